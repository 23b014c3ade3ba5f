"""How revisions run: one transaction each, one migrator at a time, the version table in schema realtime.

`head` means the head of the core: with a branch for each sample system it would be ambiguous.
"""

from __future__ import annotations

import time
from typing import Any

import psycopg
from psycopg import conninfo
from sqlalchemy import Connection, create_engine, pool, text

from alembic import context
from realtime_server import config
from realtime_server.errors import SettingsError
from realtime_server.schema import CORE, VERSION_TABLE

MIGRATION_LOCK = 7885631  # any fixed number: two migrators meet here
LOCK_TIMEOUT_S = 60

_revisions = context.script.revision_map
_current_head = _revisions.get_current_head
_revisions.get_current_head = lambda branch_label=None: _current_head(branch_label or CORE)  # type: ignore[method-assign]

OPTIONS: dict[str, Any] = {
    "version_table": VERSION_TABLE,
    "version_table_schema": "realtime",
    "transaction_per_migration": True,
}


def database_url() -> str:
    if url := context.config.attributes.get("url"):
        return str(url)
    try:
        given = config.load().database_url
    except SettingsError as error:
        raise SystemExit(str(error)) from None
    if given is None:
        raise SystemExit(
            'no database: set REALTIME_DATABASE_URL (the embedded one is migrated by "realtime-server run")'
        )
    return given.get_secret_value()


def run_offline() -> None:
    context.configure(url="postgresql+psycopg://", literal_binds=True, **OPTIONS)
    context.execute("set search_path = ''")  # as online: names mean the same whoever runs the script
    context.execute("create schema if not exists realtime")
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    url = database_url()
    own = conninfo.conninfo_to_dict(url).get("options") or ""
    url = conninfo.make_conninfo(
        url,
        options=f"{own} -c search_path= -c lock_timeout=5s".strip(),
        application_name="realtime-server migrate",
    )
    engine = create_engine("postgresql+psycopg://", poolclass=pool.NullPool, creator=lambda: psycopg.connect(url))
    with engine.connect() as connection:
        lock(connection)
        # Only where absent: a role that may use the schema but not create one can then still ask for the revision.
        if not connection.scalar(text("select to_regnamespace('realtime')")):
            connection.execute(text("create schema realtime"))
        connection.commit()
        context.configure(connection=connection, **OPTIONS)
        with context.begin_transaction():
            context.run_migrations()


def lock(connection: Connection) -> None:
    """Wait for the other migrator without holding a snapshot: CREATE INDEX CONCURRENTLY would wait for that one."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while not connection.scalar(text("select pg_try_advisory_lock(:key)"), {"key": MIGRATION_LOCK}):
        connection.commit()
        if time.monotonic() > deadline:
            raise SystemExit(f"another migration has been running for {LOCK_TIMEOUT_S} seconds; try again later")
        time.sleep(0.1)
    connection.commit()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
