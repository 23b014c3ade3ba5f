"""Patterns that take long cost those who sent them, and tables that take long do not hold up others."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from realtime_server.changes import budget
from realtime_server.changes.budget import Budget
from realtime_server.changes.judge import Identity
from realtime_server.claims import Claims
from realtime_server.protocol.filters import Condition, Operator
from tests.fix_changes import SOURCES, Source, Tables, bind, changes_server, hear_row, subscribe
from tests.fix_database import Cluster
from tests.fix_server import Server, make_token
from tests.fix_wire import WireFactory

ANN, BEN = Identity("anon", '{"sub": "ann"}'), Identity("anon", '{"sub": "ben"}')
CLAIMS = Claims(role="anon", subject=None, expires_at=0, json="{}")


class Socket:
    pass


# -- the budget


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_time_that_a_client_spent_comes_back_by_and_by(clock: list[float]) -> None:
    spent, first, second = Budget(1.0), Socket(), Socket()
    spent.spend(first, ANN, 0.5)
    assert not spent.is_spent(first, ANN)
    spent.spend(first, ANN, 0.5)
    assert spent.is_spent(first, ANN)
    assert not spent.is_spent(second, ANN)
    clock[0] += 30
    assert not spent.is_spent(first, ANN)


def test_who_connects_again_has_the_claims_of_before(clock: list[float]) -> None:
    spent = Budget(1.0)
    for _ in range(3):
        spent.spend(Socket(), ANN, 1.0)
    assert spent.is_spent(Socket(), ANN)
    assert not spent.is_spent(Socket(), BEN)


def test_accounts_are_bounded(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_KEPT", 10)
    spent, socket = Budget(1.0), Socket()
    for number in range(100):
        spent.spend(socket, Identity("anon", str(number)), 1.0)
        spent.refuse(1, [Condition("a", Operator.MATCH, False, str(number))])
    assert len(spent._identities) == len(spent._refused) == 10
    assert spent.is_refused(1, [Condition("a", Operator.MATCH, False, "99")])
    assert not spent.is_refused(1, [Condition("a", Operator.MATCH, False, "0")])
    assert not spent.is_refused(2, [Condition("a", Operator.MATCH, False, "99")])


def test_no_limit(clock: list[float]) -> None:
    spent, socket = Budget(0), Socket()
    spent.spend(socket, ANN, 1000)
    assert not spent.is_spent(socket, ANN)


# -- over the wire


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest) -> Source:
    result: Source = request.param
    return result


@pytest.fixture(scope="module")
async def server(source: Source, cluster: Cluster) -> AsyncIterator[Server]:
    async with changes_server(cluster, source) as server:
        yield server


def slow(number: int) -> str:
    return f"body=match.^(?:{number}z|)(.+)(.+)(.+)(.+)(.+)(.+)\\6\\5\\4\\3\\2\\1$"


async def test_slow_pattern_is_refused_to_whoever_sends_it_again_and_further_ones_to_who_sent_it(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    tables.create("docs", "id int primary key, body text")
    tables.create("other")
    attacker, other = [await wire(server.websocket_url, make_token(sub=name)) for name in ("mallory", "ann")]
    await subscribe(other, "other", tables.binding("other"))
    await subscribe(attacker, "slow", *(tables.binding("docs", filter=slow(number)) for number in range(1, 11)))
    with tables.db.transaction():
        tables.execute("insert into docs values (1, %s)", "".join(chr(33 + number % 90) for number in range(400)))
        tables.execute("insert into other values (1)")
    assert (await hear_row(other, "other"))[1]["id"] == 1
    refused = [await attacker.hear() for _ in range(10)]
    assert all(frame[4]["status"] == "error" and "57014" in frame[4]["message"] for frame in refused)
    # Neither another channel nor another pattern helps.
    await bind(attacker, "again", tables.binding("docs", filter=slow(20)))
    assert "patterns of this client have taken too long" in (await attacker.hear())[4]["message"]
    await bind(other, "same", tables.binding("docs", filter=slow(1)))
    assert "the pattern takes too long" in (await other.hear())[4]["message"]
    # Other filters and other clients go on.
    await subscribe(attacker, "plain", tables.binding("docs", filter="id=gt.0"))
    await subscribe(other, "like", tables.binding("docs", filter="body=like.x%"))
    tables.execute("insert into docs values (2, 'x')")
    assert (await hear_row(other, "like"))[1]["id"] == 2
