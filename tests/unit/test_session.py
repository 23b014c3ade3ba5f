"""One conversation: what it keeps, for how long, and what it says when others fail."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest

from realtime_server.authorization import EVERYTHING, Policy
from realtime_server.broadcast_subscription import MAX_BUFFERED_MESSAGES
from realtime_server.changes.feed import Feed
from realtime_server.changes.subscriptions import SUBSCRIBED, TIMEOUTS, Registration
from realtime_server.cursor import Snapshot, StreamPosition
from realtime_server.errors import DatabaseUnavailable, QueryCanceled, RealtimeError
from realtime_server.history import Page, Stored
from realtime_server.hub import Room
from realtime_server.limits import BUCKET_S, Rate
from realtime_server.protocol.frames import Broadcast, ForwardedBroadcast, Frame
from tests.fix_session import LIMITS, Talk

ERRORS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


def stored(number: int) -> Stored:
    payload = b'{"n":%d}' % number
    return Stored(Broadcast("realtime:room", "e", payload, id=str(uuid4()), cursor="behind", replayed=True), number)


async def test_what_was_replayed_is_not_kept(talk: Talk) -> None:
    talk.past.stored = tuple(map(stored, range(3)))
    ids = {stored.message.id for stored in talk.past.stored}
    await talk.join("room", private=True, broadcast={"replay": {"since": 0}})
    assert [(await talk.hear())[4]["payload"]["n"] for _ in range(3)] == [0, 1, 2]
    talk.past.stored = ()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, Stored) and thing.message.id in ids]


async def test_what_was_replayed_by_time_is_not_sent_again_when_more_comes_than_is_held(talk: Talk) -> None:
    talk.session.services = replace(
        talk.services, position=lambda: StreamPosition("life", Snapshot.parse("5:5:"), None, 5)
    )
    room, both = Room("realtime:room", True), [stored(5), stored(6)]
    is_reading, is_read = asyncio.Event(), asyncio.Event()

    async def newest(*_: object) -> list[Stored]:
        is_reading.set()
        await is_read.wait()
        return both[:1]

    async def after(*_: object) -> Page:
        return Page(both, "behind", True)

    talk.past.__dict__.update(newest=newest, after=after)
    joining = asyncio.create_task(talk.join("room", private=True, broadcast={"replay": {"since": 0}}))
    await is_reading.wait()
    for message, _ in [*both, *map(stored, range(MAX_BUFFERED_MESSAGES))]:
        talk.services.publish(room, message)
    is_read.set()
    await joining
    assert [(await talk.hear())[4]["payload"]["n"] for _ in range(2)] == [5, 6]
    await asyncio.sleep(0.05)
    assert talk.said == []


@pytest.mark.parametrize("is_lost", [True, False])
async def test_right_that_is_lost_while_the_past_is_read_lets_nothing_through(talk: Talk, is_lost: bool) -> None:
    is_reading, is_read = asyncio.Event(), asyncio.Event()

    async def newest(*_: object) -> list[Stored]:
        is_reading.set()
        await is_read.wait()
        return [stored(1)]

    async def asked_again() -> Policy:
        return Policy() if is_lost else EVERYTHING

    talk.past.__dict__.update(newest=newest)
    joining = asyncio.create_task(talk.join("room", private=True, broadcast={"replay": {"since": 0}}))
    await is_reading.wait()
    talk.policy = asked_again
    # Somebody else is asked again, too.
    for subject in ("somebody", None):
        talk.session.revalidate("room", subject)
    talk.services.publish(Room("realtime:room", True), stored(2).message)
    is_read.set()
    await joining
    if is_lost:
        assert [(await talk.hear())[3] for _ in range(2)] == ["system", "phx_close"]
    else:
        assert [(await talk.hear())[4]["payload"]["n"] for _ in range(2)] == [1, 2]
        talk.services.publish(Room("realtime:room", True), stored(3).message)
        assert (await talk.hear())[4]["payload"]["n"] == 3
    assert talk.said == []


async def test_word_of_somebody_else_during_a_join_holds_nothing_back(talk: Talk) -> None:
    is_reading, is_read = asyncio.Event(), asyncio.Event()

    async def newest(*_: object) -> list[Stored]:
        is_reading.set()
        await is_read.wait()
        return [stored(1)]

    talk.past.__dict__.update(newest=newest)
    joining = asyncio.create_task(talk.join("room", private=True, broadcast={"replay": {"since": 0}}))
    await is_reading.wait()
    talk.session.revalidate("room", "somebody")
    is_read.set()
    await joining
    assert (await talk.hear())[4]["payload"]["n"] == 1
    talk.services.publish(Room("realtime:room", True), stored(2).message)
    assert (await talk.hear())[4]["payload"]["n"] == 2


@pytest.mark.parametrize("is_lost", [True, False])
@pytest.mark.parametrize("when", ["joined", "joining"])
async def test_who_comes_and_goes_is_not_told_to_whom_policies_have_not_answered_for(
    talk: Talk, when: str, is_lost: bool
) -> None:
    room, answer = Room("realtime:room", True), asyncio.Event()
    is_asked = asyncio.Event()

    async def ask() -> Policy:
        is_asked.set()
        await answer.wait()
        return EVERYTHING

    async def ask_again() -> Policy:
        await answer.wait()
        return Policy() if is_lost else EVERYTHING

    join = partial(talk.join, "room", private=True, presence={"enabled": True})
    if when == "joined":
        await join()
        assert (await talk.hear())[3:] == ["presence_state", {}]
        talk.policy = ask_again
        talk.session.revalidate("room", None)
    else:
        talk.policy = ask
        joining = asyncio.create_task(join())
        await is_asked.wait()
        talk.session.revalidate("room", None)
        talk.policy = ask_again
    talk.services.announce(room, talk.services.presence.track(room, "other", "other", b'{"n":1}', "ref"))
    await asyncio.sleep(0.01)
    assert talk.said == []
    answer.set()
    if when == "joining":
        await joining
    heard = [await talk.hear()]
    if is_lost:
        heard.append(await talk.hear())
        assert [frame[3] for frame in heard] == ["system", "phx_close"]
    else:
        assert heard[0][3:] == ["presence_state", {"other": {"metas": [{"n": 1, "phx_ref": "ref"}]}}]
        talk.services.announce(room, talk.services.presence.untrack(room, "other"))
        assert (await talk.hear())[3] == "presence_diff"
    assert talk.said == []


async def test_what_was_held_for_a_channel_that_is_gone_makes_room_for_others(talk: Talk) -> None:
    await talk.join("room", private=True)
    answer: asyncio.Future[Policy] = asyncio.Future()
    talk.policy = lambda: answer
    talk.session.revalidate(None, None)
    talk.services.publish(Room("realtime:room", True), Broadcast("realtime:room", "e", b'"%b"' % (b"x" * 10_000)))
    assert talk.session.byte_budget.used_bytes > 10_000
    talk.session.close()
    assert talk.session.byte_budget.used_bytes == 0
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
    assert not talk.services.active_clients
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


class _Feed:
    """Changes that the test makes up: `registration` is the one that entered last and has not left."""

    def __init__(self) -> None:
        self.registration: Registration | None = None

    def register(self, registration: Registration) -> None:
        self.registration = registration

    async def activate(self, registration: Registration) -> None: ...

    def leave(self, registration: Registration) -> None:
        registration.is_open = False
        self.registration = None


def ask_for_changes(talk: Talk) -> _Feed:
    """Join with a reply that is to wait."""
    feed = _Feed()
    talk.session.services = talk.services = replace(talk.services, changes=cast(Feed, feed))
    config = {
        "postgres_changes": [{"event": "*", "schema": "public"}],
        "postgres_changes_options": {"wait": True},
        "presence": {"enabled": True},
    }
    talk.say("room", "phx_join", {"config": config, "access_token": "good"}, ref="1")
    return feed


async def wait_for_changes(talk: Talk) -> tuple[_Feed, Registration]:
    """The same, when it waits."""
    feed = ask_for_changes(talk)
    async with asyncio.timeout(5):
        while feed.registration is None:
            await asyncio.sleep(0.001)
    return feed, feed.registration


async def test_changes_that_come_before_the_reply_follow_it(talk: Talk) -> None:
    _, registration = await wait_for_changes(talk)
    subscriber = registration.subscriber
    subscriber.notify_status(TIMEOUTS, ok=False)
    await asyncio.sleep(0.01)
    assert talk.said == []
    subscriber.notify_status(SUBSCRIBED, ok=True)
    subscriber.changed(Frame(b'["first"]'))
    subscriber.notify_gap("gap: some")
    subscriber.changed(Frame(b'["second"]'))
    assert talk.said == []
    reply, confirmation, first, gap, second, presence = [await talk.hear() for _ in range(6)]
    assert (reply[3], reply[4]["status"]) == ("phx_reply", "ok")
    assert (confirmation[3], confirmation[4]["message"]) == ("system", SUBSCRIBED)
    assert (first, second) == (["first"], ["second"])
    assert (gap[4]["status"], gap[4]["message"]) == ("gap", "gap: some")
    assert presence[3] == "presence_state"
    # And from now on at once.
    subscriber.changed(Frame(b'["third"]'))
    subscriber.notify_status(TIMEOUTS, ok=False)
    assert [talk.said[0], talk.said[1][4]["message"]] == [["third"], TIMEOUTS]


async def test_messages_of_a_room_do_not_come_before_the_reply(talk: Talk) -> None:
    _, registration = await wait_for_changes(talk)
    room = Room("realtime:room", False)
    talk.services.publish(room, ForwardedBroadcast.parse("realtime:room", b'{"event":"early"}'))
    registration.subscriber.notify_status(SUBSCRIBED, ok=True)
    assert (await talk.hear())[3] == "phx_reply"
    talk.services.publish(room, ForwardedBroadcast.parse("realtime:room", b'{"event":"late"}'))
    assert [(await talk.hear())[3] for _ in range(2)] == ["system", "presence_state"]
    assert (await talk.hear())[3:] == ["broadcast", {"event": "late"}]
    assert talk.said == []


async def test_token_that_ends_while_the_reply_waits_refuses_the_join(talk: Talk) -> None:
    talk.expires_at = time.time() + 0.02
    feed, registration = await wait_for_changes(talk)
    await asyncio.sleep(0.05)
    registration.subscriber.notify_status(SUBSCRIBED, ok=True)
    registration.subscriber.changed(Frame(b'["secret"]'))
    reply = await talk.hear()
    assert reply[4]["status"] == "error"
    assert reply[4]["response"]["reason"].startswith("InvalidJWTToken: Token has expired")
    assert feed.registration is None
    assert talk.said == []


@pytest.mark.parametrize("when", ["joined", "joining"])
async def test_channel_that_is_shut_down_by_what_was_held_is_told_once(talk: Talk, when: str) -> None:
    room, answer, is_reading = Room("realtime:room", True), asyncio.Event(), asyncio.Event()
    events = Rate(1)
    talk.session.services = replace(talk.services, rates=replace(talk.services.rates, events=events))

    async def newest(*_: object) -> list[Stored]:
        is_reading.set()
        await answer.wait()
        return []

    async def ask() -> Policy:
        await answer.wait()
        return EVERYTHING

    talk.past.__dict__.update(newest=newest)
    replay = {"replay": {"since": 0}} if when == "joining" else {}
    joining = asyncio.create_task(talk.join("room", private=True, presence={"enabled": True}, broadcast=replay))
    if when == "joined":
        await joining
        assert (await talk.hear())[3] == "presence_state"
        talk.policy = ask
        talk.session.revalidate(None, None)
    else:
        await is_reading.wait()
    events.count(time.monotonic() - BUCKET_S, 1000)
    talk.services.announce(room, talk.services.presence.track(room, "other", "other", b"{}", "ref"))
    for number in range(3):
        talk.services.publish(room, stored(number).message)
    assert talk.said == []
    answer.set()
    await joining
    assert [(await talk.hear())[3] for _ in range(2)] == ["system", "phx_close"]
    await asyncio.sleep(0.01)
    assert talk.said == []
    assert room not in talk.services.broadcasts
    assert room not in talk.services.watchers


@pytest.mark.parametrize("what", ["policies", "past"])
async def test_token_that_ends_during_the_join_refuses_it(talk: Talk, what: str) -> None:
    async def ask() -> Policy:
        await asyncio.sleep(0.05)
        return EVERYTHING

    async def newest(*_: object) -> list[Stored]:
        talk.services.publish(room, stored(1).message)
        await asyncio.sleep(0.05)
        return [stored(2)]

    room, replay = Room("realtime:room", True), {}
    if what == "policies":
        talk.policy = ask
    else:
        talk.past.__dict__.update(newest=newest)
        replay = {"replay": {"since": 0}}
    talk.expires_at = time.time() + 0.02
    config = {"private": True, "presence": {"enabled": True}, "broadcast": replay}
    talk.say("room", "phx_join", {"config": config, "access_token": "good"}, ref="1")
    reply = await talk.hear()
    assert reply[4]["status"] == "error"
    assert reply[4]["response"]["reason"].startswith("InvalidJWTToken: Token has expired")
    assert talk.said == []
    assert room not in talk.services.broadcasts
    assert talk.session.byte_budget.used_bytes == 0


@pytest.mark.parametrize("is_buffered", [True, False])
async def test_who_leaves_before_the_reply_does_not_have_to_wait(talk: Talk, is_buffered: bool) -> None:
    # Or it has not even begun to wait.
    feed = (await wait_for_changes(talk))[0] if is_buffered else ask_for_changes(talk)
    talk.say("room", "phx_leave", {})
    answers = [(await talk.hear())[3] for _ in range(4)]
    assert answers == ["phx_reply", "presence_state", "phx_reply", "phx_close"]
    assert feed.registration is None
    assert not talk.session.has_channels


async def test_session_that_ends_while_the_reply_waits_leaves_nothing_behind() -> None:
    class Gone(Exception):
        pass

    with suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as tasks:
            talk = Talk(tasks)
            feed, _ = await wait_for_changes(talk)
            talk.session.close()
            raise Gone
    assert feed.registration is None
    assert not talk.services.active_clients
    assert talk.said == []
