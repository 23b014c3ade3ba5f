"""Installs and checks the server's schema: tables by the revisions in `alembic/`, functions by the files in `sql/functions`.

Revisions are frozen history. Functions, triggers, policies and views have none: at the end of an upgrade, all files of a branch are applied
if the branch is at its head and the database has other versions of them. (`sql/structure` shows the result of the revisions; tests compare
the two.)

In the repository both are folders beside the package; in an installed wheel they are inside it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

import psycopg
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import RevisionStep
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy import Connection

from alembic import command, op
from realtime_server.errors import FunctionsMismatch, SchemaMismatch

CORE: Final = "core"
SAMPLES: Final = ("chat",)
VERSION_TABLE: Final = "alembic_version"

_PACKAGE: Final = Path(__file__).parent


def _folder(name: str) -> Path:
    packed = _PACKAGE / f"_{name}"
    return packed if packed.is_dir() else _PACKAGE.parent / name


def alembic_config(url: str | None = None) -> Config:
    """Return Alembic's configuration for this package's revisions. `url`: any form that libpq takes; None: from the environment."""
    config = Config()
    config.set_main_option("script_location", str(_folder("alembic")))
    config.set_main_option("version_locations", str(_folder("alembic") / "versions"))
    config.set_main_option("recursive_version_locations", "true")
    config.set_main_option("path_separator", "newline")
    config.attributes["url"] = url
    return config


def upgrade(url: str | None, target: str) -> None:
    """Apply the revisions up to `target` (`core@head`, `chat@head`, `heads`)."""
    command.upgrade(alembic_config(url), target)


def print_script(url: str | None, targets: list[str]) -> bool:
    """Print the script of an upgrade to these targets: what is pending in the database, or without one, everything. Return False if
    nothing is pending."""
    config = alembic_config()
    script = ScriptDirectory.from_config(config)
    heads, digests = ((), {}) if url is None else _installed(url)
    config.attributes["digests"] = digests

    def pending(heads: tuple[str, ...], context: object) -> Iterator[RevisionStep]:
        printed = set()
        for target in targets:
            for step in script._upgrade_revs(target, heads):  # type: ignore[arg-type]
                if step.revision.revision not in printed:
                    printed.add(step.revision.revision)
                    yield step

    if not any(pending(heads, None)) and not pending_functions(heads, digests):
        return False
    with EnvironmentContext(
        config, script, fn=pending, as_sql=True, starting_rev=heads or None, destination_rev="heads"
    ):
        script.run_env()
    return True


@contextlib.contextmanager
def _connect(url: str) -> Iterator[psycopg.Connection]:
    """Open a connection for one transaction that resolves names in pg_catalog. The setting is local, for transaction poolers."""
    with psycopg.connect(url) as db:
        db.execute("set local search_path = pg_catalog, pg_temp")
        yield db


def revisions(url: str) -> list[str]:
    """Return the current revisions of the database, one for each branch; empty when nothing was ever installed."""
    script = ScriptDirectory.from_config(alembic_config())
    return sorted(revision.revision for revision in script.get_all_current(_installed(url)[0]))


def functions(branch: str) -> str:
    """Return the SQL files of a branch: functions, triggers, policies and views. They are idempotent."""
    root = _folder("sql")
    files = (
        sorted((root / "functions").glob("*.sql")) if branch == CORE else [root / "samples" / branch / "functions.sql"]
    )
    return "".join(file.read_text(encoding="utf-8") for file in files)


def pending_functions(heads: Collection[str], digests: Mapping[str, str]) -> dict[str, str]:
    """Return the scripts to apply, by branch, in order, to a database at these revisions that has functions with these digests.

    A branch that is not at its head is left out, because its functions may need tables of later revisions. If it is the core, the samples
    are left out, too, because they call its functions.
    """
    script = ScriptDirectory.from_config(alembic_config())
    current = {revision.revision for revision in script.get_all_current(tuple(heads))}
    scripts = {}
    for branch in (CORE, *SAMPLES):
        if script.get_revision(f"{branch}@head").revision not in current:
            if branch == CORE:
                break
            continue
        text = functions(branch)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digests.get(branch) != digest:
            scripts[branch] = text + _RECORD.format(branch, digest).as_string()
    return scripts


_RECORD: Final = sql.SQL(
    "insert into realtime_internal.applied_functions (branch, digest) values ({}, {})"
    " on conflict (branch) do update set digest = excluded.digest, applied_at = now();\n"
)


def read_digests(db: psycopg.Connection) -> dict[str, str]:
    if db.execute("select to_regclass('realtime_internal.applied_functions')").fetchone() == (None,):
        return {}
    return dict(db.execute("select branch, digest from realtime_internal.applied_functions"))


def _installed(url: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Read what a database has: the version table, which names only the revisions that no other installed one depends on, and the digests
    of functions."""
    with _connect(url) as db:
        if db.execute("select to_regclass('realtime.alembic_version')").fetchone() == (None,):
            return (), {}
        heads = db.execute("select version_num from realtime.alembic_version order by 1")
        return tuple(name for (name,) in heads), read_digests(db)


def check(url: str) -> None:
    """Check that the database has the schema that this server needs. Raises: SchemaMismatch, FunctionsMismatch."""
    heads, digests = _installed(url)
    script = ScriptDirectory.from_config(alembic_config())
    needed = script.get_revision(f"{CORE}@head").revision
    current = sorted(revision.revision for revision in script.get_all_current(heads))
    found = [revision for revision in current if revision.startswith(f"{CORE}_")]
    if needed not in found:
        raise SchemaMismatch(found[-1] if found else None, needed)
    if pending := pending_functions(heads, digests):
        raise FunctionsMismatch(list(pending))


def run_sql_file(script: str) -> None:
    """Run the `.sql` file beside the revision file `script`, or print it when offline."""
    text = Path(script).with_suffix(".sql").read_text(encoding="utf-8")
    context = op.get_context()
    if context.as_sql:
        context.impl.static_output(text)
        return
    raw_connection(op.get_bind()).execute(text.encode())


def raw_connection(connection: Connection) -> psycopg.Connection:
    """Return psycopg's connection. SQLAlchemy would read `:name` and `%` in SQL as parameters."""
    db = connection.connection.dbapi_connection
    assert isinstance(db, psycopg.Connection), "revisions run through psycopg"
    return db


def role_statements(login: str, server_version: int) -> list[str]:
    """Return the statements that an administrator runs if `login` may not create roles. They are idempotent. `server_version` is like
    180004."""
    statements = []
    for role in ("anon", "authenticated", "service_role"):
        bypass = " bypassrls" if role == "service_role" else ""
        statements.append(
            f"do $$ begin create role {role} nologin noinherit{bypass}; exception when duplicate_object then null; end $$;"
        )
    option = " with inherit false, set true" if server_version >= 160000 else ""
    name = sql.Identifier(login).as_string()
    statements.append(f"grant anon, authenticated, service_role to {name}{option};")
    return statements


def missing_role_statements(url: str) -> list[str]:
    """Return these statements if this database needs an administrator for them; empty when the roles exist or the migration can create
    them."""
    with _connect(url) as db:
        # Until PostgreSQL 15, CREATEROLE may grant every ordinary role; since 16, only those it has the ADMIN option of.
        row = db.execute(
            """
            select
                current_user::text,
                current_setting('server_version_num')::int,
                bool_and(
                    me.rolsuper
                    or case
                        when theirs.oid is null then me.rolcreaterole
                        when current_setting('server_version_num')::int < 160000
                            then me.rolcreaterole or pg_has_role(theirs.oid, 'member')
                        else pg_has_role(theirs.oid, 'set') or pg_has_role(theirs.oid, 'member with admin option')
                    end
                )
            from pg_roles as me
            cross join unnest(array['anon', 'authenticated', 'service_role']) as needed
            left join pg_roles as theirs on theirs.rolname = needed
            where me.rolname = current_user
            """
        ).fetchone()
    assert row is not None, "an aggregate returns a row"
    login, server_version, can_alone = row
    return [] if can_alone else role_statements(login, server_version)
