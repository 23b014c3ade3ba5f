"""The official clients, unmodified, talking to each other through the server."""

from __future__ import annotations

import asyncio
import base64
import os
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import count
from typing import Any

import pytest

from tests.fix_clients import ClientError, ClientFactory, ClientProcess, Kind
from tests.fix_database import Cluster
from tests.fix_rights import READ, WRITE, grant_rights, token_with
from tests.fix_server import Server, make_token

KINDS: list[Kind] = ["js", "js-2.39", "realtime-js", "py-realtime", "py-supabase"]
# The oldest client knows no private channels.
KINDS_WITH_PRIVATE: list[Kind] = ["js", "realtime-js", "py-realtime", "py-supabase"]
LIMIT_S = 30.0
# Of presence: how many, and how long.
SEQUENCES = 4
STEPS = 60


@pytest.fixture(scope="module")
async def rights_server(cluster: Cluster) -> AsyncIterator[Server]:
    """A server on which tokens claim their rights."""
    database = cluster.create("heads")
    grant_rights(database)
    async with aclosing(Server(database)) as server:
        yield await server.start()
    cluster.drop(database)


async def start_all(
    client: ClientFactory, server: Server, *, token: str | None = None, kinds: list[Kind] = KINDS
) -> list[ClientProcess]:
    return list(await asyncio.gather(*(client(kind, server.url, server.anon_key, token) for kind in kinds)))


async def subscribe(user: ClientProcess, topic: str, channel: str = "c", **options: Any) -> None:
    options = {"broadcast": ["*"], **options}
    if user.kind.startswith("py-"):
        # The Python clients know no wildcard.
        options["broadcast"] = ["e", "bin", "last"]
    joined = await user.do("subscribe", channel=channel, topic=topic, **options)
    assert joined["status"] == "SUBSCRIBED", user.story()


async def hear(user: ClientProcess, channel: str = "c") -> tuple[str, Any]:
    message = (await user.next("broadcast", channel=channel))["message"]
    return message["event"], message["payload"]


def no_errors(*users: ClientProcess) -> None:
    for user in users:
        assert not [event for event in user.seen if event["event"] == "client_error"], user.story()


async def test_every_client_hears_every_other_and_not_itself(rights_server: Server, client: ClientFactory) -> None:
    users = await start_all(client, rights_server)
    await asyncio.gather(*(subscribe(user, "pairs") for user in users))
    # The first one twice: had a client heard itself, that would stand before what it is to hear next.
    for number, sender in enumerate([*users, users[0]]):
        payload: dict[str, Any] = {
            "from": sender.kind,
            "text": 'héllo 😀 "\\\n',
            "values": [number, 1.5, None, True, {}],
        }
        assert (await sender.do("send", channel="c", event="e", payload=payload))["result"] == "ok"
        for receiver in users:
            if receiver is not sender:
                assert await hear(receiver) == ("e", payload)
    no_errors(*users)


async def test_gap_disturbs_no_client_that_knows_nothing_of_it(rights_server: Server, client: ClientFactory) -> None:
    """It hands on a cursor that is none, is told so, and hears what comes next."""
    users = await start_all(client, rights_server, token=token_with(READ), kinds=KINDS_WITH_PRIVATE)
    config = {"private": True, "broadcast": {"replay": {"after": "none"}}}
    await asyncio.gather(*(subscribe(user, "gap", config=config) for user in users))
    rights_server.database.execute("select realtime.send('{\"n\": 1}', 'e', 'gap')")
    for user in users:
        event, payload = await hear(user)
        assert (event, payload["n"]) == ("e", 1)
        told = [event for event in user.seen if event["event"] not in ("broadcast", "status")]
        if user.kind.startswith("py-"):
            # They log what they do not know, and drop it.
            (dropped,) = told
            assert dropped["event"] == "client_error"
            assert dropped["error"].startswith("Unrecognized message format")
            assert '"status":"gap"' in dropped["error"]
        else:
            assert [event["payload"]["status"] for event in told] == ["gap"]


@pytest.mark.parametrize("content", [b"\xde\xad\xbe\xef", b"", bytes(range(256)) * 100, b"[" * 5000])
async def test_bytes_between_javascript_clients_and_not_to_others(
    rights_server: Server, client: ClientFactory, content: bytes
) -> None:
    sender, receiver, old, python = await asyncio.gather(
        *(client(kind, rights_server.url, rights_server.anon_key) for kind in ("js", "js", "js-2.39", "py-realtime"))
    )
    users = (sender, receiver, old, python)
    await asyncio.gather(*(subscribe(user, "bytes") for user in users))
    encoded = base64.b64encode(content).decode()
    await sender.do("send", channel="c", event="bin", base64=encoded)
    await sender.do("send", channel="c", event="last", payload={})
    assert await hear(receiver) == ("bin", {"base64": encoded})
    for user in users[1:]:
        # Clients of version 1.0.0 cannot carry bytes; they hear what comes after them.
        assert await hear(user) == ("last", {})
    no_errors(*users)


async def test_ack_and_self(rights_server: Server, client: ClientFactory) -> None:
    users = await start_all(client, rights_server)

    async def alone(user: ClientProcess) -> None:
        await subscribe(user, f"self:{user.kind}", config={"broadcast": {"self": True, "ack": True}})
        assert (await user.do("send", channel="c", event="e", payload={"n": 1}))["result"] == "ok"
        assert await hear(user) == ("e", {"n": 1})

    await asyncio.gather(*map(alone, users))
    no_errors(*users)


async def test_private_channel_for_who_may_and_who_may_not(rights_server: Server, client: ClientFactory) -> None:
    writers = await start_all(client, rights_server, token=token_with(READ, WRITE), kinds=KINDS_WITH_PRIVATE)
    readers = await start_all(client, rights_server, token=token_with(READ), kinds=KINDS_WITH_PRIVATE)
    strangers = await start_all(client, rights_server, token=token_with(), kinds=KINDS_WITH_PRIVATE)
    private = {"private": True, "broadcast": {"ack": True}}
    await asyncio.gather(*(subscribe(user, "private", config=private) for user in (*writers, *readers)))
    for stranger in strangers:
        refused = await stranger.do("subscribe", channel="c", topic="private", config=private)
        assert refused["status"] == "CHANNEL_ERROR"
        assert "Unauthorized: You do not have permissions to read from this Channel topic: private" in refused["error"]
    for reader in readers:
        # An answer instead of ten seconds of silence.
        assert (await reader.do("send", channel="c", event="e", payload={"by": "reader"}))["result"] == "error"
    for writer in writers:
        assert (await writer.do("send", channel="c", event="e", payload={"by": writer.kind}))["result"] == "ok"
        for user in (*writers, *readers):
            if user is not writer:
                assert await hear(user) == ("e", {"by": writer.kind})
    for stranger in strangers:
        await stranger.nothing("broadcast", within_s=0)
    no_errors(*writers, *readers, *strangers)


async def test_new_token_that_keeps_the_right_and_one_that_loses_it(
    rights_server: Server, client: ClientFactory
) -> None:
    users = await start_all(client, rights_server, token=token_with(READ, sub="before"), kinds=KINDS_WITH_PRIVATE)
    await asyncio.gather(*(subscribe(user, "refresh", config={"private": True}) for user in users))

    def say(number: int) -> None:
        rights_server.database.execute("select realtime.send(jsonb_build_object('n', %s::int), 'e', 'refresh')", number)

    # The Python clients wait in vain for an answer to a token, which there is none of; so nobody waits for them.
    kept = [asyncio.create_task(user.do("set_auth", token=token_with(READ, sub="after"))) for user in users]
    say(1)
    for user in users:
        assert (await hear(user))[1]["n"] == 1
        await user.nothing("status", channel="c", within_s=0)
    lost = [asyncio.create_task(user.do("set_auth", token=token_with(WRITE, sub="without"))) for user in users]
    for user in users:
        while (await user.next("status", channel="c", timeout_s=20))["status"] != "CLOSED":
            pass
    say(2)
    for user in users:
        await user.nothing("broadcast", within_s=0.1)
    await asyncio.gather(*kept, *lost)
    no_errors(*users)


async def test_restart_of_the_server_is_survived_by_every_client(server: Server, client: ClientFactory) -> None:
    users = await start_all(client, server)
    await asyncio.gather(
        *(subscribe(user, "restart", config={"presence": {"key": user.kind}}, presence=True) for user in users)
    )
    await asyncio.gather(*(user.do("track", channel="c", payload={"n": 1}) for user in users))
    assert await server.stop() == 0
    await server.start()
    for user in users:
        while (await user.next("status", channel="c", timeout_s=30))["status"] != "SUBSCRIBED":
            pass
    for sender in users:
        assert (await sender.do("send", channel="c", event="e", payload={"from": sender.kind}))["result"] == "ok"
        for receiver in users:
            if receiver is not sender:
                assert await hear(receiver) == ("e", {"from": sender.kind})
    no_errors(*users)


def shown(state: dict[str, list[dict[str, Any]]]) -> dict[str, list[int]]:
    return {key: sorted(meta["n"] for meta in metas) for key, metas in state.items()}


class Play:
    """Players that come, track, change, get new tokens, let them expire, and leave; observers that only watch. `truth` is who is there."""

    def __init__(self, topic: str, chance: random.Random, players: list[ClientProcess], observers: list[ClientProcess]):
        self.topic, self.chance, self.players, self.observers = topic, chance, players, observers
        self.truth: dict[ClientProcess, int] = {}
        self.keys: dict[ClientProcess, str] = {}
        self._numbers = count(1)
        self._waiting: set[asyncio.Task[Any]] = set()

    async def begin(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for user in self.observers:
                tasks.create_task(subscribe(user, self.topic, config={"presence": {"key": "o"}}, presence=True))
            for user in self.players:
                tasks.create_task(self.join(user))

    async def end(self) -> None:
        await asyncio.gather(*map(self.leave, [*self.observers, *self.keys]), *self._waiting)

    async def step(self) -> None:
        user = self.chance.choice(self.players)
        if user not in self.keys:
            await self.join(user)
            return
        match self.chance.choices(
            ["track", "again", "untrack", "leave", "another key", "new token"], [6, 2, 2, 2, 2, 2]
        )[0]:
            case "track":
                self.truth[user] = next(self._numbers)
                await self._track(user)
            case "again" if user in self.truth:
                await self._track(user)
            case "untrack":
                self.truth.pop(user, None)
                assert (await user.do("untrack", channel="c"))["result"] == "ok"
            case "leave":
                await self.leave(user)
            case "another key":
                await self.leave(user)
                await self.join(user)
            case "new token":
                self._give(user, make_token(sub=secrets.token_hex(4)))

    async def join(self, user: ClientProcess) -> None:
        # Keys are shared: a key has a meta for each channel that tracks under it.
        key = self.chance.choice(["one", "two", "drei", "četiri: /?#"])
        await subscribe(user, self.topic, config={"presence": {"key": key, "enabled": True}}, presence=True)
        self.keys[user] = key

    async def leave(self, user: ClientProcess) -> None:
        self.gone(user)
        await user.do("unsubscribe", channel="c")
        await self._is_closed(user)

    async def expire(self, users: list[ClientProcess]) -> None:
        for user in users:
            self._give(user, make_token(expires_in=2))
        for user in users:
            await self._is_closed(user)
            self.gone(user)
            self._give(user, make_token())

    def gone(self, user: ClientProcess) -> None:
        self.truth.pop(user, None)
        self.keys.pop(user, None)

    async def all_agree(self) -> None:
        await asyncio.gather(*map(self._agrees, [*self.observers, *self.keys]))

    async def _is_closed(self, user: ClientProcess) -> None:
        while (await user.next("status", channel="c", timeout_s=20))["status"] != "CLOSED":
            pass

    async def _track(self, user: ClientProcess) -> None:
        assert (await user.do("track", channel="c", payload={"n": self.truth[user]}))["result"] == "ok"

    def _give(self, user: ClientProcess, token: str) -> None:
        # The Python clients wait in vain for an answer to a token, which there is none of; so nobody waits for them.
        self._waiting.add(asyncio.create_task(user.do("set_auth", token=token)))

    async def _agrees(self, user: ClientProcess) -> None:
        expected: dict[str, list[int]] = {}
        for player, number in self.truth.items():
            expected.setdefault(self.keys[player], []).append(number)
        expected = {key: sorted(numbers) for key, numbers in expected.items()}
        state: Any = None
        try:
            async with asyncio.timeout(LIMIT_S):
                while (state := shown((await user.do("presence_state", channel="c"))["state"])) != expected:
                    await user.next("presence", channel="c")
        except (TimeoutError, ClientError):
            raise AssertionError(f"{user.kind} shows {state}, expected {expected}{user.story()}") from None


async def test_presence_of_every_client_is_the_truth_after_any_sequence(
    rights_server: Server, client: ClientFactory
) -> None:
    seed = int(os.environ.get("REALTIME_TEST_SEED") or secrets.randbits(32))
    print(f"REALTIME_TEST_SEED={seed}")
    observers = await start_all(client, rights_server)
    players = await start_all(client, rights_server, token=make_token())
    for number in range(SEQUENCES):
        play = Play(f"presence:{number}", random.Random(seed + number), players, observers)
        await play.begin()
        for _ in range(STEPS):
            await play.step()
            if play.chance.random() < 0.1:
                await play.all_agree()
        await play.all_agree()
        await play.expire(play.chance.sample(list(play.keys), min(2, len(play.keys))))
        await play.all_agree()
        if number < SEQUENCES - 1:
            await play.end()
    # Sockets that are gone without a word.
    for user in players[:2]:
        play.gone(user)
        await user.close()
    await play.all_agree()
    no_errors(*observers, *players)
