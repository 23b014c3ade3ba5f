"""`realtime-server doctor`, as an operator runs it."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.acceptance.test_operation import newcomer, run_command
from tests.acceptance.test_pooler import pooled
from tests.fix_changes import SOURCES, Source, changes_server
from tests.fix_database import OWNER, Cluster, TestDatabase, all_walsenders_taken
from tests.fix_server import Server, make_token
from tests.fix_wire import WireFactory

__all__ = ["pooled"]  # fixtures


def findings(database: TestDatabase, **settings: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and what `--json` says."""
    ended = run_command("doctor", "--json", cwd=None, REALTIME_DATABASE_URL=database.url, **settings)
    assert ended.stderr == ""
    facts = json.loads(ended.stdout)
    assert set(facts) == {"problems", "notes", "findings"}
    for level in ("problem", "note"):
        assert facts[f"{level}s"] == sum(one["level"] == level for one in facts["findings"])
    return ended.returncode, facts["findings"]


def one(found: list[dict[str, Any]], check: str) -> tuple[str, str]:
    (finding,) = [one for one in found if one["check"] == check]
    return finding["level"], finding["finding"]


def test_a_line_a_finding_and_an_exit_code(database: TestDatabase) -> None:
    well = run_command("doctor", REALTIME_DATABASE_URL=database.url)
    assert (well.returncode, well.stderr) == (0, "")
    *lines, blank, count = well.stdout.splitlines()
    assert {line[:9].rstrip() for line in lines} == {"ok", "note"}
    assert "ok       the database is at chat_0001, core_0001" in lines
    assert "ok       NOTIFY wakes the server" in lines
    assert "note     no server runs on this database -> realtime-server run" in lines
    assert (blank, count) == ("", f"problems: 0, notes: {sum(line.startswith('note') for line in lines)}")

    database.execute("create table things (title text)")
    database.execute("alter publication supabase_realtime add table things")
    ill = run_command("doctor", REALTIME_DATABASE_URL=database.url)
    assert ill.returncode == 1
    told = [line for line in ill.stdout.splitlines() if line.startswith("problem ")]
    assert any("UPDATE and DELETE of public.things fail for the application" in line for line in told)
    assert any(line.endswith(" -> add it") for line in told)
    assert f"problems: {len(told)}, " in ill.stdout


def test_settings_of_the_server_are_its_settings(database: TestDatabase) -> None:
    code, found = findings(database)
    assert code == 0
    assert one(found, "changes")[0] == "note"
    assert findings(database, REALTIME_CHANGES="trigger")[0] == 0
    code, found = findings(database, REALTIME_CHANGES="wal", REALTIME_ROLES="anon,nobody_here", REALTIME_WAKEUP="poll")
    assert code == 1
    assert one(found, "changes") == (
        "problem",
        f"there are no row changes, the log cannot be read: role {OWNER} may not replicate:"
        f' an administrator runs "alter role {OWNER} replication"',
    )
    assert ("problem", "there is no role nobody_here") in [(one["level"], one["finding"]) for one in found]
    assert one(found, "wakeup")[0] == "note"


def test_pooler_is_named(pooled: TestDatabase) -> None:
    with psycopg.connect(pooled.administrator_url, autocommit=True) as db:
        db.execute(f"alter role {OWNER} replication")
        try:
            code, found = findings(pooled)
            assert code == 0
            assert one(found, "wakeup")[1].startswith("the database is behind a transaction pooler")
            assert one(found, "changes") == (
                "note",
                "row changes come from capture triggers:"
                " the database is behind a transaction pooler, which has no replication connections",
            )
            code, found = findings(pooled, REALTIME_WAKEUP="notify")
            assert (code, one(found, "wakeup")[0]) == (1, "problem")
        finally:
            db.execute(f"alter role {OWNER} noreplication")


def test_database_that_lets_no_replication_in(database: TestDatabase) -> None:
    with psycopg.connect(database.administrator_url, autocommit=True) as db, ExitStack() as stack:
        stack.callback(db.execute, f"alter role {OWNER} noreplication")
        db.execute(f"alter role {OWNER} replication")
        assert one(findings(database)[1], "changes") == ("ok", "row changes come from the log")
        stack.enter_context(all_walsenders_taken(database.administrator_url))
        code, found = findings(database)
        assert code == 0
        level, finding = one(found, "changes")
        assert level == "note"
        assert "PostgreSQL refuses a replication connection: " in finding
        assert "max_wal_senders" in finding


async def test_table_that_a_policy_may_not_read_is_named_in_the_log_and_by_doctor(
    server: Server, wire: WireFactory
) -> None:
    server.database.execute("create table members (room text, user_id uuid)")
    server.database.execute(
        "create policy members_receive on realtime.messages for select to authenticated"
        " using (exists (select from members as m where m.room = messages.topic and m.user_id = auth.uid()))"
    )
    sub = "00000000-0000-0000-0000-00000000000a"
    server.database.execute("insert into members values ('room:1', %s)", sub)
    client = await wire(server.websocket_url, server.anon_key)
    token = make_token(sub=sub)
    refused = await client.join("room:1", {"private": True}, access_token=token)
    assert refused["response"]["reason"].startswith("Unauthorized: ")
    code, found = await asyncio.to_thread(findings, server.database)
    assert code == 1
    level, finding = one(found, "policy_rights")
    assert (level, finding.partition(":")[0]) == (
        "problem",
        "policy members_receive of realtime.messages needs public.members, and role authenticated may not select from it",
    )
    (advice,) = [one["advice"] for one in found if one["check"] == "policy_rights"]
    assert advice == "grant select on public.members to authenticated"
    server.database.execute(advice)
    assert (await client.join("room:1", {"private": True}, access_token=token))["status"] == "ok"

    await server.stop()
    lines = [json.loads(line) for line in server.log.splitlines() if "policy could not be evaluated" in line]
    assert {line["extension"] for line in lines} == {"broadcast", "presence"}
    for line in lines:
        assert (line["topic"], line["role"], line["sub"]) == ("room:1", "authenticated", sub)
        assert line["problem"] == "42501: permission denied for table members"
        assert "realtime-server doctor" in line["hint"]


@pytest.mark.parametrize("source", SOURCES)
async def test_running_server_is_in_good_health(cluster: Cluster, source: Source) -> None:
    async with changes_server(cluster, source) as server:
        server.database.execute("create table things (id int primary key)")
        server.database.execute("grant select on things to authenticated")
        server.database.execute("alter publication supabase_realtime add table things")
        async with asyncio.timeout(60):
            while True:
                code, found = await asyncio.to_thread(findings, server.database, REALTIME_CHANGES=source)
                if {one["level"] for one in found} == {"ok"}:
                    break
                await asyncio.sleep(0.2)
        assert code == 0
        assert one(found, "servers")[1] == "servers on this database in the last half minute: 1"
        assert ("slot" in {one["check"] for one in found}) == (source == "wal")


async def test_embedded_database(folder: Path) -> None:
    nothing = run_command("doctor", cwd=folder)
    assert nothing.returncode == 1
    assert "there is no PostgreSQL in" in nothing.stderr
    async with newcomer(folder):
        ended = await asyncio.to_thread(run_command, "doctor", cwd=folder)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "ok       row changes come from the log" in ended.stdout
        assert "a server reads" in ended.stdout
    stopped = run_command("doctor", cwd=folder)
    assert stopped.returncode == 1
    assert "no connection to the database" in stopped.stderr


def test_database_without_the_schema(cluster: Cluster) -> None:
    database = cluster.create_empty()
    try:
        ended = run_command("doctor", "--json", REALTIME_DATABASE_URL=database.url)
        assert ended.returncode == 1
        (finding,) = json.loads(ended.stdout)["findings"]
        assert (finding["check"], finding["level"]) == ("schema", "problem")
        assert finding["finding"].startswith("the database has no realtime schema, this server needs core_0001")
    finally:
        cluster.drop(database)
