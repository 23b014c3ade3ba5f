"""Finds misconfigurations and risks for messages and row changes, each with its fix.

The database makes most of the checks (`sql/functions/90_doctor.sql`). Those that need a client are made here: whether the schema is this
server's, whether a pooler is in front of the database, and whether it accepts replication connections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, Literal

import msgspec
import psycopg
from psycopg import conninfo

from realtime_server import schema
from realtime_server.changes.wal import POOLED, refusal
from realtime_server.config import Settings
from realtime_server.database import Endpoint, probe
from realtime_server.errors import FunctionsMismatch, SchemaMismatch

STATEMENT_TIMEOUT_S: Final = 30.0


class Finding(msgspec.Struct, frozen=True):
    """The result of a check. `check` is its stable name; `advice` is empty where there is nothing to do."""

    check: str
    level: Literal["ok", "note", "problem"]
    finding: str
    advice: str | None = None


def examine(url: str, settings: Settings) -> Iterator[Finding]:
    """Check the database for a server with these settings. Raises: psycopg.Error, DatabaseUnavailable."""
    try:
        schema.check(url)
    except (SchemaMismatch, FunctionsMismatch) as error:
        # Functions that the other checks call may be missing.
        yield Finding("schema", "problem", str(error))
        return
    yield Finding("schema", "ok", f"the database is at {', '.join(schema.revisions(url))}")
    target = probe(url, timeout_s=settings.database_timeout_s)
    yield _wakeup(settings.wakeup, target.is_pooled)
    obstacle = None
    if target.is_pooled or settings.wakeup == "poll":
        obstacle = POOLED
    elif settings.changes != "trigger":
        obstacle = _replication_refusal(target, settings.database_timeout_s)
    parameters = target.parameters(
        name="doctor", timeout_s=settings.database_timeout_s, statement_timeout_s=STATEMENT_TIMEOUT_S
    )
    with psycopg.connect(parameters, **target.connection_options) as db:
        rows = db.execute(
            'select "check", level, finding, advice from realtime.doctor(current_user, %s, %s, %s, %s)',
            (settings.changes, obstacle, list(settings.roles), settings.strict_deletes),
        ).fetchall()
    for check, level, finding, advice in rows:
        yield Finding(check, level, finding, advice)


def _wakeup(wakeup: Literal["auto", "notify", "poll"], is_pooled: bool) -> Finding:
    if wakeup == "notify" and is_pooled:
        return Finding(
            "wakeup",
            "problem",
            "REALTIME_WAKEUP is notify, but through the transaction pooler before this database no NOTIFY arrives",
            "set REALTIME_WAKEUP to auto, or give the address of the database itself",
        )
    if is_pooled:
        return Finding(
            "wakeup",
            "note",
            "the database is behind a transaction pooler: the server looks for messages many times a second",
            "give the address of the database itself, and NOTIFY wakes the server",
        )
    if wakeup == "poll":
        return Finding(
            "wakeup",
            "note",
            "REALTIME_WAKEUP is poll: the server looks for messages many times a second, though NOTIFY would wake it",
            "set REALTIME_WAKEUP to auto",
        )
    return Finding("wakeup", "ok", "NOTIFY wakes the server")


def _replication_refusal(target: Endpoint, timeout_s: float) -> str | None:
    walsender = replace(target, url=conninfo.make_conninfo(target.url, replication="database"))
    try:
        psycopg.connect(walsender.parameters(name="doctor", timeout_s=timeout_s), autocommit=True).close()
    except psycopg.OperationalError as error:
        return refusal(error)
    return None
