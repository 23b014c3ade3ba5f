"""Runs coroutines until the first failure, and cancels tasks until all have ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable
from typing import Any, Final

CANCEL_S: Final = 2.0


async def run_until_first_failure(*works: Coroutine[Any, Any, None]) -> None:
    """Run coroutines until one fails or this is cancelled, then cancel all. Raises the first one's exception."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await cancel_and_wait(tasks)
    for task in done:
        task.result()


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks repeatedly until all have ended. Once is not enough: a task that waits for an unresponsive database first sends a
    cancel request, and waits for that too."""
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        # Cancelling this coroutine as well has the same purpose.
        with contextlib.suppress(asyncio.CancelledError):
            _, running = await asyncio.wait(running, timeout=CANCEL_S)
        running = {task for task in running if not task.done()}
