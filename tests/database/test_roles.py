"""Installing needs an ordinary role that owns the database, and an administrator only where the three roles are missing.

The clusters here know none of anon, authenticated and service_role when a test begins.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from psycopg import conninfo, sql

from realtime_server import schema
from realtime_server.embedded import bundled_bin
from tests.fix_database import OWNER, Cluster, TestDatabase
from tests.fix_postgres import embedded_cluster

LIMIT_S = 60
ROLES = ["anon", "authenticated", "service_role"]
# Quoting is part of what is tested.
LOGIN = 'Realtime "owner"'
PASSWORD = "x"


@dataclass(frozen=True)
class BareCluster:
    administrator_url: str

    @property
    def server_version(self) -> int:
        with psycopg.connect(self.administrator_url) as db:
            return db.info.server_version

    def create(self, name: str, login: str, attributes: LiteralString = "") -> TestDatabase:
        """A database, and the login that owns it and can do no more than `attributes` say."""
        with psycopg.connect(self.administrator_url, autocommit=True) as db:
            role, database = sql.Identifier(login), sql.Identifier(name)
            statement = sql.SQL("create role {} login password {} {}")
            db.execute(statement.format(role, sql.Literal(PASSWORD), sql.SQL(attributes)))
            db.execute(sql.SQL("create database {} template template0 owner {}").format(database, role))
        return TestDatabase(
            url=conninfo.make_conninfo(self.administrator_url, dbname=name, user=login, password=PASSWORD),
            administrator_url=conninfo.make_conninfo(self.administrator_url, dbname=name),
        )

    def empty(self) -> None:
        """Nothing but the administrator is left."""
        with psycopg.connect(self.administrator_url, autocommit=True) as db:
            for (name,) in db.execute(
                "select datname from pg_database where datname ~ '^(postgres|template.)$' is false"
            ):
                if name != db.info.dbname:
                    db.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
            # Since PostgreSQL 16 a role can't go before the memberships that it granted.
            for statement in ("drop owned by {} cascade", "drop role {}"):
                for (name,) in db.execute(
                    "select rolname from pg_roles where rolname !~ '^pg_' and rolname not in (current_user, 'realtime')"
                ).fetchall():
                    db.execute(sql.SQL(statement).format(sql.Identifier(name)))


@pytest.fixture(scope="module", params=["newest", "oldest"])
def bare_postgres(request: pytest.FixtureRequest) -> Iterator[BareCluster]:
    for url in embedded_cluster(None if request.param == "newest" else request.getfixturevalue("old_programs")):
        yield BareCluster(url)


@pytest.fixture
def bare_cluster(bare_postgres: BareCluster) -> BareCluster:
    bare_postgres.empty()
    return bare_postgres


def migrate(
    url: str | None, *arguments: str, folder: Path | None = None, program: str = "realtime_server.cli migrate"
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("REALTIME_", "DATABASE_URL"))}
    return subprocess.run(
        [sys.executable, "-m", *program.split(), *arguments],
        env=kept if url is None else {**kept, "REALTIME_DATABASE_URL": url},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def run_as_administrator(database: TestDatabase, script: str) -> None:
    done = subprocess.run(
        [bundled_bin() / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", database.administrator_url],
        input=script,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr


def assert_works(database: TestDatabase) -> None:
    """The owner may act as each of the roles, and service_role may send, with or without BYPASSRLS."""
    answers = database.execute(
        "select asked.role, answer.can_read, answer.can_write, problem"
        " from unnest(array['anon', 'authenticated', 'service_role']) as asked (role)"
        " cross join realtime.authorize('topic', asked.role, '{}', extensions => array['broadcast']) as answer"
    )
    assert answers == [
        ("anon", False, False, None),
        ("authenticated", False, False, None),
        ("service_role", True, True, None),
    ]
    with database.connect() as db, db.transaction():
        db.execute("set local role service_role")
        db.execute("select realtime.send('{}', 'event', 'topic')")
        assert db.execute("select count(*) from realtime.messages").fetchone() == (1,)


def assert_nothing_installed(database: TestDatabase) -> None:
    assert database.execute("select to_regnamespace('realtime')") == [(None,)]


def test_everything_here_runs_as_an_ordinary_role_that_owns_the_database(any_database: TestDatabase) -> None:
    (facts,) = any_database.execute(
        """
        select current_user, session_user, rolsuper, rolbypassrls, rolreplication, rolcreaterole, rolcreatedb,
            (select datdba::regrole::text from pg_database where datname = current_database())
        from pg_roles
        where rolname = current_user
        """
    )
    assert facts == (OWNER, OWNER, False, False, False, False, False, OWNER)
    others = any_database.execute(
        """
        select relname from pg_class
        where relnamespace in ('realtime'::regnamespace, 'realtime_internal'::regnamespace, 'public'::regnamespace)
            and relowner <> current_user::regrole
        union all
        select proname from pg_proc
        where pronamespace in ('realtime'::regnamespace, 'realtime_internal'::regnamespace, 'auth'::regnamespace, 'public'::regnamespace)
            and proowner <> current_user::regrole
        """
    )
    assert others == []


def test_an_administrator_runs_what_migrate_prints_and_then_it_works(bare_cluster: BareCluster) -> None:
    database = bare_cluster.create("plain", LOGIN)
    refused = migrate(database.url)
    assert refused.returncode == 1
    head, _, statements = refused.stdout.partition("\n\n")
    assert head == "An administrator of this PostgreSQL must run this first; then migrate again:"
    assert "Traceback" not in refused.stderr
    assert_nothing_installed(database)

    for _ in range(2):
        run_as_administrator(database, statements)
    done = migrate(database.url)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert_works(database)
    assert database.execute("select rolname from pg_roles where rolname = any(%s) and rolbypassrls", ROLES) == [
        ("service_role",)
    ]
    # Acting as a role is not having its rights all the time: that would be a policy for the owner's queries as well.
    if bare_cluster.server_version >= 160000:
        assert (
            database.execute("select pg_has_role(role, 'usage') from unnest(%s::text[]) as role", ROLES)
            == [(False,)] * 3
        )


def test_a_role_with_createrole_needs_nobody(bare_cluster: BareCluster) -> None:
    database = bare_cluster.create("creator", LOGIN, "createrole")
    done = migrate(database.url, "--all")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert_works(database)
    roles = database.execute(
        "select rolname, rolcanlogin, rolinherit, rolbypassrls from pg_roles where rolname = any(%s) order by 1", ROLES
    )
    assert roles == [(role, False, False, False) for role in ROLES]


def test_a_role_with_createrole_and_bypassrls_hands_that_on_to_service_role_where_it_can(
    bare_cluster: BareCluster,
) -> None:
    database = bare_cluster.create("creator", LOGIN, "createrole bypassrls")
    done = migrate(database.url)
    assert done.returncode == 0, done.stderr
    handed_on = database.execute("select rolbypassrls from pg_roles where rolname = 'service_role'")
    assert handed_on == [(bare_cluster.server_version >= 160000,)]


def test_a_second_login_with_createrole_asks_where_it_may_not_use_the_roles_of_the_first(
    bare_cluster: BareCluster,
) -> None:
    assert migrate(bare_cluster.create("first", "first", "createrole").url).returncode == 0
    database = bare_cluster.create("second", LOGIN, "createrole")
    done = migrate(database.url)
    if bare_cluster.server_version >= 160000:
        assert done.returncode == 1, done.stderr
        run_as_administrator(database, done.stdout.partition("\n\n")[2])
        done = migrate(database.url)
    assert done.returncode == 0, done.stderr
    assert_works(database)


@pytest.mark.parametrize("bare_postgres", ["newest"], indirect=True)
def test_a_login_that_inherits_but_may_not_act_as_the_roles_asks_as_well(bare_cluster: BareCluster) -> None:
    """Two rights since PostgreSQL 16, one before."""
    database = bare_cluster.create("plain", LOGIN)
    for role in ROLES:
        run_as_administrator(
            database, f"create role {role} nologin; grant {role} to {sql.Identifier(LOGIN).as_string()} with set false;"
        )
    refused = migrate(database.url)
    assert refused.returncode == 1
    run_as_administrator(database, refused.stdout.partition("\n\n")[2])
    done = migrate(database.url)
    assert done.returncode == 0, done.stderr
    assert_works(database)


@pytest.mark.parametrize("existing", [["uid"], ["jwt", "role"], ["jwt", "role", "uid"]], ids="-".join)
def test_functions_of_schema_auth_that_exist_are_not_replaced(any_cluster: Cluster, existing: list[str]) -> None:
    """As on Supabase, where Auth owns them."""
    types = {"uid": "uuid", "jwt": "jsonb", "role": "text"}
    database = any_cluster.create_empty()
    try:
        with psycopg.connect(database.administrator_url, autocommit=True) as db:
            db.execute("create schema auth")
            db.execute(sql.SQL("grant usage, create on schema auth to {}").format(sql.Identifier(OWNER)))
            for name in existing:
                statement = sql.SQL("create function auth.{}() returns {} language sql as 'select null::{}'")
                db.execute(statement.format(sql.Identifier(name), *[sql.SQL(types[name])] * 2))
        schema.upgrade(database.url, "heads")
        found = database.execute(
            "select proname::text, proowner <> current_user::regrole"
            " from pg_proc where pronamespace = 'auth'::regnamespace order by 1"
        )
        assert found == [(name, name in existing) for name in sorted(types)]
        sources = database.execute(
            "select distinct prosrc ~ '^select null::' from pg_proc"
            " where pronamespace = 'auth'::regnamespace and proname = any(%s)",
            existing,
        )
        assert sources == [(True,)]
    finally:
        any_cluster.drop(database)


def test_what_is_missing_in_auth_reads_the_claims(any_database: TestDatabase) -> None:
    with any_database.connect() as db:
        nobody = db.execute("select auth.uid(), auth.role(), auth.jwt()").fetchone()
        assert nobody == (None, None, None)
        user = "00000000-0000-0000-0000-00000000000a"
        with db.transaction():
            db.execute("select set_config('request.jwt.claims', %s, true)", (f'{{"sub":"{user}","role":"r","x":[1]}}',))
            somebody = db.execute("select auth.uid()::text, auth.role(), auth.jwt() -> 'x'").fetchone()
            assert somebody == (user, "r", [1])
            db.execute("set local role anon")
            assert db.execute("select auth.uid()::text").fetchone() == (user,)
        # Set once and gone, a setting of this kind reads as an empty text.
        assert db.execute("select current_setting('request.jwt.claims'), auth.uid(), auth.jwt()").fetchone() == (
            "",
            None,
            None,
        )


def assert_plain_error(done: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("realtime-server: ")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_migrate_without_a_database_says_so(tmp_path: Path) -> None:
    assert_plain_error(migrate(None, folder=tmp_path), "set REALTIME_DATABASE_URL")


def test_alembic_without_a_database_says_so() -> None:
    done = migrate(None, "upgrade", "head", folder=Path(__file__).parent.parent.parent, program="alembic")
    assert done.returncode == 1
    assert "set REALTIME_DATABASE_URL" in done.stderr
    assert "Traceback" not in done.stderr


def test_migrate_of_an_unknown_sample_names_those_that_exist() -> None:
    assert_plain_error(
        migrate("postgresql://127.0.0.1:1/none", "chat", "chatt"), "unknown sample: chatt; there are: chat"
    )


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("postgresql://127.0.0.1:1/none", "no connection to the database: connection failed"),
        ("nonsense", "is no address for libpq"),
        ("postgresql://127.0.0.1:port/none", "no connection to the database: connection is bad: invalid integer value"),
    ],
)
def test_migrate_without_a_connection_says_why(url: str, sentence: str) -> None:
    assert_plain_error(migrate(url), sentence)


def test_migrate_in_a_database_of_somebody_else_says_what_is_not_allowed(any_cluster: Cluster) -> None:
    database = any_cluster.create_empty()
    try:
        with psycopg.connect(database.administrator_url, autocommit=True) as db:
            db.execute(sql.SQL("alter database {} owner to postgres").format(sql.Identifier(db.info.dbname)))
        assert_plain_error(migrate(database.url), "the database refused: permission denied for database")
    finally:
        any_cluster.drop(database)
