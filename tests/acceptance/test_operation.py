"""Starting, stopping and being killed: what an operator does, and what a newcomer does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import venv
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import LiteralString

import httpx2
import psycopg
import pytest
from websockets.exceptions import InvalidStatus

from tests.fix_database import OWNER, Cluster, TestDatabase
from tests.fix_postgres import open_folder
from tests.fix_server import SECRET, Server, ServerFactory, make_token
from tests.fix_wire import WireFactory

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "realtime_server.cli"]
LIMIT_S = 60


def bare_environment(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("REALTIME_", "DATABASE_URL"))}
    return kept | {"PYTHONPATH": str(REPOSITORY)} | settings


def run_command(*arguments: str, cwd: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=bare_environment(**settings),
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )


# -- stopping


async def test_sigterm_closes_sockets_with_1012_after_what_was_sent_and_ends(server: Server, wire: WireFactory) -> None:
    sockets = [await wire(server.websocket_url, server.anon_key) for _ in range(20)]
    for client in sockets:
        await client.join("t")
    stalled = socket.create_connection(("127.0.0.1", server.port))
    stalled.sendall(b"GET /realtime/v1/websocket HTTP/1.1\r\n")

    stopping = asyncio.create_task(server.stop())
    assert {await client.closed() for client in sockets} == {1012}
    assert await stopping == 0
    stalled.close()
    assert "error" not in server.log.lower()


async def test_client_that_reads_nothing_does_not_hold_up_the_stop(server: Server, wire: WireFactory) -> None:
    client = await wire(server.websocket_url, server.anon_key)
    await client.join("t")
    client.socket.transport.pause_reading()
    server.database.execute(
        "select realtime.send(jsonb_build_object('x', repeat('y', 1000000)), 'e', 't', false) from generate_series(1, 6)"
    )
    assert await server.stop() == 0
    client.socket.transport.abort()


async def test_slow_reader_is_closed_and_others_still_receive(start_server: ServerFactory, wire: WireFactory) -> None:
    server = await start_server(max_buffered_bytes="200000")
    slow, quick = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    for client in (slow, quick):
        await client.join("t")
    slow.socket.transport.pause_reading()
    for number in range(60):
        server.database.execute(
            "select realtime.send(jsonb_build_object('number', %s::int, 'x', repeat('y', 100000)), 'e', 't', false)",
            number,
        )
        frame = await quick.hear_bytes()
        assert json.loads(frame[frame.index(b"{", frame.index(b"}")) :])["number"] == number
    slow.socket.transport.resume_reading()
    # The goodbye stands behind a full buffer, so the socket may be dropped before the code arrives.
    assert await slow.closed() in (1013, 1006)
    assert await quick.is_alive()


# -- settings


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"REALTIME_DATABASE_URL": "postgresql://x"}, "set REALTIME_JWT_SECRET"),
        ({"REALTIME_JWT_SECRET": "short"}, "REALTIME_JWT_SECRET: Value error, the secret must have at least 32 bytes"),
        ({"REALTIME_PORT": "abc"}, "REALTIME_PORT: Input should be a valid integer"),
        ({"REALTIME_PORT": "70000"}, "REALTIME_PORT: Input should be less than or equal to 65535"),
        ({"REALTIME_HOST": "192.0.2.1"}, "cannot listen on 192.0.2.1 port"),
    ],
)
def test_wrong_setting_is_one_plain_sentence(folder: Path, settings: dict[str, str], sentence: str) -> None:
    ended = run_command("keys" if "URL" in sentence + "".join(settings) else "run", cwd=folder, **settings)
    assert ended.returncode == 1
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "short" not in ended.stderr.replace("shorter", "")


def test_external_database_without_a_secret_never_gets_a_default_one(database: TestDatabase, folder: Path) -> None:
    ended = run_command("run", cwd=folder, REALTIME_DATABASE_URL=database.url, REALTIME_PORT="0")
    assert ended.returncode == 1
    assert "set REALTIME_JWT_SECRET" in ended.stderr
    assert list(folder.iterdir()) == []


def test_database_without_the_schema_is_told_plainly(cluster: Cluster, folder: Path) -> None:
    database = cluster.create_empty()
    try:
        settings = {"REALTIME_DATABASE_URL": database.url, "REALTIME_JWT_SECRET": SECRET, "REALTIME_PORT": "0"}
        ended = run_command("run", cwd=folder, **settings)
        assert ended.returncode == 1
        assert 'has no realtime schema, this server needs core_0001: run "realtime-server migrate"' in ended.stderr
        assert run_command("migrate", cwd=folder, **settings).returncode == 0
        assert "database is at core_0001" in run_command("migrate", cwd=folder, **settings).stderr
    finally:
        cluster.drop(database)


async def test_no_secret_and_no_token_in_the_log(start_server: ServerFactory, wire: WireFactory) -> None:
    server = await start_server(log_level="debug")
    token = make_token(sub="x", secret="y" * 40)
    socket = await wire(server.websocket_url, server.anon_key)
    await socket.join("t", access_token=token)
    printed = server.output
    await server.stop()
    assert "JwtSignatureError" in server.log
    password = psycopg.conninfo.conninfo_to_dict(server.database.url)["password"]
    for secret in (SECRET, str(password), token, server.anon_key, server.service_key):
        assert secret not in server.log
        # The anonymous key is public; the output may well be kept in a log.
        assert secret not in printed or secret == server.anon_key


# -- health


async def test_readyz_follows_the_database_and_healthz_does_not(server: Server, http: httpx2.AsyncClient) -> None:
    assert (await http.get(f"{server.url}/healthz")).text == "ok"
    assert (await http.get(f"{server.url}/readyz")).json() == {"ready": True, "relay": True, "serving": True}
    name = psycopg.conninfo.conninfo_to_dict(server.database.url)["dbname"]
    with psycopg.connect(server.database.administrator_url, autocommit=True) as db:
        db.execute(f'alter database "{name}" connection limit 0')
        db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> pg_backend_pid()",
            (name,),
        )
        async with asyncio.timeout(LIMIT_S):
            while (answer := await http.get(f"{server.url}/readyz")).status_code == 200:
                await asyncio.sleep(0.02)
        assert answer.status_code == 503
        assert answer.json() == {"ready": False, "relay": False, "serving": True, "why": "the database is away"}
        assert (await http.get(f"{server.url}/healthz")).status_code == 200
        db.execute(f'alter database "{name}" connection limit -1')
    async with asyncio.timeout(LIMIT_S):
        while (await http.get(f"{server.url}/readyz")).status_code != 200:
            await asyncio.sleep(0.02)


async def test_public_joins_and_client_broadcasts_work_while_the_database_is_away(
    start_server: ServerFactory, wire: WireFactory
) -> None:
    server = await start_server(database_timeout_s="1")
    name = psycopg.conninfo.conninfo_to_dict(server.database.url)["dbname"]
    socket = await wire(server.websocket_url, server.anon_key)
    with psycopg.connect(server.database.administrator_url, autocommit=True) as db:
        db.execute(f'alter database "{name}" connection limit 0')
        db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> pg_backend_pid()",
            (name,),
        )
        assert (await socket.join("t", {"broadcast": {"self": True}}))["status"] == "ok"
        await socket.say("realtime:t", "broadcast", {"type": "broadcast", "event": "e", "payload": {"a": 1}})
        assert (await socket.hear())[4] == {"type": "broadcast", "event": "e", "payload": {"a": 1}}
        refused = await socket.join("p", {"private": True})
        assert refused["response"] == {
            "reason": "UnableToConnectToProject: Realtime was unable to connect to the project database"
        }
        db.execute(f'alter database "{name}" connection limit -1')


# -- the embedded database, as a newcomer meets it


class Newcomer:
    """`realtime-server run` in a folder, nothing set but the port. `log`: its standard error, once it has ended."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = ""
        self.log = ""

    def fact(self, name: str) -> str:
        found = re.search(rf"^ +{name} +(\S.*)$", self.output, re.MULTILINE)
        assert found, self.output
        return found[1]


@asynccontextmanager
async def newcomer(folder: Path, command: list[str] = COMMAND, **settings: str) -> AsyncIterator[Newcomer]:
    process = await asyncio.create_subprocess_exec(
        *command,
        "run",
        cwd=folder,
        env=bare_environment(REALTIME_PORT="0", **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    output = ""
    server = Newcomer(process)
    try:
        async with asyncio.timeout(LIMIT_S):
            while "  3. curl" not in output:
                line = await process.stdout.readline()
                assert line, (await process.communicate())[1].decode()
                output += line.decode()
        server.output = output
        yield server
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(LIMIT_S):
            server.log = (await process.communicate())[1].decode()


def postgres_of(folder: Path) -> list[str]:
    found = subprocess.run(["pgrep", "-f", f"postgres -D {folder}"], text=True, capture_output=True, check=False)
    return found.stdout.split()


async def test_newcomer_gets_everything_with_one_command(folder: Path, wire: WireFactory) -> None:
    async with newcomer(folder) as server:
        assert "mode" in server.output
        assert "Try next" in server.output
        socket = await wire(server.fact("WebSocket"), server.fact("anon key"))
        await socket.join("room:1")
        # The second thing to try, as it is printed.
        line = re.search(r"^  2\. (.* psql .*)$", server.output, re.MULTILINE)
        assert line
        subprocess.run(["bash", "-c", line[1]], check=True, capture_output=True, cwd=folder, env=bare_environment())
        assert b'"hello": "world"' in await socket.hear_bytes()
        # And the third, which is two lines long.
        async with asyncio.timeout(LIMIT_S):
            assert server.process.stdout is not None
            curl = server.output.rsplit("  3. ", 1)[1] + (await server.process.stdout.readline()).decode()
        subprocess.run(["bash", "-c", curl], check=True, capture_output=True)
        assert b'{"hello": "curl"}' in await socket.hear_bytes()

        with psycopg.connect(server.fact("database")) as db:
            assert db.execute("show wal_level").fetchone() == ("logical",)
        assert (folder / ".realtime" / "jwt_secret").stat().st_mode & 0o777 == 0o600
    assert server.process.returncode == 0
    assert postgres_of(folder) == []


def edited_copy(folder: Path) -> str:
    """The package and its SQL, with another comment on realtime.topic(); the path to run it from."""
    for name in ("realtime_server", "alembic", "sql"):
        shutil.copytree(REPOSITORY / name, folder / name)
    file = folder / "sql" / "functions" / "10_claims.sql"
    text = file.read_text()
    assert "comment on function realtime.topic() is 'Topic" in text
    file.write_text(
        text.replace(
            "comment on function realtime.topic() is 'Topic", "comment on function realtime.topic() is 'Edited topic"
        )
    )
    return str(folder)


COMMENT: LiteralString = "select obj_description('realtime.topic()'::regprocedure)"


def test_edited_function_is_live_after_the_next_migration(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    database = cluster.create("core@head")
    settings = {"REALTIME_DATABASE_URL": database.url, "REALTIME_JWT_SECRET": SECRET, "REALTIME_PORT": "0"}
    refused = run_command("run", cwd=folder, PYTHONPATH=edited_copy(tmp_path), **settings)
    assert refused.returncode == 1
    assert 'other SQL functions of core than this server: run "realtime-server migrate"' in refused.stderr
    migrated = run_command("migrate", cwd=folder, PYTHONPATH=str(tmp_path), **settings)
    assert migrated.returncode == 0, migrated.stderr
    ((comment,),) = database.execute(COMMENT)
    assert comment.startswith("Edited topic")
    # A server of before does not serve functions that it does not know.
    assert "other SQL functions of core" in run_command("doctor", cwd=folder, **settings).stdout
    cluster.drop(database)


async def test_killed_server_starts_again_on_the_same_data_with_the_same_keys_and_edited_functions(
    folder: Path, tmp_path: Path
) -> None:
    async with newcomer(folder) as first:
        with psycopg.connect(first.fact("database")) as db:
            db.execute("create table kept (a int)")
            db.execute("insert into kept values (42)")
        first.process.kill()
        await first.process.wait()
        assert postgres_of(folder) != []
    async with newcomer(folder, PYTHONPATH=edited_copy(tmp_path)) as second:
        assert second.fact("anon key") == first.fact("anon key")
        assert second.fact("database") == first.fact("database")
        with psycopg.connect(second.fact("database")) as db:
            assert db.execute("select a from kept").fetchone() == (42,)
            assert db.execute(COMMENT.replace("regprocedure)", "regprocedure) like 'Edited%'")).fetchone() == (True,)
    assert postgres_of(folder) == []


async def test_second_server_on_one_data_folder_says_so_plainly(folder: Path) -> None:
    async with newcomer(folder) as first:
        second = await asyncio.to_thread(run_command, "run", cwd=folder, REALTIME_PORT="0")
        assert second.returncode == 1
        assert f"another realtime-server (pid {first.process.pid}) is using" in second.stderr
        assert "Traceback" not in second.stderr
        assert first.process.returncode is None


async def test_keys_and_token_serve_programs(folder: Path, wire: WireFactory) -> None:
    assert "there is no PostgreSQL in" in run_command("keys", cwd=folder).stderr
    # Nobody else may look in, also where a server has never run.
    assert (folder / ".realtime").stat().st_mode & 0o066 == 0
    async with newcomer(folder) as server:
        keys = json.loads((await asyncio.to_thread(run_command, "keys", "--json", cwd=folder)).stdout)
        assert set(keys) == {"url", "anon_key", "service_role_key", "jwt_secret", "database_url"}
        assert (keys["anon_key"], keys["database_url"]) == (server.fact("anon key"), server.fact("database"))
        sub = "00000000-0000-0000-0000-00000000000a"
        arguments = [
            "--sub",
            sub,
            "--role",
            "authenticated",
            "--expires-in",
            "60",
            "--claim",
            "org=acme",
            "--claim",
            "n=5",
        ]
        token = (await asyncio.to_thread(run_command, "token", *arguments, cwd=folder)).stdout.strip()
        with psycopg.connect(keys["database_url"], autocommit=True) as db:
            db.execute(
                "create policy by_claim on realtime.messages for select to authenticated"
                " using (auth.uid()::text = %s and auth.jwt() ->> 'org' = 'acme' and (auth.jwt() ->> 'n')::int = 5)".replace(
                    "%s", f"'{sub}'"
                )
            )
        socket = await wire(server.fact("WebSocket"), keys["anon_key"])
        assert (await socket.join("p", {"private": True}, access_token=token))["status"] == "ok"
        assert (await socket.join("q", {"private": True}))["status"] == "error"


# -- commands find the running server


async def test_commands_find_the_running_server_by_its_data_folder(folder: Path) -> None:
    record = folder / ".realtime" / "server.json"
    async with newcomer(folder, REALTIME_JWT_CLAIMS='{"iss": "here"}', REALTIME_PROT="1") as server:
        assert record.stat().st_mode & 0o777 == 0o600
        keys = json.loads((await asyncio.to_thread(run_command, "keys", "--json", cwd=folder)).stdout)
        assert keys["url"] == server.fact("client URL")
        # The settings that were given to the server count too, here the claim in both keys.
        assert keys["anon_key"] == server.fact("anon key")
        for name in ("service_role_key", "jwt_secret"):
            assert keys[name] not in record.read_text()
        assert "password" not in record.read_text()
        sent = await asyncio.to_thread(run_command, "send", "--public", "t", "e", "{}", cwd=folder)
        assert (sent.returncode, sent.stderr) == (0, "")
        # What is set here comes first.
        given = await asyncio.to_thread(run_command, "keys", "--json", cwd=folder, REALTIME_PORT="1")
        assert json.loads(given.stdout)["url"] == "http://127.0.0.1:1"
        other = await asyncio.to_thread(run_command, "token", cwd=folder, REALTIME_JWT_SECRET=SECRET)
        assert other.returncode == 1
        assert f"the server that runs here (pid {server.process.pid}) has another secret" in other.stderr
        # psql needs nothing but its arguments, and the exit code is its own.
        query = ["-XtA", "-v", "ON_ERROR_STOP=1", "-c", "select current_user, current_database()", "-c", "select 1/0"]
        asked = await asyncio.to_thread(run_command, "psql", *query, cwd=folder, PATH="/nowhere", PGSERVICE="other")
        assert (asked.returncode, asked.stdout) == (1, "postgres|realtime\n")
        assert "division by zero" in asked.stderr
        # A token is checked as the server does it.
        for claims, verdict, code in (("iss=here", "accepted", 0), ("iss=there", "refused", 1)):
            token = await asyncio.to_thread(run_command, "token", "--claim", claims, cwd=folder)
            checked = await asyncio.to_thread(run_command, "token", "--check", token.stdout.strip(), cwd=folder)
            assert (checked.returncode, checked.stdout.splitlines()[-1].split()[0]) == (code, verdict)
        left = record.read_text()
    assert not record.exists()
    (warning,) = [json.loads(line) for line in server.log.splitlines() if "no setting" in line]
    assert (warning["variable"], warning["did_you_mean"]) == ("REALTIME_PROT", "REALTIME_PORT")

    record.write_text(left)
    stale = json.loads(run_command("keys", "--json", cwd=folder).stdout)
    assert stale["url"] == "http://127.0.0.1:4000"


async def test_commands_find_the_server_of_another_database(database: TestDatabase, folder: Path) -> None:
    facts = psycopg.conninfo.conninfo_to_dict(database.url)
    password = str(facts["password"])
    settings = {"REALTIME_DATABASE_URL": database.url, "REALTIME_JWT_SECRET": SECRET, "REALTIME_CHANGES": "trigger"}
    async with newcomer(folder, COMMAND, **settings) as server:
        record = (folder / ".realtime" / "server.json").read_text()
        assert password not in record
        assert SECRET not in record
        doctor = await asyncio.to_thread(run_command, "doctor", cwd=folder, PGPASSWORD=password)
        assert (doctor.returncode, doctor.stderr) == (0, "")
        assert "row changes come from capture triggers, as the settings ask for it" in doctor.stdout
        keys = await asyncio.to_thread(run_command, "keys", "--json", cwd=folder, REALTIME_JWT_SECRET=SECRET)
        assert json.loads(keys.stdout)["url"] == server.fact("client URL")
        for given in ({"PGPASSWORD": password}, {"REALTIME_DATABASE_URL": database.url}):
            show = ["-XtAc", "select current_user, current_database()", "-c", r"\! tr '\0' ' ' < /proc/$PPID/cmdline"]
            asked = await asyncio.to_thread(run_command, "psql", *show, cwd=folder, **given)
            assert asked.stdout.splitlines()[0] == f"{OWNER}|{facts['dbname']}"
            assert "psql -XtAc" in asked.stdout
            assert password not in asked.stdout
        # The secret of the embedded database is not this server's.
        assert "set REALTIME_JWT_SECRET" in (await asyncio.to_thread(run_command, "keys", cwd=folder)).stderr
        # To another database this server is of no concern.
        elsewhere = {"REALTIME_DATABASE_URL": f"{database.url}_else", "REALTIME_JWT_SECRET": SECRET}
        keys = await asyncio.to_thread(run_command, "keys", "--json", cwd=folder, **elsewhere)
        assert json.loads(keys.stdout)["url"] == "http://127.0.0.1:4000"


# -- the wheel


@pytest.fixture(scope="session")
def installed_command() -> Iterator[list[str]]:
    """`realtime-server` of the built wheel, in an environment of its own that borrows only the dependencies."""
    with open_folder() as home:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        wheels = home / "wheels"
        subprocess.run(
            [*pip, "wheel", "--no-deps", "-w", str(wheels), str(REPOSITORY)], check=True, timeout=LIMIT_S * 3
        )
        (wheel,) = wheels.glob("*.whl")
        venv.create(home / "env", with_pip=False)
        (site,) = (home / "env" / "lib").glob("python*/site-packages")
        subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=LIMIT_S)
        dependencies = Path(psycopg.__file__).parents[1]
        (site / "dependencies.pth").write_text(f"{dependencies}\n")
        code = "import realtime_server; print(realtime_server.__file__)"
        python = str(home / "env" / "bin" / "python")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        where = subprocess.run(
            [python, "-c", code], text=True, capture_output=True, check=True, cwd=home, env=environment
        )
        assert str(home) in where.stdout
        yield [python, "-m", "realtime_server.cli"]


async def test_wheel_in_an_empty_folder_serves(installed_command: list[str], folder: Path, wire: WireFactory) -> None:
    async with newcomer(folder, installed_command, PYTHONPATH="") as server:
        socket = await wire(server.fact("WebSocket"), server.fact("anon key"))
        await socket.join("t")
        with psycopg.connect(server.fact("database"), autocommit=True) as db:
            db.execute("select realtime.send('{\"from\": \"the wheel\"}', 'e', 't', false)")
            assert db.execute("select to_regclass('public.chat_messages') is not null").fetchone() == (True,)
        assert b'"from": "the wheel"' in await socket.hear_bytes()


async def test_client_that_never_finishes_its_request_is_dropped(server: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
    async with asyncio.timeout(LIMIT_S):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()


async def test_more_sockets_than_allowed_are_refused(start_server: ServerFactory, wire: WireFactory) -> None:
    server = await start_server(max_sockets="5")
    sockets = [await wire(server.websocket_url, server.anon_key) for _ in range(5)]
    with pytest.raises(InvalidStatus) as refused:
        await wire(server.websocket_url, server.anon_key)
    assert refused.value.response.status_code == 429
    assert all([await socket.is_alive() for socket in sockets])
    await sockets.pop().socket.close()
    async with asyncio.timeout(LIMIT_S):
        while True:
            with contextlib.suppress(InvalidStatus):
                await wire(server.websocket_url, server.anon_key)
                break
