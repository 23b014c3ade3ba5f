"""When a subscription stands: what happens while it is put to work."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec

from realtime_server.changes.activation import SubscriptionActivator
from realtime_server.changes.budget import Budget
from realtime_server.changes.catalog import Access, Catalog, Column, Table
from realtime_server.changes.change import Action, Change
from realtime_server.changes.dispatch import ChangeDispatcher
from realtime_server.changes.judge import Judge
from realtime_server.changes.publication_monitor import PublicationMonitor
from realtime_server.changes.quarantine import Quarantine
from realtime_server.changes.sources import Sources
from realtime_server.changes.subscriptions import SUBSCRIBED, Registration, Subscriptions
from realtime_server.claims import Claims
from realtime_server.database import Pool
from realtime_server.metrics import Metrics
from realtime_server.protocol.bindings import Binding
from realtime_server.protocol.frames import Encoding, Frame
from realtime_server.protocol.messages import Format

TABLE = Table(
    relation=1,
    schema="public",
    name="todos",
    has_row_security=False,
    has_whole_old=False,
    row_filter=None,
    is_captured=True,
    events=("INSERT",),
    columns=(Column("id", "int8", False, False, True, True, False, True),),
    unpublished=(),
    access={"anon": Access(frozenset({"id"}), False)},
    policy_columns=frozenset(),
)
CLAIMS = Claims(role="anon", subject=None, expires_at=0, json="{}")
BINDING = Binding("*", "public", "todos")


class Listener:
    client = "a socket"
    topic = "realtime:t"
    encoding = Encoding(Format.V2)

    def __init__(self) -> None:
        self.heard: list[str] = []

    def changed(self, frame: Frame) -> None: ...

    def notify_status(self, text: str, *, ok: bool) -> None:
        self.heard.append(text)

    def notify_gap(self, problem: str) -> None:
        self.heard.append(problem)


class Stage:
    """The source and the database, which says what `snapshot` is by now and answers when the gate is open."""

    triggers = None
    version = 1
    is_active = True

    def __init__(self) -> None:
        self.tables = {1: TABLE}
        self.snapshot = "1000:1000:"
        self.gate = asyncio.Event()
        self.is_asked = asyncio.Event()
        self.subscriptions = Subscriptions()
        catalog = cast(Catalog, self)
        parts = (
            cast(Judge, self),
            self.subscriptions,
            Quarantine(),
            Budget(1.0),
            cast(Sources, self),
            cast(PublicationMonitor, self),
        )
        self.entrance = SubscriptionActivator(cast(Pool, self), catalog, *parts)
        self.courier = ChangeDispatcher(catalog, *parts, strict_deletes=False, metrics=Metrics("test"))

    async def is_current(self, relations: object) -> bool:
        return True

    async def fetch(self, query: str) -> list[tuple[Any, ...]]:
        snapshot = self.snapshot
        self.is_asked.set()
        await self.gate.wait()
        return [(snapshot,)]


async def test_who_is_entered_while_the_source_is_lost_stands_when_there_is_another() -> None:
    """And what had a transaction id before a crash is not what has it afterwards."""
    stage, listener = Stage(), Listener()
    registration = Registration(listener, CLAIMS, [(1, BINDING)])
    stage.subscriptions.registrations[registration] = None
    entering = asyncio.create_task(stage.entrance.activate(registration))
    await stage.is_asked.wait()
    # Who is not told of a gap must not have been there before it.
    stage.is_active = False
    stage.subscriptions.report_gap_to_all("gap")
    stage.gate.set()
    await asyncio.sleep(0.01)
    assert not listener.heard
    assert not registration.entries
    stage.snapshot, stage.is_active = "900:900:", True
    await entering
    assert listener.heard == [SUBSCRIBED]
    assert not registration.is_past(950)


async def test_changes_that_come_while_their_table_is_not_published_are_told_to_be_missing() -> None:
    """It may be back before the subscription is entered again, which then is as it was."""
    stage, listener = Stage(), Listener()
    registration = Registration(listener, CLAIMS, [(1, BINDING)])
    stage.subscriptions.registrations[registration] = None
    stage.gate.set()
    await stage.entrance.activate(registration)
    stage.tables = {}
    await stage.courier.take([Change(1, Action.INSERT, 0.0, {"id": msgspec.Raw(b'"1"')}, None, False, 1, 2000)])
    stage.tables = {1: TABLE}
    await stage.entrance.activate(registration)
    assert listener.heard == [SUBSCRIBED, "gap: changes of a table came when it was not published"]
