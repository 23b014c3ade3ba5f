"""What waking the server costs those who write: inserts a second into the outbox, by pgbench.

Four ways in one run, on the same table: without any wake-up (the trigger disabled: the 100 %), with the doorbell while the relay is awake
(it reads as it does in production), with the doorbell while a relay sleeps and never wakes (the worst case), and with a `pg_notify` in
each transaction, which is what the doorbell saves.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psycopg
from psycopg import conninfo
from setup import fresh_database, show

from realtime_server.cursor import StreamPosition
from realtime_server.database import Endpoint
from realtime_server.embedded import bundled_bin
from realtime_server.relay import MESSAGES, Relay, Row
from tests.fix_database import TestDatabase

INSERT = "insert into realtime.messages (topic, extension, event, payload) values ('t', 'broadcast', 'e', '{\"filler\": \"%s\"}');\n"
NOTIFY = "select pg_notify('other', '');\n"


class Nobody:
    def row(self, row: Row, behind: StreamPosition) -> None:
        """Nobody listens: what is measured is the reading."""

    async def ready(self) -> None:
        await asyncio.sleep(0)

    def gap(self, oldest: str) -> None:
        raise AssertionError(oldest)


@contextmanager
def relay(database: TestDatabase) -> Iterator[None]:
    """A relay that reads, in a thread of its own."""
    loop = asyncio.new_event_loop()
    task: list[asyncio.Task[None]] = []

    def run() -> None:
        task.append(loop.create_task(Relay(Endpoint(database.url), MESSAGES, name="relay", timeout_s=5).run(Nobody())))
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task[0])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task[0].cancel)
        thread.join()


@contextmanager
def sleeper(database: TestDatabase) -> Iterator[None]:
    """Somebody who holds the doorbell lock and listens, and never lets go."""
    with database.connect() as db:
        db.execute("listen realtime")
        db.execute("select pg_advisory_lock(7237125663275445356)")
        yield


@contextmanager
def trigger_disabled(database: TestDatabase) -> Iterator[None]:
    database.execute("alter table realtime.messages disable trigger ring_doorbell")
    yield
    database.execute("alter table realtime.messages enable trigger ring_doorbell")


@contextmanager
def notify_in_each(database: TestDatabase) -> Iterator[None]:
    with trigger_disabled(database), psycopg.connect(database.url, autocommit=True) as db:
        db.execute("listen other")
        yield


def pgbench(database: TestDatabase, script: str, writers: int, seconds: int) -> float:
    facts = conninfo.conninfo_to_dict(database.url)
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        where = f"-h {facts['host']} -p {facts['port']} -U {facts['user']} {facts['dbname']}"
        ended = subprocess.run(
            [
                str(bundled_bin() / "pgbench"),
                *f"-n -f {file.name} -c {writers} -j 2 -T {seconds} -M prepared {where}".split(),
            ],
            env=os.environ | {"PGPASSWORD": str(facts["password"])},
            text=True,
            capture_output=True,
            check=True,
        )
    found = re.search(r"tps = ([\d.]+)", ended.stdout)
    assert found, ended.stdout
    return float(found[1])


WAYS: dict[str, tuple[Callable[[TestDatabase], object], str]] = {
    "no wake-up": (trigger_disabled, INSERT),
    "doorbell, relay awake": (relay, INSERT),
    "doorbell, a sleeper that never wakes": (sleeper, INSERT),
    "pg_notify in each transaction": (notify_in_each, "begin;\n" + INSERT + NOTIFY + "commit;\n"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows: list[list[object]] = []
    with fresh_database() as database:
        for writers in (1, 8, 32):
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(arguments.rounds):
                for way, (setting, script) in WAYS.items():
                    database.execute("truncate realtime.messages")
                    with setting(database):  # type: ignore[attr-defined]
                        rates[way].append(pgbench(database, script % ("x" * 120), writers, arguments.seconds))
            best = statistics.median(rates["no wake-up"])
            for way, measured in rates.items():
                median = statistics.median(measured)
                rows.append([writers, way, f"{median:,.0f}", f"{median / best:.2f}"])
            print(f"{writers} writers done", flush=True)
    show("Inserts a second, a transaction each", ["writers", "way", "inserts/s", "ratio"], rows)


if __name__ == "__main__":
    main()
