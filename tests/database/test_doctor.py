"""Each finding appears when its cause is made and is gone with it. Where the cause does harm, PostgreSQL itself says so."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import conninfo, sql

from realtime_server.embedded import EmbeddedPostgres
from realtime_server.errors import EmbeddedError
from tests.database.test_relay import until
from tests.database.test_wal import OwnCluster
from tests.fix_database import OWNER, Cluster, TestDatabase
from tests.fix_postgres import FAST, open_folder

NODE = "insert into realtime_internal.nodes (id) values ('00000000-0000-0000-0000-000000000001')"
# Nothing is found about it but that it is published.
THINGS = (
    "create table things (id int primary key, title text, big text)",
    "alter table things replica identity full",
    "alter table things enable row level security",
    "create policy everybody on things for select using (true)",
    "grant select on things to anon, authenticated, service_role",
    "alter publication supabase_realtime add table things",
    "insert into things values (1, 'a', 'b')",
)


class Finding(NamedTuple):
    check: str
    level: str
    finding: str
    advice: str | None


def found(findings: list[Finding], check: str, level: str, words: str = "") -> list[Finding]:
    return [one for one in findings if (one.check, one.level) == (check, level) and words in one.finding]


def doctor(db: psycopg.Connection[Any], **arguments: Any) -> list[Finding]:
    given = sql.SQL(", ").join(
        sql.SQL("{} => {}").format(sql.Identifier(name), sql.Literal(value)) for name, value in arguments.items()
    )
    return [Finding(*row) for row in db.execute(sql.SQL("select * from realtime.doctor({})").format(given))]


class Lab:
    """A database where everything is done in one transaction, which is rolled back: roles are the whole cluster's."""

    def __init__(self, db: psycopg.Connection[Any]) -> None:
        self._db = db
        self.server_version = db.info.server_version

    def run(self, *statements: str, as_administrator: bool = False) -> None:
        """As the owner of the database. Takes nothing back when it fails but what failed."""
        with self._db.transaction():
            self._db.execute("reset role" if as_administrator else f"set role {OWNER}")
            for statement in statements:
                self._db.execute(statement.encode())

    def ask(self, **arguments: Any) -> list[Finding]:
        """What a DBA sees, as the owner."""
        self.run()
        return doctor(self._db, **arguments)


@pytest.fixture(scope="module", params=["newest", "oldest"])
def shared_database(request: pytest.FixtureRequest) -> Iterator[TestDatabase]:
    """For all tests that roll back what they do."""
    cluster: Cluster = request.getfixturevalue("cluster" if request.param == "newest" else "old_cluster")
    database = cluster.create("heads")
    yield database
    cluster.drop(database)


@pytest.fixture
def lab(shared_database: TestDatabase) -> Iterator[Lab]:
    with psycopg.connect(shared_database.administrator_url) as db, db.transaction(force_rollback=True):
        lab = Lab(db)
        lab.run(f"alter role {OWNER} replication", as_administrator=True)
        lab.run(*THINGS)
        yield lab


@dataclass(frozen=True)
class Cause:
    """`make` and `undo` are run as the owner, or as an administrator. `hurts`: a statement of the application that fails meanwhile."""

    check: str
    level: str
    words: str
    make: tuple[str, ...]
    undo: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    as_administrator: bool = False
    hurts: str | None = None

    @property
    def is_narrow(self) -> bool:
        """Whether it takes a column list or a row filter, which came with PostgreSQL 15."""
        return any(statement.startswith(f"{PUBLISHED} ") for statement in self.make)

    def __str__(self) -> str:
        return f"{self.check}: {self.words}"


WAL = {"changes": "wal"}
TRIGGER = {"changes": "trigger"}
PUBLISHED = "alter publication supabase_realtime set table things"
UPDATE = "update things set title = 'c'"

MEMBERS = (
    "create table members (room text, user_id uuid, note text)",
    "create policy members_receive on realtime.messages for select to authenticated"
    " using (exists (select from members as m where m.room = messages.topic and m.user_id = auth.uid()))",
)
DENIED = (
    "policy members_receive of realtime.messages needs public.members, and role authenticated may not select from it:"
    " permission denied"
)

NO_TEMPORARY = "do $$ begin execute format('revoke temporary on database %I from public', current_database()); end $$"

CAUSES = [
    # -- policies
    Cause(
        "policies",
        "note",
        "no policy on realtime.messages lets role authenticated receive",
        (
            "drop policy chat_members_receive on realtime.messages",
            "drop policy chat_members_type on realtime.messages",
        ),
        ("create policy everybody on realtime.messages for all to public using (true)",),
    ),
    Cause("policy_rights", "problem", DENIED, MEMBERS, ("grant select on members to authenticated",)),
    Cause("policy_rights", "problem", DENIED, MEMBERS, ("grant select (room, user_id) on members to authenticated",)),
    Cause("policy_rights", "problem", DENIED, MEMBERS, ("alter role authenticated bypassrls",), as_administrator=True),
    Cause(
        "policy_rights",
        "problem",
        "policy by_secret of public.things needs public.secrets, and role anon may not select from it",
        (
            "create table secrets (id int)",
            "create policy by_secret on things for select to anon using (id in (select s.id from secrets as s))",
        ),
        ("alter publication supabase_realtime drop table things",),
    ),
    # What a policy reads may have policies of its own.
    Cause(
        "policy_rights",
        "problem",
        "policy by_secret of public.members needs public.secrets, and role authenticated may not select from it",
        (
            *MEMBERS,
            "grant select on members to authenticated",
            "alter table members enable row level security",
            "create table secrets (id uuid)",
            "create policy by_secret on members for select using (user_id in (select s.id from secrets as s))",
        ),
        ("alter table members disable row level security",),
    ),
    Cause(
        "policy_rights",
        "problem",
        "policy by_function of realtime.messages needs public.is_allowed(), and role authenticated may not execute it",
        (
            "create function is_allowed() returns boolean language sql as 'select true'",
            "revoke execute on function is_allowed() from public",
            "create policy by_function on realtime.messages for insert to authenticated with check (is_allowed())",
        ),
        ("grant execute on function is_allowed() to authenticated",),
    ),
    # -- roles
    Cause(
        "temporary",
        "problem",
        "role authenticated has no right TEMPORARY on database",
        (NO_TEMPORARY,),
        (
            "do $$ begin execute format('grant temporary on database %I to anon, authenticated', current_database()); end $$",
        ),
    ),
    Cause(
        "temporary",
        "problem",
        f"role {OWNER} has no right TEMPORARY on database",
        (NO_TEMPORARY, NO_TEMPORARY.replace("public", OWNER)),
        (NO_TEMPORARY.replace("revoke", "grant").replace("from", "to"),),
    ),
    Cause(
        "bypassrls",
        "problem",
        "row-level security does not bind role anon",
        ("alter role anon bypassrls",),
        ("alter role anon nobypassrls",),
        as_administrator=True,
    ),
    Cause(
        "bypassrls",
        "note",
        "row-level security binds service_role",
        ("alter role service_role nobypassrls",),
        ("alter role service_role bypassrls",),
        as_administrator=True,
    ),
    Cause(
        "roles",
        "problem",
        f"role {OWNER} may not take on role anon",
        (f"revoke anon from {OWNER}",),
        (f"grant anon to {OWNER}",),
        as_administrator=True,
    ),
    Cause(
        "roles",
        "problem",
        "there is no role nobody_here",
        (),
        ("create role nobody_here", f"grant nobody_here to {OWNER}"),
        {"roles": ["anon", "nobody_here"]},
        as_administrator=True,
    ),
    # -- servers and partitions
    Cause("servers", "note", "no server runs", (), (NODE,)),
    Cause(
        "servers",
        "ok",
        "in the last half minute: 1",
        (NODE,),
        ("update realtime_internal.nodes set last_seen_at = now() - '31 s'::interval",),
    ),
    Cause(
        "partitions",
        "problem",
        "has no partition for",
        ("select realtime_internal.drop_old_messages('-2 days')",),
        ("select realtime.maintain()",),
    ),
    Cause(
        "partitions",
        "note",
        "are in realtime.messages_default",
        (
            "select realtime_internal.drop_old_messages('-2 days')",
            "select realtime.send('{}', 'e', 't')",
            "select realtime.maintain()",
        ),
        ("delete from realtime.messages", "select realtime.maintain()"),
    ),
    # -- the publication
    Cause(
        "publication",
        "problem",
        "there is no publication supabase_realtime",
        ("drop publication supabase_realtime",),
        ("create publication supabase_realtime",),
    ),
    Cause(
        "publication",
        "note",
        "has no tables",
        ("alter publication supabase_realtime drop table things",),
        ("alter publication supabase_realtime add table things",),
    ),
    Cause(
        "publication",
        "note",
        "tells nothing of UPDATE, DELETE",
        ("alter publication supabase_realtime set (publish = 'insert')",),
        ("alter publication supabase_realtime set (publish = 'insert, update, delete')",),
    ),
    Cause(
        "publication",
        "note",
        "the server's own tables",
        ("alter publication supabase_realtime add table realtime_internal.changes",),
        ("alter publication supabase_realtime drop table realtime_internal.changes",),
    ),
    Cause(
        "partitioned",
        "note",
        "changes of public.parted are told under the names of its partitions",
        (
            "create table parted (id int primary key) partition by list (id)",
            "alter publication supabase_realtime add table parted",
        ),
        ("alter publication supabase_realtime set (publish_via_partition_root = true)",),
    ),
    # -- what applications suffer
    Cause(
        "replica_identity",
        "problem",
        "public.things fail for the application: it is published and has no replica identity",
        ("alter table things replica identity nothing",),
        ("alter table things replica identity default",),
        hurts=UPDATE,
    ),
    Cause(
        "replica_identity",
        "problem",
        "has no replica identity",
        ("alter table things replica identity default", "alter table things drop constraint things_pkey"),
        ("alter table things add primary key (id)",),
        hurts="delete from things",
    ),
    Cause(
        "replica_identity",
        "problem",
        "has no replica identity",
        (
            "alter table things replica identity default",
            "alter table things drop constraint things_pkey",
            "alter table things add primary key (id) deferrable",
        ),
        ("alter table things replica identity full",),
        hurts=UPDATE,
    ),
    Cause(
        "replica_identity",
        "problem",
        "public.part_one fail for the application",
        (
            "create table parted (id int primary key, title text) partition by list (id)",
            "create table part_one partition of parted for values in (1)",
            "alter publication supabase_realtime set (publish_via_partition_root = true)",
            "alter publication supabase_realtime add table parted",
            "insert into parted values (1, 'a')",
            "alter table part_one replica identity nothing",
        ),
        ("alter table part_one replica identity default",),
        hurts="update parted set title = 'c'",
    ),
    Cause(
        "replica_identity",
        "problem",
        "the column list of the publication does not cover the replica identity",
        ("alter table things replica identity default", f"{PUBLISHED} (title)"),
        (f"{PUBLISHED} (id, title)",),
        hurts=UPDATE,
    ),
    Cause(
        "replica_identity",
        "problem",
        "the column list of the publication does not cover the replica identity",
        (f"{PUBLISHED} (id, title, big)",),
        ("alter table things replica identity default",),
        hurts=UPDATE,
    ),
    Cause(
        "replica_identity",
        "problem",
        "the row filter of the publication reads columns outside the replica identity",
        ("alter table things replica identity default", f"{PUBLISHED} where (title <> 'x')"),
        ("alter table things replica identity full",),
        hurts=UPDATE,
    ),
    # -- what clients are told
    Cause(
        "primary_key",
        "problem",
        "public.things has no primary key: clients get",
        ("alter table things drop constraint things_pkey",),
        ("alter table things add primary key (id)",),
    ),
    Cause(
        "primary_key",
        "problem",
        "public.things has no primary key in the column list",
        ("alter publication supabase_realtime set (publish = 'insert')", f"{PUBLISHED} (title)"),
        (f"{PUBLISHED} (id, title)",),
    ),
    Cause(
        "privileges",
        "problem",
        "none of the roles may select from public.things",
        ("revoke select on things from anon, authenticated, service_role",),
        ("grant select on things to service_role",),
    ),
    Cause(
        "privileges",
        "problem",
        "role authenticated may select columns of public.things, but not of its primary key (id)",
        ("revoke select on things from authenticated", "grant select (title) on things to authenticated"),
        ("grant select (id) on things to authenticated",),
    ),
    Cause(
        "policies",
        "note",
        "row-level security of public.things has no policy for SELECT: clients of anon, authenticated are told nothing",
        ("drop policy everybody on things", "create policy others on things for update using (true)"),
        ("create policy everybody on things for select using (true)",),
    ),
    Cause("row_filter", "note", "(title <> 'x'", (f"{PUBLISHED} where (title <> 'x')",), (PUBLISHED,)),
    Cause(
        "column_list",
        "note",
        "public.things only these columns are told: id, title",
        (f"{PUBLISHED} (id, title)",),
        (PUBLISHED,),
    ),
    Cause(
        "row_security",
        "note",
        "row-level security of public.things is off and anon may select",
        ("alter table things disable row level security",),
        ("alter table things enable row level security",),
    ),
    Cause(
        "row_security",
        "note",
        "row-level security of public.things is off and anon may select",
        ("alter table things disable row level security",),
        ("revoke select on things from anon",),
    ),
    Cause(
        "deletes",
        "note",
        "a DELETE in public.things tells the key to everybody who subscribed",
        ("alter table things replica identity default",),
        ("alter table things replica identity full",),
        WAL,
    ),
    Cause(
        "deletes",
        "note",
        "a DELETE in public.parted tells the key to everybody who subscribed",
        (
            "create table parted (id int primary key) partition by list (id)",
            "create table part_one partition of parted for values in (1)",
            "alter table parted replica identity full, enable row level security",
            "alter publication supabase_realtime set (publish_via_partition_root = true)",
            "alter publication supabase_realtime add table parted",
        ),
        ("alter table part_one replica identity full",),
        WAL,
    ),
    Cause(
        "deletes",
        "note",
        "a DELETE in public.things is told to nobody whom policies bind",
        ("alter table things replica identity default",),
        ("alter table things disable row level security",),
        {**WAL, "strict_deletes": True},
    ),
    Cause(
        "unlogged",
        "problem",
        "public.part_one is unlogged",
        (
            "create table parted (id int primary key) partition by list (id)",
            "create unlogged table part_one partition of parted for values in (1)",
            "alter publication supabase_realtime add table parted",
        ),
        ("alter publication supabase_realtime drop table parted", "alter table part_one set logged"),
        WAL,
    ),
    # -- what the server may not do
    Cause(
        "rights",
        "problem",
        f"role {OWNER} may not use schema elsewhere, so changes of elsewhere.things",
        ("create schema elsewhere", "alter table things set schema elsewhere"),
        (f"grant usage on schema elsewhere to {OWNER}",),
        as_administrator=True,
    ),
    Cause(
        "rights",
        "problem",
        f"role {OWNER} may not select from public.things",
        # Until PostgreSQL 15 the server inherits the rights of the roles that it may take on.
        ("revoke select on things from anon, authenticated, service_role", "alter table things owner to current_user"),
        (f"grant select on things to {OWNER}",),
        WAL,
        as_administrator=True,
    ),
    # -- capture triggers
    Cause(
        "capture",
        "note",
        "public.things has no capture trigger",
        (),
        ("select realtime_internal.sync_capture()",),
        TRIGGER,
    ),
    Cause(
        "capture",
        "problem",
        "public.things has no capture trigger",
        (NODE,),
        ("select realtime_internal.sync_capture()",),
        TRIGGER,
    ),
    Cause(
        "capture",
        "problem",
        "the capture trigger of public.things is disabled",
        ("select realtime_internal.sync_capture()", "alter table things disable trigger user"),
        ("select realtime_internal.sync_capture()",),
        TRIGGER,
    ),
    Cause(
        "capture",
        "problem",
        "public.things has no capture trigger",
        ("alter table things owner to current_user",),
        (f"grant trigger on things to {OWNER}", f"set role {OWNER}", "select realtime_internal.sync_capture()"),
        TRIGGER,
        as_administrator=True,
    ),
    Cause(
        "capture",
        "note",
        f"public.things is not owned by role {OWNER}",
        ("select realtime_internal.sync_capture()", "alter table things owner to current_user"),
        (f"alter table things owner to {OWNER}",),
        TRIGGER,
        as_administrator=True,
    ),
    Cause("outbox", "note", "and no server runs", ("select realtime_internal.sync_capture()",), (NODE,), TRIGGER),
    Cause(
        "capture_left",
        "problem",
        "public.things has a capture trigger, and nobody reads",
        ("select realtime_internal.sync_capture()",),
        ("select realtime_internal.release_capture()",),
        WAL,
    ),
    Cause(
        "capture_left",
        "problem",
        "public.things has a capture trigger and is not in the publication",
        ("select realtime_internal.sync_capture()", "alter publication supabase_realtime drop table things"),
        ("select realtime_internal.sync_capture()",),
        TRIGGER,
    ),
]


@pytest.mark.parametrize("cause", CAUSES, ids=str)
def test_finding_comes_and_goes_with_its_cause(lab: Lab, cause: Cause) -> None:
    def findings() -> list[Finding]:
        return found(lab.ask(**cause.arguments), cause.check, cause.level, cause.words)

    if cause.make:
        assert findings() == []
    if cause.is_narrow and lab.server_version < 150000:
        with pytest.raises(psycopg.errors.SyntaxError):
            lab.run(*cause.make)
        return
    lab.run(*cause.make, as_administrator=cause.as_administrator)
    made, *_ = findings()
    assert (made.advice is None) == (cause.level == "ok" or cause.check in ("row_filter", "column_list"))
    if cause.hurts is not None:
        with pytest.raises(psycopg.Error):
            lab.run(cause.hurts)
    lab.run(*cause.undo, as_administrator=cause.as_administrator)
    assert findings() == []
    if cause.hurts is not None:
        lab.run(cause.hurts)


def test_healthy_database_has_nothing_but_ok(lab: Lab) -> None:
    lab.run(NODE)
    assert {one.level for one in lab.ask(changes="wal")} == {"ok"}
    lab.run("select realtime_internal.sync_capture()")
    assert {one.level for one in lab.ask(changes="trigger")} == {"ok"}


# -- what is the whole cluster's


@pytest.fixture(scope="module", params=["newest", "oldest"])
def own_cluster(request: pytest.FixtureRequest) -> Iterator[OwnCluster]:
    bin_dir = None if request.param == "newest" else request.getfixturevalue("old_programs")
    with open_folder() as folder:
        postgres = EmbeddedPostgres(folder / "data", bin_dir=bin_dir, settings=FAST)
        try:
            yield OwnCluster(postgres.start())
        finally:
            postgres.stop("immediate")


@pytest.fixture
def own(own_cluster: OwnCluster) -> Iterator[OwnCluster]:
    yield own_cluster
    own_cluster.reset()
    with psycopg.connect(own_cluster.cluster.administrator_url, autocommit=True) as db:
        db.execute("select pg_drop_replication_slot(slot_name) from pg_replication_slots")
        db.execute(f"alter role {OWNER} noreplication")


@pytest.fixture
def own_database(own: OwnCluster) -> Iterator[TestDatabase]:
    database = own.cluster.create("heads")
    yield database
    administrate(database, "select pg_drop_replication_slot(slot_name) from pg_replication_slots")
    own.cluster.drop(database)


def administrate(database: TestDatabase, *statements: str) -> None:
    with psycopg.connect(database.administrator_url, autocommit=True) as db:
        for statement in statements:
            db.execute(statement.encode())


def ask(database: TestDatabase, **arguments: str) -> list[Finding]:
    with database.connect() as db:
        return doctor(db, **arguments)


def levels(findings: list[Finding], *checks: str) -> dict[str, list[str]]:
    return {check: [one.level for one in findings if one.check == check] for check in checks}


CREATE_SLOT = "select pg_create_logical_replication_slot(realtime_internal.slot_name(), 'pgoutput')"
DROP_SLOT = "select realtime.drop_slot()"


@contextmanager
def reading(database: TestDatabase) -> Iterator[None]:
    """Somebody reads the server's slot."""
    ((slot,),) = database.execute("select realtime_internal.slot_name()")
    url = conninfo.make_conninfo(database.administrator_url, replication="database")
    # Leaving the connection's own context would ask it something, which it cannot answer while it streams.
    with closing(psycopg.connect(url, autocommit=True)) as db:
        options = "(proto_version '1', publication_names 'supabase_realtime')"
        db.execute(f"START_REPLICATION SLOT {slot} LOGICAL 0/0 {options}".encode())
        yield


async def test_log_that_is_not_to_be_read_and_what_it_takes(own: OwnCluster, own_database: TestDatabase) -> None:
    checks = ("changes", "wal_level", "replication")
    own.set(wal_level="replica")
    await own.restart("fast")
    # PostgreSQL 19 raises it by itself.
    is_enough = own.cluster.server_version >= 190000
    findings = ask(own_database)
    level = "ok" if is_enough else "note"
    assert levels(findings, *checks) == {"changes": ["note"], "wal_level": [level], "replication": ["note"]}
    (why,) = found(findings, "changes", "note")
    obstacle = "may not replicate" if is_enough else "wal_level is replica: set it to logical and restart PostgreSQL"
    assert why.finding.startswith("row changes come from capture triggers: ")
    assert obstacle in why.finding
    findings = ask(own_database, changes="wal")
    assert found(findings, "changes", "problem", "there are no row changes, the log cannot be read: ")
    assert found(findings, "replication", "problem", f"role {OWNER} may not replicate")
    findings = ask(own_database, changes="trigger")
    assert levels(findings, *checks) == {"changes": ["ok"], "wal_level": [], "replication": []}

    own.reset()
    await own.restart("fast")
    assert levels(ask(own_database), *checks) == {"changes": ["note"], "wal_level": ["ok"], "replication": ["note"]}
    administrate(own_database, f"alter role {OWNER} replication")
    for changes in ("auto", "wal"):
        findings = ask(own_database, changes=changes)
        assert levels(findings, *checks) == {"changes": ["ok"], "wal_level": ["ok"], "replication": ["ok"]}
    # What only a client of the database knows.
    (why,) = found(ask(own_database, obstacle="the pooler is in the way"), "changes", "note")
    assert why.finding == "row changes come from capture triggers: the pooler is in the way"


async def test_slot_that_is_read_left_alone_or_lost(own: OwnCluster, own_database: TestDatabase) -> None:
    administrate(own_database, f"alter role {OWNER} replication")
    assert levels(ask(own_database), "slot", "max_slot_wal_keep_size") == {"slot": [], "max_slot_wal_keep_size": []}
    own_database.execute(CREATE_SLOT)
    (alone,) = found(ask(own_database), "slot", "note", "nobody reads")
    assert alone.advice is not None
    assert "realtime.drop_slot()" in alone.advice
    with reading(own_database):
        findings = ask(own_database)
        assert found(findings, "slot", "ok", "a server reads")
        # To a second server it would be an obstacle.
        assert levels(findings, "changes") == {"changes": ["ok"]}

        own.set(max_slot_wal_keep_size="-1")
        await until(lambda: bool(found(ask(own_database), "max_slot_wal_keep_size", "note")), "the setting")
    await until(lambda: bool(found(ask(own_database), "max_slot_wal_keep_size", "problem")), "the reader to be gone")

    own.set(max_slot_wal_keep_size="1MB")

    def lost() -> list[Finding]:
        administrate(
            own_database, "select pg_switch_wal()", "create table if not exists filler ()", "drop table filler"
        )
        administrate(own_database, "checkpoint")
        return found(ask(own_database), "slot", "problem")

    await until(lambda: bool(lost()), "the slot to be lost")
    assert levels(ask(own_database), "max_slot_wal_keep_size") == {"max_slot_wal_keep_size": []}
    own_database.execute(DROP_SLOT)
    assert levels(ask(own_database), "slot") == {"slot": []}


def test_slots_of_others_that_keep_the_log(own: OwnCluster, own_database: TestDatabase) -> None:
    assert levels(ask(own_database), "other_slots") == {"other_slots": []}
    administrate(own_database, "select pg_create_physical_replication_slot('forgotten', true)")
    (forgotten,) = found(ask(own_database), "other_slots", "note", "replication slot forgotten, which is not ours")
    assert forgotten.advice == "if nobody comes for it any more: select pg_drop_replication_slot('forgotten')"
    administrate(own_database, "select pg_drop_replication_slot('forgotten')")
    assert levels(ask(own_database), "other_slots") == {"other_slots": []}


def test_triggers_for_one_server_while_another_one_reads_the_log(own: OwnCluster, own_database: TestDatabase) -> None:
    administrate(own_database, f"alter role {OWNER} replication")
    for statement in THINGS:
        administrate(own_database, f"set role {OWNER}", statement)
    own_database.execute("select realtime_internal.sync_capture()")
    assert levels(ask(own_database), "capture_left") == {"capture_left": ["problem"]}
    name = {"application_name": "realtime-server changes"}
    with psycopg.connect(conninfo.make_conninfo(own_database.url, **name), autocommit=True):
        assert found(ask(own_database), "capture_left", "note", "public.things has a capture trigger for a server")


def test_superuser_hears_of_the_servers_role(own: OwnCluster, own_database: TestDatabase) -> None:
    with psycopg.connect(own_database.administrator_url, autocommit=True) as db:
        findings = doctor(db)
        assert found(findings, "replication", "note", f"role {OWNER} may not replicate")
        findings = doctor(db, login="postgres")
        assert found(findings, "replication", "ok", "role postgres may replicate")
        assert db.execute("select current_user, current_setting('role')").fetchone() == ("postgres", "none")


async def test_standby_is_all_that_is_said_of_a_standby(own: OwnCluster, own_database: TestDatabase) -> None:
    own_database.execute("create table written ()")
    await asyncio.to_thread(own.postgres.stop, "fast")
    signal_file = own.postgres.location / "standby.signal"
    signal_file.touch()
    owner = (own.postgres.location / "PG_VERSION").stat()
    os.chown(signal_file, owner.st_uid, owner.st_gid)
    with suppress(EmbeddedError):
        # It runs, and its roles can't be looked after.
        await asyncio.to_thread(own.postgres.start)
    (standby,) = ask(own_database)
    assert (standby.check, standby.level) == ("primary", "problem")
    administrate(own_database, "select pg_promote()")
    assert levels(ask(own_database), "primary") == {"primary": []}
