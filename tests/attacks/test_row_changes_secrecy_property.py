"""Whatever tables, policies, filters and rows there are: what a client observes does not depend on rows that it may not see.

Each case is played twice. The second time, the secrets in all rows that one client may not see, as PostgreSQL's own SELECT says, are other
ones. The client must be told the same, and no secret of a row that is hidden from everybody is compared or rendered at all.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, NamedTuple, cast

import psycopg
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from realtime_server.changes.activation import _entry
from realtime_server.changes.catalog import Catalog, Table
from realtime_server.changes.change import Action, Change, Image
from realtime_server.changes.evaluation import Round
from realtime_server.changes.judge import Identity, Judge, Matches, Question, Rejected
from realtime_server.changes.payload import encode
from realtime_server.changes.subscriptions import Entry, Registration, Subscriptions
from realtime_server.claims import Claims
from realtime_server.database import Endpoint, Pool
from realtime_server.protocol import bindings
from tests.fix_database import Cluster, TestDatabase

USERS = [f"00000000-0000-0000-0000-00000000000{letter}" for letter in "abc"]
CLAIMS = [
    Claims(role, sub, 0, json.dumps({"role": role, "sub": sub, "level": level}))
    for role, sub, level in (
        ("anon", None, 0),
        ("authenticated", USERS[0], 1),
        ("authenticated", USERS[1], 2),
        ("service_role", None, 0),
    )
]
# None of them reads what is secret.
POLICIES = [
    ["for select using (owner = (select auth.uid()))"],
    ["for select to authenticated using (level <= (auth.jwt() ->> 'level')::int)"],
    ["for select using (true)", "as restrictive for select using (owner is null or owner = auth.uid())"],
    ["for select using (owner = auth.uid())", "for select to anon using (level = 0)"],
    [
        "for select using (level in (select m.level from members as m join members as n using (who) where n.who = auth.uid()))"
    ],
    ["for select using (seen_by(docs_5) is true)"],
    ["for select using (level = 0 or 1 / level > 0 and owner = auth.uid())"],
    [],
]
WORDS = ["alpha", "beta", "gamma", "delta"]
FILTERS = [
    None,
    *(
        f"secret={operator}.{word}"
        for operator in ("eq", "neq", "like", "match", "gt", "isdistinct", "not.imatch")
        for word in WORDS
    ),
    "secret=in.(alpha,beta)",
    "secret=like.%a%,n=gt.1",
    "n=gt.2",
    "n=eq.1,secret=neq.gamma",
    "checked=eq.alpha",
    "checked=match.^[ab]",
    f"owner=eq.{USERS[0]}",
    "level=gte.1,secret=ilike.B%",
]


class Recording(Judge):
    """Notes what is compared and rendered."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.compared: list[bytes] = []

    async def match(self, table: Table, role: str, images: bytes, questions: Sequence[Question]) -> Matches:
        self.compared.append(images)
        return await super().match(table, role, images, questions)

    async def visible_rows(
        self, table: Table, images: bytes, wanted: Sequence[tuple[Identity, Collection[int]]]
    ) -> Any:
        # Judging is to be given what policies read, and nothing else.
        if "mark" not in table.policy_columns:
            self.compared.append(images)
        return await super().visible_rows(table, images, wanted)

    async def render(self, table: Table, images: bytes) -> list[Image]:
        self.compared.append(images)
        return await super().render(table, images)


class World(NamedTuple):
    db: psycopg.Connection[Any]
    judge: Recording
    tables: list[Table]


class Row(NamedTuple):
    id: int
    owner: str | None
    level: int
    secret: str
    n: int

    def image(self, marks: bool = True) -> dict[str, str | None]:
        # The mark says which row it is, where it turns up.
        secret = self.secret
        return {
            "id": str(self.id),
            "owner": self.owner,
            "level": str(self.level),
            "secret": secret,
            "n": str(self.n),
            "checked": secret,
            "mark": f"mark-{self.id}-{secret}",
        }


def prepare(database: TestDatabase) -> None:
    with database.connect() as db:
        db.execute("create domain checked as text check (length(value) < 100)")
        db.execute("create table members (who uuid, level int)")
        db.execute("grant select on members to public")
        db.execute("insert into members values (%s, 1), (%s, 2), (%s, 0)", (USERS[0], USERS[1], USERS[1]))
        for number in range(len(POLICIES)):
            db.execute(
                f"create table docs_{number} (id int primary key, owner uuid, level int, secret text, n int, checked checked,"
                " mark text)".encode()
            )
        db.execute(
            "create function seen_by(docs_5) returns boolean language plpgsql as"
            " $$ begin return $1.owner = auth.uid() and exists (select from members where who = $1.owner); end $$"
        )
        for number, policies in enumerate(POLICIES):
            db.execute(f"alter table docs_{number} enable row level security".encode())
            db.execute(f"grant select on docs_{number} to anon, authenticated, service_role".encode())
            for at, policy in enumerate(policies):
                kind, _, rest = policy.partition("for ")
                db.execute(f"create policy p{at} on docs_{number} {kind} for {rest}".encode())
            db.execute(f"alter publication supabase_realtime add table docs_{number}".encode())


@pytest.fixture(scope="module", params=["cluster", "old_cluster"], ids=["newest", "oldest"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    cluster: Cluster = request.getfixturevalue(request.param)
    database = cluster.create("heads")
    prepare(database)
    pool = Pool(Endpoint(database.url), name="test", size=1, timeout_s=30, statement_timeout_s=30, runs_user_code=True)
    await pool.open()
    catalog = Catalog(pool, sorted({one.role for one in CLAIMS}))
    await catalog.refresh()
    tables = sorted(catalog.tables.values(), key=lambda table: table.name)
    with database.connect() as db:
        db.execute("set search_path = public, extensions")
        yield World(db, Recording(pool), tables)
    await pool.close()
    cluster.drop(database)


rows = st.builds(
    Row, st.just(0), st.sampled_from([None, *USERS]), st.integers(0, 2), st.sampled_from(WORDS), st.integers(0, 3)
)
actions = st.sampled_from(list(Action))
wanted = st.lists(
    st.tuples(
        st.integers(0, len(CLAIMS) - 1),
        st.sampled_from(FILTERS),
        st.sampled_from(["*", "UPDATE", "DELETE"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


def seen_by(world: World, table: Table, who: Claims, all_rows: Sequence[Row]) -> set[Row]:
    """As SELECT says; none where it raises, and each row by itself, because one that raises says nothing of the others."""
    found = set()
    for row in all_rows:
        with world.db.transaction(force_rollback=True):
            image = row.image()
            world.db.execute(
                f"insert into {table} values (%s, %s, %s, %s, %s, %s, %s)".encode(),
                [image[name] for name in ("id", "owner", "level", "secret", "n", "checked", "mark")],
            )
            try:
                with world.db.transaction():
                    world.db.execute("select realtime_internal.take_identity(%s, %s)", (who.role, who.json))
                    if world.db.execute(f"select id from {table}".encode()).fetchall():
                        found.add(row)
                    raise psycopg.Rollback
            except psycopg.Error:
                pass
    return found


async def play(
    world: World,
    table: Table,
    wishes: Sequence[tuple[int, str | None, str, bool]],
    steps: Sequence[tuple[Action, Row, Row]],
) -> dict[int, Any]:
    """What each client observes, by its number."""
    subscriptions = Subscriptions()
    entries: dict[Entry, tuple[int, int]] = {}
    refused = []
    for number, (client, filter, action, leaves) in enumerate(wishes):
        registration = Registration(cast(Any, None), CLAIMS[client], ())
        binding = bindings.parse(
            {"event": action, "schema": table.schema, "table": table.name, "filter": filter, "leaves": leaves}
        )
        try:
            exact = await world.judge.check(table, CLAIMS[client].role, binding.conditions, ())
        except Rejected as error:
            refused.append((number, str(error)))
            continue
        entry = _entry(registration, number, binding, table, exact)
        entries[entry] = (client, number)
        subscriptions.put(registration, [entry])
    round = Round(
        world.judge,
        subscriptions,
        table,
        is_captured=True,
        strict_deletes=False,
        quarantined=(),
        is_last_try=True,
    )
    changes = [
        Change.of_rows(
            table.relation,
            action,
            0.0,
            None if action is Action.DELETE else new.image(),
            None if action is Action.INSERT else old.image(),
            True,
            xid,
        )
        for xid, (action, old, new) in enumerate(steps, start=1)
    ]
    observed: dict[int, list[Any]] = {client: [] for client, *_ in wishes}
    for verdict in await round.evaluate(changes):
        for view, told in verdict.recipients:
            new, old = (None if version is None else version.published for version in (verdict.new, verdict.old))
            data = encode(table, verdict.change, new, old, view)
            for entry in told:
                client, number = entries[entry]
                observed[client].append(("told", verdict.change.xid, number, data))
    for entry, problem in round.unmatched.items():
        observed[entries[entry][0]].append(("unmatched", entries[entry][1], problem))
    for entry in round.failed:
        observed[entries[entry][0]].append(("missed", entries[entry][1]))
    return {client: sorted(map(str, told)) for client, told in observed.items()}


def changed(row: Row, visible: set[Row], words: dict[str, str]) -> Row:
    """With other secrets, if it is hidden."""
    return row if row in visible else row._replace(secret=words[row.secret], n=row.n + 1)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    number=st.integers(0, len(POLICIES) - 1),
    wishes=wanted,
    drawn=st.lists(st.tuples(actions, rows, rows), min_size=1, max_size=5),
    viewer=st.integers(0, 5),
    words=st.permutations(WORDS),
)
async def test_nothing_observable_depends_on_hidden_rows(
    world: World,
    number: int,
    wishes: list[tuple[int, str | None, str, bool]],
    drawn: list[tuple[Action, Row, Row]],
    viewer: int,
    words: list[str],
) -> None:
    table = world.tables[number]
    client = wishes[viewer % len(wishes)][0]
    # Old and new rows have the same key, and each image a number of its own for the mark.
    steps = [
        (action, old._replace(id=100 + at), new._replace(id=200 + at)) for at, (action, old, new) in enumerate(drawn)
    ]
    all_rows = [row for _, old, new in steps for row in (old, new)]
    access = {one.role: table.access_of(one.role).is_bound for one in CLAIMS}
    visible = {
        at: seen_by(world, table, one, all_rows) if access[one.role] else set(all_rows) for at, one in enumerate(CLAIMS)
    }
    event(f"{len(set(all_rows) - visible[client])} hidden of {len(all_rows)}")
    world.judge.compared.clear()
    first = await play(world, table, wishes, steps)
    compared = b"".join(world.judge.compared)
    present = {at for at, *_ in wishes}
    for action, old, new in steps:
        images = [new] if action is Action.INSERT else [old] if action is Action.DELETE else [old, new]
        if not any(image in visible[at] for image in images for at in present):
            for image in images:
                assert f"mark-{image.id}-".encode() not in compared, "a row that is hidden from everybody"
    for told in first[client]:
        for row in set(all_rows) - visible[client]:
            assert f"mark-{row.id}-" not in told, "a row that is hidden from this client"
    others = dict(zip(WORDS, words, strict=True))
    second = await play(
        world,
        table,
        wishes,
        [
            (action, changed(old, visible[client], others), changed(new, visible[client], others))
            for action, old, new in steps
        ],
    )
    assert second[client] == first[client]
