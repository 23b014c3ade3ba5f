"""One conversation: what it keeps, for how long, and what it says when others fail."""

from __future__ import annotations

import asyncio
import gc
from uuid import uuid4

from realtime_server.authorization import EVERYTHING, Policy
from realtime_server.history import Stored
from realtime_server.hub import Room
from realtime_server.protocol.frames import Broadcast
from tests.fix_session import Talk


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
