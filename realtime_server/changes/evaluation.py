"""Evaluates the changes of one table in a batch: who receives what of each change.

**Visibility comes before filters.** For roles that row-level security binds, a condition is evaluated only on images that they may see, so
that neither an error nor the time that it takes reveals hidden rows. Before that, the index of `Subscriptions` alone narrows candidates: by
equality of texts, which is leakproof in PostgreSQL's sense. For roles that row-level security does not bind, only filters are evaluated.
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

# Size of the columns of a row that policies read: above the first bound it is evaluated alone, and above the second not at all.
LARGE_IMAGE_BYTES: Final = 1_048_576
MAX_JUDGED_BYTES: Final = 16 * 1_048_576
# Time limit for all single attempts to find the changes that cannot be rendered.
LIMIT_RENDERING_S: Final = 5.0

log = structlog.get_logger()


class Outdated(Exception):
    """A row was written before a column was renamed, so its value of that column cannot be assigned any more."""


@dataclass(slots=True, eq=False)
class RowVersion:
    """A row before or after a change. `published` has the columns that clients may receive; `known` those that policies see, which are more
    where an UPDATE left large values unchanged. Not `is_whole`: only the replica identity is known, so policies cannot be evaluated. Not
    `is_judgeable`: a column that policies read is absent, or too large."""

    published: Image
    known: Image
    is_whole: bool
    is_judgeable: bool = True


@dataclass(slots=True, eq=False)
class Verdict:
    """A change, and the recipients of each view of it."""

    change: Change
    action: Action
    new: RowVersion | None
    old: RowVersion | None
    recipients: list[tuple[View, Sequence[Entry]]] = field(default_factory=list)


class _Interest(NamedTuple):
    """What entries have in common. `identity` is the current one, which may be newer than that of the activation."""

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
    """`entries` have the same interest, so they are evaluated once. The filter is evaluated on `image`. `is_leaving`: an UPDATE that may
    remove the row from what they see; not `is_wanted_event`: an UPDATE that they want only if it removes the row."""

    verdict: Verdict
    interest: _Interest
    entries: Sequence[Entry]
    image: Image
    is_leaving: bool = False
    is_wanted_event: bool = True
    is_fulfilled: bool = False

    @property
    def version(self) -> RowVersion:
        """The row version that the filter is evaluated on."""
        version = self.verdict.old if self.is_leaving else self.verdict.new or self.verdict.old
        assert version is not None, "a change has a row"
        return version


class Round:
    """Evaluates one batch of one table.

    `is_captured`: the changes come from triggers, which do not apply the publication's row filters and column lists. `quarantined`:
    identities whose policies are not evaluated. `strict_deletes`: where the deleted row is not known, and so nobody can say who saw it,
    roles that row-level security binds do not even receive its key. `is_last_try`: changes that cannot be rendered become a gap.

    Afterwards, `judged` are the identities whose policies were evaluated; `indeterminate` those among them for whom this failed, and
    `unmatched` entries whose filter failed, each with the reason. `slow` are conditions that took long, with the seconds. `failed` are
    entries to be notified of a gap: policies need values of a row that are not known any more, or the row cannot be rendered.
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
        self._visible: dict[Identity, set[int]] = defaultdict(set)
        self.judged: set[Identity] = set()
        self.indeterminate: dict[Identity, str] = {}
        self.unmatched: dict[Entry, str] = {}
        self.failed: set[Entry] = set()
        self.slow: dict[tuple[Entry, Condition], float] = defaultdict(float)

    async def evaluate(self, changes: Sequence[Change]) -> list[Verdict]:
        """Return a verdict for each change. Raises: Outdated, DatabaseUnavailable, QueryCanceled, database.Error."""
        verdicts = [self._verdict(change) for change in changes]
        if self._is_captured and self._table.row_filter is not None:
            verdicts = await self._filter_rows(verdicts)
        await self._complete(verdicts)
        self._fail_unknown(verdicts)
        candidates = self._find_candidates(verdicts)
        if candidates:
            await self._query_visibility(candidates)
            for candidate in await self._match([candidate for candidate in candidates if self._may_match(candidate)]):
                candidate.is_fulfilled = True
            self._choose_recipients(candidates)
        await self._render([verdict for verdict in verdicts if verdict.recipients])
        return verdicts

    def _verdict(self, change: Change) -> Verdict:
        # Where only the root of partitions has REPLICA IDENTITY FULL, the log marks as a whole row what is a key and nulls.
        has_whole_old = change.has_whole_old and (self._is_captured or self._table.has_whole_old)
        return Verdict(
            change, change.action, self._row_version(change.new, True), self._row_version(change.old, has_whole_old)
        )

    def _row_version(self, image: Image | None, is_whole: bool) -> RowVersion | None:
        if image is None:
            return None
        published = known = {name: value for name, value in image.items() if name in self._table.names}
        if len(image) > len(published):
            known = {name: value for name, value in image.items() if name in self._table.all_names}
            if len(known) < min(len(image), len(self._table.all_names)):
                # Taking the value from the current row would mean to evaluate policies on that one.
                raise Outdated(f"columns have gone, others have come: {', '.join(sorted(image.keys() - known.keys()))}")
        return RowVersion(published, known, is_whole)

    async def _filter_rows(self, verdicts: list[Verdict]) -> list[Verdict]:
        """Apply the publication's row filter as the log does: an UPDATE into the filter is an INSERT, one out of it a DELETE."""
        batch = RowBatch()
        for verdict in verdicts:
            for version in _versions(verdict):
                batch.add(version.known)
        passing = await self._judge.published(self._table, batch.json())
        kept = []
        for verdict in verdicts:
            comes, goes = (
                version is not None and batch.number_of(version.known) in passing
                for version in (verdict.new, verdict.old)
            )
            if verdict.action is Action.UPDATE and comes != goes:
                verdict.action = Action.INSERT if comes else Action.DELETE
                verdict.new, verdict.old = (verdict.new, None) if comes else (None, verdict.old)
            if comes or goes:
                kept.append(verdict)
        return kept

    # -- candidates

    def _find_candidates(self, verdicts: Iterable[Verdict]) -> list[_Candidate]:
        """Find candidates by the index. Entries that receive an error receive it whatever the filter says."""
        # Most changes have the same candidates: these are grouped once.
        known: dict[int, list[tuple[_Interest, list[Entry]]]] = {}

        def interests(image: Image) -> Iterator[tuple[_Interest, list[Entry]]]:
            for group in self._subscriptions.candidate_groups(self._table.relation, image):
                if id(group) not in known:
                    groups: dict[_Interest, list[Entry]] = defaultdict(list)
                    for entry in group:
                        if self._may_read_filter(entry):
                            groups[_Interest.of(entry)].append(entry)
                    known[id(group)] = list(groups.items())
                yield from known[id(group)]

        candidates = []
        for verdict in verdicts:
            action, new, old = verdict.action, verdict.new, verdict.old
            if new is None:
                assert old is not None, "a change without a new row has an old one"
                image = {name: value for name, value in old.published.items() if name in self._table.identity}
                # Where policies cannot be evaluated, roles that row-level security binds receive nothing but the key.
                key = image if old.is_whole else {name: image[name] for name in image.keys() & self._table.key}
                for is_bound, known_image in ((False, image), (True, key)):
                    for interest, entries in interests(known_image):
                        if (
                            self._is_bound(interest.identity) is is_bound
                            and interest.event in ("*", action)
                            and self._table.access_of(interest.identity.role).columns
                        ):
                            candidates.append(_Candidate(verdict, interest, entries, known_image))
                continue
            self._add_refused(verdict)
            may_leave = action is Action.UPDATE and old is not None and old.is_whole
            for interest, entries in interests(new.published):
                is_wanted_event = interest.event in ("*", action)
                if (is_wanted_event or (may_leave and interest.leaves)) and self._may_read_key(interest.identity.role):
                    candidates.append(
                        _Candidate(verdict, interest, entries, new.published, is_wanted_event=is_wanted_event)
                    )
            if may_leave:
                assert old is not None
                for interest, entries in interests(old.published):
                    if (
                        interest.leaves
                        and interest.event in ("*", Action.DELETE)
                        and self._may_read_key(interest.identity.role)
                    ):
                        candidates.append(_Candidate(verdict, interest, entries, old.published, is_leaving=True))
        return candidates

    def _add_refused(self, verdict: Verdict) -> None:
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
                verdict.recipients.append((view, refused))

    def _may_read_filter(self, entry: Entry) -> bool:
        """Check that the role may still read the columns of the filter: otherwise a matching change would reveal the value."""
        columns = self._table.access_of(entry.claims.role).columns
        return all(condition.column in columns for condition in entry.binding.conditions)

    def _may_read_key(self, role: str) -> bool:
        return bool(self._table.key) and self._table.key <= self._table.access_of(role).columns

    # -- missing values

    async def _complete(self, verdicts: list[Verdict]) -> None:
        """Add generated columns, and values that the log omits: unpublished columns, and large values that an UPDATE left unchanged.
        Clients do not receive the latter, but policies may read them."""
        names, generated = self._table.all_names, self._table.generated
        needed = names if self._table.has_generated else self._table.policy_columns
        lacking = [
            version
            for verdict in verdicts
            for version in _versions(verdict)
            # Triggers see virtual columns as null.
            if version.is_whole
            and (not needed <= version.known.keys() or (self._table.has_generated and self._is_captured))
            and _size(version.known, names) <= MAX_JUDGED_BYTES
        ]
        if not lacking:
            return
        batch = RowBatch()
        for version in lacking:
            batch.add(version.known)
        known = await self._judge.complete(self._table, batch.json())
        for number, version in enumerate(lacking):
            version.known = {name: value for name, value in known[number].items() if name in names}
            version.published |= {name: value for name, value in version.known.items() if name in generated}

    def _fail_unknown(self, verdicts: Iterable[Verdict]) -> None:
        """Report a gap where policies read an unknown value, whatever the filters say: comparing would reveal the row. A row that is too
        large for policies is no fault of a client, and nobody is notified."""
        columns = self._table.policy_columns
        for verdict in verdicts:
            for version in _versions(verdict):
                if not version.is_whole:
                    continue
                is_known = columns <= version.known.keys()
                is_too_large = _size(version.known, columns) > MAX_JUDGED_BYTES
                version.is_judgeable = is_known and not is_too_large
                if is_too_large:
                    log.warning("a row is too large for policies", table=str(self._table))
                elif not is_known and self._table.has_row_security:
                    self._fail(verdict, is_leaving=version is verdict.old and verdict.new is not None)

    def _fail(self, verdict: Verdict, *, is_leaving: bool) -> None:
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
                self.failed.add(entry)

    # -- visibility

    async def _query_visibility(self, candidates: list[_Candidate]) -> None:
        """Evaluate policies once for each role and claims."""
        usual = RowBatch(self._table.policy_columns)
        large: dict[int, tuple[RowVersion, list[Identity]]] = {}
        asked: dict[Identity, dict[int, RowVersion]] = defaultdict(dict)
        for candidate in candidates:
            identity = candidate.interest.identity
            if self._is_bound(identity) and identity not in self._quarantined:
                for version in _versions(candidate.verdict):
                    if version.is_whole and version.is_judgeable:
                        asked[identity][id(version)] = version
        wanted: dict[Identity, dict[int, RowVersion]] = defaultdict(dict)
        for identity, versions in asked.items():
            for version in versions.values():
                if _size(version.known, self._table.policy_columns) > LARGE_IMAGE_BYTES:
                    large.setdefault(id(version), (version, []))[1].append(identity)
                else:
                    wanted[identity][usual.add(version.known)] = version
        questions = list(wanted.items())
        if questions:
            visibilities = await self._judge.visible_rows(self._table, usual.json(), questions)
            for (identity, numbered), visibility in zip(questions, visibilities, strict=True):
                self._visible[identity].update(id(numbered[number]) for number in visibility.images)
                self.judged.add(identity)
                if visibility.problem is not None:
                    self.indeterminate[identity] = visibility.problem
                if visibility.unknown:
                    self._note_unknown(candidates, identity, {id(numbered[number]) for number in visibility.unknown})
        for version, identities in large.values():
            await self._query_large(version, identities)

    async def _query_large(self, version: RowVersion, identities: list[Identity]) -> None:
        """Evaluate policies on a large row alone: on failure an identity does not receive this row, but is not quarantined."""
        batch = RowBatch(self._table.policy_columns)
        number = batch.add(version.known)
        for identity, visibility in zip(
            identities,
            await self._judge.visible_large_rows(
                self._table, batch.json(), [(identity, (number,)) for identity in identities]
            ),
            strict=True,
        ):
            if number in visibility.images:
                self._visible[identity].add(id(version))
            elif visibility.problem is not None:
                log.warning(
                    "policies could not be evaluated on a large row",
                    table=str(self._table),
                    problem=visibility.problem[:5],
                )

    def _note_unknown(self, candidates: Iterable[_Candidate], identity: Identity, versions: Collection[int]) -> None:
        """Report a gap where a domain turned out to refuse null."""
        for candidate in candidates:
            if candidate.interest.identity == identity and id(candidate.version) in versions:
                self.failed.update(_entries_in_time(candidate))

    def _sees(self, candidate: _Candidate, version: RowVersion | None) -> bool:
        if version is None or not self._is_bound(candidate.interest.identity):
            return version is not None
        return id(version) in self._visible[candidate.interest.identity]

    # -- filters

    def _may_match(self, candidate: _Candidate) -> bool:
        return self._sees(candidate, candidate.version) or (
            candidate.verdict.new is None and self._gets_unknown_delete(candidate)
        )

    async def _match(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """Return the candidates whose conditions are satisfied. Each condition is evaluated on the images that its identity may see."""
        by_role = defaultdict(list)
        for candidate in candidates:
            if candidate.interest.rest:
                by_role[candidate.interest.identity.role].append(candidate)
        unfulfilled: set[_Candidate] = set()
        for role, asked in by_role.items():
            batch = RowBatch({condition.column for candidate in asked for condition in candidate.interest.rest})
            images: dict[tuple[Identity, Condition], set[int]] = defaultdict(set)
            for candidate in asked:
                number = batch.add(candidate.image)
                for condition in candidate.interest.rest:
                    images[candidate.interest.identity, condition].add(number)
            questions = {
                key: Question(key[1], tuple(sorted(numbers)) if len(numbers) < len(batch) else None)
                for key, numbers in images.items()
            }
            numbers = {question: number for number, question in enumerate(dict.fromkeys(questions.values()))}
            matches = await self._judge.match(self._table, role, batch.json(), list(numbers))
            for candidate in asked:
                image = batch.number_of(candidate.image)
                own = [
                    numbers[questions[candidate.interest.identity, condition]] for condition in candidate.interest.rest
                ]
                if not all((image, number) in matches.found for number in own):
                    unfulfilled.add(candidate)
                for number in own:
                    if seconds := matches.slow_s.get(number):
                        for entry in candidate.entries:
                            self.slow[entry, list(numbers)[number].condition] += seconds
                    if number in matches.problems:
                        self.unmatched |= dict.fromkeys(candidate.entries, matches.problems[number])
        return [candidate for candidate in candidates if candidate not in unfulfilled]

    # -- recipients

    def _choose_recipients(self, candidates: list[_Candidate]) -> None:
        # Leaving is evaluated after staying: a subscriber that still sees the row is not told that it is gone.
        staying: dict[Verdict, set[Entry]] = {
            candidate.verdict: set() for candidate in candidates if candidate.is_leaving
        }
        for candidate in sorted(candidates, key=lambda candidate: candidate.is_leaving):
            verdict = candidate.verdict
            if not candidate.is_fulfilled:
                continue
            if candidate.is_leaving:
                self._add_recipients(candidate, Action.DELETE, self._table.key, but=staying[verdict])
            elif verdict.new is None:
                self._add_recipients(
                    candidate, Action.DELETE, self._table.key if self._table.has_row_security else self._table.identity
                )
            else:
                if verdict in staying:
                    staying[verdict].update(candidate.entries)
                if candidate.is_wanted_event:
                    # A subscriber that sees the row now may not have seen the old one.
                    is_known = self._sees(candidate, verdict.old)
                    self._add_recipients(
                        candidate, verdict.action, self._table.identity if is_known else self._table.key
                    )

    def _gets_unknown_delete(self, candidate: _Candidate) -> bool:
        """Whether to send the DELETE of a row of which only the key is known, as applications expect."""
        old = candidate.verdict.old
        return (
            old is not None
            and not old.is_whole
            and not self._strict_deletes
            and candidate.interest.identity not in self._quarantined
        )

    def _is_bound(self, identity: Identity) -> bool:
        return self._table.access_of(identity.role).is_bound

    def _add_recipients(
        self, candidate: _Candidate, action: Action, old: frozenset[str], *, but: Collection[Entry] = ()
    ) -> None:
        entries = [entry for entry in _entries_in_time(candidate) if entry not in but]
        columns = self._table.access_of(candidate.interest.identity.role).columns
        if candidate.interest.select:
            columns &= self._table.key.union(candidate.interest.select)
        if entries:
            candidate.verdict.recipients.append((View(action, columns, old & columns), entries))

    # -- rendering

    async def _render(self, verdicts: list[Verdict]) -> None:
        """Render what is sent as `to_jsonb` does. Where that fails, the recipients are notified of a gap."""
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
                    self.failed.update(
                        entry for view, entries in verdict.recipients if view.error is None for entry in entries
                    )
                    verdict.recipients = [
                        (view, entries) for view, entries in verdict.recipients if view.error is not None
                    ]

    async def _render_together(self, verdicts: Sequence[Verdict]) -> None:
        versions = [version for verdict in verdicts if _has_values(verdict) for version in _versions(verdict)]
        if not versions:
            return
        batch = RowBatch()
        for version in versions:
            batch.add(version.published)
        rendered = await self._judge.render(self._table, batch.json())
        for number, version in enumerate(versions):
            version.published = {name: value for name, value in rendered[number].items() if name in version.published}


class RowBatch:
    """Images that are sent to the database together, each once, numbered from 0; only `columns` of them, if given."""

    def __init__(self, columns: Collection[str] | None = None) -> None:
        self._columns = columns
        # Dictionaries cannot be keys; the images live as long as the batch, so their ids are unique.
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


def _entries_in_time(candidate: _Candidate) -> list[Entry]:
    """Return the entries that were active before the commit."""
    return [entry for entry in candidate.entries if not entry.registration.is_past(candidate.verdict.change.xid)]


def _versions(verdict: Verdict) -> Iterable[RowVersion]:
    return [version for version in (verdict.new, verdict.old) if version is not None]


def _has_values(verdict: Verdict) -> bool:
    """Whether any recipient gets values."""
    return any(view.error is None for view, _ in verdict.recipients)


def _size(image: Image, columns: Collection[str]) -> int:
    """Return the size of these columns in bytes, as they are sent."""
    return sum(len(bytes(value)) for name, value in image.items() if name in columns)
