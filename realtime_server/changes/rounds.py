"""One table's share of a piece of changes: who is to be told what of each.

**Visibility comes before filters.** For those whom row-level security binds, a condition is evaluated only on images that they may see, so
that neither an error nor the time that it takes tells of hidden rows. Candidates are narrowed beforehand by the index of `Subscriptions`
alone: equality of texts, which is leakproof in PostgreSQL's sense. Those whom nothing binds are asked about their filters only.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec
import structlog

from realtime_server import database
from realtime_server.changes.catalog import Table
from realtime_server.changes.change import Action, Change, Image
from realtime_server.changes.judge import Identity, Judge, Question
from realtime_server.changes.payload import NO_KEY, UNAUTHORIZED, View
from realtime_server.changes.subscriptions import Entry, Subscriptions
from realtime_server.errors import QueryCanceled
from realtime_server.protocol.filters import Condition

# What policies read of a row: above the first bound it is judged apart, and above the second not at all.
LARGE_IMAGE_BYTES: Final = 1_048_576
MOST_JUDGED_BYTES: Final = 16 * 1_048_576
# Changes that cannot be rendered are found one by one, in so much time together.
LIMIT_RENDERING_S: Final = 5.0

log = structlog.get_logger()


class Outdated(Exception):
    """A row of before a column was renamed: what it had in there cannot be found any more."""


@dataclass(slots=True, eq=False)
class RowVersion:
    """A row as it was. `told` is what clients may be told of it; `known` what it is judged by, which is more where an UPDATE left large
    values alone. Not `is_whole`: only the replica identity is known, and nobody can judge it. Not `is_judgeable`: it lacks a column that
    policies read, or has too much of it."""

    told: Image
    known: Image
    is_whole: bool
    is_judgeable: bool = True


@dataclass(slots=True, eq=False)
class Verdict:
    """A change, and who is told what of it."""

    change: Change
    action: Action
    new: RowVersion | None
    old: RowVersion | None
    told: list[tuple[View, Sequence[Entry]]] = field(default_factory=list)


class _Interest(NamedTuple):
    """What entries may have in common. `identity` is that of now, which may be another one than they were entered with."""

    identity: Identity
    event: str
    leaves: bool
    select: tuple[str, ...]
    rest: tuple[Condition, ...]

    @classmethod
    def of(cls, entry: Entry) -> _Interest:
        binding = entry.binding
        return cls(Identity.of(entry.claims), binding.event, binding.leaves, binding.select, entry.rest)


@dataclass(slots=True, eq=False)
class _Candidate:
    """`entries` want the same, so they are asked about once. `image` is what the filter looks at. `is_leaving`: an UPDATE that may take
    the row away from them; not `is_told`: one that is only of interest because then it does not."""

    verdict: Verdict
    want: _Interest
    entries: Sequence[Entry]
    image: Image
    is_leaving: bool = False
    is_told: bool = True
    is_fulfilled: bool = False

    @property
    def picture(self) -> RowVersion:
        """The row that the filter looks at."""
        picture = self.verdict.old if self.is_leaving else self.verdict.new or self.verdict.old
        assert picture is not None, "a change has a row"
        return picture


class Round:
    """`is_captured`: the changes come from triggers, which know nothing of the publication's row filters and column lists.

    `quarantined`: identities that are not to be asked about. `strict_deletes`: where the deleted row is not known, and so nobody can say
    who saw it, those whom row-level security binds are not even told its key. `is_last_try`: changes that cannot be rendered are told as
    missing.

    Afterwards, `judged` are the identities that policies were asked about; `indeterminate` those among them for whom they could not be
    evaluated, and `unmatched` entries whose filter could not, each with the reason. `slow` are conditions that took long, with the
    seconds. `missed` are entries to be told of a gap: for their identities, policies read what is not known of a row any more, or the row
    cannot be rendered.
    """

    def __init__(
        self,
        judge: Judge,
        subscriptions: Subscriptions,
        table: Table,
        *,
        is_captured: bool,
        strict_deletes: bool,
        quarantined: Collection[Identity],
        is_last_try: bool,
    ) -> None:
        self._judge = judge
        self._subscriptions = subscriptions
        self._table = table
        self._is_captured = is_captured
        self._strict_deletes = strict_deletes
        self._quarantined = quarantined
        self._is_last_try = is_last_try
        self._seen: dict[Identity, set[int]] = defaultdict(set)
        self.judged: set[Identity] = set()
        self.indeterminate: dict[Identity, str] = {}
        self.unmatched: dict[Entry, str] = {}
        self.missed: set[Entry] = set()
        self.slow: dict[tuple[Entry, Condition], float] = defaultdict(float)

    async def decide(self, changes: Sequence[Change]) -> list[Verdict]:
        """Raises: Outdated, DatabaseUnavailable, QueryCanceled, database.Error."""
        verdicts = [self._verdict(change) for change in changes]
        if self._is_captured and self._table.row_filter is not None:
            verdicts = await self._filter_rows(verdicts)
        await self._complete(verdicts)
        self._miss_unknown(verdicts)
        wishes = self._wishes(verdicts)
        if wishes:
            await self._see(wishes)
            for wish in await self._match([wish for wish in wishes if self._may_match(wish)]):
                wish.is_fulfilled = True
            self._decide(wishes)
        await self._render([verdict for verdict in verdicts if verdict.told])
        return verdicts

    def _verdict(self, change: Change) -> Verdict:
        # Where only the root of partitions has a replica identity of all columns, the log calls whole what is a key and nulls.
        has_whole_old = change.has_whole_old and (self._is_captured or self._table.has_whole_old)
        return Verdict(change, change.action, self._picture(change.new, True), self._picture(change.old, has_whole_old))

    def _picture(self, image: Image | None, is_whole: bool) -> RowVersion | None:
        if image is None:
            return None
        told = known = {name: value for name, value in image.items() if name in self._table.names}
        if len(image) > len(told):
            known = {name: value for name, value in image.items() if name in self._table.all_names}
            if len(known) < min(len(image), len(self._table.all_names)):
                # To take the value from the row as it is now would be to judge that one.
                raise Outdated(f"columns have gone, others have come: {', '.join(sorted(image.keys() - known.keys()))}")
        return RowVersion(told, known, is_whole)

    async def _filter_rows(self, verdicts: list[Verdict]) -> list[Verdict]:
        """Apply the publication's row filter as the log does: what comes in by an UPDATE is an INSERT, what goes out a DELETE."""
        album = RowBatch()
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

    def _wishes(self, verdicts: Iterable[Verdict]) -> list[_Candidate]:
        """Those whom the index names. Who is told of an error is told whatever the filter says."""
        # Most changes meet the same subscribers: those are sorted once.
        known: dict[int, list[tuple[_Interest, list[Entry]]]] = {}

        def wants(image: Image) -> Iterator[tuple[_Interest, list[Entry]]]:
            for circle in self._subscriptions.candidate_groups(self._table.relation, image):
                if id(circle) not in known:
                    groups: dict[_Interest, list[Entry]] = defaultdict(list)
                    for entry in circle:
                        if self._may_read_filter(entry):
                            groups[_Interest.of(entry)].append(entry)
                    known[id(circle)] = list(groups.items())
                yield from known[id(circle)]

        wishes = []
        for verdict in verdicts:
            action, new, old = verdict.action, verdict.new, verdict.old
            if new is None:
                assert old is not None, "a change without a new row has an old one"
                image = {name: value for name, value in old.told.items() if name in self._table.identity}
                # A row that nobody can judge tells those whom policies bind nothing but its key.
                key = image if old.is_whole else {name: image[name] for name in image.keys() & self._table.key}
                for is_bound, known_image in ((False, image), (True, key)):
                    for want, entries in wants(known_image):
                        if (
                            self._is_bound(want.identity) is is_bound
                            and want.event in ("*", action)
                            and self._table.access_of(want.identity.role).columns
                        ):
                            wishes.append(_Candidate(verdict, want, entries, known_image))
                continue
            self._refuse(verdict)
            may_leave = action is Action.UPDATE and old is not None and old.is_whole
            for want, entries in wants(new.told):
                is_told = want.event in ("*", action)
                if (is_told or (may_leave and want.leaves)) and self._may_read_key(want.identity.role):
                    wishes.append(_Candidate(verdict, want, entries, new.told, is_told=is_told))
            if may_leave:
                assert old is not None
                for want, entries in wants(old.told):
                    if want.leaves and want.event in ("*", Action.DELETE) and self._may_read_key(want.identity.role):
                        wishes.append(_Candidate(verdict, want, entries, old.told, is_leaving=True))
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
        needed = names if self._table.has_generated else self._table.policy_columns
        lacking = [
            picture
            for verdict in verdicts
            for picture in _pictures(verdict)
            # To a trigger, virtual columns are null.
            if picture.is_whole
            and (not needed <= picture.known.keys() or (self._table.has_generated and self._is_captured))
            and _size(picture.known, names) <= MOST_JUDGED_BYTES
        ]
        if not lacking:
            return
        album = RowBatch()
        for picture in lacking:
            album.add(picture.known)
        known = await self._judge.complete(self._table, album.json())
        for number, picture in enumerate(lacking):
            picture.known = {name: value for name, value in known[number].items() if name in names}
            picture.told |= {name: value for name, value in picture.known.items() if name in generated}

    def _miss_unknown(self, verdicts: Iterable[Verdict]) -> None:
        """Tell of a gap where policies read what is not known, whatever the filters say: to compare would be to tell of the row. What is
        too large to be judged is nobody's fault, and is told of to nobody."""
        columns = self._table.policy_columns
        for verdict in verdicts:
            for picture in _pictures(verdict):
                if not picture.is_whole:
                    continue
                is_known = columns <= picture.known.keys()
                is_too_large = _size(picture.known, columns) > MOST_JUDGED_BYTES
                picture.is_judgeable = is_known and not is_too_large
                if is_too_large:
                    log.warning("a row is too large to be judged", table=str(self._table))
                elif not is_known and self._table.has_row_security:
                    self._miss(verdict, is_leaving=picture is verdict.old and verdict.new is not None)

    def _miss(self, verdict: Verdict, *, is_leaving: bool) -> None:
        for entry in self._subscriptions.of_table(self._table.relation):
            identity, binding = Identity.of(entry.claims), entry.binding
            is_wanted = binding.event in ("*", Action.DELETE if is_leaving else verdict.action)
            if (
                is_wanted
                and (binding.leaves or not is_leaving)
                and self._is_bound(identity)
                and identity not in self._quarantined
                and self._may_read_filter(entry)
                and self._may_read_key(identity.role)
                and not entry.registration.is_past(verdict.change.xid)
            ):
                self.missed.add(entry)

    # -- who may see it

    async def _see(self, wishes: list[_Candidate]) -> None:
        """Ask policies once for each role and claims."""
        usual = RowBatch(self._table.policy_columns)
        large: dict[int, tuple[RowVersion, list[Identity]]] = {}
        asked: dict[Identity, dict[int, RowVersion]] = defaultdict(dict)
        for wish in wishes:
            identity = wish.want.identity
            if self._is_bound(identity) and identity not in self._quarantined:
                for picture in _pictures(wish.verdict):
                    if picture.is_whole and picture.is_judgeable:
                        asked[identity][id(picture)] = picture
        wanted: dict[Identity, dict[int, RowVersion]] = defaultdict(dict)
        for identity, pictures in asked.items():
            for picture in pictures.values():
                if _size(picture.known, self._table.policy_columns) > LARGE_IMAGE_BYTES:
                    large.setdefault(id(picture), (picture, []))[1].append(identity)
                else:
                    wanted[identity][usual.add(picture.known)] = picture
        questions = list(wanted.items())
        if questions:
            sights = await self._judge.see(self._table, usual.json(), questions)
            for (identity, numbered), sight in zip(questions, sights, strict=True):
                self._seen[identity].update(id(numbered[number]) for number in sight.images)
                self.judged.add(identity)
                if sight.problem is not None:
                    self.indeterminate[identity] = sight.problem
                if sight.unknown:
                    self._note_unknown(wishes, identity, {id(numbered[number]) for number in sight.unknown})
        for picture, identities in large.values():
            await self._see_large(picture, identities)

    async def _see_large(self, picture: RowVersion, identities: list[Identity]) -> None:
        """What is asked about a large row costs it alone: who cannot be answered is not told of it, and is judged as before."""
        album = RowBatch(self._table.policy_columns)
        number = album.add(picture.known)
        for identity, sight in zip(
            identities,
            await self._judge.see_large(self._table, album.json(), [(identity, (number,)) for identity in identities]),
            strict=True,
        ):
            if number in sight.images:
                self._seen[identity].add(id(picture))
            elif sight.problem is not None:
                log.warning("a large row was not judged", table=str(self._table), problem=sight.problem[:5])

    def _note_unknown(self, wishes: Iterable[_Candidate], identity: Identity, pictures: Collection[int]) -> None:
        """A domain turned out to refuse null."""
        for wish in wishes:
            if wish.want.identity == identity and id(wish.picture) in pictures:
                self.missed.update(_present(wish))

    def _sees(self, wish: _Candidate, picture: RowVersion | None) -> bool:
        if picture is None or not self._is_bound(wish.want.identity):
            return picture is not None
        return id(picture) in self._seen[wish.want.identity]

    # -- whether it fits

    def _may_match(self, wish: _Candidate) -> bool:
        return self._sees(wish, wish.picture) or (wish.verdict.new is None and self._is_told_of_unknown(wish))

    async def _match(self, wishes: list[_Candidate]) -> list[_Candidate]:
        """Those wishes whose conditions are fulfilled. Each condition is evaluated on the images of those who may see them."""
        by_role = defaultdict(list)
        for wish in wishes:
            if wish.want.rest:
                by_role[wish.want.identity.role].append(wish)
        unfulfilled: set[_Candidate] = set()
        for role, asked in by_role.items():
            album = RowBatch({condition.column for wish in asked for condition in wish.want.rest})
            images: dict[tuple[Identity, Condition], set[int]] = defaultdict(set)
            for wish in asked:
                number = album.add(wish.image)
                for condition in wish.want.rest:
                    images[wish.want.identity, condition].add(number)
            questions = {
                key: Question(key[1], tuple(sorted(numbers)) if len(numbers) < len(album) else None)
                for key, numbers in images.items()
            }
            numbers = {question: number for number, question in enumerate(dict.fromkeys(questions.values()))}
            matches = await self._judge.match(self._table, role, album.json(), list(numbers))
            for wish in asked:
                image = album.number_of(wish.image)
                own = [numbers[questions[wish.want.identity, condition]] for condition in wish.want.rest]
                if not all((image, number) in matches.found for number in own):
                    unfulfilled.add(wish)
                for number in own:
                    if seconds := matches.slow_s.get(number):
                        for entry in wish.entries:
                            self.slow[entry, list(numbers)[number].condition] += seconds
                    if number in matches.problems:
                        self.unmatched |= dict.fromkeys(wish.entries, matches.problems[number])
        return [wish for wish in wishes if wish not in unfulfilled]

    # -- what each is told

    def _decide(self, wishes: list[_Candidate]) -> None:
        # Leaving comes after staying: who still has the row is not told that it is gone.
        staying: dict[Verdict, set[Entry]] = {wish.verdict: set() for wish in wishes if wish.is_leaving}
        for wish in sorted(wishes, key=lambda wish: wish.is_leaving):
            verdict = wish.verdict
            if not wish.is_fulfilled:
                continue
            if wish.is_leaving:
                self._tell(wish, Action.DELETE, self._table.key, but=staying[verdict])
            elif verdict.new is None:
                self._tell(
                    wish, Action.DELETE, self._table.key if self._table.has_row_security else self._table.identity
                )
            else:
                if verdict in staying:
                    staying[verdict].update(wish.entries)
                if wish.is_told:
                    # Who sees the row now may not have seen it before.
                    is_known = self._sees(wish, verdict.old)
                    self._tell(wish, verdict.action, self._table.identity if is_known else self._table.key)

    def _is_told_of_unknown(self, wish: _Candidate) -> bool:
        """Whether to tell of a deleted row of which nothing but the key is known, as applications expect."""
        old = wish.verdict.old
        return (
            old is not None
            and not old.is_whole
            and not self._strict_deletes
            and wish.want.identity not in self._quarantined
        )

    def _is_bound(self, identity: Identity) -> bool:
        return self._table.access_of(identity.role).is_bound

    def _tell(self, wish: _Candidate, action: Action, old: frozenset[str], *, but: Collection[Entry] = ()) -> None:
        entries = [entry for entry in _present(wish) if entry not in but]
        columns = self._table.access_of(wish.want.identity.role).columns
        if wish.want.select:
            columns &= self._table.key.union(wish.want.select)
        if entries:
            wish.verdict.told.append((View(action, columns, old & columns), entries))

    # -- how it looks

    async def _render(self, verdicts: list[Verdict]) -> None:
        """Put what is told as `to_jsonb` writes it. Where that cannot be done, those who were to be told are told of a gap."""
        try:
            await self._render_together(verdicts)
        except (QueryCanceled, database.Error):
            if not self._is_last_try:
                raise
            ends_at = time.monotonic() + LIMIT_RENDERING_S
            for verdict in verdicts:
                try:
                    if time.monotonic() > ends_at:
                        raise QueryCanceled from None
                    await self._render_together([verdict])
                except (QueryCanceled, database.Error):
                    self.missed.update(
                        entry for view, entries in verdict.told if view.error is None for entry in entries
                    )
                    verdict.told = [(view, entries) for view, entries in verdict.told if view.error is not None]

    async def _render_together(self, verdicts: Sequence[Verdict]) -> None:
        pictures = [picture for verdict in verdicts if _is_shown(verdict) for picture in _pictures(verdict)]
        if not pictures:
            return
        album = RowBatch()
        for picture in pictures:
            album.add(picture.told)
        rendered = await self._judge.render(self._table, album.json())
        for number, picture in enumerate(pictures):
            picture.told = {name: value for name, value in rendered[number].items() if name in picture.told}


class RowBatch:
    """Images that are sent to the database together, each once, numbered from 0; only these `columns` of them, if they are given."""

    def __init__(self, columns: Collection[str] | None = None) -> None:
        self._columns = columns
        # Dictionaries cannot be keys; these live as long as the album.
        self._numbers: dict[int, int] = {}
        self._images: list[Image] = []

    def add(self, image: Image) -> int:
        number = self._numbers.setdefault(id(image), len(self._images))
        if number == len(self._images):
            self._images.append(image)
        return number

    def __len__(self) -> int:
        return len(self._images)

    def number_of(self, image: Image) -> int:
        return self._numbers.get(id(image), -1)

    def json(self) -> bytes:
        if self._columns is None:
            return msgspec.json.encode(self._images)
        return msgspec.json.encode(
            [{name: value for name, value in image.items() if name in self._columns} for image in self._images]
        )


def _present(wish: _Candidate) -> list[Entry]:
    """Those who were there when it was committed."""
    return [entry for entry in wish.entries if not entry.registration.is_past(wish.verdict.change.xid)]


def _pictures(verdict: Verdict) -> Iterable[RowVersion]:
    return [picture for picture in (verdict.new, verdict.old) if picture is not None]


def _is_shown(verdict: Verdict) -> bool:
    """Whether anybody is told values."""
    return any(view.error is None for view, _ in verdict.told)


def _size(image: Image, columns: Collection[str]) -> int:
    """Bytes of these columns, as they are sent."""
    return sum(len(bytes(value)) for name, value in image.items() if name in columns)
