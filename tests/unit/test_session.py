"""One conversation: what it keeps, for how long, and what it says when others fail."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from realtime_server.authorization import EVERYTHING, Policy
from realtime_server.errors import DatabaseUnavailable, QueryCanceled, RealtimeError
from realtime_server.history import Stored
from realtime_server.hub import Room
from realtime_server.protocol.frames import Broadcast
from tests.fix_session import LIMITS, Talk

ERRORS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


def stored(number: int) -> Stored:
    return Stored(Broadcast("realtime:room", "e", b'{"n":%d}' % number, id=str(uuid4()), replayed=True), number)


async def test_what_was_replayed_is_not_kept(talk: Talk) -> None:
    talk.past.stored = tuple(map(stored, range(3)))
    ids = {stored.message.id for stored in talk.past.stored}
    await talk.join("room", private=True, broadcast={"replay": {"since": 0}})
    assert [(await talk.hear())[4]["payload"]["n"] for _ in range(3)] == [0, 1, 2]
    talk.past.stored = ()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, Stored) and thing.message.id in ids]


async def test_what_was_held_for_a_channel_that_is_gone_makes_room_for_others(talk: Talk) -> None:
    await talk.join("room", private=True)
    answer: asyncio.Future[Policy] = asyncio.Future()
    talk.policy = lambda: answer
    talk.session.revalidate(None, None)
    talk.services.publish(Room("realtime:room", True), Broadcast("realtime:room", "e", b'"%b"' % (b"x" * 10_000)))
    assert talk.session.shelf.used_bytes > 10_000
    talk.session.close()
    assert talk.session.shelf.used_bytes == 0
    answer.set_result(EVERYTHING)


@pytest.mark.parametrize("error", [DatabaseUnavailable, QueryCanceled])
@pytest.mark.parametrize("asked_by", ["sql", "new token"])
async def test_rights_that_cannot_be_found_out_end_the_channel_so_that_clients_join_again(
    talk: Talk, error: type[RealtimeError], asked_by: str
) -> None:
    async def fail() -> Policy:
        raise error

    await talk.join("room", private=True)
    room = Room("realtime:room", True)
    assert room in talk.services.broadcasts
    talk.policy = fail
    if asked_by == "sql":
        talk.session.revalidate("room", None)
    else:
        talk.say("room", "access_token", {"access_token": "other"})
    assert await talk.hear() == ["1", "1", "realtime:room", "phx_error", {"reason": "channel_crash"}]
    assert talk.said == []
    # Nothing is sent to whom nobody could answer for.
    assert room not in talk.services.broadcasts


async def test_warning_is_not_skipped_when_another_channel_is_joined_in_its_moment(talk: Talk) -> None:
    talk.expires_at = time.time() + 60.02
    await talk.join("first")
    # The timer is set a little later than the moment itself.
    await asyncio.sleep(0.03)
    talk.expires_at += 3600
    await talk.join("second")
    topic, event, payload = (await talk.hear())[2:]
    assert (topic, event, payload["message"]) == ("realtime:first", "system", "Token expires in 60 seconds")


async def test_joins_that_had_no_time_to_begin_leave_nothing_behind() -> None:
    """A coroutine that is never awaited warns, and warnings are errors."""

    class Gone(Exception):
        pass

    with suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as tasks:
            talk = Talk(tasks)
            for number in range(2 * LIMITS.max_channels):
                talk.say(f"room {number}", "phx_join", {"config": {}})
            talk.session.close()
            raise Gone
    gc.collect()
    assert not talk.services.users
    assert len(talk.services.broadcasts) == 0


@pytest.mark.parametrize(
    ("event", "payload", "may", "response", "code"),
    [
        ("broadcast", {}, False, {"reason": "unauthorized"}, "unauthorized"),
        ("broadcast", [], True, {"reason": "payload must be an object"}, "payload must be an object"),
        ("broadcast", {"x": "y" * 10_000}, True, {"reason": "payload_size_exceeded"}, "payload_size_exceeded"),
        ("presence", {"event": "track"}, False, {}, "UnableToTrackPresence"),
        ("presence", {"event": "dance"}, True, {}, "UnknownPresenceEvent"),
        ("presence", {"event": 5}, True, {}, "UnknownPresenceEvent"),
        ("presence", [], True, {}, "UnknownPresenceEvent"),
        (
            "presence",
            {"event": "track", "payload": 5},
            True,
            {"reason": "Presence track payload must be a map"},
            "Presence track payload must be a map",
        ),
    ],
)
async def test_push_that_is_refused_is_answered_with_an_error_of_the_table(
    talk: Talk, event: str, payload: Any, may: bool, response: dict[str, str], code: str
) -> None:
    async def policy() -> Policy:
        return replace(EVERYTHING, can_write_broadcast=may, can_write_presence=may)

    talk.policy = policy
    await talk.join("room", private=True, broadcast={"ack": True})
    talk.say("room", event, payload)
    assert await talk.hear() == [
        "1",
        "9",
        "realtime:room",
        "phx_reply",
        {"status": "error", "response": response},
    ]
    assert f"\n| `{code}` |" in ERRORS_PAGE.read_text()
