"""sql/ (today) and alembic/ (history) say the same, on the oldest and the newest PostgreSQL, for every branch.

`make schema-diff` runs the tests with "equals" in their name.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from alembic.script import ScriptDirectory
from psycopg import conninfo

from realtime_server import schema
from realtime_server.embedded import bundled_bin
from tests.fix_database import Cluster, TestDatabase

ROOT = Path(__file__).parent.parent.parent
BRANCHES = [schema.CORE, *schema.SAMPLES]
LIMIT_S = 60

# Definer functions that everybody may call: they tell places in the stream, and nothing of what is there.
PLACES = {
    "realtime.life()",
    "realtime.cursor()",
    "realtime.oldest_cursor()",
    "realtime.read_cursor(realtime.cursor)",
}
# Those that applications call, and what these and inserts into realtime.messages run. Everything else is the server's.
FOR_EVERYBODY = PLACES | {
    "realtime.messages_after(text,realtime.cursor,integer,boolean)",
    "realtime.snapshot(text)",
    "realtime_internal.snapshot_text(pg_snapshot)",
    "realtime_internal.snapshot_from_text(text)",
    "realtime.overlapping(pg_snapshot)",
    "realtime.durable(pg_snapshot)",
    "realtime.format_cursor(text,pg_snapshot,pg_snapshot,bigint)",
    "realtime.topic()",
    "realtime.send(jsonb,text,text,boolean)",
    "realtime.send_binary(bytea,text,text,boolean)",
    "realtime.broadcast_changes(text,text,text,text,text,record,record,text)",
    "realtime.write_message(text,text,jsonb,bytea,boolean)",
    "realtime_internal.check_message(text,text,jsonb,bytea)",
    "realtime_internal.base_type(oid)",
    "realtime_internal.comparison(text,boolean,text)",
}

NewDatabase = Callable[..., TestDatabase]


@pytest.fixture
def new_database(any_cluster: Cluster) -> Iterator[NewDatabase]:
    """Databases migrated to these targets; without a target, empty ones."""
    made: list[TestDatabase] = []

    def create(*targets: str) -> TestDatabase:
        made.append(any_cluster.create(*targets) if targets else any_cluster.create_empty())
        return made[-1]

    yield create
    for database in made:
        any_cluster.drop(database)


def run_sql(database: TestDatabase, text: str) -> None:
    """As a migration does: the whole text at once, all or nothing, with an empty search path."""
    with psycopg.connect(database.url, options="-c search_path=") as db:
        db.execute(text.encode())


def sql_of(branch: str, *parts: str) -> str:
    """What `sql/` says of a branch: `structure`, which makes it from nothing, or `functions`, which may run again at any time."""
    root = ROOT / "sql"
    if branch == schema.CORE:
        files = [file for part in parts for file in sorted((root / part).glob("*.sql"))]
    else:
        files = [root / "samples" / branch / f"{part}.sql" for part in parts]
    return "\n".join(file.read_text() for file in files)


def fresh(database: TestDatabase, branch: str) -> TestDatabase:
    for name in dict.fromkeys([schema.CORE, branch]):
        run_sql(database, sql_of(name, "structure", "functions"))
    return database


def dump(database: TestDatabase) -> list[str]:
    """The whole database but the version table and the partitions of days. Owners, grants and comments are in it."""
    # The bundled pg_dump is of the newest version, so it reads every server; Debian's would refuse a newer one.
    command = [str(bundled_bin() / "pg_dump"), "--schema-only", f"--dbname={database.administrator_url}"]
    hidden = ["--exclude-table=realtime.alembic_version", "--exclude-table=realtime.messages_20*"]
    done = subprocess.run([*command, *hidden], capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert "CREATE TABLE realtime.messages " in done.stdout
    # \restrict carries a new random word each time.
    return [line for line in done.stdout.splitlines() if not line.startswith(("\\restrict", "\\unrestrict"))]


def assert_equal(one: list[str], two: list[str]) -> None:
    if one != two:
        pytest.fail("\n".join(difflib.unified_diff(one, two, lineterm="", n=2)), pytrace=False)


def environment(url: str | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("REALTIME_", "DATABASE_URL"))}
    return kept if url is None else {**kept, "REALTIME_DATABASE_URL": url}


def run_alembic(url: str | None, *arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The real command, as a DBA runs it."""
    return subprocess.run(
        [sys.executable, "-m", "alembic", "-c", ROOT / "alembic.ini", *arguments],
        cwd=folder,
        env=environment(url),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def alembic(url: str | None, *arguments: str) -> str:
    done = run_alembic(url, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def migrate_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "realtime_server.cli", "migrate", *arguments]


def run_script(database: TestDatabase, script: str) -> None:
    done = subprocess.run(
        [bundled_bin() / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", database.url],
        input=script,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr


def history() -> ScriptDirectory:
    return ScriptDirectory.from_config(schema.alembic_config())


def branch_of(revision: str) -> str:
    return revision.rpartition("_")[0]


def heads(*branches: str) -> list[str]:
    return sorted(head for head in history().get_heads() if branch_of(head) in branches)


def installed(database: TestDatabase) -> list[str]:
    return schema.revisions(database.url)


def has(database: TestDatabase, relation: str) -> bool:
    return database.execute("select to_regclass(%s) is not null", relation) == [(True,)]


@pytest.mark.parametrize("branch", BRANCHES)
def test_fresh_schema_equals_upgraded_schema(new_database: NewDatabase, branch: str) -> None:
    upgraded = dump(new_database(*dict.fromkeys([f"{schema.CORE}@head", f"{branch}@head"])))
    assert_equal(upgraded, dump(fresh(new_database(), branch)))


@pytest.mark.parametrize("branch", BRANCHES)
def test_files_of_functions_can_run_again(new_database: NewDatabase, branch: str) -> None:
    database = fresh(new_database(), branch)
    before = dump(database)
    for _ in range(2):
        for name in dict.fromkeys([schema.CORE, branch]):
            run_sql(database, sql_of(name, "functions"))
    assert_equal(before, dump(database))


def add_rows(database: TestDatabase) -> None:
    """A message, and a chat message where there is chat. Fails where the API does not answer."""
    database.execute("select realtime.send('{\"kept\": true}', 'event', 'topic')")
    if has(database, "public.chat_threads"):
        database.execute(
            "insert into public.chat_threads"
            " values ('a__b', 'a', 'b', gen_random_uuid(), gen_random_uuid()) on conflict do nothing"
        )
        with database.connect() as db, db.transaction():
            db.execute("select set_config('request.jwt.claim.sub', user_a_supabase_id::text, true) from chat_threads")
            db.execute("select public.insert_chat_message('a__b', 'a', 'b', 'hello')")


def rows(database: TestDatabase) -> set[str]:
    found = database.execute("select id::text from realtime.messages")
    if has(database, "public.chat_messages"):
        found += database.execute("select id::text from public.chat_messages")
        found += database.execute("select thread_id from public.chat_threads")
    return {row for (row,) in found}


def test_each_revision_upgrades_one_by_one_with_rows_in_it(new_database: NewDatabase) -> None:
    database = new_database()
    steps = [script.revision for script in history().walk_revisions("base", "heads")][::-1]
    assert steps
    for step in steps:
        before: set[str] = set()
        if has(database, "realtime.messages"):
            add_rows(database)
            before = rows(database)
            assert before
        schema.upgrade(database.url, step)
        assert before <= rows(database)
        if step not in history().get_heads():
            # Functions are those of the heads.
            continue
        add_rows(database)
        assert rows(database) > before
        answer = database.execute("select can_read from realtime.authorize('topic', 'service_role', '{}')")
        assert answer == [(True,), (True,)]
        read = database.execute("select topic from realtime_internal.messages_since('1:1:') where seq is not null")
        assert ("topic",) in read
    assert installed(database) == heads(*BRANCHES)


def frozen_problems(folder: Path) -> list[str]:
    """What differs from the digests in `folder`/frozen.sha256, in the form of sha256sum; no file: nothing is released."""
    record = folder / "frozen.sha256"
    problems = []
    for line in record.read_text().splitlines() if record.exists() else []:
        digest, _, name = line.partition("  ")
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is gone")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            problems.append(f"{name} has changed; a mistake in a released revision is repaired by the next one")
    return problems


def test_released_revisions_are_unchanged() -> None:
    assert frozen_problems(ROOT / "alembic") == []


def test_freezing_records_each_revision_once_and_a_later_change_shows(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "alembic" / "versions", tmp_path / "alembic" / "versions")
    record = tmp_path / "alembic" / "frozen.sha256"
    for _ in range(2):
        subprocess.run(["make", "freeze"], cwd=tmp_path, check=True, capture_output=True, timeout=LIMIT_S)
    recorded = sorted(line.partition("  ")[2] for line in record.read_text().splitlines())
    files = [file for file in (tmp_path / "alembic" / "versions").rglob("*") if file.suffix in (".py", ".sql")]
    assert recorded == sorted(str(file.relative_to(tmp_path / "alembic")) for file in files)
    assert frozen_problems(tmp_path / "alembic") == []

    changed, gone = (tmp_path / "alembic" / name for name in recorded[:2])
    changed.write_text(changed.read_text() + "\n")
    gone.unlink()
    problems = frozen_problems(tmp_path / "alembic")
    assert [problem.split(" ")[0] for problem in problems] == recorded[:2]


def test_every_branch_has_one_head_and_each_revision_its_sql_file() -> None:
    script = history()
    assert sorted(branch_of(head) for head in script.get_heads()) == sorted(BRANCHES)
    for revision in script.walk_revisions("base", "heads"):
        file = Path(revision.path)
        assert file.with_suffix(".sql").is_file()
        assert file.stem.startswith(f"{revision.revision}_")
        assert branch_of(revision.revision) == file.parent.name
        assert file.parent.name in revision.branch_labels


@pytest.mark.parametrize("target", ["core@head", "chat@head", "heads"])
def test_offline_sql_equals_online_upgrade(new_database: NewDatabase, target: str) -> None:
    online, offline = new_database(target), new_database()
    run_script(offline, alembic(None, "upgrade", target, "--sql"))
    assert_equal(dump(online), dump(offline))
    versions: LiteralString = "select version_num from realtime.alembic_version order by 1"
    assert offline.execute(versions) == online.execute(versions)


@pytest.mark.parametrize("arguments", [[], ["chat"], ["--all"]], ids=" ".join)
def test_the_script_of_realtime_server_migrate_equals_the_migration(
    new_database: NewDatabase, arguments: list[str]
) -> None:
    online, offline = new_database(), new_database()
    subprocess.run(migrate_command(*arguments), env=environment(online.url), check=True, timeout=LIMIT_S)
    script = subprocess.run(
        migrate_command(*arguments, "--sql"), env=environment(None), check=True, capture_output=True, text=True
    ).stdout
    run_script(offline, script)
    assert_equal(dump(online), dump(offline))
    assert installed(offline) == installed(online)
    assert has(online, "public.chat_threads") == bool(arguments)


def test_the_script_for_a_database_is_what_is_pending_there(new_database: NewDatabase) -> None:
    database = new_database("core@head")

    def script(*arguments: str) -> str:
        command = migrate_command(*arguments, "--sql")
        return subprocess.run(
            command, env=environment(database.url), check=True, capture_output=True, text=True, timeout=LIMIT_S
        ).stdout

    assert script() == "-- Nothing is pending.\n"
    database.execute("update realtime_internal.applied_functions set digest = ''")
    pending = script()
    assert "create or replace function realtime.send(" in pending
    assert "create table realtime.messages (" not in pending
    run_script(database, pending)
    assert script() == "-- Nothing is pending.\n"
    pending = script("chat")
    assert "create table public.chat_threads" in pending
    assert "create table realtime.messages" not in pending
    run_script(database, pending)
    assert installed(database) == heads("chat", "core")
    assert script("--all") == "-- Nothing is pending.\n"


@pytest.mark.parametrize(
    ("target", "revisions"),
    [
        ("head", heads("core")),
        # A sample brings the core that it was written for.
        ("chat@head", [*heads("chat"), "core_0001"]),
        ("heads", heads(*BRANCHES)),
    ],
)
def test_alembic_installs_the_core_for_head_and_a_sample_where_it_is_named(
    new_database: NewDatabase, target: str, revisions: list[str]
) -> None:
    database = new_database()
    alembic(database.url, "upgrade", target)
    assert installed(database) == revisions
    assert has(database, "realtime.messages")
    assert has(database, "public.chat_threads") == (heads("chat")[0] in revisions)


def test_alembic_finds_the_database_where_the_server_does(cluster: Cluster, tmp_path: Path) -> None:
    database = cluster.create_empty()
    (tmp_path / ".env").write_text(f"REALTIME_DATABASE_URL={database.url!r}\n")
    done = run_alembic(None, "upgrade", "head", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert installed(database) == heads("core")
    cluster.drop(database)


def test_options_of_the_url_hold_for_migrations(cluster: Cluster) -> None:
    database = cluster.create_empty()
    done = run_alembic(
        conninfo.make_conninfo(database.url, options="-c default_transaction_read_only=on"), "upgrade", "head"
    )
    assert "cannot execute CREATE SCHEMA in a read-only transaction" in done.stderr
    cluster.drop(database)


def test_two_migrators_at_once_both_end_well(new_database: NewDatabase) -> None:
    database = new_database()
    with psycopg.connect(database.url) as holder, database.connect() as watcher:
        # Uncommitted, so the first migrator waits here, holding the lock that the second one waits for.
        holder.execute("create schema realtime")
        migrators = [
            subprocess.Popen(migrate_command("--all"), env=environment(database.url), stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        seen = 0
        deadline = time.monotonic() + 30
        while seen < 2 and time.monotonic() < deadline:
            (seen,) = watcher.execute(
                "select count(*) from pg_stat_activity"
                " where application_name = 'realtime-server migrate' and datname = current_database()"
            ).fetchone() or (0,)
            time.sleep(0.01)
        holder.rollback()
        said = [migrator.communicate(timeout=LIMIT_S)[1] for migrator in migrators]
    assert seen == 2, said
    assert [migrator.returncode for migrator in migrators] == [0, 0], said
    assert installed(database) == heads(*BRANCHES)


def test_downgrade_and_upgrade_again_leads_to_the_same_schema(new_database: NewDatabase) -> None:
    database = new_database("heads")
    before = dump(database)
    add_rows(database)
    for branch in reversed(BRANCHES):
        alembic(database.url, "downgrade", f"{branch}@base")
        assert branch not in map(branch_of, installed(database))
    assert not has(database, "public.chat_threads")
    left = database.execute(
        "select proname from pg_proc where pronamespace = 'realtime'::regnamespace"
        " union all"
        " select relname from pg_class where relnamespace = 'realtime'::regnamespace and relname !~ '^alembic_version'"
        " union all"
        " select nspname from pg_namespace where nspname = 'realtime_internal'"
        " union all"
        " select typname from pg_type where typnamespace = 'realtime'::regnamespace and typname !~ 'alembic_version$'"
    )
    assert left == []
    alembic(database.url, "upgrade", "heads")
    assert_equal(before, dump(database))


def test_last_revision_is_taken_back_and_comes_again(new_database: NewDatabase) -> None:
    database = new_database("heads")
    before = dump(database)
    alembic(database.url, "downgrade", "core@-1")
    alembic(database.url, "upgrade", "heads")
    assert_equal(before, dump(database))


def test_what_people_call_fits_on_a_screen(any_database: TestDatabase) -> None:
    names = any_database.execute("select proname from pg_proc where pronamespace = 'realtime'::regnamespace")
    assert len(names) < 30
    assert {
        "send",
        "broadcast_changes",
        "messages_after",
        "snapshot",
        "revalidate",
        "authorize",
        "doctor",
        "maintain",
    } <= {name for (name,) in names}


def test_every_function_table_and_column_has_a_comment(any_database: TestDatabase) -> None:
    without = any_database.execute(
        """
        with schemas as (
            select oid from pg_namespace where nspname in ('realtime', 'realtime_internal', 'auth', 'public')
        )
        select 'function ' || oid::regprocedure
        from pg_proc
        where pronamespace in (select oid from schemas) and obj_description(oid, 'pg_proc') is null
        union all
        select 'table ' || oid::regclass
        from pg_class
        where relnamespace in (select oid from schemas)
            and relkind in ('r', 'p', 'v', 'm', 'S')
            and obj_description(oid, 'pg_class') is null
            and relname !~ '^messages_20|^alembic_version$'
        union all
        select 'column ' || attrelid::regclass || '.' || attname
        from pg_attribute
        join pg_class on pg_class.oid = attrelid
        where relnamespace in (select oid from schemas)
            and relkind in ('r', 'p', 'v', 'm')
            and not relispartition
            and relname <> 'alembic_version'
            and attnum > 0
            and not attisdropped
            and col_description(attrelid, attnum) is null
        """
    )
    assert without == []


def test_definer_functions_pin_their_search_path_and_are_not_for_everybody(any_database: TestDatabase) -> None:
    functions = any_database.execute(
        """
        select oid::regprocedure::text, proconfig, has_function_privilege('public', oid, 'execute')
        from pg_proc
        where prosecdef and pronamespace in (select oid from pg_namespace where nspname !~ '^pg_|^information_schema$')
        """
    )
    assert {"insert_chat_message(text,text,text,text)", "broadcast_chat_message()"} <= {name for name, *_ in functions}
    for name, settings, is_for_everybody in functions:
        assert "search_path=pg_catalog, pg_temp" in settings, name
        assert is_for_everybody == (name in PLACES), name


@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_user_roles_may_execute_nothing_internal(any_database: TestDatabase, role: str) -> None:
    allowed = any_database.execute(
        "select oid::regprocedure::text from pg_proc"
        " where pronamespace in ('realtime'::regnamespace, 'realtime_internal'::regnamespace)"
        " and has_function_privilege(%s, oid, 'execute')",
        role,
    )
    assert {name for (name,) in allowed} == FOR_EVERYBODY


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
def test_user_roles_may_change_and_delete_nothing_in_schema_realtime(any_database: TestDatabase, role: str) -> None:
    allowed = any_database.execute(
        """
        select relname, privilege
        from pg_class, unnest(array['update', 'delete', 'truncate', 'references', 'trigger']) as privilege
        where relnamespace in ('realtime'::regnamespace, 'realtime_internal'::regnamespace)
            and relkind in ('r', 'p')
            and has_table_privilege(%s, pg_class.oid, privilege)
        """,
        role,
    )
    assert allowed == []
    assert any_database.execute("select has_schema_privilege(%s, 'realtime', 'create')", role) == [(False,)]
    assert any_database.execute("select has_schema_privilege(%s, 'realtime_internal', 'usage, create')", role) == [
        (False,)
    ]
    readable = any_database.execute(
        "select relname from pg_class where relnamespace in ('realtime'::regnamespace, 'realtime_internal'::regnamespace)"
        " and relkind in ('r', 'p') and has_table_privilege(%s, oid, 'select')",
        role,
    )
    assert readable == [("messages",)]
