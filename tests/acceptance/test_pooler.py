"""Behind a transaction pooler: a real PgBouncer, as it comes."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from psycopg import conninfo

from tests.fix_database import TestDatabase
from tests.fix_server import Server, make_token
from tests.fix_wire import WireFactory
from tests.wire.test_resume import hear_broadcast, joined, send

LIMIT_S = 30


@pytest.fixture
def pooled(database: TestDatabase, folder: Path) -> Iterator[TestDatabase]:
    """The database through PgBouncer in transaction mode, which knows no startup options and gives each statement any session."""
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    assert Path(program).exists(), "pgbouncer is missing: run tests/install-parts"
    facts = conninfo.conninfo_to_dict(database.url)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "users").write_text(f'"{facts["user"]}" "{facts["password"]}"\n')
    (folder / "pgbouncer.ini").write_text(
        f"""
        [databases]
        {facts["dbname"]} = host={facts["host"]} port={facts["port"]}
        [pgbouncer]
        listen_addr = 127.0.0.1
        listen_port = {port}
        unix_socket_dir =
        auth_type = plain
        auth_file = {folder}/users
        pool_mode = transaction
        default_pool_size = 5
        """.replace("        ", "")
    )
    for file in folder.iterdir():
        file.chmod(0o644)
    process = subprocess.Popen(
        [program, str(folder / "pgbouncer.ini")], user="nobody", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    yield TestDatabase(conninfo.make_conninfo(database.url, port=port), database.administrator_url)
    process.terminate()
    process.communicate(timeout=LIMIT_S)


@pytest.fixture
async def pooled_server(pooled: TestDatabase) -> AsyncIterator[Server]:
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                port = int(str(conninfo.conninfo_to_dict(pooled.url)["port"]))
                (await asyncio.open_connection("127.0.0.1", port))[1].close()
                break
            except OSError:
                await asyncio.sleep(0.02)
    async with aclosing(Server(pooled)) as server:
        yield await server.start()


async def test_pooler_is_found_out_and_messages_arrive_and_resume(pooled_server: Server, wire: WireFactory) -> None:
    assert "wake-up: poll" in pooled_server.output
    direct = TestDatabase(pooled_server.database.administrator_url, pooled_server.database.administrator_url)
    socket, response = await joined(pooled_server, wire, "t", {"private": True, "broadcast": {"cursor": True}})
    send(direct, "t", *range(20), private=True)
    assert [(await hear_broadcast(socket))["n"] for _ in range(20)] == list(range(20))
    again, _ = await joined(
        pooled_server, wire, "t", {"private": True, "broadcast": {"replay": {"after": response["cursor"]}}}
    )
    assert [(await hear_broadcast(again))["n"] for _ in range(20)] == list(range(20))


async def test_policies_hold_and_are_bounded_in_time(pooled_server: Server, wire: WireFactory) -> None:
    direct = TestDatabase(pooled_server.database.administrator_url, pooled_server.database.administrator_url)
    direct.execute(
        "create policy some_topics on realtime.messages for select to authenticated"
        " using (topic = 'mine' or topic = 'slow' and pg_sleep(60) is null)"
    )
    socket = await wire(pooled_server.websocket_url, pooled_server.anon_key)
    token = make_token()
    assert (await socket.join("mine", {"private": True}, access_token=token))["status"] == "ok"
    assert (await socket.join("others", {"private": True}, access_token=token))["status"] == "error"
    slow = await socket.join("slow", {"private": True}, access_token=token)
    assert slow["response"] == {"reason": "QueryCanceled: Query was cancelled, please try again"}
