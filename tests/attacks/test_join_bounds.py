"""A join costs a bounded amount of memory and time, and what was asked for is not kept once it is answered."""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import pytest

from realtime_server.errors import InvalidBinding, PayloadTooLarge
from realtime_server.protocol import bindings, filters, join
from realtime_server.session import Channel
from tests.fix_server import Server
from tests.fix_session import Talk
from tests.fix_wire import WireFactory

TOO_MANY = "RealtimeDisabledForConfiguration: A channel has at most 100 bindings of postgres_changes"


def payload_with(**config: Any) -> bytes:
    return json.dumps({"config": config}).encode()


def allocated_by_parsing(text: bytes) -> int:
    """How many blocks of memory parsing the payload keeps at its peak, as its answer or on the way to its error."""
    gc.collect()
    gc.disable()
    peak = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal peak
        peak = max(peak, sys.getallocatedblocks())

    before = sys.getallocatedblocks()
    sys.setprofile(profile)
    try:
        join.loads(text)
    except (InvalidBinding, PayloadTooLarge):
        pass
    finally:
        sys.setprofile(None)
        gc.enable()
    return peak - before


@pytest.mark.parametrize(
    "text",
    [
        payload_with(postgres_changes=[{}] * 60_000),
        payload_with(postgres_changes=[{}] * 20_000),
        payload_with(broadcast={"replay": [{}] * 60_000}),
        payload_with(presence=[{"": 0.5}] * 20_000),
        payload_with(unknown=[{}] * 60_000),
        json.dumps({"access_token": [{}] * 60_000, "config": {}}).encode(),
        json.dumps({"config": [{}] * 60_000}).encode(),
    ],
)
def test_entries_beyond_the_bound_are_not_parsed(text: bytes) -> None:
    assert len(text) < 256_000
    assert allocated_by_parsing(text) < 25_000


@pytest.mark.parametrize("filter", ["c=eq." + "(" * 32_763, "c=eq." + "()" * 16_381, 'c=eq.("' * 4_681])
def test_all_filters_of_a_channel_are_bounded_before_they_are_parsed(
    filter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    original = filters.parse

    def parse(text: str) -> Any:
        parsed.append(len(text))
        return original(text)

    monkeypatch.setattr(filters, "parse", parse)
    element = json.dumps({"table": "t", "filter": filter}).encode()
    assert len(bindings.parse_all([element])) == 1
    with pytest.raises(InvalidBinding, match="All filters of a channel have at most 32768 characters"):
        bindings.parse_all([element, b'{"table":"t","filter":"c=eq.1234567"}'])
    assert sum(parsed) <= 2 * filters.MAX_CHARS


def test_all_conditions_and_columns_of_a_channel_are_bounded() -> None:
    conditions = json.dumps({"table": "t", "filter": ",".join(["a=eq.1"] * 100)}).encode()
    columns = json.dumps({"table": "t", "select": ["a"] * 1_500}).encode()
    assert len(bindings.parse_all([columns, *[conditions] * 5])) == 6
    with pytest.raises(InvalidBinding, match="All filters of a channel have at most 500 conditions"):
        bindings.parse_all([*[conditions] * 5, b'{"table":"t","filter":"a=eq.1"}'])
    with pytest.raises(InvalidBinding, match="at most 2000 conditions and selected columns"):
        bindings.parse_all([columns, *[conditions] * 5, b'{"table":"t","select":["a"]}'])


async def test_join_with_too_many_bindings_is_refused(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    for count in (101, 20_000, 80_000):
        answer = await socket.join("many", {"postgres_changes": [{}] * count})
        sentence = TOO_MANY if count == 101 else answer["response"]["reason"]
        assert answer == {"status": "error", "response": {"reason": sentence}}
    large = {"table": "t", "filter": "c=eq." + "x" * 30_000}
    answer = await socket.join("many", {"postgres_changes": [large] * 3})
    sentence = "The bindings of postgres_changes of a channel have at most 65536 bytes"
    assert answer["response"]["reason"] == f"RealtimeDisabledForConfiguration: {sentence}"
    assert (await socket.join("many"))["status"] == "ok"


async def test_echo_has_what_the_client_sent(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    sent = [{"event": "*", "schema": "nowhere", "table": "t", "id": "mine", "more": [1.5, None, "ü"]}, 5, {}]
    answer = await socket.join("echo", {"postgres_changes": sent})
    assert answer["response"]["postgres_changes"] == [{**sent[0], "id": 1}, {"id": 2}]  # type: ignore[dict-item]


async def test_answered_join_is_not_kept(talk: Talk) -> None:
    await talk.join("small", token="t" * 1_000, broadcast={"replay": None, "more": "x" * 10_000})
    channel: Channel = next(iter(talk.session._channels.values()))
    assert (channel.config.bindings, channel.config.replay, channel.config.problems) == ((), {}, ())
    assert (channel.config.access_token, channel.config.user_token) == (None, None)
    assert channel.token == "t" * 1_000


async def test_frame_with_a_long_ref_is_dropped(shared_server: Server, wire: WireFactory) -> None:
    """A channel keeps its join ref."""
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    for ref, join_ref in (("r" * 256, "1"), ("1", "r" * 256)):
        await socket.say("realtime:ref", "phx_join", {"config": {}}, ref=ref, join_ref=join_ref)
    assert await socket.is_alive()
    await socket.say("realtime:ref", "phx_join", {"config": {}}, ref="r" * 255, join_ref="r" * 255)
    assert (await socket.hear())[:2] == ["r" * 255, "r" * 255]
