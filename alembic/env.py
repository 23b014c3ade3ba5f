"""Runs revisions: one transaction each, one migrator at a time, the version table in schema realtime. At the end of an upgrade, the changed
functions of every branch that is at its head are applied in one transaction.

`head` means the head of the core: with a branch for each sample system it would be ambiguous.
"""

from __future__ import annotations

import time
from typing import Any

import psycopg
from alembic.runtime.migration import MigrationInfo
from psycopg import conninfo
from sqlalchemy import Connection, create_engine, pool, text

from alembic import context, util
from realtime_server import config
from realtime_server.errors import SettingsError
from realtime_server.schema import CORE, VERSION_TABLE, pending_functions, raw_connection, read_digests

MIGRATION_LOCK = 7885631  # key of the advisory lock of migrators; any fixed number
LOCK_TIMEOUT_S = 60

_revisions = context.script.revision_map
_current_head = _revisions.get_current_head
_revisions.get_current_head = lambda branch_label=None: _current_head(branch_label or CORE)  # type: ignore[method-assign]

# The revisions that were applied.
steps: list[MigrationInfo] = []

OPTIONS: dict[str, Any] = {
    "on_version_apply": lambda step, **_: steps.append(step),
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


def is_upgrade() -> bool:
    """Whether this command upgrades, and does not downgrade, stamp, show or compare."""
    try:
        context.get_revision_argument()
    except KeyError:
        return False
    return all(step.is_upgrade and not step.is_stamp for step in steps)


def run_offline() -> None:
    context.configure(url="postgresql+psycopg://", literal_binds=True, **OPTIONS)
    context.execute("set search_path = ''")  # as online, so that names resolve the same for every user
    context.execute("create schema if not exists realtime")
    with context.begin_transaction():
        context.run_migrations()
    if is_upgrade():
        heads = {*util.to_tuple(context.get_starting_revision_argument(), ()), *(step.up_revision_id for step in steps)}
        scripts = pending_functions(heads, context.config.attributes.get("digests", {}))
        context.get_context().impl.static_output("\n".join(["BEGIN;", *scripts.values(), "COMMIT;"]))


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
        # Only if absent, so that a role that may use the schema but not create one can still read the revision.
        if not connection.scalar(text("select to_regnamespace('realtime')")):
            connection.execute(text("create schema realtime"))
        connection.commit()
        context.configure(connection=connection, **OPTIONS)
        with context.begin_transaction():
            context.run_migrations()
        if is_upgrade():
            apply_functions(connection)


def apply_functions(connection: Connection) -> None:
    db = raw_connection(connection)
    heads = context.get_context().get_current_heads()
    # SQLAlchemy began a transaction to read the heads.
    connection.commit()
    with db.transaction():
        for script in pending_functions(heads, read_digests(db)).values():
            db.execute(script.encode())


def lock(connection: Connection) -> None:
    """Wait for another migrator without holding a snapshot, which its CREATE INDEX CONCURRENTLY would wait for."""
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
