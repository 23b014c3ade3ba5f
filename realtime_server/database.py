"""Connections to PostgreSQL, and the translation of its errors into those of this server.

A statement in Python is one call of a function in `sql/`. Every connection sets its `application_name`, uses UTC and resolves names in
pg_catalog alone, so that the server calls no operators or functions that somebody has created in another schema.
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

# Closing a pool does not wait longer for connections that are being made.
CLOSING_S: Final = 1.0

# How soon a backend notices, in the middle of a statement, that its client's connection is closed.
CLIENT_CHECK_INTERVAL: Final = "2s"

SEARCH_PATH: Final = "pg_catalog,pg_temp"

# Chunk size of a stream: a quarter slower than fetching all rows at once, where one row at a time takes twice as long.
ROWS_AT_ONCE: Final = 10

# SQLSTATE of realtime.read_cursor when messages after a cursor are no longer kept.
GAP: Final = "RT001"
# The domain's constraint, which rejects texts that are no cursors.
CURSOR_FORMAT: Final = "cursor_format"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of the database. `is_pooled`: it is behind a transaction pooler, so no session settings, prepared statements or LISTEN
    can be used. `can_check_clients`: PostgreSQL runs on a system where backends can detect that their client is gone."""

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
        """Return the URL with the settings of this server's connections. `name` shows in pg_stat_activity after `realtime-server`."""
        settings: dict[str, Any] = {
            "application_name": f"realtime-server {name}",
            "connect_timeout": max(2, int(timeout_s)),
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            # Limits unacknowledged data: by default the kernel retransmits for a quarter of an hour.
            "tcp_user_timeout": int(2000 * timeout_s),
            "client_encoding": "UTF8",
        }
        if not self.is_pooled:
            own = conninfo.conninfo_to_dict(self.url).get("options") or ""
            options = f"{own} -c search_path={SEARCH_PATH} -c timezone=UTC -c idle_in_transaction_session_timeout=60s"
            # Timeouts that are set for the role or the database would end sessions that wait on purpose: the relay, and its lock queue.
            options += f" -c statement_timeout={int((statement_timeout_s or 0) * 1000)} -c lock_timeout=0 -c idle_session_timeout=0"
            if self.can_check_clients:
                # Otherwise a statement keeps running after its connection was aborted or its server was killed.
                options += f" -c client_connection_check_interval={CLIENT_CHECK_INTERVAL}"
            settings["options"] = options.strip()
        return conninfo.make_conninfo(self.url, **settings)

    @property
    def connection_options(self) -> dict[str, Any]:
        return {"autocommit": True} | ({"prepare_threshold": None} if self.is_pooled else {})


def probe(url: str, *, timeout_s: float) -> Endpoint:
    """Find out whether a pooler is in front of the database, and whether backends can check clients. Raises: DatabaseUnavailable."""
    return _examine(Endpoint(url), timeout_s)


def _examine(direct: Endpoint, timeout_s: float) -> Endpoint:
    try:
        with psycopg.connect(direct.parameters(name="probe", timeout_s=timeout_s), autocommit=True) as db:
            db.execute("listen realtime")
            db.execute("select pg_catalog.pg_notify('realtime', '')")
            # A pooler that lets the settings through sends LISTEN and NOTIFY to different sessions, or drops the LISTEN.
            is_notified = any(True for _ in db.notifies(timeout=1.0, stop_after=1))
        return replace(direct, is_pooled=not is_notified)
    except psycopg.errors.ReadOnlySqlTransaction:
        # It is a standby, which does not allow LISTEN. The relay waits for it to be promoted.
        return direct
    except psycopg.OperationalError as error:
        if "unsupported startup parameter" in str(error):
            return replace(direct, is_pooled=True)
        if direct.can_check_clients and "client_connection_check_interval" in str(error):
            return _examine(replace(direct, can_check_clients=False), timeout_s)
        raise DatabaseUnavailable from error


async def connect(target: Endpoint, *, name: str, timeout_s: float) -> Database:
    """Open one connection outside of any pool, in autocommit. Raises: DatabaseUnavailable."""
    with errors():
        parameters = target.parameters(name=name, timeout_s=timeout_s)
        return await AsyncConnection.connect(parameters, **target.connection_options)


class Pool:
    """Connections for short queries, each of which PostgreSQL ends after `statement_timeout_s`.

    `timeout_s` limits connecting, and how long the response may take beyond the statement timeout. `acquire_timeout_s` limits the wait for
    a free connection; its default is `timeout_s`. `runs_user_code`: policies and other code of users runs in the sessions. Prepared
    statements and session-level locks outlive a rollback, so the server prepares none that could be replaced, and resets the session
    before the next query.
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
            # The next query connects anew; otherwise the pause between attempts would grow to minutes.
            reconnect_timeout=timeout_s,
            open=False,
            name=name,
        )

    async def open(self) -> None:
        """Open the pool without waiting for connections: the server also starts while the database is unreachable."""
        await self._pool.open()

    async def close(self) -> None:
        await self._pool.close(timeout=CLOSING_S)

    async def fetch(
        self, query: LiteralString, arguments: Sequence[object] = (), *, limit_s: float | None = None
    ) -> list[tuple[Any, ...]]:
        """Return the rows of one statement. `limit_s`: its statement timeout, by default that of the pool.

        Raises: DatabaseUnavailable, QueryCanceled, Gap, MalformedCursor.
        """
        response_timeout_s = (self._statement_timeout_s if limit_s is None else limit_s) + self._timeout_s
        async with self._connection() as db:
            with abort_after(db, response_timeout_s):
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
        """Yield the rows like `fetch`, with only `rows_at_once` of them in memory. Closing the iterator ends the statement.

        Before a statement fails, its earlier rows are yielded, in whole chunks of `rows_at_once`.
        """
        response_timeout_s = (self._statement_timeout_s if limit_s is None else limit_s) + self._timeout_s
        async with (
            self._connection() as db,
            contextlib.nullcontext() if limit_s is None else _limited(db, limit_s),
            streaming(db, query, arguments, closing_s=response_timeout_s, rows_at_once=rows_at_once) as rows,
        ):
            while True:
                with abort_after(db, response_timeout_s):
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
                        # Session settings would leak to another client of the pooler, so they are local to the transaction.
                        with abort_after(db, self._timeout_s):
                            await stack.enter_async_context(_limited(db, self._statement_timeout_s))
                            await db.execute("select pg_catalog.set_config('search_path', %s, true)", (SEARCH_PATH,))
                    yield db
                    with abort_after(db, self._timeout_s):
                        await stack.aclose()
            except psycopg.errors.FeatureNotSupported as error:
                # Tables with an unlogged part cannot be read on a standby, which may become the primary.
                if db.info.parameter_status("in_hot_standby") == "on":
                    raise DatabaseUnavailable from error
                raise
            finally:
                # The pool's own `connection` is not used: it loses a connection whose return is cancelled, as happens when clients leave
                # while others wait, until the pool is empty.
                await asyncio.shield(self._pool.putconn(db))

    async def _reset(self, db: Database) -> None:
        # One round trip, and not DISCARD ALL, which would drop what the session has cached of the catalog.
        with abort_after(db, self._timeout_s):
            await db.execute("deallocate all; reset all; select pg_catalog.pg_advisory_unlock_all()")

    async def _check(self, db: Database) -> None:
        try:
            # Half of the timeout, so that the waiting query has time left for another connection.
            with abort_after(db, self._timeout_s / 2):
                await AsyncConnectionPool.check_connection(db)
        except psycopg.Error:
            # If one connection is dead, usually all are: the pool replaces them instead of checking one after the other.
            await self._pool.drain()
            raise


@contextlib.asynccontextmanager
async def _limited(db: Database, limit_s: float) -> AsyncIterator[None]:
    """Open a transaction with this statement timeout."""
    async with db.transaction():
        await db.execute("select pg_catalog.set_config('statement_timeout', %s, true)", (str(int(limit_s * 1000)),))
        yield


@contextlib.contextmanager
def abort_after(db: Database, timeout_s: float) -> Iterator[None]:
    """Abort the connection when the block takes longer. Cancelling instead would need the server, which may be unreachable."""
    timer = asyncio.get_running_loop().call_later(timeout_s, abort_connection, db)
    try:
        yield
    finally:
        timer.cancel()


def abort_connection(db: Database) -> None:
    """Close the connection at once; a pending query on it raises an error."""
    # The server, or libpq, may have closed it already.
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
    """Stream the rows of one statement, with only `rows_at_once` in memory. On exit the rest is discarded within `closing_s`."""
    async with db.cursor() as cursor:
        rows = cast(AsyncGenerator[tuple[Any, ...]], cursor.stream(query, arguments, size=rows_at_once))
        try:
            yield rows
        finally:
            # Until the stream is closed, the connection accepts no other command and cannot be closed cleanly.
            with abort_after(db, closing_s):
                await rows.aclose()


def describe(error: psycopg.Error) -> str:
    """Format an error as `ERROR 22P02 (invalid_text_representation) message`, for the client that caused it."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(error).__name__).lower()
    return f"ERROR {error.sqlstate} ({name}) {error.diag.message_primary}"


@contextlib.contextmanager
def retry_on_ddl() -> Iterator[None]:
    """Make errors retryable, for queries about tables that others may drop or change meanwhile. Raises: DatabaseUnavailable."""
    try:
        yield
    except psycopg.Error as error:
        raise DatabaseUnavailable from error


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Translate errors of PostgreSQL into those of this server; others pass through."""
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
        # Read-only: it is a standby, which may become the primary, or under maintenance.
        raise DatabaseUnavailable from error
    except psycopg.Error as error:
        if error.sqlstate == GAP:
            raise Gap(error.diag.message_primary or "", error.diag.message_detail or "") from error
        if error.diag.constraint_name == CURSOR_FORMAT or error.diag.message_primary == "malformed cursor":
            raise MalformedCursor from error
        raise
