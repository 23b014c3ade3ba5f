"""One table's share of a piece of changes: who is to be told what of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from realtime_server.changes.catalog import Table
from realtime_server.changes.change import Action, Change, Image
from realtime_server.changes.judge import BLIND, Identity, Judge, Sight
from realtime_server.changes.payload import NO_KEY, UNAUTHORIZED, View
from realtime_server.changes.subscriptions import Entry, Subscriptions
from realtime_server.protocol.filters import Condition


class Outdated(Exception):
    """A row of before a column was renamed: what it had in there cannot be found any more."""


@dataclass(slots=True, eq=False)
class Picture:
    """A row as it was. `told` is what clients may be told of it; `known` what it is judged by, which is more where an UPDATE left large
    values alone. Not `is_whole`: only the replica identity is known, and nobody can judge it."""

    told: Image
    known: Image
    is_whole: bool


@dataclass(slots=True, eq=False)
class Verdict:
    """A change, and who is told what of it."""

    change: Change
    action: Action
    new: Picture | None
    old: Picture | None
    told: list[tuple[View, Sequence[Entry]]] = field(default_factory=list)


class _Want(NamedTuple):
    """What entries may have in common. `identity` is that of now, which may be another one than they were entered with."""

    identity: Identity
    event: str
    leaves: bool
    select: tuple[str, ...]
    rest: tuple[Condition, ...]

    @classmethod
    def of(cls, entry: Entry) -> _Want:
        binding = entry.binding
        return cls(Identity.of(entry.claims), binding.event, binding.leaves, binding.select, entry.rest)


@dataclass(slots=True, eq=False)
class _Wish:
    """`entries` want the same, so they are asked about once. `image` is what the filter looks at. `is_leaving`: an UPDATE that may take
    the row away from them; not `is_told`: one that is only of interest because then it does not."""

    verdict: Verdict
    want: _Want
    entries: Sequence[Entry]
    image: Image
    is_leaving: bool = False
    is_told: bool = True


class Round:
    """`is_captured`: the changes come from triggers, which know nothing of the publication's row filters and column lists.

    `left_out`: identities that are not to be asked about. `strict_deletes`: where the deleted row is not known, and so nobody can say who
    saw it, those whom row-level security binds are not even told its key.

    Afterwards, `judged` are the identities that policies were asked about; `unjudged` those among them for whom they could not be
    evaluated, and `unmatched` entries whose filter could not, each with the reason. `missed` are entries to be told of a gap: for their
    identities, policies read what is not known of a row any more.
    """

    def __init__(
        self,
        judge: Judge,
        subscriptions: Subscriptions,
        table: Table,
        *,
        is_captured: bool,
        strict_deletes: bool,
        left_out: Collection[Identity],
    ) -> None:
        self._judge = judge
        self._subscriptions = subscriptions
        self._table = table
        self._is_captured = is_captured
        self._strict_deletes = strict_deletes
        self._left_out = left_out
        self.judged: set[Identity] = set()
        self.unjudged: dict[Identity, str] = {}
        self.unmatched: dict[Entry, str] = {}
        self.missed: set[Entry] = set()

    async def decide(self, changes: Sequence[Change]) -> list[Verdict]:
        """Raises: Outdated, DatabaseUnavailable, QueryCanceled, database.Error."""
        verdicts = [self._verdict(change) for change in changes]
        if self._is_captured and self._table.row_filter is not None:
            verdicts = await self._filter_rows(verdicts)
        if self._table.generated:
            # Filters may read them.
            await self._complete(verdicts)
        wishes = self._wishes(verdicts)
        if wishes:
            if not self._table.generated:
                await self._complete(verdicts)
            await self._see(await self._match(wishes))
        await self._render([verdict for verdict in verdicts if verdict.told])
        return verdicts

    def _verdict(self, change: Change) -> Verdict:
        # Where only the root of partitions has a replica identity of all columns, the log calls whole what is a key and nulls.
        has_whole_old = change.has_whole_old and (self._is_captured or self._table.has_whole_old)
        return Verdict(change, change.action, self._picture(change.new, True), self._picture(change.old, has_whole_old))

    def _picture(self, image: Image | None, is_whole: bool) -> Picture | None:
        if image is None:
            return None
        told = known = {name: value for name, value in image.items() if name in self._table.names}
        if len(image) > len(told):
            known = {name: value for name, value in image.items() if name in self._table.all_names}
            if len(known) < min(len(image), len(self._table.all_names)):
                # To take the value from the row as it is now would be to judge that one.
                raise Outdated(f"columns have gone, others have come: {', '.join(sorted(image.keys() - known.keys()))}")
        return Picture(told, known, is_whole)

    async def _filter_rows(self, verdicts: list[Verdict]) -> list[Verdict]:
        """Apply the publication's row filter as the log does: what comes in by an UPDATE is an INSERT, what goes out a DELETE."""
        album = Album()
        for verdict in verdicts:
            for picture in _pictures(verdict):
                album.add(picture.known)
        passing = await self._judge.published(self._table, album.json())
        kept = []
        for verdict in verdicts:
            comes, goes = (
                picture is not None and album.number_of(picture.known) in passing
                for picture in (verdict.new, verdict.old)
            )
            if verdict.action is Action.UPDATE and comes != goes:
                verdict.action = Action.INSERT if comes else Action.DELETE
                verdict.new, verdict.old = (verdict.new, None) if comes else (None, verdict.old)
            if comes or goes:
                kept.append(verdict)
        return kept

    # -- who may want it

    def _wishes(self, verdicts: Iterable[Verdict]) -> list[_Wish]:
        """Those whom the index names. Who is told of an error is told whatever the filter says."""
        # Most changes meet the same subscribers: those are sorted once.
        known: dict[int, list[tuple[_Want, list[Entry]]]] = {}

        def wants(image: Image) -> Iterator[tuple[_Want, list[Entry]]]:
            for circle in self._subscriptions.circles(self._table.relation, image):
                if id(circle) not in known:
                    groups: dict[_Want, list[Entry]] = defaultdict(list)
                    for entry in circle:
                        if self._may_read_filter(entry):
                            groups[_Want.of(entry)].append(entry)
                    known[id(circle)] = list(groups.items())
                yield from known[id(circle)]

        wishes = []
        for verdict in verdicts:
            action, new, old = verdict.action, verdict.new, verdict.old
            if new is None:
                assert old is not None, "a change without a new row has an old one"
                image = {name: value for name, value in old.told.items() if name in self._table.identity}
                for want, entries in wants(image):
                    if want.event in ("*", action) and self._table.access_of(want.identity.role).columns:
                        wishes.append(_Wish(verdict, want, entries, image))
                continue
            self._refuse(verdict)
            may_leave = action is Action.UPDATE and old is not None and old.is_whole
            for want, entries in wants(new.told):
                is_told = want.event in ("*", action)
                if (is_told or (may_leave and want.leaves)) and self._may_read_key(want.identity.role):
                    wishes.append(_Wish(verdict, want, entries, new.told, is_told=is_told))
            if may_leave:
                assert old is not None
                for want, entries in wants(old.told):
                    if want.leaves and want.event in ("*", Action.DELETE) and self._may_read_key(want.identity.role):
                        wishes.append(_Wish(verdict, want, entries, old.told, is_leaving=True))
        return wishes

    def _refuse(self, verdict: Verdict) -> None:
        for role, entries in self._subscriptions.by_role(self._table.relation).items():
            if not self._may_read_key(role):
                view = View(verdict.action, frozenset(), error=UNAUTHORIZED if self._table.key else NO_KEY)
                refused = [
                    entry
                    for entry in entries
                    if entry.binding.event in ("*", verdict.action)
                    and not self._may_read_key(entry.claims.role)
                    and not entry.registration.is_past(verdict.change.xid)
                ]
                verdict.told.append((view, refused))

    def _may_read_filter(self, entry: Entry) -> bool:
        """It was so when it was entered. When it is no more, to be told of a change would be to be told of the value."""
        columns = self._table.access_of(entry.claims.role).columns
        return all(condition.column in columns for condition in entry.binding.conditions)

    def _may_read_key(self, role: str) -> bool:
        return bool(self._table.key) and self._table.key <= self._table.access_of(role).columns

    # -- what is known of it

    async def _complete(self, verdicts: list[Verdict]) -> None:
        """Find out generated columns, and what the log leaves out: columns that are not published, large values that an UPDATE left alone.
        Those are not told, but policies may read them."""
        names, generated = self._table.all_names, self._table.generated
        album = Album()
        lacking = [
            picture
            for verdict in verdicts
            for picture in _pictures(verdict)
            # To a trigger, virtual columns are null.
            if picture.is_whole
            and (len(picture.known) < len(names) or (self._table.has_generated and self._is_captured))
        ]
        if not lacking:
            return
        for picture in lacking:
            album.add(picture.known)
        known = await self._judge.complete(self._table, album.json())
        for number, picture in enumerate(lacking):
            picture.known = {name: value for name, value in known[number].items() if name in names}
            picture.told |= {name: value for name, value in picture.known.items() if name in generated}

    # -- whether it fits

    async def _match(self, wishes: list[_Wish]) -> list[_Wish]:
        """Those wishes whose conditions are fulfilled."""
        by_role = defaultdict(list)
        for wish in wishes:
            if wish.want.rest:
                by_role[wish.want.identity.role].append(wish)
        unfulfilled: set[_Wish] = set()
        for role, asked in by_role.items():
            album = Album()
            for wish in asked:
                album.add(wish.image)
            conditions = list(dict.fromkeys(condition for wish in asked for condition in wish.want.rest))
            numbers = {condition: number for number, condition in enumerate(conditions)}
            matches = await self._judge.match(self._table, role, album.json(), conditions)
            for wish in asked:
                image = album.number_of(wish.image)
                if not all((image, numbers[condition]) in matches.found for condition in wish.want.rest):
                    unfulfilled.add(wish)
                for number, problem in matches.problems.items():
                    if conditions[number] in wish.want.rest:
                        self.unmatched |= dict.fromkeys(wish.entries, problem)
        return [wish for wish in wishes if wish not in unfulfilled]

    # -- who may see it

    async def _see(self, wishes: list[_Wish]) -> None:
        """Ask policies once for each role and claims, and note what each is told."""
        album = Album()
        wanted: dict[Identity, set[int]] = defaultdict(set)
        for wish in wishes:
            identity = wish.want.identity
            if self._is_bound(identity) and identity not in self._left_out:
                for picture in _pictures(wish.verdict):
                    if picture.is_whole:
                        wanted[identity].add(album.add(picture.known))
        questions = list(wanted.items())
        seen: dict[Identity, Sight] = {}
        if questions:
            sights = await self._judge.see(self._table, album.json(), questions)
            for (identity, _), sight in zip(questions, sights, strict=True):
                seen[identity] = sight
                self.judged.add(identity)
                if sight.problem is not None:
                    self.unjudged[identity] = sight.problem

        def sees(wish: _Wish, picture: Picture | None) -> bool:
            if picture is None or not self._is_bound(wish.want.identity):
                return picture is not None
            return picture.is_whole and album.number_of(picture.known) in seen.get(wish.want.identity, BLIND).images

        def is_unknown(wish: _Wish) -> bool:
            decisive = wish.verdict.new or wish.verdict.old
            asked = _pictures(wish.verdict) if wish.is_leaving else [decisive] if decisive else []
            unknown = seen.get(wish.want.identity, BLIND).unknown
            return any(album.number_of(picture.known) in unknown for picture in asked)

        # Leaving comes after staying: who still has the row is not told that it is gone.
        staying: dict[Verdict, set[Entry]] = {wish.verdict: set() for wish in wishes if wish.is_leaving}
        for wish in sorted(wishes, key=lambda wish: wish.is_leaving):
            verdict = wish.verdict
            if is_unknown(wish):
                self.missed.update(_present(wish))
            elif wish.is_leaving:
                if sees(wish, verdict.old):
                    self._tell(wish, Action.DELETE, self._table.key, but=staying[verdict])
            elif verdict.new is None:
                if sees(wish, verdict.old) or self._is_told_of_unknown(wish):
                    self._tell(
                        wish, Action.DELETE, self._table.key if self._table.has_row_security else self._table.identity
                    )
            elif sees(wish, verdict.new):
                if verdict in staying:
                    staying[verdict].update(wish.entries)
                if wish.is_told:
                    # Who sees the row now may not have seen it before.
                    is_known = sees(wish, verdict.old)
                    self._tell(wish, verdict.action, self._table.identity if is_known else self._table.key)

    def _is_told_of_unknown(self, wish: _Wish) -> bool:
        """Whether to tell of a deleted row of which nothing but the key is known, as applications expect."""
        old = wish.verdict.old
        return (
            old is not None
            and not old.is_whole
            and not self._strict_deletes
            and wish.want.identity not in self._left_out
        )

    def _is_bound(self, identity: Identity) -> bool:
        return self._table.access_of(identity.role).is_bound

    def _tell(self, wish: _Wish, action: Action, old: frozenset[str], *, but: Collection[Entry] = ()) -> None:
        entries = [entry for entry in _present(wish) if entry not in but]
        columns = self._table.access_of(wish.want.identity.role).columns
        if wish.want.select:
            columns &= self._table.key.union(wish.want.select)
        if entries:
            wish.verdict.told.append((View(action, columns, old & columns), entries))

    # -- how it looks

    async def _render(self, verdicts: list[Verdict]) -> None:
        """Put what is told as `to_jsonb` writes it."""
        pictures = [picture for verdict in verdicts for picture in _pictures(verdict)]
        if not pictures:
            return
        album = Album()
        for picture in pictures:
            album.add(picture.told)
        rendered = await self._judge.render(self._table, album.json())
        for number, picture in enumerate(pictures):
            picture.told = {name: value for name, value in rendered[number].items() if name in picture.told}


class Album:
    """Images that are sent to the database together, each once, numbered from 0."""

    def __init__(self) -> None:
        # Dictionaries cannot be keys; these live as long as the album.
        self._numbers: dict[int, int] = {}
        self._images: list[Image] = []

    def add(self, image: Image) -> int:
        number = self._numbers.setdefault(id(image), len(self._images))
        if number == len(self._images):
            self._images.append(image)
        return number

    def number_of(self, image: Image) -> int:
        return self._numbers.get(id(image), -1)

    def json(self) -> bytes:
        return msgspec.json.encode(self._images)


def _present(wish: _Wish) -> list[Entry]:
    """Those who were there when it was committed."""
    return [entry for entry in wish.entries if not entry.registration.is_past(wish.verdict.change.xid)]


def _pictures(verdict: Verdict) -> Iterable[Picture]:
    return [picture for picture in (verdict.new, verdict.old) if picture is not None]
