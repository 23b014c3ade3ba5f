"""Row changes under faults: everybody is told exactly what the ledger says, or of a gap, and nobody what is hidden."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, LiteralString

import psycopg
import pytest
from psycopg import conninfo

from tests.fix_changes import Source, hear_change, hear_row, subscribe, tables_on
from tests.fix_oracle import FaultCluster, until
from tests.fix_proxy import Proxy, ProxyFactory
from tests.fix_row_oracle import (
    ROWS_LONG,
    USERS,
    Binding,
    BroadcastSubscription,
    Condition,
    RowOracle,
    RowOracleFactory,
    RowServerFactory,
    RowSize,
    Who,
)
from tests.fix_server import Server
from tests.fix_wire import WireFactory

# Who reads changes, as it shows in pg_stat_activity.
READERS: Final[dict[Source, str]] = {"wal": "realtime-server wal%", "trigger": "realtime-server changes%"}
# 100,000 rows at once take the server 500 MB and more. What it has written for a client that is slow is 60 MB at most, and pieces little.
MOST_GROWTH_BYTES: Final = 150_000_000


def terminate(oracle: RowOracle, name: str, state: str = "%") -> int:
    with psycopg.connect(oracle.server.database.administrator_url, autocommit=True) as db:
        return db.execute(
            "select from pg_stat_activity where application_name like %s and state like %s"
            " and datname = current_database() and pg_terminate_backend(pid)",
            (name, state),
        ).rowcount


async def with_crowd(oracle: RowOracle) -> RowOracle:
    oracle.add_crowd()
    await oracle.confirmed()
    return oracle


async def while_writing(oracle: RowOracle, fault: Callable[[], Awaitable[object]]) -> None:
    """Write once more for each round, and let it happen meanwhile."""
    for _ in range(oracle.size.rounds):
        writing = asyncio.create_task(oracle.write())
        await oracle.pause(0.05, 0.3)
        await fault()
        await writing


async def test_everybody_is_told_what_the_ledger_says(
    row_server: Server, row_oracle_of: RowOracleFactory, row_size: RowSize
) -> None:
    """No fault at all, but memberships, claims and subscriptions change again and again."""
    oracle = await with_crowd(row_oracle_of(row_server))
    told = 0
    for _ in range(row_size.phases):
        await oracle.write()
        told += await oracle.verdict()
        await oracle.change_everything()
    assert told > 20 * row_size.phases


# -- connections to the database


async def test_reader_terminated(row_server: Server, row_oracle_of: RowOracleFactory, source: Source) -> None:
    oracle = await with_crowd(row_oracle_of(row_server))

    async def terminate_reader() -> None:
        ended = 0
        while ended < 3:
            ended += terminate(oracle, READERS[source])
            await oracle.pause(0.05, 0.3)

    await while_writing(oracle, terminate_reader)
    await oracle.verdict()


async def test_judges_terminated(row_server: Server, row_oracle_of: RowOracleFactory) -> None:
    """A piece that was not judged is judged again, and told once."""
    oracle = await with_crowd(row_oracle_of(row_server))
    # Time to be met at work: one that is idle is just replaced.
    oracle.execute("create policy slow on oracle.own_full as restrictive using ((select pg_sleep(0.05) is not null))")

    async def terminate_judges() -> None:
        ended = 0
        while ended < 3:
            ended += terminate(oracle, "realtime-server judge", "active")
            await oracle.pause(0.01, 0.1)

    await while_writing(oracle, terminate_judges)
    await oracle.verdict()


@pytest.mark.parametrize("source", ["wal"], indirect=True)
async def test_slot_dropped(row_server: Server, row_oracle_of: RowOracleFactory) -> None:
    """What was in it is lost, and everybody is told so; what comes afterwards is complete."""
    oracle = await with_crowd(row_oracle_of(row_server))

    async def drop_slot() -> None:
        await asyncio.to_thread(drop_slot_of, oracle)
        await until(lambda: all(one.gaps for one in oracle.followers), "everybody to be told of the gap")

    await while_writing(oracle, drop_slot)
    await oracle.write()
    await oracle.verdict(gaps=True)


def drop_slot_of(oracle: RowOracle) -> None:
    of_this = "from pg_replication_slots where database = current_database()"
    with psycopg.connect(oracle.server.database.administrator_url, autocommit=True) as db:
        dropped = 0
        while not dropped:
            try:
                db.execute(f"select pg_terminate_backend(active_pid, 5000) {of_this} and active")
                dropped = db.execute(f"select pg_drop_replication_slot(slot_name) {of_this}").rowcount
            except psycopg.errors.ObjectInUse:
                # The server was quicker.
                pass


async def test_database_restarted_at_once(
    row_server: Server, row_oracle_of: RowOracleFactory, fault_cluster: FaultCluster
) -> None:
    """`immediate`: sessions die, the log is replayed at the start; what had not been committed is gone."""
    oracle = await with_crowd(row_oracle_of(row_server))

    async def restart() -> None:
        await asyncio.to_thread(fault_cluster.postgres.stop, "immediate")
        await asyncio.to_thread(fault_cluster.postgres.start)

    await while_writing(oracle, restart)
    await oracle.verdict()


async def test_subscription_of_a_moment_before_a_crash(
    row_server: Server, fault_cluster: FaultCluster, wire: WireFactory
) -> None:
    """Ids of transactions that left nothing durable come again: what has them then is newer than the subscription."""
    execute = row_server.database.execute
    binding = {"event": "*", "schema": "crash", "table": "notes"}
    with fault_cluster.administer() as administrator:
        administrator.execute("alter system set wal_writer_delay = '10s'")
        administrator.execute("select pg_reload_conf()")
    execute("create schema crash create table notes (id int primary key)")
    execute("grant usage on schema crash to anon")
    execute("grant select on crash.notes to anon")
    execute("alter publication supabase_realtime add table crash.notes")
    # It is captured by then.
    await subscribe(await wire(row_server.websocket_url, row_server.anon_key), "rows", binding)
    for id in range(5):
        with row_server.database.connect() as db:
            for _ in range(100):
                ((highest,),) = db.execute("select pg_current_xact_id()::text::bigint").fetchall()
        socket = await wire(row_server.websocket_url, row_server.anon_key)
        await subscribe(socket, "rows", binding)
        await asyncio.to_thread(fault_cluster.postgres.stop, "immediate")
        await asyncio.to_thread(fault_cluster.postgres.start)
        ((xid,),) = execute("insert into crash.notes values (%s) returning pg_current_xact_id()::text::bigint", id)
        # Unless somebody's commit has put all of them on disk, as a server's sign of life does.
        if xid <= highest:
            break
    assert xid <= highest, "no id was given again"
    assert (await hear_change(socket, "rows"))["data"]["record"] == {"id": id}
    execute("drop schema crash cascade")
    with fault_cluster.administer() as administrator:
        administrator.execute("alter system reset wal_writer_delay")
        administrator.execute("select pg_reload_conf()")


async def test_transaction_that_is_prepared_is_told_when_it_is_committed(row_server: Server, wire: WireFactory) -> None:
    socket = await wire(row_server.websocket_url, row_server.anon_key)
    with tables_on(row_server) as tables:
        tables.create()
        await subscribe(socket, "prepared", tables.binding())
        for id in (1, 2):
            # Bells are notifications, which cannot be prepared.
            quiet = "set local realtime.doorbell = 'off'"
            tables.execute(f"begin; {quiet}; insert into todos values ({id}); prepare transaction 'todo {id}'")
        tables.execute("insert into todos values (3)")
        assert await hear_row(socket, "prepared") == ("INSERT", {"id": 3, "title": None})
        tables.execute("rollback prepared 'todo 1'")
        tables.execute("commit prepared 'todo 2'")
        assert await hear_row(socket, "prepared") == ("INSERT", {"id": 2, "title": None})
        tables.execute("insert into todos values (4)")
        assert await hear_row(socket, "prepared") == ("INSERT", {"id": 4, "title": None})


async def test_link_to_the_database_cut(row_server: Server, row_link: Proxy, row_oracle_of: RowOracleFactory) -> None:
    oracle = await with_crowd(row_oracle_of(row_server))

    async def cut() -> None:
        for _ in range(3):
            row_link.cut()
            await oracle.pause(0.05, 0.3)

    await while_writing(oracle, cut)
    await oracle.verdict()


@pytest.mark.faults
@pytest.mark.parametrize("row_size", [ROWS_LONG], indirect=True, ids=["long"])
async def test_link_to_the_database_frozen(
    start_row_server: RowServerFactory,
    row_oracle_of: RowOracleFactory,
    proxy_to: ProxyFactory,
    fault_cluster: FaultCluster,
) -> None:
    """To both sides the other one looks alive and silent, for longer than the server waits for an answer."""
    port = conninfo.conninfo_to_dict(fault_cluster.cluster.administrator_url)["port"]
    link = await proxy_to(int(str(port)))
    oracle = await with_crowd(row_oracle_of(await start_row_server(link=link, database_timeout_s="2")))

    async def freeze() -> None:
        link.freeze()
        await asyncio.sleep(3)
        link.thaw()

    await while_writing(oracle, freeze)
    await oracle.verdict()


# -- the server


async def test_server_killed(row_server: Server, row_oracle_of: RowOracleFactory) -> None:
    """Who comes again is told everything from the moment that its subscription is confirmed, and nothing of before."""
    oracle = await with_crowd(row_oracle_of(row_server))

    async def kill() -> None:
        await row_server.kill()
        await oracle.pause(0, 0.2)
        await row_server.start()

    await while_writing(oracle, kill)
    # Again, because now they come while others write.
    writing = asyncio.create_task(oracle.write())
    await oracle.confirmed()
    await writing
    await oracle.write()
    await oracle.verdict()


@pytest.mark.parametrize("source", ["wal"], indirect=True)
async def test_source_is_changed_and_changed_back(
    start_row_server: RowServerFactory, row_oracle_of: RowOracleFactory, row_size: RowSize
) -> None:
    """Whoever comes is told everything, as the source of now knows it; of what the other one needed nothing is left, or it is told."""
    server = await start_row_server()
    oracle = await with_crowd(row_oracle_of(server))
    triggers: LiteralString = "select count(*)::int from pg_trigger where tgname like '!realtime_capture_%%'"
    captured: LiteralString = "select count(*)::int from realtime_internal.changes"
    slots: LiteralString = "select active from pg_replication_slots where database = current_database()"
    sources: list[Source] = ["trigger", "wal"]
    for oracle.source in sources * row_size.rounds:
        await server.stop()
        writing = asyncio.create_task(oracle.write())
        await oracle.pause(0, 0.2)
        await server.start(changes=oracle.source)
        await writing
        await oracle.confirmed()
        for one in oracle.followers:
            # A table that is in use may have its trigger a little later, and who asks for it is told both.
            assert oracle.source == "trigger" or not one.errors
            one.errors.clear()
        await oracle.write()
        assert await oracle.verdict() > 0
        if oracle.source == "trigger":
            assert server.database.execute(triggers) == [(7,)]
            await until(lambda: "nobody reads the replication slot" in server.log, "the slot to be told of")
        else:
            # When nobody writes, at once.
            await server.stop()
            await server.start()
            await until(
                lambda: server.database.execute(triggers) == server.database.execute(captured) == [(0,)],
                "triggers and what they wrote to be taken away",
            )
            await until(lambda: server.database.execute(slots) == [(True,)], "the slot to be read")


# -- policies


async def test_policy_that_raises_for_one_user(row_server: Server, row_oracle_of: RowOracleFactory) -> None:
    """That user alone is told, and left out of that table; the others have everything."""
    await one_user_cannot_be_judged(row_oracle_of(row_server), "1 / (id - id) = 1", "22012")


# Policies are not asked in another way where changes come from triggers.
@pytest.mark.parametrize("source", ["wal"], indirect=True)
async def test_policy_that_sleeps_for_one_user(
    start_row_server: RowServerFactory, row_oracle_of: RowOracleFactory
) -> None:
    """It is given a second, and the others wait no longer than that takes."""
    oracle = row_oracle_of(await start_row_server(policy_timeout_s="1"))
    await one_user_cannot_be_judged(oracle, "pg_sleep(60) is not null", "57014")


async def one_user_cannot_be_judged(oracle: RowOracle, bad: str, code: str) -> None:
    *others, troubled = USERS
    oracle.execute(
        "create policy bad on oracle.own_full as restrictive using"
        f" (case when auth.uid() = '{troubled}' then {bad} else true end)"
    )
    everything = [Binding("*", None, leaves=True)]
    crowd = [
        BroadcastSubscription(f"follower {user[-1]}", oracle, Who("authenticated", user), everything) for user in others
    ]
    # Each with a token of its own.
    victims = [
        BroadcastSubscription(f"victim {number}", oracle, Who("authenticated", troubled), everything)
        for number in range(3)
    ]
    oracle.add(*crowd, *victims)
    await oracle.confirmed()
    await oracle.write()
    await until(lambda: all(one.errors for one in victims), "the troubled ones to be told")
    await oracle.pass_fence(crowd)
    for one in victims:
        assert one.errors == [
            f"Changes of oracle.own_full are withheld: a policy could not be evaluated for your claims ({code})"
        ]
        # They are told of all other tables.
        assert {told.table for _, told in one.heard} >= {"open_key", "open_full"}
        assert all(told.table != "own_full" for _, told in one.heard)
    await oracle.verdict(but=victims)


# -- what is done to tables

# Each line in its order, the lines in any.
ALTERATIONS: Final[dict[str, list[str]]] = {
    "a column that nobody may select": [
        f"alter table oracle.own_key add column hidden text default 'sec-0-{'0' * 32}'",
        "alter table oracle.own_key drop column hidden",
    ],
    "a column that all may select": [
        "alter table oracle.open_full add column extra integer default 7;"
        " grant select (extra) on oracle.open_full to anon, authenticated, service_role",
        "alter table oracle.open_full rename column extra to extra_too",
    ],
    "all rows": ["truncate oracle.own_full", "truncate oracle.own_full, oracle.open_key"],
    "the publication": [
        "alter publication supabase_realtime drop table oracle.team_key",
        "alter publication supabase_realtime add table oracle.team_key",
    ],
    "row-level security": [
        "alter table oracle.team_full disable row level security",
        "alter table oracle.team_full enable row level security",
    ],
}


async def test_tables_are_altered(row_server: Server, row_oracle_of: RowOracleFactory, row_size: RowSize) -> None:
    """Who did not subscribe to the one that leaves the publication hears no word of it, and is told everything."""
    oracle = row_oracle_of(row_server)
    undisturbed = [
        BroadcastSubscription(
            f"undisturbed {number}", oracle, oracle.anybody(), [Binding("*", table), Binding("*", "own_full")]
        )
        for number, table in enumerate(["own_key", "open_key", "open_full", "team_full"])
    ]
    oracle.add(*undisturbed)
    await with_crowd(oracle)
    for _ in range(row_size.rounds):
        writing = asyncio.create_task(oracle.write(transactions=2 * row_size.transactions))
        waiting = [list(steps) for steps in ALTERATIONS.values()]
        while waiting:
            steps = oracle.chance.choice(waiting)
            await alter(oracle, steps.pop(0))
            waiting = [steps for steps in waiting if steps]
            await oracle.pause(0, 0.3)
        await writing
        # Who subscribed to what was not published has been told so, and is told when it is again.
        await oracle.pass_fence()
        for one in oracle.followers:
            assert all("table: team_key" in error or "schema: oracle]" in error for error in one.errors), one.errors
            one.errors.clear()
        assert all(one.confirmations == 1 for one in undisturbed), oracle.state()
        # Nothing is missing where no column came, went or has another name.
        assert all(not one.gaps for one in oracle.followers if one.tables <= {"open_key", "own_full"}), oracle.state()
        await oracle.verdict(perhaps={"team_key"}, anyhow={"team_full"}, gaps=True)
        # All is as before, but for a name.
        await oracle.write()
        await oracle.verdict()
        assert {"extra_too"} <= set().union(*(one.extras for one in oracle.followers)) <= {"extra", "extra_too"}
        await alter(oracle, "alter table oracle.open_full drop column extra_too")


async def alter(oracle: RowOracle, statement: str) -> None:
    while True:
        try:
            await asyncio.to_thread(oracle.execute, statement)
            return
        except psycopg.errors.DeadlockDetected:
            # A writer was in the way.
            pass


async def test_column_that_a_policy_reads_is_renamed(
    row_server: Server, row_link: Proxy, row_oracle_of: RowOracleFactory
) -> None:
    """Of what was written before and comes late nobody can say who may see it. That is told, and nothing of the rows."""
    alice, bob = USERS[:2]
    oracle = row_oracle_of(row_server)
    subscription = BroadcastSubscription("alice", oracle, Who("authenticated", alice), [Binding("*", "own_full")])
    oracle.add(subscription)
    await oracle.confirmed()
    row_link.freeze()
    oracle.execute(f"insert into oracle.own_full (id, owner) values (100, '{bob}')")
    [(own,)] = oracle.execute(f"update oracle.own_full set owner = '{alice}' where id = 100 returning title")
    oracle.execute("alter table oracle.own_full rename owner to keeper")
    row_link.thaw()
    await oracle.pass_fence()
    # Once for each piece that they came in.
    assert set(subscription.gaps) == {"gap: changes of oracle.own_full could not be read"}
    assert not subscription.heard
    [(newer,)] = oracle.execute("update oracle.own_full set size = 1 where id = 100 returning title")
    await oracle.pass_fence()
    assert subscription.secrets == {own, newer}


# -- size


def most_memory(server: Server) -> int:
    """Bytes that the server had resident at most."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


async def test_one_statement_that_changes_very_many_rows(
    start_row_server: RowServerFactory, row_oracle_of: RowOracleFactory, row_size: RowSize
) -> None:
    """Everybody has all that fit, and the server never has more than pieces of them in memory."""
    # The clients of this test share a process, and would be too slow for the server.
    oracle = row_oracle_of(await start_row_server(max_buffered_bytes="200000000"))
    oracle.execute("drop trigger note on oracle.own_full; drop trigger note on oracle.open_key")
    whole = Binding("INSERT", "open_key", (Condition("size", "gt", -1),))
    few = Binding("INSERT", "open_key", (Condition("team", "eq", 3), Condition("size", "gt", -1)))
    own = Binding("INSERT", "own_full", (Condition("team", "eq", 3),))
    alice, bob = (
        BroadcastSubscription(name, oracle, Who("authenticated", user), bindings)
        for name, user, bindings in (("alice", USERS[0], [whole]), ("bob", USERS[1], [few, own]))
    )
    oracle.add(alice, bob)
    await oracle.confirmed()
    before = most_memory(oracle.server)
    for table in ("open_key", "own_full"):
        await asyncio.to_thread(
            oracle.execute,
            f"insert into oracle.{table} (id, owner, team, size, body)"
            f" select 1000 + n, (array['{USERS[0]}', '{USERS[1]}'])[1 + n % 2]::uuid,"
            " case when n % 999 = 0 then 3 else 4 end, n, repeat('x', 200)"
            f" from generate_series(0, {row_size.bulk - 1}) as n",
        )
    await oracle.pass_fence()
    rows = range(1000, 1000 + row_size.bulk)
    assert [told.key for _, told in alice.heard] == [("open_key", id) for id in rows], oracle.state()
    assert [told.key for _, told in bob.heard] == [
        *(("open_key", id) for id in rows[::999]),
        *(("own_full", id) for id in rows[999::1998]),
    ], oracle.state()
    grown = most_memory(oracle.server) - before
    print(f"{2 * row_size.bulk} rows: {grown / 1e6:.0f} MB more than {before / 1e6:.0f} MB")
    assert grown < MOST_GROWTH_BYTES
