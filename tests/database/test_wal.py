"""Row changes from the log, against an oracle: what PostgreSQL says was committed is what is taken, once each, in the order of the commits,
whatever happens meanwhile.

Each written row is put into a ledger in the same transaction, and a second slot that nobody disturbs says in which order they committed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

import msgspec
import psycopg
import pytest
import structlog
from psycopg import conninfo, sql

from realtime_server.changes import pgoutput, wal
from realtime_server.changes.change import Change, Image
from realtime_server.changes.pgoutput import Begin, Insert
from realtime_server.changes.wal import SourceLost, WalSource
from realtime_server.database import Endpoint, Pool
from realtime_server.embedded import EmbeddedPostgres
from realtime_server.errors import EmbeddedError
from tests.database.test_relay import until
from tests.fix_database import OWNER, Cluster, TestDatabase, all_walsenders_taken
from tests.fix_postgres import FAST, open_folder
from tests.fix_proxy import Proxy, ProxyFactory, Pump

PUBLICATION = "supabase_realtime"
READER = "realtime_wal_reader"
TIMEOUT_S = 5
LIMIT_S = 30
WRITERS = 8
TRANSACTIONS_EACH = 12


# -- a database to read from


@dataclass(frozen=True)
class WalDatabase(TestDatabase):
    """`url` is of a role that owns what the owner owns, and may replicate."""

    slot: str = ""

    def administrate(self, query: LiteralString, *arguments: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.administrator_url, autocommit=True) as db:
            cursor = db.execute(query, arguments)
            return cursor.fetchall() if cursor.description else []

    def publish(self, *tables: LiteralString) -> None:
        for table in tables:
            self.administrate(f"alter publication supabase_realtime add table {table}")

    def oid(self, table: str) -> int:
        ((oid,),) = self.execute("select %s::regclass::oid::bigint", table)
        return int(oid)

    def slot_state(self) -> tuple[Any, ...] | None:
        """Whether somebody reads, and who."""
        rows = self.execute("select active, active_pid from pg_replication_slots where slot_name = %s", self.slot)
        return rows[0] if rows else None

    def end_walsender(self) -> int:
        """As an administrator does; how many."""
        query = "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = %s and active"
        return len(self.administrate(query, self.slot))


def prepare(cluster: Cluster) -> WalDatabase:
    database = cluster.create("heads")
    with psycopg.connect(cluster.administrator_url, autocommit=True) as db:
        if not db.execute("select 1 from pg_roles where rolname = %s", (READER,)).fetchone():
            db.execute(
                sql.SQL("create role {} login replication in role {}").format(
                    sql.Identifier(READER), sql.Identifier(OWNER)
                )
            )
        db.execute(sql.SQL("alter role {} password 'reader'").format(sql.Identifier(READER)))
    ((slot,),) = database.execute("select realtime_internal.slot_name()")
    url = conninfo.make_conninfo(database.url, user=READER, password="reader")
    return WalDatabase(url, database.administrator_url, slot)


def drop(cluster: Cluster, database: WalDatabase) -> None:
    query = "select pg_drop_replication_slot(slot_name) from pg_replication_slots where database = current_database()"
    with suppress(psycopg.errors.ObjectInUse):
        database.administrate(query)
    cluster.drop(database)


@pytest.fixture(autouse=True)
def _eager_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal, "STATUS_S", 0.2)


@pytest.fixture
def source_database(any_cluster: Cluster) -> Iterator[WalDatabase]:
    """On the newest PostgreSQL, and on the oldest at hand."""
    database = prepare(any_cluster)
    yield database
    drop(any_cluster, database)


@pytest.fixture
def newest_database(cluster: Cluster) -> Iterator[WalDatabase]:
    """For what is about connections, which are the same with every PostgreSQL."""
    database = prepare(cluster)
    yield database
    drop(cluster, database)


class OwnCluster:
    """A cluster that may be stopped and set, because nobody else is on it."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self.postgres = postgres
        self.cluster = Cluster(postgres.administrator_url)

    @property
    def port(self) -> int:
        return int(str(conninfo.conninfo_to_dict(self.postgres.administrator_url)["port"]))

    @property
    def log(self) -> str:
        return (self.postgres.location / "log").read_text() if (self.postgres.location / "log").is_file() else ""

    def set(self, **settings: str) -> None:
        """Until `reset`; what needs no restart takes effect at once."""
        with psycopg.connect(self.postgres.administrator_url, autocommit=True) as db:
            for name, value in settings.items():
                db.execute(sql.SQL("alter system set {} = {}").format(sql.Identifier(name), sql.Literal(value)))
            db.execute("select pg_reload_conf()")

    def reset(self) -> None:
        with psycopg.connect(self.postgres.administrator_url, autocommit=True) as db:
            db.execute("alter system reset all")
            db.execute("select pg_reload_conf()")

    def give(self, path: Path) -> None:
        """To the user that PostgreSQL runs as."""
        facts = (self.postgres.location / "PG_VERSION").stat()
        os.chown(path, facts.st_uid, facts.st_gid)

    async def restart(self, mode: Any = "immediate") -> None:
        await asyncio.to_thread(self.postgres.stop, mode)
        await asyncio.to_thread(self.postgres.start)


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[OwnCluster]:
    settings = {**FAST, "max_prepared_transactions": "10", "max_wal_senders": "3", "max_replication_slots": "4"}
    with open_folder() as folder:
        postgres = EmbeddedPostgres(folder / "data", settings=settings)
        try:
            yield OwnCluster(postgres.start())
        finally:
            postgres.stop("immediate")


@pytest.fixture
def own(own_cluster: OwnCluster) -> Iterator[OwnCluster]:
    yield own_cluster
    own_cluster.reset()


@pytest.fixture
def own_database(own: OwnCluster) -> Iterator[WalDatabase]:
    database = prepare(own.cluster)
    yield database
    drop(own.cluster, database)


# -- somebody who takes changes


class Received:
    """What was taken. Changes wait before the `gate`, which closes behind each piece if they are to come one by one."""

    def __init__(self, database: WalDatabase) -> None:
        self.database = database
        self.changes: list[Change] = []
        self.pieces: list[int] = []
        self.gaps: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_waiting = False
        self.one_by_one = False

    async def take(self, changes: Sequence[Change]) -> None:
        self.is_waiting = True
        await self.gate.wait()
        self.is_waiting = False
        if self.one_by_one:
            self.gate.clear()
        self.pieces.append(len(changes))
        self.changes.extend(changes)

    def gap(self, problem: str) -> None:
        self.gaps.append(problem)

    @property
    def numbers(self) -> list[int]:
        return [int(value(change.new, "number")) for change in self.changes if change.new and "number" in change.new]

    async def until_there_are(self, count: int) -> list[Change]:
        await until(lambda: len(self.changes) >= count, f"{count} changes")
        return self.changes

    @property
    def told(self) -> list[tuple[str, dict[str, Any] | None, dict[str, Any] | None]]:
        return [(change.action.value, plain(change.new), plain(change.old)) for change in self.changes]


def plain(image: Image | None) -> dict[str, Any] | None:
    return None if image is None else {name: json.loads(bytes(raw)) for name, raw in image.items()}


def value(image: Image, name: str) -> Any:
    return json.loads(bytes(image[name]))


def source_of(
    database: WalDatabase, *, url: str | None = None, is_pooled: bool = False, timeout_s: float = TIMEOUT_S
) -> WalSource:
    target = Endpoint(url or database.url, is_pooled=is_pooled)
    pool = Pool(target, name="pool", size=1, timeout_s=timeout_s, statement_timeout_s=timeout_s)
    return WalSource(
        target,
        pool,
        publication=PUBLICATION,
        slot=database.slot,
        timeout_s=timeout_s,
    )


@asynccontextmanager
async def running(source: WalSource, received: Received) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(source.run(received))
    try:
        await until(lambda: source.is_ready or task.done(), "the source to be ready")
        assert source.is_ready, task
        yield task
        assert not task.done(), task
    finally:
        before = received.database.slot_state()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

        def is_free() -> bool:
            state = received.database.slot_state()
            # Or another source has it by now.
            return not state or not state[0] or state != before

        # PostgreSQL has noticed that we are gone.
        await until(is_free, "the slot to be free")


@asynccontextmanager
async def reading(database: WalDatabase) -> AsyncIterator[Received]:
    received = Received(database)
    async with running(source_of(database), received):
        yield received
    assert received.gaps == []


async def obstacle_of(database: WalDatabase, **options: Any) -> str | None:
    source = source_of(database, **options)
    await source._pool.open()
    try:
        return await source.obstacle()
    finally:
        await source._pool.close()


# -- what changes look like


async def test_each_kind_of_change_under_the_default_identity(source_database: WalDatabase) -> None:
    source_database.execute("create table item (number bigint primary key, body text, meta jsonb)")
    source_database.publish("item")
    async with reading(source_database) as received:
        for query in (
            "insert into item values (1, 'one', '{\"a\": [1, 2.50]}'), (2, null, null)",
            "update item set body = 'uno' where number = 1",
            "update item set number = 3 where number = 2",
            "insert into item values (1, 'x') on conflict (number) do update set body = excluded.body",
            "delete from item where number = 3",
            "truncate item",
            "insert into item values (9)",
        ):
            source_database.execute(query)
        changes = await received.until_there_are(7)
    # As PostgreSQL writes it, to the letter.
    meta = '{"a": [1, 2.50]}'
    assert received.told == [
        ("INSERT", {"number": "1", "body": "one", "meta": meta}, None),
        ("INSERT", {"number": "2", "body": None, "meta": None}, None),
        ("UPDATE", {"number": "1", "body": "uno", "meta": meta}, {"number": "1"}),
        ("UPDATE", {"number": "3", "body": None, "meta": None}, {"number": "2"}),
        ("UPDATE", {"number": "1", "body": "x", "meta": meta}, {"number": "1"}),
        ("DELETE", None, {"number": "3"}),
        ("INSERT", {"number": "9", "body": None, "meta": None}, None),
    ]
    assert {change.table for change in changes} == {source_database.oid("item")}
    assert not any(change.has_whole_old for change in changes)
    ((now,),) = source_database.execute("select extract(epoch from now())::float")
    times = [change.committed_at for change in changes]
    assert times == sorted(times)
    assert times[0] == times[1] < times[2]
    assert now - 60 < times[-1] <= now


async def test_old_rows_are_as_the_replica_identity_says(source_database: WalDatabase) -> None:
    for name in ("whole", "by_index", "nothing"):
        source_database.execute(f"create table {name} (number int primary key, code int not null unique, body text)")
    source_database.execute("alter table whole replica identity full")
    source_database.execute("alter table by_index replica identity using index by_index_code_key")
    source_database.execute("alter table nothing replica identity nothing")
    source_database.publish("whole", "by_index", "nothing")
    async with reading(source_database) as received:
        source_database.execute("insert into nothing values (2, 2)")
        for table in ("whole", "by_index"):
            for query in (
                "insert into {} values (1, 10)",
                "update {} set body = 'b'",
                "update {} set code = 20",
                "delete from {}",
            ):
                source_database.execute(query.format(table))
        changes = await received.until_there_are(9)

    def row(code: int, body: str | None) -> dict[str, Any]:
        return {"number": "1", "code": str(code), "body": body}

    assert received.told[0] == ("INSERT", {"number": "2", "code": "2", "body": None}, None)
    assert received.told[1:5] == [
        ("INSERT", row(10, None), None),
        ("UPDATE", row(10, "b"), row(10, None)),
        ("UPDATE", row(20, "b"), row(10, "b")),
        ("DELETE", None, row(20, "b")),
    ]
    assert [change.has_whole_old for change in changes[1:5]] == [False, True, True, True]
    assert received.told[5:] == [
        ("INSERT", row(10, None), None),
        ("UPDATE", row(10, "b"), {"code": "10"}),
        ("UPDATE", row(20, "b"), {"code": "10"}),
        ("DELETE", None, {"code": "20"}),
    ]
    assert not any(change.has_whole_old for change in changes[5:])


async def test_large_values_that_an_update_does_not_touch(source_database: WalDatabase) -> None:
    large = "".join(random.Random(1).choices("abcdefgh", k=20_000))
    for name in ("item", "whole"):
        source_database.execute(f"create table {name} (number int primary key, body text, meta jsonb, n int)")
        source_database.publish(name)
    source_database.execute("alter table whole replica identity full")
    async with reading(source_database) as received:
        for name in ("item", "whole"):
            source_database.execute(f"insert into {name} values (1, %s, jsonb_build_array(%s::text), 0)", large, large)
            source_database.execute(f"update {name} set n = 1")
        changes = await received.until_there_are(4)
    whole = {"number": "1", "body": large, "meta": f'["{large}"]'}
    assert received.told[1] == ("UPDATE", {"number": "1", "n": "1"}, {"number": "1"})
    assert received.told[3] == ("UPDATE", {**whole, "n": "1"}, {**whole, "n": "0"})
    assert [change.size > 40_000 for change in changes] == [True, False, True, True]


@pytest.mark.parametrize("via_root", [False, True])
async def test_partitions_are_told_by_their_own_name_or_the_roots(source_database: WalDatabase, via_root: bool) -> None:
    source_database.execute(
        "create table part (number int, body text, primary key (number)) partition by range (number)"
    )
    source_database.execute("create table part_low partition of part for values from (0) to (10)")
    # Other columns in another order, one of them dropped.
    source_database.execute("create table part_high (gone int, body text, number int not null, primary key (number))")
    source_database.execute("alter table part_high drop column gone")
    source_database.execute("alter table part attach partition part_high for values from (10) to (20)")
    source_database.administrate(f"alter publication supabase_realtime set (publish_via_partition_root = {via_root})")
    source_database.publish("part")
    async with reading(source_database) as received:
        source_database.execute("insert into part values (1, 'low'), (11, 'high')")
        source_database.execute("update part set number = 12 where number = 1")
        await received.until_there_are(4)
    # To PostgreSQL, a row that moves is deleted here and inserted there.
    assert received.told == [
        ("INSERT", {"number": "1", "body": "low"}, None),
        ("INSERT", {"number": "11", "body": "high"}, None),
        ("DELETE", None, {"number": "1"}),
        ("INSERT", {"number": "12", "body": "low"}, None),
    ]
    tables = ["part"] * 4 if via_root else ["part_low", "part_high", "part_low", "part_high"]
    assert [change.table for change in received.changes] == [source_database.oid(table) for table in tables]


VALUES: dict[str, list[str]] = {
    "smallint": ["-32768"],
    "integer": ["2147483647"],
    "bigint": ["-9223372036854775808"],
    "numeric": ["12345678901234567890.12345678901234567890", "NaN", "Infinity"],
    "numeric(10,2)": ["1.50"],
    "real": ["1.1", "-Infinity", "1e-30"],
    "double precision": ["0.1", "NaN", "1.7976931348623157e308"],
    "money": ["12.34"],
    "boolean": ["true", "false"],
    "text": ["", 'say "é" \\ \n\t\x01 \U0001f600', "null"],
    "varchar(10)": ["x"],
    "char(5)": ["ab"],
    '"char"': ["c"],
    "name": ["n"],
    "bytea": ["\\x00ff27"],
    "date": ["2026-11-21", "infinity", "0044-03-15 BC"],
    "time": ["23:59:59.999999"],
    "timetz": ["12:00:00+05:45"],
    "timestamp": ["2026-11-21 01:02:03.000004"],
    "timestamptz": ["2026-11-21 01:02:03.5+05:45", "-infinity"],
    "interval": ["-1 year 2 mons -3 days 04:05:06.7"],
    "uuid": ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
    "json": ['{"b": 1,   "a": 1.00, "a": 2}', "null", "[\n1]"],
    "jsonb": ['{"b": 1, "a": 1.00}', '"text"', "12345678901234567890.10", "null"],
    "jsonpath": ['$."a"[*]'],
    "inet": ["10.0.0.1/8"],
    "cidr": ["10.0.0.0/8"],
    "macaddr": ["08:00:2b:01:02:03"],
    "macaddr8": ["08:00:2b:01:02:03:04:05"],
    "bit(3)": ["101"],
    "bit varying": ["10101"],
    "point": ["(1.5,-2)"],
    "line": ["{1,2,3}"],
    "lseg": ["[(0,0),(1,1)]"],
    "box": ["(1,1),(0,0)"],
    "path": ["((0,0),(1,1))"],
    "polygon": ["((0,0),(1,1),(1,0))"],
    "circle": ["<(0,0),1.5>"],
    "tsvector": ["'a':1 'b':2"],
    "tsquery": ["'a' & 'b'"],
    "xid8": ["12345678901"],
    "pg_lsn": ["16/B374D848"],
    "pg_snapshot": ["10:20:10,14"],
    "txid_snapshot": ["10:20:10,14"],
    "oid": ["4294967295"],
    "regclass": ["pg_class", "public.plain"],
    "regtype": ["integer", "public.mood"],
    "regproc": ["now"],
    "regnamespace": ["public"],
    "xid": ["7"],
    "cid": ["7"],
    "tid": ["(1,2)"],
    "int2vector": ["1 2"],
    "oidvector": ["1 2"],
    "int4range": ["[1,10)", "empty"],
    "tstzrange": ['["2026-11-21 00:00:00+00",)'],
    "datemultirange": ["{[2026-01-01,2026-02-01)}"],
    "integer[]": ["{1,NULL,3}", "[0:1]={1,2}", "{}"],
    "text[]": ['{"a b","c\\"d",NULL,"NULL"}', "{{a},{b}}"],
    "jsonb[]": ['{"{\\"a\\": 1}"}'],
    "timestamptz[]": ['{"2026-11-21 01:02:03+00"}'],
    "mood": ["glad"],
    "mood[]": ["{glad,calm}"],
    "place": ['(1,"a ""b""",glad)'],
    "place[]": ['{"(1,a,glad)"}'],
    "positive": ["5"],
    "document": ['{"a": 1}'],
    "deep_document": ['{"a":   1}'],
    "place_domain": ["(1,a,calm)"],
}

TYPES = """
create table plain ();
create type mood as enum ('calm', 'glad');
create type place as (x int, name text, mood mood);
create domain positive as int check (value > 0);
create domain document as jsonb;
create domain any_json as json;
create domain deep_document as any_json not null;
create domain place_domain as place;
"""


# Of the database; PostgreSQL would write many values otherwise.
ODD_SETTINGS = {
    "datestyle": "German",
    "intervalstyle": "iso_8601",
    "timezone": "Asia/Kathmandu",
    "bytea_output": "escape",
    "extra_float_digits": "-3",
}
PLAIN = "-c search_path=pg_catalog -c timezone=UTC -c datestyle=ISO -c intervalstyle=postgres -c bytea_output=hex -c extra_float_digits=1"


async def test_values_of_every_type_are_as_postgresql_writes_them_and_reads_them_back(
    source_database: WalDatabase,
) -> None:
    """Under settings of the database that would write many of them otherwise."""
    rows = max(map(len, VALUES.values()))
    written = [[values[min(row, len(values) - 1)] for values in VALUES.values()] for row in range(rows)]
    columns = [f"c{index}" for index in range(len(VALUES))]
    with source_database.connect() as db:
        db.execute(TYPES)
        definitions = ", ".join(f"{name} {type_}" for name, type_ in zip(columns, VALUES, strict=True))
        db.execute(f"create table every (number int primary key, {definitions})".encode())
        for name, setting in ODD_SETTINGS.items():
            db.execute(sql.SQL("alter database {} set {} = {}").format(
                sql.Identifier(db.info.dbname), sql.Identifier(name), sql.Literal(setting)
            ))  # fmt: skip
        missing = db.execute(
            "select typname from pg_type where typnamespace = 'pg_catalog'::regnamespace and typtype = 'b' and typarray <> 0"
            " and typname !~ '^(reg.*|xml|gtsvector|aclitem|refcursor|pg_dependencies|pg_ndistinct)$'"
            " and oid <> all(select atttypid from pg_attribute where attrelid = 'every'::regclass)"
        ).fetchall()
    assert missing == [], "every type of PostgreSQL is here, but for those that stand for others"
    source_database.publish("every")

    # `format` writes a value as its type does; a cast to text does not always.
    texts = ", ".join(f"case when {name} is not null then format('%%s', {name}) end" for name in columns)
    differences = ", ".join(
        f"case when realtime_internal.written(read.{name}) is distinct from realtime_internal.written(every.{name}) then '{type_}' end"
        for name, type_ in zip(columns, VALUES, strict=True)
    )
    async with reading(source_database) as received:
        with (
            psycopg.connect(source_database.url, autocommit=True, options=PLAIN) as plain_session,
            psycopg.connect(
                Endpoint(source_database.url).parameters(name="pool", timeout_s=5),
                autocommit=True,
            ) as odd_session,
        ):
            for number, row in enumerate(written):
                marks = ", ".join("%s" for _ in row)
                plain_session.execute(f"insert into public.every values (%s, {marks})".encode(), [number, *row])
            nulls = f"insert into public.every (number, c{list(VALUES).index('deep_document')}) values (%s, '{{}}')"
            plain_session.execute(nulls.encode(), [rows])
            changes = await received.until_there_are(rows + 1)
            for number, change in enumerate(changes):
                assert change.new is not None
                stored = plain_session.execute(
                    f"select {texts} from public.every as every where number = %s".encode(), [number]
                ).fetchone()
                for name, type_, text in zip(columns, VALUES, stored or (), strict=True):
                    assert json.loads(bytes(change.new[name])) == text, type_
                ((unlike,),) = odd_session.execute(
                    f"select array_remove(array[{differences}], null)"
                    " from public.every as every,"
                    " cast(realtime_internal.row_texts('public.every'::regclass, %s::jsonb) ->> 0 as public.every) as read"
                    " where every.number = %s".encode(),
                    [msgspec.json.encode([change.new]).decode(), number],
                ).fetchall()
                assert unlike == []


async def test_tables_may_change(source_database: WalDatabase) -> None:
    source_database.execute("create table item (number int primary key, body text)")
    source_database.execute("create table other (number int primary key)")
    source_database.publish("item")
    async with reading(source_database) as received:
        source_database.execute("insert into other values (1)")
        source_database.execute("insert into item values (1, 'a')")
        source_database.execute("alter table item rename column body to content")
        source_database.execute("update item set content = 'c' where number = 1")
        source_database.publish("other")
        source_database.execute("insert into other values (2)")
        source_database.execute("alter table item drop column content, add column more int default 7")
        source_database.execute("insert into item values (5)")
        await received.until_there_are(4)
    assert received.told == [
        ("INSERT", {"number": "1", "body": "a"}, None),
        ("UPDATE", {"number": "1", "content": "c"}, {"number": "1"}),
        ("INSERT", {"number": "2"}, None),
        ("INSERT", {"number": "5", "more": "7"}, None),
    ]


async def test_publications_may_be_narrow(newest_database: WalDatabase) -> None:
    """By row filters and column lists, which came with PostgreSQL 15."""
    newest_database.execute("create table item (number int primary key, body text, secret text)")
    newest_database.administrate(
        "alter publication supabase_realtime add table item (number, body) where (number < 100)"
    )
    async with reading(newest_database) as received:
        newest_database.execute("insert into item values (1, 'a', 's'), (100, 'b', 's')")
        newest_database.execute("update item set body = 'c' where number = 1")
        newest_database.execute("update item set number = number + 100 where number = 1")
        newest_database.administrate("alter publication supabase_realtime set table item")
        newest_database.execute("insert into item values (5, 'd', 's')")
        await received.until_there_are(4)
    assert received.told == [
        ("INSERT", {"number": "1", "body": "a"}, None),
        ("UPDATE", {"number": "1", "body": "c"}, {"number": "1"}),
        # It left the filter.
        ("DELETE", None, {"number": "1"}),
        ("INSERT", {"number": "5", "body": "d", "secret": "s"}, None),
    ]


# -- large transactions


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_memory_is_bounded_in_a_transaction_of_a_hundred_thousand_rows(newest_database: WalDatabase) -> None:
    newest_database.execute("create table item (number int primary key, body text)")
    newest_database.publish("item")

    class Counting(Received):
        count = 0
        most_bytes = 0

        async def take(self, changes: Sequence[Change]) -> None:
            for change in changes:
                assert int(value(change.new or {}, "number")) == self.count
                self.count += 1
            self.pieces.append(len(changes))
            self.most_bytes = max(self.most_bytes, resident_bytes())
            await asyncio.sleep(0)

    received = Counting(newest_database)
    async with running(source_of(newest_database), received):
        before = resident_bytes()
        newest_database.execute("insert into item select n, repeat('x', 1000) from generate_series(0, 99999) as n")
        await until(lambda: received.count == 100_000, "all rows")
    assert max(received.pieces) <= 500
    assert received.most_bytes - before < 30_000_000, "the rows are 100 MB"


async def test_pieces_of_large_rows_are_bounded_in_bytes(newest_database: WalDatabase) -> None:
    newest_database.execute("create table item (number int primary key, body text)")
    newest_database.publish("item")
    row_bytes = 1_500_000

    class Weighing(Received):
        async def take(self, changes: Sequence[Change]) -> None:
            self.changes.extend(change._replace(new=None) for change in changes)
            self.pieces.append(sum(change.size for change in changes))

    received = Weighing(newest_database)
    async with running(source_of(newest_database), received):
        newest_database.execute(
            "insert into item select n, repeat('x', %s) from generate_series(1, 20) as n", row_bytes
        )
        await received.until_there_are(20)
    assert sum(received.pieces) > 20 * row_bytes
    assert max(received.pieces) <= 4 * 1024 * 1024 + row_bytes + 100


# -- every committed change, once each, in the order of the commits


LEDGER = """
create table ledger (number bigint generated always as identity);
create table item (number bigint primary key, body text);
create function write_item(bytes integer default 0) returns bigint language plpgsql as $$
declare
    v_number bigint;
begin
    insert into ledger default values returning number into v_number;
    insert into item values (v_number, repeat('x', bytes));
    return v_number;
end
$$;
"""


class Oracle:
    """Writers, and what PostgreSQL says of what they wrote."""

    def __init__(self, database: WalDatabase) -> None:
        self.database = database
        with database.connect() as db:
            db.execute(LEDGER)
        database.publish("item")
        self._slot = f"{database.slot}_oracle"
        database.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", self._slot)
        self.seed = int(os.environ.get("REALTIME_TEST_SEED", random.randrange(10**6)))
        print(f"seed {self.seed}")

    async def write(self, writers: int = WRITERS, *, prepares: bool = False, largest: int = 1500) -> None:
        seeds = range(self.seed, self.seed + writers)
        self.seed += writers
        await asyncio.gather(*(self._write(random.Random(seed), prepares, largest) for seed in seeds))
        # Whoever should have ended these was cut off.
        for (name,) in self.database.administrate(
            "select gid from pg_prepared_xacts where database = current_database()"
        ):
            with psycopg.connect(self.database.administrator_url, autocommit=True) as db:
                db.execute(sql.SQL("commit prepared {}").format(sql.Literal(name)))

    async def _write(self, chance: random.Random, prepares: bool, largest: int) -> None:
        """Pauses before and between rows and before the end, savepoints, rollbacks, two phases, large transactions."""
        done = 0
        while done < TRANSACTIONS_EACH:
            with suppress(psycopg.OperationalError):
                async with await psycopg.AsyncConnection.connect(self.database.administrator_url) as db:
                    while done < TRANSACTIONS_EACH:
                        done += 1
                        await self._transaction(db, chance, prepares, largest)
            # The server was away: come again.
            await asyncio.sleep(0.05)

    async def _transaction(
        self, db: psycopg.AsyncConnection[Any], chance: random.Random, prepares: bool, largest: int
    ) -> None:
        await asyncio.sleep(chance.choice([0, 0, 0.002, 0.01, 0.05]))
        for _ in range(chance.choice([1, 1, 1, 2, 5, 20])):
            if chance.random() < 0.15:
                await db.execute("savepoint here")
                await db.execute("select write_item()")
                await db.execute("rollback to here" if chance.random() < 0.5 else "release here")
            elif chance.random() < 0.02:
                await db.execute("select write_item() from generate_series(1, %s)", (largest,))
            else:
                await db.execute("select write_item()")
            await asyncio.sleep(chance.choice([0, 0, 0, 0.001, 0.02]))
        if chance.random() < 0.25:
            await db.rollback()
        elif prepares and chance.random() < 0.3:
            name = f"two_phase_{chance.random()}"
            await db.execute(sql.SQL("prepare transaction {}").format(sql.Literal(name)))
            await db.commit()
            await asyncio.sleep(chance.choice([0, 0.01, 0.05]))
            await db.set_autocommit(True)
            end = "rollback prepared {}" if chance.random() < 0.3 else "commit prepared {}"
            await db.execute(sql.SQL(end).format(sql.Literal(name)))
            await db.set_autocommit(False)
        else:
            await db.commit()

    def committed(self) -> list[int]:
        """What was written, in the order of the commits."""
        messages = self.database.administrate(
            "select data from pg_logical_slot_peek_binary_changes(%s, null, null,"
            " 'proto_version', '1', 'publication_names', 'supabase_realtime')",
            self._slot,
        )
        decoded = [pgoutput.decode(bytes(data)) for (data,) in messages]
        numbers = [
            int(message.new[0])
            for message in decoded
            if isinstance(message, Insert) and isinstance(message.new[0], bytes)
        ]
        ledger = [number for (number,) in self.database.administrate("select number from ledger order by number")]
        assert sorted(numbers) == ledger
        transactions = sum(isinstance(message, Begin) for message in decoded)
        assert numbers != ledger or transactions < 20, "transactions overlapped"
        return numbers

    async def agrees_with(self, received: Received) -> None:
        expected = self.committed()
        await until(lambda: len(received.changes) >= len(expected), "the last changes")
        # What comes behind everything else comes behind what is doubled, too.
        self.database.administrate("select write_item()")
        await until(lambda: received.numbers[-1] not in expected, "the end")
        assert received.numbers[:-1] == expected, f"seed {self.seed}"


Fault = Callable[[], Awaitable[None]]


async def under(fault: Fault, received: Received, at: Sequence[int], writing: Coroutine[Any, Any, None]) -> None:
    """Let something happen each time so many changes were taken while writers write; what is left of it, once they are done."""
    writers = asyncio.create_task(writing)
    for count in at:
        await until(lambda count=count: len(received.changes) >= count or writers.done(), f"{count} changes")  # type: ignore[misc]
        await fault()
    await writers


async def test_every_committed_change_is_taken_once_while_the_walsender_is_ended(source_database: WalDatabase) -> None:
    oracle, received = Oracle(source_database), Received(source_database)
    ended = 0

    async def end_walsender() -> None:
        nonlocal ended
        await until(lambda: source_database.end_walsender() == 1, "a walsender to end")
        ended += 1

    source = source_of(source_database)
    async with running(source, received):
        await under(end_walsender, received, (50, 150, 250, 350), oracle.write(16))
        await oracle.agrees_with(received)
    assert (ended, received.gaps) == (4, [])


async def through_proxy(
    database: WalDatabase, proxy_to: ProxyFactory, monkeypatch: pytest.MonkeyPatch
) -> tuple[Proxy, WalSource]:
    """Questions without an answer are given up soon."""
    monkeypatch.setattr(wal, "VISIBLE_S", 0.3)
    proxy = await proxy_to(int(str(conninfo.conninfo_to_dict(database.url)["port"])))
    url = conninfo.make_conninfo(database.url, host="127.0.0.1", port=proxy.port, sslmode="disable")
    return proxy, source_of(database, url=url, timeout_s=0.7)


async def test_every_committed_change_is_taken_once_while_the_link_is_cut(
    newest_database: WalDatabase, proxy_to: ProxyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle, received = Oracle(newest_database), Received(newest_database)
    proxy, source = await through_proxy(newest_database, proxy_to, monkeypatch)
    chance = random.Random(oracle.seed)

    async def cut() -> None:
        await until(lambda: source.is_ready, "the source to be there")
        # As a rule, in the middle of a message.
        proxy.limit(chance.randrange(1, 3000))
        await until(lambda: proxy.bytes_left is None, "the cut")

    async with running(source, received):
        await under(cut, received, (1, 60, 120, 180, 240), oracle.write())
        await oracle.agrees_with(received)
        assert proxy.accepted >= 2 * 4
    assert received.gaps == []


async def test_every_committed_change_is_taken_once_though_the_link_freezes(
    newest_database: WalDatabase, proxy_to: ProxyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To both sides the other one looks alive. PostgreSQL goes on to believe so: the slot is still held when we come again."""
    oracle, received = Oracle(newest_database), Received(newest_database)
    proxy, source = await through_proxy(newest_database, proxy_to, monkeypatch)

    async def freeze() -> None:
        await until(lambda: source.is_ready, "the source to be there")
        proxy.freeze()
        await until(lambda: not source.is_ready, "the source to notice")
        # New connections get through, the old ones stay as they are.
        proxy.is_frozen = False

    async with running(source, received):
        await under(freeze, received, (100,), oracle.write())
        # In the quiet, where we leave no unread bytes behind.
        await received.until_there_are(len(oracle.committed()))
        proxy.freeze()
        writing = asyncio.create_task(oracle.write(2))
        await until(lambda: not source.is_ready, "the source to notice")
        assert newest_database.slot_state() not in (None, (False, None)), "the walsender believes in us"
        proxy.is_frozen = False
        await writing
        await oracle.agrees_with(received)
    assert received.gaps == []


async def test_every_committed_change_is_taken_once_while_postgresql_is_killed_and_restarted(
    own: OwnCluster, own_database: WalDatabase
) -> None:
    oracle, received = Oracle(own_database), Received(own_database)
    source = source_of(own_database)
    async with running(source, received):
        await under(own.restart, received, (60, 200), oracle.write(prepares=True))
        # A walsender holds up an orderly end until we have confirmed all of the log.
        await under(lambda: own.restart("fast"), received, (len(received.changes) + 60,), oracle.write(prepares=True))
        await oracle.agrees_with(received)
    assert received.gaps == []


async def test_changes_that_are_being_taken_when_the_connection_breaks_are_taken_once(
    source_database: WalDatabase,
) -> None:
    """In the middle of a transaction of many pieces, larger than what is on its way, and with another one behind it."""
    oracle, received = Oracle(source_database), Received(source_database)
    source = source_of(source_database)
    async with running(source, received):
        received.one_by_one = True
        received.gate.clear()
        source_database.execute("select write_item(20000) from generate_series(1, 1500)")
        for count in (1, 2):
            await until(lambda: received.is_waiting, "a piece to be taken")
            assert len(received.pieces) == count - 1
            source_database.execute("select write_item()")
            # The second piece may come from what the first connection left behind.
            assert source_database.end_walsender() >= (count == 1)
            # One that cannot send must be told twice.
            await until(lambda: source_database.end_walsender() == 0, "the walsender to end")
            received.gate.set()
            await until(lambda count=count: len(received.pieces) == count, "the piece")  # type: ignore[misc]
        received.one_by_one = False
        received.gate.set()
        await oracle.agrees_with(received)
    assert sum(received.pieces[:2]) < 1500, "of one transaction"


async def test_the_next_server_goes_on_where_the_last_one_left(newest_database: WalDatabase) -> None:
    """Also in the midst of a stream: to leave is to confirm what was taken. Only a transaction of several pieces, of which not all were
    taken, would come again."""
    oracle, received = Oracle(newest_database), Received(newest_database)
    for _ in range(4):
        before = len(received.changes)
        async with running(source_of(newest_database), received):
            writing = asyncio.create_task(oracle.write(6, largest=40))
            await until(lambda before=before: len(received.changes) >= before + 30, "changes")  # type: ignore[misc]
        await writing
    async with running(source_of(newest_database), received):
        await oracle.agrees_with(received)


async def test_changes_made_while_no_server_was_there_are_taken(newest_database: WalDatabase) -> None:
    oracle, received = Oracle(newest_database), Received(newest_database)
    async with running(source_of(newest_database), received):
        pass
    await oracle.write(4)
    assert received.changes == []
    async with running(source_of(newest_database), received):
        await oracle.agrees_with(received)
    assert received.gaps == []


async def test_silent_walsender_is_asked_for(
    newest_database: WalDatabase, proxy_to: ProxyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be at work on something that is not for us, and then to begin again would be never to get past it. Or it is gone."""
    oracle, received = Oracle(newest_database), Received(newest_database)
    proxy, source = await through_proxy(newest_database, proxy_to, monkeypatch)
    monkeypatch.setattr(wal, "VISIBLE_S", 5.0)

    def silence() -> list[Pump]:
        """Its link, and no other, carries nothing any more."""
        query = "select client_port from pg_stat_replication where pid = (select active_pid from pg_replication_slots where slot_name = %s)"
        ((port,),) = newest_database.administrate(query, newest_database.slot)
        for connection in proxy._connections:
            if connection._writers[1].get_extra_info("sockname")[1] == port:
                for pump in connection.pumps:
                    pump._held.append(b"")
                return list(connection.pumps)
        raise AssertionError("the walsender is behind the proxy")

    async with running(source, received):
        before = newest_database.slot_state()
        pumps = silence()
        newest_database.execute("select write_item()")
        # Three times what it takes to wonder.
        await asyncio.sleep(2.1)
        assert source.is_ready
        assert received.numbers == []
        for pump in pumps:
            pump.release()
        await received.until_there_are(1)
        assert newest_database.slot_state() == before

        silence()
        newest_database.end_walsender()
        newest_database.execute("select write_item()")
        await oracle.agrees_with(received)
    assert received.gaps == []


# -- the slot


async def test_slot_that_is_dropped_is_made_anew_and_the_gap_is_told(source_database: WalDatabase) -> None:
    Oracle(source_database)
    received = Received(source_database)
    async with running(source_of(source_database), received):
        source_database.execute("select write_item()")
        await received.until_there_are(1)
        await until(lambda: _is_dropped(source_database), "the slot to be dropped")
        await until(lambda: received.gaps != [], "the gap")
        source_database.execute("select write_item()")
        await received.until_there_are(2)
    assert received.numbers == [1, 2]
    assert received.gaps == ["the replication slot was dropped, and with it changes that had not been read"]


async def test_what_another_server_has_read_meanwhile_is_told_as_a_gap(source_database: WalDatabase) -> None:
    Oracle(source_database)
    received, source = Received(source_database), source_of(source_database)
    async with running(source, received):
        source_database.execute("select write_item()")
        await received.until_there_are(1)
    async with reading(source_database) as others:
        source_database.execute("select write_item()")
        await others.until_there_are(1)
    async with running(source, received):
        source_database.execute("select write_item()")
        await received.until_there_are(2)
    async with running(source, received):
        source_database.execute("select write_item()")
        await received.until_there_are(3)
    assert received.numbers == [1, 3, 4]
    assert received.gaps == ["another server has read a part of the log"]


def _is_dropped(database: WalDatabase) -> bool:
    """Between two connections of the source."""
    database.end_walsender()
    with suppress(psycopg.errors.ObjectInUse):
        database.administrate("select pg_drop_replication_slot(%s)", database.slot)
        return True
    return False


async def test_slot_that_is_lost_is_made_anew_and_the_gap_is_told(own: OwnCluster, own_database: WalDatabase) -> None:
    Oracle(own_database)
    # The other slot would be lost as well.
    own_database.administrate("select pg_drop_replication_slot(%s)", f"{own_database.slot}_oracle")
    received = Received(own_database)
    async with running(source_of(own_database), received):
        own_database.execute("select write_item()")
        await received.until_there_are(1)
        own.set(max_slot_wal_keep_size="1MB")
        received.gate.clear()
        own_database.execute("select write_item()")
        await until(lambda: received.is_waiting, "a piece to be taken")

        def is_lost() -> bool:
            own_database.administrate("select pg_switch_wal()")
            own_database.execute("insert into ledger default values")
            own_database.administrate("checkpoint")
            return own_database.execute(
                "select wal_status from pg_replication_slots where slot_name = %s", own_database.slot
            ) == [("lost",)]

        await until(is_lost, "the slot to be lost")
        ((slot, active, *_, wal_status, _, problem),) = own_database.execute("select * from realtime.slot_status()")
        assert (slot, active, wal_status) == (own_database.slot, False, "lost")
        assert problem.startswith("changes are lost, because nobody read them in time")
        received.gate.set()
        await until(lambda: received.gaps != [], "the gap")
        own_database.execute("select write_item()")
        await received.until_there_are(3)
    assert received.gaps == ["the database removed its log before all changes had been read"]
    own.reset()


async def test_place_that_cannot_be_decoded_is_given_up_and_the_gap_is_told(newest_database: WalDatabase) -> None:
    """Here: a row filter that fails, which PostgreSQL 15 brought. It fails again each time, however often it is read."""
    newest_database.execute("create table item (number int primary key)")
    newest_database.administrate("alter publication supabase_realtime add table item where (1 / number > -5)")
    received = Received(newest_database)
    async with running(source_of(newest_database), received):
        newest_database.execute("insert into item values (1)")
        newest_database.execute("insert into item values (0)")
        await until(lambda: received.gaps != [], "the gap")
        newest_database.execute("insert into item values (2)")
        await received.until_there_are(2)
    assert received.numbers == [1, 2]
    assert received.gaps == ["a part of the database's log cannot be read"]


async def test_publication_that_was_dropped_and_made_again_is_read_again(source_database: WalDatabase) -> None:
    """Older versions do not get past rows of the time between."""
    Oracle(source_database)
    received = Received(source_database)
    async with running(source_of(source_database), received):
        source_database.administrate("select write_item()")
        await received.until_there_are(1)
        source_database.administrate("drop publication supabase_realtime")
        source_database.administrate("select write_item()")
        source_database.administrate("create publication supabase_realtime for table item")

        def is_read() -> bool:
            source_database.administrate("select write_item()")
            return len(received.changes) > 1

        await until(is_read, "changes to come again")
        newest = source_database.administrate("select max(number) from ledger")[0][0]
        await until(lambda: received.numbers[-1] == newest, "the newest")
    assert 2 not in received.numbers
    assert received.gaps in ([], ["a part of the database's log cannot be read"])
    # What is told as lost is all that is.
    if not received.gaps:
        assert received.numbers == [1, *range(3, newest + 1)]
    else:
        assert received.numbers == [1, *range(received.numbers[1], newest + 1)]


async def test_slot_is_made_once_the_writers_of_that_moment_have_ended(source_database: WalDatabase) -> None:
    Oracle(source_database)
    source_database.administrate("select pg_drop_replication_slot(%s)", f"{source_database.slot}_oracle")
    received, source = Received(source_database), source_of(source_database)
    with psycopg.connect(source_database.administrator_url) as db:
        db.execute("select write_item()")
        task = asyncio.create_task(source.run(received))
        waits = "select count(*) from pg_stat_activity where query ~ '^select pg_create_logical' and wait_event = 'transactionid'"
        await until(lambda: source_database.administrate(waits) == [(1,)], "the slot to be waited for")
        assert not source.is_ready
        db.commit()
        await until(lambda: source.is_ready, "the source to be ready")
    source_database.execute("select write_item()")
    await received.until_there_are(1)
    assert received.numbers == [2]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert received.gaps == []


async def test_transaction_that_the_slot_waits_for_is_named(
    source_database: WalDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal, "SLOT_WAITS_S", 0.02)
    source_database.execute("create table item (number int)")
    findings = "select finding, advice from realtime.doctor() where \"check\" = 'slot' and level = 'problem'"
    with (
        structlog.testing.capture_logs() as logs,
        psycopg.connect(source_database.administrator_url, application_name="report") as db,
    ):
        db.execute("insert into item values (1)")
        pid = db.info.backend_pid
        source = source_of(source_database)
        await source._pool.open()
        task = asyncio.create_task(source.run(Received(source_database)))
        await until(lambda: any("waits" in entry["event"] for entry in logs), "the log to name it")
        ((finding, advice),) = source_database.execute(findings)
        assert f"(pid {pid}, role " in finding
        assert f"pg_terminate_backend({pid})" in advice
        # It is said once, however long it takes.
        await asyncio.sleep(0.2)
        assert [(entry["pid"], entry["application"]) for entry in logs if "waits" in entry["event"]] == [
            (pid, "report")
        ]
        db.commit()
        await until(lambda: source.is_ready, "the source to be ready")
    assert source_database.execute(findings) == []
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await source._pool.close()


async def test_cancelling_leaves_no_half_made_slot(source_database: WalDatabase) -> None:
    source_database.execute("create table item (number int)")
    received = Received(source_database)
    with psycopg.connect(source_database.administrator_url) as db:
        db.execute("insert into item values (1)")
        task = asyncio.create_task(source_of(source_database).run(received))
        await until(lambda: source_database.slot_state() is not None, "the slot to be begun")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: source_database.slot_state() is None, "the slot to be gone")


async def test_slot_moves_on_while_only_other_tables_are_written(newest_database: WalDatabase) -> None:
    newest_database.execute("create table other (number int)")
    async with reading(newest_database) as received:
        newest_database.execute("insert into other select generate_series(1, 1000)")
        ((position,),) = newest_database.administrate("select pg_current_wal_insert_lsn()::text")
        query = "select confirmed_flush_lsn >= %s::pg_lsn from pg_replication_slots where slot_name = %s"
        await until(
            lambda: newest_database.administrate(query, position, newest_database.slot) == [(True,)],
            "the slot to move on",
        )
    assert received.changes == []


async def test_place_is_confirmed_only_when_changes_are_taken(newest_database: WalDatabase) -> None:
    """Until then the walsender hears that we live, though it cannot get rid of what it has to send."""
    Oracle(newest_database)
    received, source = Received(newest_database), source_of(newest_database)
    confirmed = "select confirmed_flush_lsn::text from pg_replication_slots where slot_name = %s"
    stuck = "select wait_event = 'WalSenderWriteData' from pg_stat_activity where pid = %s"
    reported = "select max(reply_time) > %s from pg_stat_replication where pid = %s"

    def is_confirmed() -> bool:
        ((position,),) = newest_database.administrate(confirmed, newest_database.slot)
        return pgoutput.parse_lsn(position) >= pgoutput.parse_lsn(end)

    async with running(source, received):
        newest_database.execute("select write_item()")
        await received.until_there_are(1)
        received.gate.clear()
        newest_database.execute("select write_item()")
        ((end,),) = newest_database.administrate("select pg_current_wal_insert_lsn()::text")
        newest_database.execute("select write_item(20000) from generate_series(1, 1500)")
        await until(lambda: received.is_waiting, "a piece to be taken")
        _, pid = newest_database.slot_state() or (False, None)
        await until(lambda: newest_database.administrate(stuck, pid) == [(True,)], "the walsender to be stuck")
        for _ in range(2):
            ((now,),) = newest_database.administrate("select clock_timestamp()")
            await until(lambda now=now: newest_database.administrate(reported, now, pid) == [(True,)], "a report")  # type: ignore[misc]
        assert not is_confirmed()
        received.gate.set()
        await received.until_there_are(1502)
        await until(is_confirmed, "the confirmation")
    assert received.numbers == list(range(1, 1503))


# -- what stands in the way


async def test_second_server_is_told_that_the_slot_is_in_use(
    newest_database: WalDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal, "OBSTACLE_GRACE_S", 0.2)
    Oracle(newest_database)
    async with reading(newest_database) as received:
        problem = f"replication slot {newest_database.slot} is in use by another server"
        assert await obstacle_of(newest_database) == problem
        with pytest.raises(SourceLost, match=problem):
            await source_of(newest_database).run(Received(newest_database))
        newest_database.execute("select write_item()")
        await received.until_there_are(1)


async def test_server_waits_a_moment_for_the_slot_of_one_that_stops(
    newest_database: WalDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal, "OBSTACLE_GRACE_S", LIMIT_S)
    oracle = Oracle(newest_database)
    received = Received(newest_database)
    second = source_of(newest_database)
    async with running(source_of(newest_database), received):
        await oracle.write(2)
        await received.until_there_are(5)
        waiting = asyncio.create_task(second.run(received))
        await oracle.write(2)
    await until(lambda: second.is_ready, "the second one to have it")
    await oracle.agrees_with(received)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_obstacles_are_named(source_database: WalDatabase, cluster: Cluster) -> None:
    assert await obstacle_of(source_database) is None
    assert await obstacle_of(source_database, is_pooled=True) == wal.POOLED

    without = conninfo.make_conninfo(source_database.url, **_login_without_replication(source_database))
    assert await obstacle_of(source_database, url=without) == (
        'role realtime_wal_stranger may not replicate: an administrator runs "alter role realtime_wal_stranger replication"'
    )

    source_database.administrate("drop publication supabase_realtime")
    assert await obstacle_of(source_database) == "there is no publication supabase_realtime"
    source_database.administrate("create publication supabase_realtime")

    source_database.administrate("select pg_create_physical_replication_slot(%s)", source_database.slot)
    assert (
        await obstacle_of(source_database) == f"replication slot {source_database.slot} is of another kind or database"
    )
    source_database.administrate("select pg_drop_replication_slot(%s)", source_database.slot)


def _login_without_replication(database: WalDatabase) -> dict[str, str]:
    with psycopg.connect(database.administrator_url, autocommit=True) as db:
        if not db.execute("select 1 from pg_roles where rolname = 'realtime_wal_stranger'").fetchone():
            db.execute(sql.SQL("create role realtime_wal_stranger login in role {}").format(sql.Identifier(OWNER)))
        db.execute("alter role realtime_wal_stranger password 'stranger'")
    return {"user": "realtime_wal_stranger", "password": "stranger"}


async def test_walsenders_and_slots_that_are_all_taken_are_obstacles(
    own: OwnCluster, own_database: WalDatabase
) -> None:
    with all_walsenders_taken(own_database.administrator_url):
        problem = await obstacle_of(own_database)
        assert problem is not None
        assert problem.startswith("PostgreSQL refuses a replication connection: ")
        assert "max_wal_senders" in problem
    for number in range(4):
        own_database.administrate("select pg_create_physical_replication_slot(%s)", f"filler_{number}")
    assert await obstacle_of(own_database) == "all of max_replication_slots (4) are taken"
    own_database.administrate("select pg_drop_replication_slot(slot_name) from pg_replication_slots")
    assert await obstacle_of(own_database) is None


async def test_source_is_lost_with_the_right_to_replicate(
    own: OwnCluster, own_database: WalDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal, "OBSTACLE_GRACE_S", 0.2)
    Oracle(own_database)
    received = Received(own_database)
    task = asyncio.create_task(source_of(own_database).run(received))
    own_database.execute("select write_item()")
    await until(lambda: own_database.slot_state() is not None and own_database.slot_state()[0], "the source")  # type: ignore[index]
    own_database.administrate("alter role realtime_wal_reader noreplication")
    own_database.end_walsender()
    with pytest.raises(SourceLost, match="may not replicate"):
        await task
    own_database.administrate("alter role realtime_wal_reader replication")


async def test_lower_wal_level_is_an_obstacle(own: OwnCluster, own_database: WalDatabase) -> None:
    own.set(wal_level="replica")
    await own.restart("fast")
    # PostgreSQL 19 raises it by itself.
    expected = (
        None
        if own.cluster.server_version >= 190000
        else "wal_level is replica: set it to logical and restart PostgreSQL"
    )
    assert await obstacle_of(own_database) == expected
    own.reset()
    await own.restart("fast")
    assert await obstacle_of(own_database) is None


async def test_source_waits_for_a_standby_to_be_promoted_and_goes_on(
    own: OwnCluster, own_database: WalDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The places of the new history mean something else: what was taken before may come again, and nothing is missing."""
    monkeypatch.setattr(wal, "OBSTACLE_GRACE_S", LIMIT_S)
    Oracle(own_database)
    received, source = Received(own_database), source_of(own_database)
    async with running(source, received):
        own_database.execute("select write_item()")
        await received.until_there_are(1)
        await asyncio.to_thread(own.postgres.stop, "immediate")
        signal_file = own.postgres.location / "standby.signal"
        signal_file.touch()
        own.give(signal_file)
        with suppress(EmbeddedError):
            # It runs, and its roles can't be looked after.
            await asyncio.to_thread(own.postgres.start)
        assert (
            await obstacle_of(own_database) == "PostgreSQL is a standby here, and its changes are read from the primary"
        )
        assert not source.is_ready
        own_database.administrate("select pg_promote()")
        ((number,),) = own_database.execute("select write_item()")
        await until(lambda: number in received.numbers, "the change of the new primary")
    assert own_database.administrate("select left(pg_walfile_name(pg_current_wal_lsn()), 8)") == [("00000002",)]
    assert set(received.numbers) == {1, number}
    assert received.gaps == []


async def test_changes_of_a_database_that_was_set_back_are_taken(
    own: OwnCluster, own_database: WalDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the files, put back: the places that were confirmed are used once more, for other changes."""
    monkeypatch.setattr(wal, "OBSTACLE_GRACE_S", LIMIT_S)
    Oracle(own_database)
    received, source = Received(own_database), source_of(own_database)
    files, copy = own.postgres.location, own.postgres.location.with_name("copy")
    async with running(source, received):
        own_database.execute("select write_item()")
        await received.until_there_are(1)
        await asyncio.to_thread(own.postgres.stop)
        shutil.copytree(files, copy, copy_function=copy_with_owner)
        await asyncio.to_thread(own.postgres.start)
        own_database.execute("select write_item() from generate_series(1, 5000)")
        await received.until_there_are(5001)
        await asyncio.to_thread(own.postgres.stop)
        shutil.rmtree(files)
        shutil.copytree(copy, files, copy_function=copy_with_owner)
        shutil.rmtree(copy)
        for folder in [files, *(path for path in files.rglob("*") if path.is_dir())]:
            own.give(folder)
        await asyncio.to_thread(own.postgres.start)
        own_database.execute("select write_item()")
        await received.until_there_are(5002)
    assert received.numbers == [*range(1, 5002), 2]
    assert received.gaps == []


def copy_with_owner(source: str, target: str) -> None:
    shutil.copy2(source, target)
    facts = Path(source).stat()
    os.chown(target, facts.st_uid, facts.st_gid)


# -- visible to others


async def test_change_is_not_taken_before_others_can_see_it(own: OwnCluster, own_database: WalDatabase) -> None:
    """A commit that waits for a synchronous standby is in the log, and to nobody's eyes."""
    Oracle(own_database)

    class Looking(Received):
        async def take(self, changes: Sequence[Change]) -> None:
            seen = {number for (number,) in own_database.execute("select number from item")}
            await super().take(changes)
            assert set(self.numbers) <= seen

    received = Looking(own_database)
    async with running(source_of(own_database), received):
        own_database.execute("select write_item()")
        await received.until_there_are(1)
        own.set(synchronous_standby_names="nobody")
        hidden = asyncio.create_task(asyncio.to_thread(own_database.execute, "select write_item()"))
        asked = (
            "select count(*) from pg_stat_activity"
            " where query ~ 'wait_until_visible' and state = 'active' and pid <> pg_backend_pid()"
        )
        try:
            await until(lambda: own_database.administrate(asked) == [(1,)], "the source to ask")
            assert own_database.execute("select number from item") == [(1,)]
            assert received.numbers == [1]
        finally:
            own.set(synchronous_standby_names="")
            await hidden
        await received.until_there_are(2)
    assert received.numbers == [1, 2]


async def test_commits_never_wait_for_us_while_we_wait_for_them(
    own: OwnCluster, own_database: WalDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A * in synchronous_standby_names is for whoever reads the log. Not to read is what resolves it."""
    monkeypatch.setattr(wal, "OBSTACLE_GRACE_S", 0.2)
    Oracle(own_database)
    received, source = Received(own_database), source_of(own_database)
    async with running(source, received):
        own_database.execute("select write_item()")
        await received.until_there_are(1)
    task = asyncio.create_task(source.run(received))
    await until(lambda: source.is_ready, "the source to be ready")
    own.set(synchronous_standby_names="FIRST 1 (one, *)")
    stuck = asyncio.create_task(asyncio.to_thread(own_database.execute, "select write_item()"))
    try:
        with pytest.raises(SourceLost, match="synchronous_standby_names is \\*"):
            await asyncio.wait_for(task, LIMIT_S)
        assert await obstacle_of(own_database) is not None
        own.set(synchronous_standby_names='one, "a*b", "*c"')
        assert await obstacle_of(own_database) is None
    finally:
        own.set(synchronous_standby_names="")
        await stuck
    assert received.numbers == [1]


def test_visible_means_to_every_other_session(source_database: WalDatabase) -> None:
    source_database.execute("create table item (number int)")
    ask = "select realtime_internal.wait_until_visible(%s, '0 s')"
    with source_database.connect() as db:
        db.execute("begin")
        ((full,),) = db.execute("select pg_current_xact_id()::text::bigint").fetchall()
        xid = full % 2**32
        assert source_database.execute(ask, [xid]) == [(False,)]
        assert source_database.execute(ask, [xid + 1000]) == [(False,)], "not begun yet"
        assert source_database.execute(ask, [xid - 1]) == [(True,)]
        assert source_database.execute(ask, [xid - 1, xid]) == [(False,)]
        db.execute("commit")
    assert source_database.execute(ask, [xid, xid - 1]) == [(True,)]


async def test_visible_is_waited_for(source_database: WalDatabase) -> None:
    async with await psycopg.AsyncConnection.connect(source_database.url) as db:
        cursor = await db.execute("select pg_current_xact_id()::text::bigint")
        (xid,) = await cursor.fetchone() or (0,)
        waiting = asyncio.create_task(
            asyncio.to_thread(source_database.execute, "select realtime_internal.wait_until_visible(%s, '20 s')", [xid])
        )
        sleeping = "select count(*) from pg_stat_activity where query ~ 'wait_until_visible' and wait_event = 'PgSleep'"
        await until(lambda: source_database.administrate(sleeping) == [(1,)], "the question")
        await db.commit()
        assert await waiting == [(True,)]


@pytest.mark.parametrize(
    ("xid", "near", "full"),
    [
        (5, 7, 5),
        (9, 7, 9),
        (5, 2**32 + 7, 2**32 + 5),
        (2**32 - 1, 2**32 + 7, 2**32 - 1),
        (3, 2**32 - 2, 2**32 + 3),
        (2**32 + 5, 2**32 + 7, 2**32 + 5),
        (0, 2**31, 0),
        (2**31 + 1, 9 * 2**32, 8 * 2**32 + 2**31 + 1),
        (2**31 - 1, 9 * 2**32, 9 * 2**32 + 2**31 - 1),
    ],
)
def test_lower_bits_of_a_transaction_id_are_made_whole(database: TestDatabase, xid: int, near: int, full: int) -> None:
    assert database.execute("select realtime_internal.full_xid(%s, %s)", xid, near) == [(full,)]


def test_walsender_whose_client_does_not_read_can_be_ended(source_database: WalDatabase) -> None:
    Oracle(source_database)
    url = conninfo.make_conninfo(source_database.url, replication="database")
    walsender = psycopg.connect(url, autocommit=True)
    walsender.execute(
        f"START_REPLICATION SLOT {source_database.slot}_oracle LOGICAL 0/0 (proto_version '1', publication_names 'supabase_realtime')"
    )
    source_database.execute("select write_item(20000) from generate_series(1, 1500)")
    pid = walsender.info.backend_pid
    is_stuck = "select wait_event = 'WalSenderWriteData' from pg_stat_activity where pid = %s"
    while source_database.administrate(is_stuck, pid) != [(True,)]:
        pass
    ((started,),) = source_database.execute("select realtime_internal.backend_started(%s)", pid)
    assert source_database.execute("select realtime_internal.end_walsender(%s, %s)", pid, started - 1) == [(True,)], (
        "another one"
    )
    assert source_database.execute("select realtime_internal.backend_started(%s)", pid) == [(started,)]
    assert source_database.execute("select realtime_internal.end_walsender(%s, %s)", pid, started) == [(True,)]
    assert source_database.execute("select realtime_internal.backend_started(%s)", pid) == [(None,)]
    walsender.close()


# -- for a DBA


async def test_dba_sees_the_slot_and_gives_it_up(source_database: WalDatabase) -> None:
    assert source_database.execute("select * from realtime.slot_status()") == []
    assert source_database.execute("select realtime.drop_slot()") == [(False,)]
    received = Received(source_database)
    async with running(source_of(source_database), received):
        ((slot, active, retained, unconfirmed, status, safe, problem),) = source_database.execute(
            "select * from realtime.slot_status()"
        )
        assert (slot, active, status, problem) == (source_database.slot, True, "reserved", None)
        assert retained >= unconfirmed >= 0
        assert safe > 0
        with pytest.raises(psycopg.errors.ObjectInUse):
            source_database.execute("select realtime.drop_slot()")
    ((_, active, *_, problem),) = source_database.execute("select * from realtime.slot_status()")
    assert (active, problem[:13]) == (False, "nobody reads,")
    assert source_database.execute("select realtime.drop_slot()") == [(True,)]
    assert source_database.execute("select * from realtime.slot_status()") == []


async def test_dba_is_warned_of_a_log_without_bounds(own: OwnCluster, own_database: WalDatabase) -> None:
    own.set(max_slot_wal_keep_size="-1")
    async with reading(own_database):
        ((*_, problem),) = own_database.execute("select * from realtime.slot_status()")
        assert problem.startswith("max_slot_wal_keep_size is not set")


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
def test_functions_are_the_servers_only(source_database: WalDatabase, role: str) -> None:
    allowed = source_database.execute(
        "select oid::regprocedure::text from pg_proc where pronamespace in ('realtime'::regnamespace, 'realtime_internal'::regnamespace)"
        " and proname in ('slot_name', 'wal_obstacle', 'full_xid', 'wait_until_visible', 'end_walsender', 'slot_status', 'drop_slot')"
        " and has_function_privilege(%s, oid, 'execute')",
        role,
    )
    assert allowed == []
