"""Who wants which changes: by table and by the value of one column, so that a change finds its few candidates, not touching the others."""

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
# What is said of a subscription that may stand in a moment.
RETRYABLE: Final = (TIMEOUTS, UNAVAILABLE)


class Subscriber(Protocol):
    """One client's channel or stream, as row changes reach it. None of these may wait."""

    @property
    def encoding(self) -> Encoding: ...

    @property
    def topic(self) -> str: ...

    @property
    def client(self) -> Hashable:
        """Whose it is: the socket of a channel. What its filters cost is counted for it."""

    def changed(self, frame: Frame) -> None:
        """Take a change."""

    def tell_changes(self, text: str, *, ok: bool) -> None:
        """Take word of what became of the subscription."""

    def tell_missing_changes(self, problem: str) -> None:
        """Take word that changes are missing here."""


class Registration:
    """What one subscriber wants, under its claims of now. `bindings`: each with the id that the client knows it by."""

    def __init__(self, subscriber: Subscriber, claims: Claims, bindings: Iterable[tuple[int, Binding]]) -> None:
        self.subscriber = subscriber
        self.claims = claims
        self.bindings = tuple(bindings)
        self.entries: tuple[Entry, ...] = ()
        # What this sees was there before: only what was committed later is told.
        self.since: Snapshot | None = None
        self.is_open = True
        # What the subscriber was told last.
        self.said: str | None = None
        # Counts how often it was to be entered, so that what is late does not undo what is newer.
        self.turn = 0

    def is_past(self, xid: int) -> bool:
        """Whether the transaction had committed before."""
        return self.since is not None and self.since.sees(xid)

    def say(self, text: str, *, ok: bool) -> None:
        """Tell the subscriber what became of it, unless it knows."""
        if self.is_open and self.said != text:
            self.said = text
            self.subscriber.tell_changes(text, ok=ok)

    def report_pending(self, text: str) -> None:
        """Tell the subscriber why it is not told changes yet. What stands goes on standing, and loses nothing."""
        if not self.entries:
            self.say(text, ok=False)


class Entry:
    """One binding on one table. `exact`: a column and the texts of which it must have one; `rest`: conditions that are left for the
    database to judge. `role` is the one it was entered with; `claims` may be newer."""

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

    `registrations` are all that there are, also those without entries. `connection_epoch` counts how often snapshots were forgotten.
    """

    def __init__(self) -> None:
        self.registrations: dict[Registration, None] = {}
        self.connection_epoch = 0
        # Those that are to be entered anew, each once.
        self._again: asyncio.Queue[Registration] = asyncio.Queue()
        self._is_queued: set[Registration] = set()
        self._tables: dict[int, dict[str, dict[Entry, None]]] = {}
        self._unindexed: dict[int, dict[Entry, None]] = {}
        self._exact: dict[int, dict[str, dict[str, dict[Entry, None]]]] = {}

    def put(self, registration: Registration, entries: Iterable[Entry]) -> None:
        """In place of those it had."""
        for entry in registration.entries:
            self.discard(entry)
        registration.entries = tuple(entries)
        for entry in registration.entries:
            self.add(entry)

    def requeue_all(self) -> None:
        for registration in self.registrations:
            if registration not in self._is_queued:
                self._is_queued.add(registration)
                self._again.put_nowait(registration)

    async def next_pending(self) -> Registration:
        """Wait for one that is to be entered anew. From now on it may be queued once more."""
        registration = await self._again.get()
        self._is_queued.discard(registration)
        return registration

    def forget_snapshots(self) -> None:
        """After a crash or a restore, ids of transactions are given again: what a snapshot of before seems to see may be new. Who reads has
        lost the connection then."""
        self.connection_epoch += 1
        for registration in self.registrations:
            registration.since = None

    def have_seen(self, snapshot: Snapshot) -> None:
        """Who has entries was told all that the snapshot sees, and is not to be told it again."""
        for registration in self.registrations:
            if registration.entries and (registration.since is None or registration.since < snapshot):
                registration.since = snapshot

    def miss(self, relation: int, problem: str) -> None:
        """Tell those who have an entry on the table that changes are missing here."""
        for registration in {entry.registration for entry in self.of_table(relation)}:
            registration.subscriber.tell_missing_changes(problem)

    def miss_all(self, problem: str) -> None:
        """The same of all tables."""
        self.forget_snapshots()
        for registration in list(self.registrations):
            if registration.entries:
                registration.subscriber.tell_missing_changes(problem)

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
        """Entries that the image may fit, whose `exact` it has or that have none, in the sets that other images have, too: the same object
        until an entry comes or goes."""
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
