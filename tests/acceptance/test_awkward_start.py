"""Starting in an environment that means something else, and being stopped in the middle of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from realtime_server.embedded import EmbeddedPostgres
from tests.acceptance.test_operation import bare_environment, newcomer, postgres_of, run_command


async def test_environment_of_another_postgresql_is_not_ours(folder: Path) -> None:
    async with newcomer(folder, PGSSLMODE="verify-full", PGCLIENTENCODING="LATIN1", PYTHONIOENCODING="ascii"):
        database_url = json.loads(run_command("keys", "--json", cwd=folder).stdout)["database_url"]
        with psycopg.connect(database_url) as db:
            assert db.execute("select version_num from realtime.alembic_version").fetchall()


@pytest.fixture
def slow_cluster(folder: Path) -> Iterator[EmbeddedPostgres]:
    postgres = EmbeddedPostgres(folder / "data")
    postgres.start()
    postgres.stop()
    yield postgres
    postgres.stop("immediate")


@pytest.mark.parametrize("moment", ["_launch", "_provision"])
def test_stopped_while_it_starts_leaves_no_postgresql(slow_cluster: EmbeddedPostgres, moment: str) -> None:
    """A signal raises SystemExit wherever the start is."""
    program = f"""
import os, signal, sys
from pathlib import Path
from realtime_server import embedded
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if {moment!r} == "_provision":
    embedded.EmbeddedPostgres._provision = lambda self: signal.raise_signal(signal.SIGTERM)
else:
    run = embedded._Programs.run
    def run_and_be_stopped(self, program, *arguments, **limits):
        done = run(self, program, *arguments, **limits)
        if program == "pg_ctl":
            signal.raise_signal(signal.SIGTERM)
        return done
    embedded._Programs.run = run_and_be_stopped
with embedded.EmbeddedPostgres(Path({str(slow_cluster.data_dir)!r})):
    raise AssertionError("does not come here")
"""
    done = subprocess.run([sys.executable, "-c", program], env=bare_environment(), timeout=60, check=False)
    assert done.returncode == 0
    assert postgres_of(slow_cluster.data_dir) == []


async def test_second_signal_does_not_leave_postgresql_behind(folder: Path) -> None:
    async with newcomer(folder) as server:
        for _ in range(20):
            if server.process.returncode is None:
                os.kill(server.process.pid, signal.SIGTERM)
            await asyncio.sleep(0.02)
        await server.process.wait()
        assert postgres_of(folder) == []


@pytest.mark.parametrize("half", ["", "half"])
def test_half_written_secret_is_named_and_not_used(folder: Path, half: str) -> None:
    (folder / ".realtime").mkdir()
    (folder / ".realtime" / "jwt_secret").write_text(half)
    done = run_command("token", cwd=folder)
    assert done.returncode == 1
    assert "jwt_secret is not whole" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["run", "migrate"])
def test_address_that_is_none_is_refused_without_its_password(command: str) -> None:
    done = run_command(
        command,
        REALTIME_DATABASE_URL="postgresql+asyncpg://user:pass-word@localhost/db",
        REALTIME_JWT_SECRET="x" * 40,
        REALTIME_PORT="0",
    )
    assert done.returncode == 1
    assert "no address for libpq" in done.stderr
    assert "pass-word" not in done.stderr
