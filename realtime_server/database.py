"""Connections to PostgreSQL, and the one place where its errors become ours.

A statement in Python is one call of a function that lives in `sql/`. Every connection says who it is (`application_name`), speaks UTC and
resolves names by the search path that users' policies expect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg import AsyncConnection, conninfo
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from realtime_server.errors import DatabaseUnavailable, QueryCanceled

Canceled = psycopg.errors.QueryCanceled
InvalidText = psycopg.DataError
# SQLSTATE of realtime.read_cursor when messages behind a cursor are gone.
GAP = "RT001"
Database = AsyncConnection[tuple[Any, ...]]


def parameters(url: str, *, name: str, timeout_s: float, statement_timeout_s: float | None = None) -> str:
    """The URL with the settings of our connections. `name` shows in pg_stat_activity behind `realtime-server`."""
    options = "-c search_path=public,extensions -c timezone=UTC -c idle_in_transaction_session_timeout=60s"
    if statement_timeout_s is not None:
        options += f" -c statement_timeout={int(statement_timeout_s * 1000)}"
    return conninfo.make_conninfo(
        url,
        application_name=f"realtime-server {name}",
        connect_timeout=max(2, int(timeout_s)),
        options=options,
        keepalives_idle=30,
        keepalives_interval=10,
        keepalives_count=3,
    )


async def connect(url: str, *, name: str, timeout_s: float) -> Database:
    """One connection of its own, in autocommit. Raises: DatabaseUnavailable."""
    with errors():
        return await AsyncConnection.connect(parameters(url, name=name, timeout_s=timeout_s), autocommit=True)


def pool(
    url: str, *, name: str, size: int, timeout_s: float, statement_timeout_s: float
) -> AsyncConnectionPool[Database]:
    """A pool of autocommit connections, not open yet. `open()` does not wait: the server starts while the database is away."""
    return AsyncConnectionPool(
        parameters(url, name=name, timeout_s=timeout_s, statement_timeout_s=statement_timeout_s),
        kwargs={"autocommit": True},
        min_size=1,
        max_size=size,
        timeout=timeout_s,
        check=AsyncConnectionPool.check_connection,
        open=False,
        name=name,
    )


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Turn what means "no database" and "took too long" into our errors; let everything else through."""
    try:
        yield
    except psycopg.errors.QueryCanceled as error:
        raise QueryCanceled from error
    except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout) as error:
        raise DatabaseUnavailable from error
