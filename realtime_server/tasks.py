"""Several coroutines that live and die together, and an end that is certain."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable
from typing import Any, Final

CANCEL_S: Final = 2.0


async def run_until_first_failure(*works: Coroutine[Any, Any, None]) -> None:
    """Run them until one fails or this is cancelled; then end all. Raises what the first one raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await end(tasks)
    for task in done:
        task.result()


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel them again and again until they have ended: one that waits for a database which does not answer first asks it to cancel,
    and waits for that too."""
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        # Whoever cancels this too wants the same.
        with contextlib.suppress(asyncio.CancelledError):
            _, running = await asyncio.wait(running, timeout=CANCEL_S)
        running = {task for task in running if not task.done()}
