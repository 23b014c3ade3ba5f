"""What clients do wrong fills the log with a bounded number of lines of a bounded length."""

from __future__ import annotations

import json
import logging

import pytest
import structlog

from realtime_server.logs import BURST_S, MAX_FIELD_CHARS, ClientLines
from tests.fix_server import ServerFactory
from tests.fix_wire import WireFactory

EVENT = {"event": "refused", "topic": "t"}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_over_the_rate_are_counted_and_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("realtime_server.logs.log.warning", told.append, raising=False)
    clock = Clock()
    limit = ClientLines(5, clock)
    session, relay = logging.getLogger("realtime_server.session"), logging.getLogger("realtime_server.relay")

    def written(logger: logging.Logger, method: str, times: int) -> int:
        lines = 0
        for _ in range(times):
            try:
                limit(logger, method, dict(EVENT))
            except structlog.DropEvent:
                continue
            lines += 1
        return lines

    assert written(session, "info", 1_000) == 5 * BURST_S
    assert written(session, "warning", 10) == 0
    assert written(session, "error", 10) == 10
    assert written(relay, "info", 1_000) == 1_000
    assert told == []
    clock.now = 2.0
    assert written(session, "info", 1_000) == 10
    assert told == ["960 more lines about clients were suppressed"]
    clock.now = 1_000.0
    assert written(session, "info", 1) == 1
    assert told[1:] == ["990 more lines about clients were suppressed"]


def test_zero_suppresses_nothing() -> None:
    limit = ClientLines(0, Clock())
    logger = logging.getLogger("realtime_server.endpoints.stream")
    assert all(limit(logger, "info", dict(EVENT)) == EVENT for _ in range(10_000))


async def test_flood_of_refused_messages_writes_little(start_server: ServerFactory, wire: WireFactory) -> None:
    server = await start_server(max_client_log_lines_per_second="1", max_messages_per_second="0")
    socket = await wire(server.websocket_url, server.anon_key)
    topic = "realtime:" + "t" * 990
    refused = json.dumps([None, "1", topic, "broadcast", {}])
    for _ in range(100):
        for _ in range(20):
            await socket.socket.send(refused)
        await socket.socket.send(f'["1","1","{topic}","broadcast",nonsense')
        for _ in range(20):
            assert (await socket.hear())[4]["response"] == {"reason": "unmatched topic"}
    assert await socket.is_alive()
    await socket.join("unknown")
    await socket.say("realtime:unknown", "e" * 100_000, {})
    assert await socket.is_alive()
    await server.stop()
    lines = [line for line in server.log.splitlines() if "refused" in line or "dropped" in line or "unknown" in line]
    assert 5 <= len(lines) < 400
    assert max(map(len, lines)) < 4 * MAX_FIELD_CHARS


async def test_joins_over_the_rate_write_nothing(start_server: ServerFactory, wire: WireFactory) -> None:
    server = await start_server(max_messages_per_second="20")
    socket = await wire(server.websocket_url, server.anon_key)
    answers = [(await socket.join(f"t{number}", {}))["status"] for number in range(200)]
    # No more than are let pass before the socket is closed.
    assert answers.count("error") > 20
    await server.stop()
    assert "TooManyJoins" not in server.log
    assert "ClientJoinRateLimitReached" not in server.log
