"""Connections to PostgreSQL, and the one place where its errors become ours.

A statement in Python is one call of a function that lives in `sql/`. Every connection says who it is (`application_name`), speaks UTC and
resolves names by the search path that users' policies expect.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, LiteralString

import psycopg
from psycopg import AsyncConnection, conninfo
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from realtime_server.errors import DatabaseUnavailable, Gap, MalformedCursor, QueryCanceled

Canceled = psycopg.errors.QueryCanceled
InvalidText = psycopg.DataError
Error = psycopg.Error
Database = AsyncConnection[tuple[Any, ...]]

# Of a stream: a quarter slower than all at once, where one by one takes twice as long.
ROWS_AT_ONCE: Final = 10

# SQLSTATE of realtime.read_cursor when messages behind a cursor are gone.
GAP: Final = "RT001"
# The domain's constraint: what is no cursor at all.
CURSOR_FORMAT: Final = "cursor_format"


@dataclass(frozen=True, slots=True)
class Target:
    """Where the database is. `is_pooled`: behind a transaction pooler, where no session is ours: nothing may be set for one, prepared in
    one or listened to in one."""

    url: str
    is_pooled: bool = False

    def parameters(self, *, name: str, timeout_s: float, statement_timeout_s: float | None = None) -> str:
        """The URL with the settings of our connections. `name` shows in pg_stat_activity behind `realtime-server`."""
        settings: dict[str, Any] = {
            "application_name": f"realtime-server {name}",
            "connect_timeout": max(2, int(timeout_s)),
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "client_encoding": "UTF8",
        }
        if not self.is_pooled:
            # The session's own schema last: what users' functions leave there must not be found instead of what is meant.
            own = conninfo.conninfo_to_dict(self.url).get("options") or ""
            options = f"{own} -c search_path=public,extensions,pg_temp -c timezone=UTC -c idle_in_transaction_session_timeout=60s"
            # Limits that the role or the database sets for everybody would end what waits on purpose: the relay, its place in a queue.
            options += f" -c statement_timeout={int((statement_timeout_s or 0) * 1000)} -c lock_timeout=0 -c idle_session_timeout=0"
            settings["options"] = options.strip()
        return conninfo.make_conninfo(self.url, **settings)

    @property
    def connection_options(self) -> dict[str, Any]:
        return {"autocommit": True} | ({"prepare_threshold": None} if self.is_pooled else {})


def target_of(url: str, *, timeout_s: float) -> Target:
    """Find out whether a pooler stands before the database. Raises: DatabaseUnavailable."""
    direct = Target(url)
    try:
        with psycopg.connect(direct.parameters(name="look", timeout_s=timeout_s), autocommit=True) as db:
            db.execute("listen realtime")
            db.execute("select pg_notify('realtime', '')")
            # A pooler that lets our settings through gives LISTEN and NOTIFY to different sessions, or forgets the first.
            hears = any(True for _ in db.notifies(timeout=1.0, stop_after=1))
        return Target(url, is_pooled=not hears)
    except psycopg.OperationalError as error:
        if "unsupported startup parameter" in str(error):
            return Target(url, is_pooled=True)
        raise DatabaseUnavailable from error


async def connect(target: Target, *, name: str, timeout_s: float) -> Database:
    """One connection of its own, in autocommit. Raises: DatabaseUnavailable."""
    with errors():
        parameters = target.parameters(name=name, timeout_s=timeout_s)
        return await AsyncConnection.connect(parameters, **target.connection_options)


class Pool:
    """Connections for short questions, each answered within `statement_timeout_s`."""

    def __init__(self, target: Target, *, name: str, size: int, timeout_s: float, statement_timeout_s: float) -> None:
        self.size = size
        self._is_pooled = target.is_pooled
        self._statement_timeout_ms = int(statement_timeout_s * 1000)
        self._pool: AsyncConnectionPool[Database] = AsyncConnectionPool(
            target.parameters(name=name, timeout_s=timeout_s, statement_timeout_s=statement_timeout_s),
            kwargs=target.connection_options,
            min_size=1,
            max_size=size,
            timeout=timeout_s,
            check=AsyncConnectionPool.check_connection,
            open=False,
            name=name,
        )

    async def open(self) -> None:
        """Does not wait: the server starts while the database is away."""
        await self._pool.open()

    async def close(self) -> None:
        await self._pool.close()

    async def fetch(
        self, query: LiteralString, arguments: Sequence[object] = (), *, limit_s: float | None = None
    ) -> list[tuple[Any, ...]]:
        """The rows of one statement, which may take `limit_s`, or what is usual for the pool.

        Raises: DatabaseUnavailable, QueryCanceled, Gap, MalformedCursor.
        """
        async with self._connection() as db, contextlib.AsyncExitStack() as stack:
            if limit_s is not None:
                await stack.enter_async_context(db.transaction())
                await db.execute("select set_config('statement_timeout', %s, true)", (str(int(limit_s * 1000)),))
            cursor = await db.execute(query, arguments)
            return await cursor.fetchall()

    async def stream(self, query: LiteralString, arguments: Sequence[object] = ()) -> AsyncGenerator[tuple[Any, ...]]:
        """The same rows, of which only `ROWS_AT_ONCE` are in memory; who closes the iterator gets no more of them."""
        async with self._connection() as db, db.cursor() as cursor:
            async for row in cursor.stream(query, arguments, size=ROWS_AT_ONCE):
                yield row

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Database]:
        with errors():
            db = await self._pool.getconn()
            try:
                async with db, contextlib.AsyncExitStack() as stack:
                    if self._is_pooled:
                        # Settings of a session would be some other client's next.
                        await stack.enter_async_context(db.transaction())
                        await db.execute(
                            "select set_config('statement_timeout', %s, true)", (str(self._statement_timeout_ms),)
                        )
                    yield db
            finally:
                # Not the pool's own `connection`: it forgets one whose return is cancelled, as happens to clients that leave while others
                # wait, until it has none to give.
                await asyncio.shield(self._pool.putconn(db))


def describe(error: psycopg.Error) -> str:
    """`ERROR 22P02 (invalid_text_representation) message`, as clients are told of what they asked for themselves."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(error).__name__).lower()
    return f"ERROR {error.sqlstate} ({name}) {error.diag.message_primary}"


@contextlib.contextmanager
def changing() -> Iterator[None]:
    """For questions about tables that may be dropped or changed by others meanwhile: ask again later. Raises: DatabaseUnavailable."""
    try:
        yield
    except psycopg.Error as error:
        raise DatabaseUnavailable from error


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Turn what has a meaning of ours into our errors; let everything else through."""
    try:
        yield
    except psycopg.errors.QueryCanceled as error:
        raise QueryCanceled from error
    except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout) as error:
        raise DatabaseUnavailable from error
    except psycopg.Error as error:
        if error.sqlstate == GAP:
            raise Gap(error.diag.message_primary or "", error.diag.message_detail or "") from error
        if error.diag.constraint_name == CURSOR_FORMAT or error.diag.message_primary == "malformed cursor":
            raise MalformedCursor from error
        raise
