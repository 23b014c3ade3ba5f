"""How often verifying tokens and asking policies can be caused by one socket, and that a channel ends once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import pytest

from realtime_server import session as module
from realtime_server.authorization import EVERYTHING, Policy
from realtime_server.claims import Claims
from realtime_server.session import Channel
from tests.fix_session import LIMITS, Talk


@pytest.fixture
def asked(talk: Talk) -> list[str]:
    """What the session asked for: `verify` and the token, `policy`."""
    calls: list[str] = []
    numbers: Iterator[int] = count(1)

    async def verify(token: str) -> Claims:
        calls.append(f"verify {token}")
        claims = {
            "role": "authenticated",
            "sub": token.partition("-")[0],
            "exp": time.time() + 3600,
            "jti": next(numbers),
        }
        return Claims("authenticated", claims["sub"], claims["exp"], json.dumps(claims))  # type: ignore[arg-type]

    async def policy() -> Policy:
        calls.append("policy")
        return EVERYTHING

    talk.session.services = replace(talk.services, verify=verify)
    talk.policy = policy
    return calls


def limit_refreshes(talk: Talk, per_second: float) -> None:
    limits = replace(LIMITS, max_token_refreshes_per_second=per_second, max_channels=2)
    services = replace(talk.session.services, limits=limits)
    talk.session.__init__(  # type: ignore[misc]
        talk.session.connection, services, api_key=talk.session._api_key, headers={}, tasks=talk.session._tasks
    )


def channel_of(talk: Talk, topic: str) -> Channel:
    return talk.session._channels[f"realtime:{topic}"]


async def until_token(talk: Talk, topic: str, token: str) -> None:
    async with asyncio.timeout(20):
        while channel_of(talk, topic).token != token:
            await asyncio.sleep(0.001)


async def test_new_token_of_the_same_identity_asks_no_policy(
    talk: Talk, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await talk.join("room", token="ann-0", private=True)
    asked.clear()
    for token in ("ann-1", "ann-0", "ann-1"):
        before = channel_of(talk, "room").claims.expires_at
        talk.say("room", "access_token", {"access_token": token})
        await until_token(talk, "room", token)
        assert channel_of(talk, "room").claims.expires_at > before, "the later end is in effect"
    assert asked == ["verify ann-1", "verify ann-0", "verify ann-1"]
    # Rights are looked up with a new token all the same, unless that was done a moment ago.
    monkeypatch.setattr(module, "POLICY_REUSE_S", 0.0)
    talk.say("room", "access_token", {"access_token": "ann-2"})
    await until_token(talk, "room", "ann-2")
    monkeypatch.undo()
    talk.say("room", "access_token", {"access_token": "bob-0"})
    await until_token(talk, "room", "bob-0")
    assert asked[3:] == ["verify ann-2", "policy", "verify bob-0", "policy"]


async def test_of_many_tokens_only_the_newest_of_each_channel_is_pending(talk: Talk, asked: list[str]) -> None:
    limit_refreshes(talk, 20.0)
    for topic in ("a", "b"):
        await talk.join(topic, token="ann-0", private=True)
    asked.clear()
    for number in range(500):
        for topic in ("a", "b"):
            talk.say(topic, "access_token", {"access_token": f"ann-{topic}{number}"})
    assert all(len(pending) <= 1 for pending in talk.session._queues.values())
    for topic in ("a", "b"):
        await until_token(talk, topic, f"ann-{topic}499")
    assert len(asked) <= 4, asked


async def test_bucket_of_refreshes_delays_and_loses_no_token(talk: Talk, asked: list[str]) -> None:
    limit_refreshes(talk, 50.0)
    await talk.join("a", token="ann-0", private=True)
    begin = time.monotonic()
    for number in range(1, 15):
        talk.say("a", "access_token", {"access_token": f"ann-{number}"})
        await until_token(talk, "a", f"ann-{number}")
    # Four at once, then fifty a second.
    assert time.monotonic() - begin >= 10 / 50 - 0.01


async def test_token_for_the_next_join_does_not_replace_one_for_the_former(talk: Talk, asked: list[str]) -> None:
    answer = asyncio.Event()

    async def policy() -> Policy:
        await answer.wait()
        return EVERYTHING

    talk.policy = policy
    talk.say("room", "phx_join", {"config": {"private": True}, "access_token": "ann-0"}, ref="1")
    talk.say("room", "access_token", {"access_token": "ann-1"})
    talk.say("room", "phx_leave", {})
    talk.say("room", "phx_join", {"config": {"private": True}, "access_token": "bob-0"}, ref="2")
    talk.say("room", "access_token", {"access_token": "bob-1"})
    answer.set()
    while "verify bob-1" not in asked:
        await asyncio.sleep(0.001)
    assert asked == ["verify ann-0", "verify ann-1", "verify bob-0", "verify bob-1"]


async def test_revalidations_during_a_join_are_merged(talk: Talk) -> None:
    asked, answer = [0], asyncio.Event()

    async def policy() -> Policy:
        asked[0] += 1
        await answer.wait()
        return EVERYTHING

    talk.policy = policy
    joining = asyncio.create_task(talk.join("room", private=True))
    while not asked[0]:
        await asyncio.sleep(0.001)
    for number in range(1_000):
        talk.session.revalidate(None, f"user-{number}")
    assert [len(pending) for pending in talk.session._queues.values()] == [1]
    answer.set()
    await joining
    while talk.session._queues:
        await asyncio.sleep(0.001)
    assert asked[0] == 2


async def test_channel_that_ends_twice_is_closed_once(talk: Talk) -> None:
    await talk.join("room")
    channel = channel_of(talk, "room")
    for reason in ("first", "second"):
        talk.session.shut_down(channel, reason)
    assert [(await talk.hear())[3] for _ in range(2)] == ["system", "phx_close"]
    assert talk.said == []
    await talk.join("room")
    talk.session.shut_down(channel, "late")
    assert talk.said == []
    assert channel_of(talk, "room") is not channel
