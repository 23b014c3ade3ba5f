"""Indexes subscriptions by table and by the value of one column, so that a change finds its few candidates without scanning the others."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Final, Protocol, TypeVar

from realtime_server.changes.change import Image, text_of
from realtime_server.claims import Claims
from realtime_server.cursor import Snapshot
from realtime_server.protocol.bindings import Binding
from realtime_server.protocol.filters import Condition
from realtime_server.protocol.frames import Encoding, Frame

SUBSCRIBED: Final = "Subscribed to PostgreSQL"
TIMEOUTS: Final = '{:error, "Too many database timeouts"}'
UNAVAILABLE: Final = "Row changes are not available now, subscribe to broadcasts"
# Results of a subscription that may become active later.
RETRYABLE: Final = (TIMEOUTS, UNAVAILABLE)


class Subscriber(Protocol):
    """A client's channel or stream as subscriber to row changes. None of these methods may wait."""

    @property
    def encoding(self) -> Encoding: ...

    @property
    def topic(self) -> str: ...

    @property
    def client(self) -> Hashable:
        """The owner: for a channel, its socket. The cost of filters is charged to it."""

    def changed(self, frame: Frame) -> None:
        """Accept a change."""

    def notify_status(self, text: str, *, ok: bool) -> None:
        """Accept the status of the subscription."""

    def notify_gap(self, problem: str) -> None:
        """Accept a notification that changes are missing here."""


class Registration:
    """The subscription of one subscriber, with its current claims. `bindings`: each with the id that the client knows it by."""

    def __init__(self, subscriber: Subscriber, claims: Claims, bindings: Iterable[tuple[int, Binding]]) -> None:
        self.subscriber = subscriber
        self.claims = claims
        self.bindings = tuple(bindings)
        self.entries: tuple[Entry, ...] = ()
        # Only transactions that this snapshot does not see are sent.
        self.since: Snapshot | None = None
        self.is_open = True
        # Status that the subscriber was last notified of.
        self.last_status: str | None = None
        # Counts activations, so that a late one does not overwrite a newer one.
        self.generation = 0

    def is_past(self, xid: int) -> bool:
        """Whether the transaction had committed before the subscription."""
        return self.since is not None and self.since.sees(xid)

    def send_status(self, text: str, *, ok: bool) -> None:
        """Notify the subscriber of its status, unless it is the last one that it got."""
        if self.is_open and self.last_status != text:
            self.last_status = text
            self.subscriber.notify_status(text, ok=ok)

    def report_pending(self, text: str) -> None:
        """Notify the subscriber why it is not active yet. An active one stays active and loses nothing."""
        if not self.entries:
            self.send_status(text, ok=False)


class Entry:
    """One binding on one table. `exact`: a column and the texts of which it must have one; `rest`: conditions that the database evaluates.
    `role` is that of the activation; `claims` may be newer."""

    __slots__ = ("binding", "exact", "id", "registration", "relation", "rest", "role")

    def __init__(
        self,
        registration: Registration,
        id: int,
        binding: Binding,
        relation: int,
        exact: tuple[str, frozenset[str]] | None,
        rest: tuple[Condition, ...],
    ) -> None:
        self.registration = registration
        self.id = id
        self.binding = binding
        self.relation = relation
        self.exact = exact
        self.rest = rest
        self.role = registration.claims.role

    @property
    def claims(self) -> Claims:
        return self.registration.claims


class Subscriptions:
    """All entries. Dictionaries keep the order of subscribing, sets do not.

    `registrations` includes those without entries. `connection_epoch` counts how often snapshots were forgotten.
    """

    def __init__(self) -> None:
        self.registrations: dict[Registration, None] = {}
        self.connection_epoch = 0
        # Registrations to activate again, each queued once.
        self._pending: asyncio.Queue[Registration] = asyncio.Queue()
        self._queued: set[Registration] = set()
        self._tables: dict[int, dict[str, dict[Entry, None]]] = {}
        self._unindexed: dict[int, dict[Entry, None]] = {}
        self._exact: dict[int, dict[str, dict[str, dict[Entry, None]]]] = {}

    def put(self, registration: Registration, entries: Iterable[Entry]) -> None:
        """Replace the entries of the registration."""
        for entry in registration.entries:
            self.discard(entry)
        registration.entries = tuple(entries)
        for entry in registration.entries:
            self.add(entry)

    def requeue_all(self) -> None:
        for registration in self.registrations:
            if registration not in self._queued:
                self._queued.add(registration)
                self._pending.put_nowait(registration)

    async def next_pending(self) -> Registration:
        """Wait for a registration to activate again. From now on it may be queued once more."""
        registration = await self._pending.get()
        self._queued.discard(registration)
        return registration

    def forget_snapshots(self) -> None:
        """Forget snapshots, because the reader has lost its connection: after a crash or a restore transaction ids are assigned again, and
        an old snapshot would seem to see new transactions."""
        self.connection_epoch += 1
        for registration in self.registrations:
            registration.since = None

    def skip_visible_in(self, snapshot: Snapshot) -> None:
        """Skip what the snapshot sees: active subscriptions have received it."""
        for registration in self.registrations:
            if registration.entries and (registration.since is None or registration.since < snapshot):
                registration.since = snapshot

    def report_gap(self, relation: int, problem: str) -> None:
        """Notify subscribers of the table that changes are missing here."""
        for registration in {entry.registration for entry in self.of_table(relation)}:
            registration.subscriber.notify_gap(problem)

    def report_gap_to_all(self, problem: str) -> None:
        """Notify subscribers of all tables that changes are missing here."""
        self.forget_snapshots()
        for registration in list(self.registrations):
            if registration.entries:
                registration.subscriber.notify_gap(problem)

    def add(self, entry: Entry) -> None:
        self._tables.setdefault(entry.relation, {}).setdefault(entry.role, {})[entry] = None
        if entry.exact is None:
            self._unindexed.setdefault(entry.relation, {})[entry] = None
            return
        column, texts = entry.exact
        values = self._exact.setdefault(entry.relation, {}).setdefault(column, {})
        for text in texts:
            values.setdefault(text, {})[entry] = None

    def discard(self, entry: Entry) -> None:
        roles = self._tables.get(entry.relation, {})
        _discard(roles, entry.role, entry)
        if not roles:
            self._tables.pop(entry.relation, None)
        if entry.exact is None:
            _discard(self._unindexed, entry.relation, entry)
            return
        column, texts = entry.exact
        columns = self._exact.get(entry.relation, {})
        values = columns.get(column, {})
        for text in texts:
            _discard(values, text, entry)
        if not values:
            columns.pop(column, None)
        if not columns:
            self._exact.pop(entry.relation, None)

    def of_table(self, relation: int) -> Iterable[Entry]:
        return chain.from_iterable(self.by_role(relation).values())

    def by_role(self, relation: int) -> Mapping[str, Iterable[Entry]]:
        return self._tables.get(relation, {})

    def candidate_groups(self, relation: int, image: Image) -> Iterator[Mapping[Entry, None]]:
        """Yield the sets of entries that the image may match: their `exact` column has its value, or they have none. Other images get the
        same set objects, until an entry is added or removed."""
        if relation in self._unindexed:
            yield self._unindexed[relation]
        for column, values in self._exact.get(relation, {}).items():
            text = text_of(image.get(column))
            if text is not None and text in values:
                yield values[text]

    def __contains__(self, relation: int) -> bool:
        return relation in self._tables

    def __len__(self) -> int:
        return sum(len(entries) for roles in self._tables.values() for entries in roles.values())


K = TypeVar("K")


def _discard(groups: dict[K, dict[Entry, None]], key: K, entry: Entry) -> None:
    members = groups.get(key)
    if members is not None:
        members.pop(entry, None)
        if not members:
            del groups[key]
