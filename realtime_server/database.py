"""Connections to PostgreSQL, and the one place where its errors become ours.

A statement in Python is one call of a function that lives in `sql/`. Every connection says who it is (`application_name`), speaks UTC and
resolves names in pg_catalog alone: whoever may create operators or functions in another schema must not have them called by the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, LiteralString, cast

import psycopg
from psycopg import AsyncConnection, conninfo, sql
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from realtime_server.errors import DatabaseUnavailable, Gap, MalformedCursor, QueryCanceled

Canceled = psycopg.errors.QueryCanceled
InvalidText = psycopg.DataError
Error = psycopg.Error
Database = AsyncConnection[tuple[Any, ...]]

# Who stops does not wait for connections that are being made.
CLOSING_S: Final = 1.0

# How soon a backend notices, in the middle of a statement, that its client's connection is closed.
CLIENT_CHECK_INTERVAL: Final = "2s"

SEARCH_PATH: Final = "pg_catalog,pg_temp"

# Of a stream: a quarter slower than all at once, where one by one takes twice as long.
ROWS_AT_ONCE: Final = 10

# SQLSTATE of realtime.read_cursor when messages behind a cursor are gone.
GAP: Final = "RT001"
# The domain's constraint: what is no cursor at all.
CURSOR_FORMAT: Final = "cursor_format"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the database is. `is_pooled`: behind a transaction pooler, where no session is ours: nothing may be set for one, prepared in
    one or listened to in one. `can_check_clients`: PostgreSQL runs on a system where backends can find out whether their client is gone."""

    url: str
    is_pooled: bool = False
    can_check_clients: bool = True

    def parameters(
        self,
        *,
        name: str,
        timeout_s: float,
        statement_timeout_s: float | None = None,
    ) -> str:
        """The URL with the settings of our connections. `name` shows in pg_stat_activity behind `realtime-server`."""
        settings: dict[str, Any] = {
            "application_name": f"realtime-server {name}",
            "connect_timeout": max(2, int(timeout_s)),
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            # What was said and is not acknowledged: by itself the kernel would go on for a quarter of an hour.
            "tcp_user_timeout": int(2000 * timeout_s),
            "client_encoding": "UTF8",
        }
        if not self.is_pooled:
            own = conninfo.conninfo_to_dict(self.url).get("options") or ""
            options = f"{own} -c search_path={SEARCH_PATH} -c timezone=UTC -c idle_in_transaction_session_timeout=60s"
            # Limits that the role or the database sets for everybody would end what waits on purpose: the relay, its place in a queue.
            options += f" -c statement_timeout={int((statement_timeout_s or 0) * 1000)} -c lock_timeout=0 -c idle_session_timeout=0"
            if self.can_check_clients:
                # Otherwise a statement runs on when its connection was given up, and so does one of a server that was killed.
                options += f" -c client_connection_check_interval={CLIENT_CHECK_INTERVAL}"
            settings["options"] = options.strip()
        return conninfo.make_conninfo(self.url, **settings)

    @property
    def connection_options(self) -> dict[str, Any]:
        return {"autocommit": True} | ({"prepare_threshold": None} if self.is_pooled else {})


def probe(url: str, *, timeout_s: float) -> Endpoint:
    """Find out whether a pooler stands before the database, and what its system can do. Raises: DatabaseUnavailable."""
    return _examine(Endpoint(url), timeout_s)


def _examine(direct: Endpoint, timeout_s: float) -> Endpoint:
    try:
        with psycopg.connect(direct.parameters(name="look", timeout_s=timeout_s), autocommit=True) as db:
            db.execute("listen realtime")
            db.execute("select pg_catalog.pg_notify('realtime', '')")
            # A pooler that lets our settings through gives LISTEN and NOTIFY to different sessions, or forgets the first.
            hears = any(True for _ in db.notifies(timeout=1.0, stop_after=1))
        return replace(direct, is_pooled=not hears)
    except psycopg.errors.ReadOnlySqlTransaction:
        # A standby, where nobody may listen. The relay waits for it to be promoted.
        return direct
    except psycopg.OperationalError as error:
        if "unsupported startup parameter" in str(error):
            return replace(direct, is_pooled=True)
        if direct.can_check_clients and "client_connection_check_interval" in str(error):
            return _examine(replace(direct, can_check_clients=False), timeout_s)
        raise DatabaseUnavailable from error


async def connect(target: Endpoint, *, name: str, timeout_s: float) -> Database:
    """One connection of its own, in autocommit. Raises: DatabaseUnavailable."""
    with errors():
        parameters = target.parameters(name=name, timeout_s=timeout_s)
        return await AsyncConnection.connect(parameters, **target.connection_options)


class Pool:
    """Connections for short questions, each answered within `statement_timeout_s`.

    `timeout_s`: how long it may take to connect, and how long a connection may be silent beyond the longest time that the database takes
    for an answer. `acquire_timeout_s`: how long to wait for a connection that others use, by default no longer than that.
    `runs_user_code`: policies and other code of users runs in the sessions. Prepared statements and session-level locks outlive a rollback,
    so the server prepares none that could be replaced, and whatever is left behind is dropped before the next question.
    """

    def __init__(
        self,
        target: Endpoint,
        *,
        name: str,
        size: int,
        timeout_s: float,
        statement_timeout_s: float,
        acquire_timeout_s: float | None = None,
        runs_user_code: bool = False,
    ) -> None:
        self.size = size
        self._is_pooled = target.is_pooled
        self._statement_timeout_s = statement_timeout_s
        self._timeout_s = timeout_s
        self._pool: AsyncConnectionPool[Database] = AsyncConnectionPool(
            target.parameters(name=name, timeout_s=timeout_s, statement_timeout_s=statement_timeout_s),
            kwargs=target.connection_options | ({"prepare_threshold": None} if runs_user_code else {}),
            reset=self._reset if runs_user_code and not target.is_pooled else None,
            min_size=1,
            max_size=size,
            timeout=timeout_s if acquire_timeout_s is None else acquire_timeout_s,
            check=self._check,
            # Who asks begins anew; the pause between attempts would grow to minutes.
            reconnect_timeout=timeout_s,
            open=False,
            name=name,
        )

    async def open(self) -> None:
        """Does not wait: the server starts while the database is away."""
        await self._pool.open()

    async def close(self) -> None:
        await self._pool.close(timeout=CLOSING_S)

    async def fetch(
        self, query: LiteralString, arguments: Sequence[object] = (), *, limit_s: float | None = None
    ) -> list[tuple[Any, ...]]:
        """The rows of one statement, which may take `limit_s`, or what is usual for the pool.

        Raises: DatabaseUnavailable, QueryCanceled, Gap, MalformedCursor.
        """
        longest_s = (self._statement_timeout_s if limit_s is None else limit_s) + self._timeout_s
        async with self._connection() as db:
            with abort_after(db, longest_s):
                async with contextlib.nullcontext() if limit_s is None else _limited(db, limit_s):
                    cursor = await db.execute(query, arguments)
                    return await cursor.fetchall()

    async def stream(
        self,
        query: LiteralString,
        arguments: Sequence[object] = (),
        *,
        limit_s: float | None = None,
        rows_at_once: int = ROWS_AT_ONCE,
    ) -> AsyncGenerator[tuple[Any, ...]]:
        """The same rows, of which only `rows_at_once` are in memory; who closes the iterator gets no more of them.

        A statement that fails has returned the rows from before, in whole portions of `rows_at_once`.
        """
        longest_s = (self._statement_timeout_s if limit_s is None else limit_s) + self._timeout_s
        async with (
            self._connection() as db,
            contextlib.nullcontext() if limit_s is None else _limited(db, limit_s),
            streaming(db, query, arguments, closing_s=longest_s, rows_at_once=rows_at_once) as rows,
        ):
            while True:
                with abort_after(db, longest_s):
                    row = await anext(rows, None)
                if row is None:
                    return
                yield row

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Database]:
        with errors():
            db = await self._pool.getconn()
            try:
                async with db, contextlib.AsyncExitStack() as stack:
                    if self._is_pooled:
                        # Settings of a session would be some other client's next.
                        with abort_after(db, self._timeout_s):
                            await stack.enter_async_context(_limited(db, self._statement_timeout_s))
                            await db.execute("select pg_catalog.set_config('search_path', %s, true)", (SEARCH_PATH,))
                    yield db
                    with abort_after(db, self._timeout_s):
                        await stack.aclose()
            except psycopg.errors.FeatureNotSupported as error:
                # Our tables with an unlogged part cannot be read on a standby, which may become the primary.
                if db.info.parameter_status("in_hot_standby") == "on":
                    raise DatabaseUnavailable from error
                raise
            finally:
                # Not the pool's own `connection`: it forgets one whose return is cancelled, as happens to clients that leave while others
                # wait, until it has none to give.
                await asyncio.shield(self._pool.putconn(db))

    async def _reset(self, db: Database) -> None:
        # In one round trip, and without DISCARD ALL, which would drop what the session knows of the catalog.
        with abort_after(db, self._timeout_s):
            await db.execute("deallocate all; reset all; select pg_catalog.pg_advisory_unlock_all()")

    async def _check(self, db: Database) -> None:
        try:
            # Half of it, so that who waits for this one has time for another.
            with abort_after(db, self._timeout_s / 2):
                await AsyncConnectionPool.check_connection(db)
        except psycopg.Error:
            # What silenced or ended one has as a rule done so to all: they are not waited for one after the other.
            await self._pool.drain()
            raise


@contextlib.asynccontextmanager
async def _limited(db: Database, limit_s: float) -> AsyncIterator[None]:
    """A transaction in which a statement may take so long."""
    async with db.transaction():
        await db.execute("select pg_catalog.set_config('statement_timeout', %s, true)", (str(int(limit_s * 1000)),))
        yield


@contextlib.contextmanager
def abort_after(db: Database, timeout_s: float) -> Iterator[None]:
    """End the connection when this takes longer. To cancel would be to ask the server first, which takes long if it is away."""
    timer = asyncio.get_running_loop().call_later(timeout_s, abort_connection, db)
    try:
        yield
    finally:
        timer.cancel()


def abort_connection(db: Database) -> None:
    """End the connection at once; who waits for its answer gets an error."""
    # The other side, or libpq, may have closed it.
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(db.pgconn.socket)) as line:
        line.shutdown(socket.SHUT_RDWR)


@contextlib.asynccontextmanager
async def streaming(
    db: Database,
    query: LiteralString | sql.Composed,
    arguments: Sequence[object] = (),
    *,
    closing_s: float,
    rows_at_once: int = ROWS_AT_ONCE,
) -> AsyncIterator[AsyncIterator[tuple[Any, ...]]]:
    """The rows of one statement as they come, of which only `rows_at_once` are in memory. The rest is given up within `closing_s`."""
    async with db.cursor() as cursor:
        rows = cast(AsyncGenerator[tuple[Any, ...]], cursor.stream(query, arguments, size=rows_at_once))
        try:
            yield rows
        finally:
            # Until it is closed the connection takes nothing else, not even its own end.
            with abort_after(db, closing_s):
                await rows.aclose()


def describe(error: psycopg.Error) -> str:
    """`ERROR 22P02 (invalid_text_representation) message`, as clients are told of what they asked for themselves."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(error).__name__).lower()
    return f"ERROR {error.sqlstate} ({name}) {error.diag.message_primary}"


@contextlib.contextmanager
def retry_on_ddl() -> Iterator[None]:
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
    except (
        psycopg.OperationalError,
        psycopg.InterfaceError,
        PoolTimeout,
        psycopg.errors.ReadOnlySqlTransaction,
    ) as error:
        # Read-only: a standby, which may become the primary, or maintenance.
        raise DatabaseUnavailable from error
    except psycopg.Error as error:
        if error.sqlstate == GAP:
            raise Gap(error.diag.message_primary or "", error.diag.message_detail or "") from error
        if error.diag.constraint_name == CURSOR_FORMAT or error.diag.message_primary == "malformed cursor":
            raise MalformedCursor from error
        raise
