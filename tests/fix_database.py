"""Databases for tests: each test gets a migrated one of its own, owned by an ordinary role."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import conninfo, sql

from realtime_server import schema

OWNER = "realtime_owner"


@dataclass(frozen=True)
class TestDatabase:
    """`url` is the ordinary role's that owns it, `administrator_url` a superuser's."""

    __test__ = False

    url: str
    administrator_url: str

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.url, autocommit=True)

    def execute(self, query: LiteralString, *arguments: Any) -> list[tuple[Any, ...]]:
        """Run one statement as the owner; its rows."""
        with self.connect() as db:
            cursor = db.execute(query, arguments)
            return cursor.fetchall() if cursor.description else []


class Cluster:
    """One PostgreSQL server, with an ordinary login role on it and a template for each set of branches."""

    def __init__(self, administrator_url: str) -> None:
        self.administrator_url = administrator_url
        self._password = secrets.token_urlsafe(12)
        self._templates: dict[str, str] = {}
        with psycopg.connect(administrator_url, autocommit=True) as db:
            owner, password = sql.Identifier(OWNER), sql.Literal(self._password)
            if db.execute("select from pg_roles where rolname = %s", (OWNER,)).fetchone() is None:
                db.execute(sql.SQL("create role {} login").format(owner))
            db.execute(sql.SQL("alter role {} password {}").format(owner, password))
            self.server_version = db.info.server_version
            for statement in schema.role_statements(OWNER, self.server_version):
                db.execute(sql.SQL(statement))

    def create(self, *targets: str) -> TestDatabase:
        """A database migrated to these targets; copied from a template, because migrating takes a second."""
        key = " ".join(targets)
        if key not in self._templates:
            template = self._create_empty()
            for target in targets:
                schema.upgrade(template.url, target)
            self._templates[key] = conninfo.conninfo_to_dict(template.url)["dbname"]  # type: ignore[assignment]
        return self._create(self._templates[key])

    def create_empty(self) -> TestDatabase:
        return self._create_empty()

    def drop(self, database: TestDatabase) -> None:
        name = str(conninfo.conninfo_to_dict(database.url)["dbname"])
        with psycopg.connect(self.administrator_url, autocommit=True) as db:
            db.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))

    def _create_empty(self) -> TestDatabase:
        return self._create("template0")

    def _create(self, template: str) -> TestDatabase:
        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(self.administrator_url, autocommit=True) as db:
            db.execute(
                sql.SQL("create database {} template {} owner {}").format(
                    sql.Identifier(name), sql.Identifier(template), sql.Identifier(OWNER)
                )
            )
        login = {"user": OWNER, "password": self._password, "dbname": name}
        return TestDatabase(
            url=conninfo.make_conninfo(self.administrator_url, **login),
            administrator_url=conninfo.make_conninfo(self.administrator_url, dbname=name),
        )


@pytest.fixture(scope="session")
def cluster(postgres: str) -> Cluster:
    return Cluster(postgres)


@pytest.fixture(scope="session")
def old_cluster(old_postgres: str) -> Cluster:
    return Cluster(old_postgres)


@pytest.fixture(params=["newest", "oldest"])
def any_cluster(request: pytest.FixtureRequest) -> Cluster:
    """The newest PostgreSQL that is supported, and the oldest."""
    result: Cluster = request.getfixturevalue("cluster" if request.param == "newest" else "old_cluster")
    return result


@pytest.fixture
def database(cluster: Cluster) -> Iterator[TestDatabase]:
    """A database with the core and every sample system, on the newest PostgreSQL."""
    database = cluster.create("heads")
    yield database
    cluster.drop(database)


@pytest.fixture
def any_database(any_cluster: Cluster) -> Iterator[TestDatabase]:
    """The same on the newest PostgreSQL and on the oldest."""
    database = any_cluster.create("heads")
    yield database
    any_cluster.drop(database)


def act_as(db: psycopg.Connection[Any], role: str, claims: str = "{}") -> None:
    """Take on a role and claims for the rest of the transaction, as a request does."""
    db.execute("select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)", (role, claims))


@contextmanager
def all_walsenders_taken(administrator_url: str) -> Iterator[None]:
    """Replication connections, as many as the cluster lets in. One that just ended keeps its place until its process has."""
    url = conninfo.make_conninfo(administrator_url, replication="database")
    deadline = time.monotonic() + 30
    with psycopg.connect(administrator_url) as db, ExitStack() as held:
        ((senders,),) = db.execute("show max_wal_senders")
        taken = 0
        while taken < int(senders):
            try:
                held.enter_context(psycopg.connect(url, autocommit=True))
                taken += 1
            except psycopg.OperationalError as refused:
                if "max_wal_senders" not in str(refused) or time.monotonic() > deadline:
                    raise
        yield
