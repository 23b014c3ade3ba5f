"""What one read of the relay costs as the outbox grows, and while an old writing transaction stays open.

The cost is PostgreSQL's own: pages touched (which repeats exactly) and milliseconds, for a read that finds nothing, a read that finds one
message, and for a client's resume from a minute ago on a topic of its own.
"""

from __future__ import annotations

import argparse
import re
import statistics

import psycopg
from setup import fresh_database, show

TOPICS = 1000
REPEATS = 30


def fill(db: psycopg.Connection[tuple[object, ...]], rows: int) -> None:
    # In transactions of 10,000 rows, so that transaction ids spread as in life.
    for _ in range(max(1, rows // 10_000)):
        db.execute(
            "insert into realtime.messages (topic, extension, event, payload)"
            " select 'topic:' || number %% %s, 'broadcast', 'e', jsonb_build_object('n', number, 'filler', repeat('x', 100))"
            " from generate_series(1, %s) as number",
            (TOPICS, min(rows, 10_000)),
        )


def explain(db: psycopg.Connection[tuple[object, ...]], query: str, *arguments: object) -> tuple[int, float]:
    """Pages and the median of milliseconds of one query."""
    pages, times = 0, []
    for _ in range(REPEATS):
        plan = "\n".join(
            str(line)
            for (line,) in db.execute(f"explain (analyze, buffers, timing off) {query}", arguments)  # type: ignore[arg-type]
        )
        hits = re.search(r"Buffers: shared(?: hit=(\d+))?(?: read=(\d+))?", plan)
        pages = sum(int(part or 0) for part in hits.groups()) if hits else 0
        times.append(float(re.findall(r"Execution Time: ([\d.]+)", plan)[-1]))
    return pages, statistics.median(times)


def measure(db: psycopg.Connection[tuple[object, ...]], other: psycopg.Connection[tuple[object, ...]]) -> list[object]:
    cells: list[object] = []
    now = db.execute("select pg_current_snapshot()::text").fetchone()
    assert now is not None
    for write in (False, True):
        if write:
            other.execute("select realtime.send('{}', 'e', 'topic:1', false)")
        pages, milliseconds = explain(db, "select * from realtime_internal.messages_since(%s::pg_snapshot)", now[0])
        cells += [pages, f"{milliseconds:.2f}"]
    place = db.execute("select realtime.cursor()").fetchone()
    assert place is not None
    for _ in range(100):
        other.execute("select realtime.send('{}', 'e', 'topic:1', false)")
    pages, milliseconds = explain(db, "select * from realtime.messages_after('topic:1', %s, 1000)", place[0])
    return [*cells, pages, f"{milliseconds:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    most = parser.parse_args().rows
    table = []
    with (
        fresh_database(shared_buffers="1GB") as database,
        database.connect() as db,
        database.connect() as other,
        psycopg.connect(database.url) as old,
    ):
        size = 0
        for rows in (0, 10_000, 100_000, 1_000_000, 5_000_000):
            if rows > most:
                break
            fill(db, rows - size) if rows > size else None
            size = rows
            db.execute("analyze realtime.messages")
            table.append([f"{rows:,}", "no", *measure(db, other)])
            if rows == 100_000:
                old.execute("select realtime.send('{}', 'e', 'old', false)")
            if rows >= 1_000_000:
                table[-1][1] = "yes, since 100,000 rows"
            print(f"{rows:,} rows done", flush=True)
    show(
        "Cost of a read (pages of 8 kB, milliseconds)",
        [
            "rows in the outbox",
            "old transaction open",
            "nothing new: pages",
            "ms",
            "one new: pages",
            "ms",
            "resume of 100 of one topic: pages",
            "ms",
        ],
        table,
    )


if __name__ == "__main__":
    main()
