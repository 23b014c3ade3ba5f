"""Partitions are made ahead and dropped when they are old, by one caller at a time, and none of it stands in a writer's way."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import LiteralString

import psycopg
import pytest

from tests.fix_database import TestDatabase, act_as

MAINTAIN = "select partition, action from realtime.maintain('72 hours')"


def days(first: int, last: int) -> list[date]:
    """From so many days after today, in UTC."""
    today = datetime.now(UTC).date()
    return [today + timedelta(number) for number in range(first, last + 1)]


def name_of(day: date) -> str:
    return f"messages_{day:%Y_%m_%d}"


def old_partition(database: TestDatabase) -> str:
    """A day that the retention has passed, with a message; all other partitions are as they should be."""
    database.execute("select realtime_internal.create_partitions()")
    (day,) = days(-5, -5)
    name = name_of(day)
    database.execute(
        f"create table realtime.{name} partition of realtime.messages for values from ('{day}') to ('{day + timedelta(1)}')"
    )
    database.execute(
        "insert into realtime.messages (topic, extension, event, payload, inserted_at) values ('old', 'broadcast', 'e', '{}', %s)",
        day,
    )
    return name


def test_what_is_kept_is_visible_in_a_view(any_database: TestDatabase) -> None:
    old = old_partition(any_database)
    any_database.execute("select realtime.send('{}', 'e', 'new')")
    # A message of a day that nobody made a partition for.
    any_database.execute(
        "insert into realtime.messages (topic, extension, event, payload, inserted_at)"
        " values ('far', 'broadcast', 'e', '{}', now() + interval '40 days')"
    )
    any_database.execute("analyze realtime.messages")
    rows = any_database.execute("select partition, bounds, estimated_rows, bytes from realtime.partitions")
    shown = {partition: (bounds, count) for partition, bounds, count, _ in rows}
    expected = {
        name_of(day): (
            f"FOR VALUES FROM ('{day} 00:00:00') TO ('{day + timedelta(1)} 00:00:00')",
            int(day == datetime.now(UTC).date()),
        )
        for day in days(-1, 3)
    }
    (day,) = days(-5, -5)
    expected[old] = (f"FOR VALUES FROM ('{day} 00:00:00') TO ('{day + timedelta(1)} 00:00:00')", 1)
    expected["messages_default"] = ("DEFAULT", 1)
    expected["messages_probe"] = ("FOR VALUES FROM (MINVALUE) TO ('1970-01-02 00:00:00')", 0)
    assert shown.items() >= expected.items()
    assert [row[0] for row in rows] == sorted(shown)
    assert all(size > 0 for *_, size in rows)

    assert any_database.execute(MAINTAIN) == [(old, "dropped")]
    assert set(any_database.execute("select partition from realtime.partitions")) == {(name,) for name in shown} - {
        (old,)
    }


def test_one_caller_at_a_time_does_the_work(database: TestDatabase) -> None:
    old = old_partition(database)
    (newest,) = days(3, 3)
    database.execute(f"drop table realtime.{name_of(newest)}")
    with psycopg.connect(database.url) as first, psycopg.connect(database.url) as second:
        assert first.execute(MAINTAIN).fetchall() == [(name_of(newest), "created"), (old, "dropped")]
        assert second.execute(MAINTAIN).fetchall() == []
        second.rollback()
        first.rollback()
        assert second.execute(MAINTAIN).fetchall() == [(name_of(newest), "created"), (old, "dropped")]
        second.commit()
        assert first.execute(MAINTAIN).fetchall() == []


def test_partition_in_use_is_dropped_another_time(database: TestDatabase) -> None:
    """In the first hour after its time: so much younger is a partition of two days ago, under this retention."""
    database.execute("select realtime.maintain('100 hours')")
    (day,) = days(-2, -2)
    old = name_of(day)
    database.execute(
        f"create table realtime.{old} partition of realtime.messages for values from ('{day}') to ('{day + timedelta(1)}')"
    )
    database.execute(
        "insert into realtime.messages (topic, extension, event, payload, inserted_at) values ('old', 'broadcast', 'e', '{}', %s)",
        day,
    )
    maintain: LiteralString = (
        "select partition, action from realtime.maintain("
        "(now() at time zone 'utc') - date_trunc('day', now() at time zone 'utc') + interval '1 day' - interval '30 minutes')"
    )
    before = database.execute("select realtime.oldest_cursor()")
    with psycopg.connect(database.url) as reader, database.connect() as db:
        reader.execute("select count(*) from realtime.messages")
        assert db.execute(maintain).fetchall() == [(old, "waiting")]
        assert db.execute("select count(*) from realtime.messages where topic = 'old'").fetchone() == (1,)
        # No gap is told for messages that are still there.
        assert database.execute("select realtime.oldest_cursor()") == before
        reader.rollback()
        assert db.execute(maintain).fetchall() == [(old, "dropped")]
    assert database.execute("select realtime.oldest_cursor()") != before


def test_clients_may_neither_maintain_nor_look_at_partitions(database: TestDatabase) -> None:
    for role in ("anon", "authenticated", "service_role"):
        for query in (MAINTAIN, "select * from realtime.partitions"):
            with database.connect() as db, db.transaction():
                act_as(db, role)
                try:
                    db.execute(query)
                except psycopg.errors.InsufficientPrivilege:
                    continue
                raise AssertionError(f"{role} may: {query}")


def test_transaction_that_has_run_for_longer_than_messages_are_kept_makes_no_gap(any_database: TestDatabase) -> None:
    read = "select (payload ->> 'n')::int from realtime.messages_after('old', %s)"
    with psycopg.connect(any_database.url) as long:
        long.execute("select pg_current_xact_id()")
        before = any_database.execute("select realtime.cursor()")[0][0]
        old = old_partition(any_database)
        assert any_database.execute(MAINTAIN) == [(old, "dropped")]
        (place,) = any_database.execute("select realtime.cursor()")[0]
        any_database.execute("select realtime.send('{\"n\": 1}', 'e', 'old')")
        assert any_database.execute(read, place) == [(1,)]
        # Where there is one, it is told.
        with pytest.raises(psycopg.Error, match="older than what is kept"):
            any_database.execute(read, before)
        long.execute("select realtime.send('{\"n\": 2}', 'e', 'old')")
        long.commit()
    # It has ended, and may have had messages among what was dropped since.
    with pytest.raises(psycopg.Error, match="older than what is kept"):
        any_database.execute(read, place)
    assert any_database.execute(read, any_database.execute("select realtime.cursor()")[0][0]) == []


def test_reader_that_waits_for_a_partition_to_be_dropped_is_told_of_the_gap(any_database: TestDatabase) -> None:
    before = any_database.execute("select realtime.cursor()")[0][0]
    old = old_partition(any_database)
    with psycopg.connect(any_database.url) as maintenance, ThreadPoolExecutor(1) as other:
        assert maintenance.execute(MAINTAIN).fetchall() == [(old, "dropped")]
        reading = other.submit(any_database.execute, "select id from realtime.messages_after('old', %s)", before)
        while not reading.done() and not any_database.execute(
            "select pid from pg_locks where not granted and database ="
            " (select oid from pg_database where datname = current_database())"
        ):
            time.sleep(0.01)
        maintenance.commit()
        with pytest.raises(psycopg.Error, match="older than what is kept"):
            reading.result()
