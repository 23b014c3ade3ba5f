"""Coroutines that live and die together."""

from __future__ import annotations

import asyncio

import pytest

from realtime_server.tasks import cancel_and_wait, run_until_first_failure


async def test_one_that_fails_ends_the_others_and_is_told() -> None:
    ended = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("waits")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await run_until_first_failure(waits(), fails())
    assert ended == ["waits"]


async def test_cancelling_ends_also_those_that_have_to_be_cancelled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realtime_server.tasks.CANCEL_S", 0.01)
    cancelled = []

    async def stubborn(name: str) -> None:
        for _ in range(2):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(name)

    task = asyncio.create_task(run_until_first_failure(stubborn("a"), stubborn("b")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(cancelled) == ["a", "a", "b", "b"]


async def test_end_goes_on_though_it_is_cancelled_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realtime_server.tasks.CANCEL_S", 0.01)

    async def stubborn() -> None:
        for _ in range(3):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue

    victim = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    ending = asyncio.create_task(cancel_and_wait([victim]))
    await asyncio.sleep(0)
    ending.cancel()
    await asyncio.wait([ending])
    assert victim.done()
