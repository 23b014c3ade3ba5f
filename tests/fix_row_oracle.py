"""The oracle of row changes: a ledger says what was committed, and this file, who was to be told what of it.

Every change of a row leaves its images in `oracle.ledger`, in the same transaction. Followers, each with claims and bindings of its own,
listen over sockets and come again whenever they are thrown out. At a quiet point, what each was told of each row is held against what its
policies and filters let through of the images in the ledger: the same, in the order of the commits, each once, from the moment its
subscription was confirmed. Each row bears secrets: none may be in any byte that went to somebody who may not see it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

import psycopg
import pytest
from psycopg import conninfo
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from realtime_server.cursor import Snapshot
from tests.fix_changes import SOURCES, Source
from tests.fix_database import OWNER, TestDatabase
from tests.fix_oracle import (
    CHECKPOINT_INTERVAL_S,
    COME_AGAIN_S,
    FaultCluster,
    Lost,
    end,
    keep_writing,
    look,
    perhaps_undone,
    until,
)
from tests.fix_proxy import Proxy
from tests.fix_server import Server, make_token

Image = dict[str, Any]

USERS: Final = [f"00000000-0000-0000-0000-00000000000{digit}" for digit in "abcd"]
TEAMS: Final = range(1, 6)
# Nobody may select column "secret".
GRANTED: Final = ("id", "owner", "team", "size", "title", "body", "mark")
BIG: Final = 5000
SECRET: Final = re.compile(r"(?:tit|sec)-[0-9]+-[0-9a-f]{32}")
# Columns that tests add and rename while changes flow: what is told of them is not held against the ledger.
EXTRA: Final = "extra"


class Kind(NamedTuple):
    """A table; `rule` says whose its rows are."""

    name: str
    rule: str
    is_full: bool

    @property
    def is_secured(self) -> bool:
        return self.rule != "open"


KINDS: Final = {
    f"{rule}_{identity}": Kind(f"{rule}_{identity}", rule, identity == "full")
    for rule in ("own", "team", "open")
    for identity in ("key", "full")
}

SETUP: Final = """
create schema oracle;
create schema fence;
grant usage on schema oracle, fence to anon, authenticated, service_role;
create sequence oracle.marks;
create table oracle.ledger (
    number bigint generated always as identity primary key,
    xid text not null default pg_current_xact_id()::text,
    name text not null,
    old jsonb,
    new jsonb
);
create table oracle.members (team integer, who uuid, primary key (team, who));
grant select on oracle.members to anon, authenticated;
create table fence.fence (id bigint generated always as identity primary key);
grant select on fence.fence to anon, authenticated, service_role;
alter publication supabase_realtime add table fence.fence;

create function oracle.mark() returns trigger language plpgsql as $$
begin
    new.mark := nextval('oracle.marks');
    new.title := 'tit-' || new.mark || '-' || md5(random()::text);
    new.secret := 'sec-' || new.mark || '-' || md5(random()::text);
    return new;
end
$$;
create function oracle.note() returns trigger language plpgsql as $$
begin
    insert into oracle.ledger (name, old, new)
    values (
        tg_table_name,
        case when tg_op <> 'INSERT' then to_jsonb(old) end,
        case when tg_op <> 'DELETE' then to_jsonb(new) end
    );
    return null;
end
$$;
"""

TABLE: Final = """
create table oracle.{name} (
    id integer primary key, owner uuid, team integer, size integer, title text, secret text, body text, mark bigint
);
alter table oracle.{name} alter body set storage external;
alter table oracle.{name} replica identity {identity};
grant select (id, owner, team, size, title, body, mark) on oracle.{name} to anon, authenticated, service_role;
create trigger mark before insert or update on oracle.{name} for each row execute function oracle.mark();
create trigger note after insert or update or delete on oracle.{name} for each row execute function oracle.note();
alter publication supabase_realtime add table oracle.{name};
"""
RULES: Final = {
    "own": "owner = (select auth.uid())",
    "team": "exists (select from oracle.members as m where m.team = {name}.team and m.who = auth.uid())",
}


# -- who may be told what


class Change(NamedTuple):
    """A row of the ledger."""

    number: int
    xid: int
    kind: Kind
    old: Image | None
    new: Image | None

    @property
    def action(self) -> str:
        return "INSERT" if self.old is None else "DELETE" if self.new is None else "UPDATE"


class Condition(NamedTuple):
    column: str
    operator: str
    value: Any

    def __str__(self) -> str:
        match self.value:
            case list():
                value = f"({','.join(map(str, self.value))})"
            case None:
                value = "null"
            case _:
                value = str(self.value)
        return f"{self.column}={self.operator}.{value}"

    def holds(self, image: Mapping[str, Any]) -> bool:
        """A column that is not known satisfies nothing, null only what asks for it."""
        if self.column not in image:
            return False
        found = image[self.column]
        if self.operator == "is":
            return found is None
        if found is None:
            return False
        match self.operator:
            case "eq":
                return bool(found == self.value)
            case "neq":
                return bool(found != self.value)
            case "not.eq":
                return bool(found != self.value)
            case "gt":
                return bool(found > self.value)
            case "lte":
                return bool(found <= self.value)
            case "in":
                return found in self.value
            case "like":
                return str(found).startswith(self.value.removesuffix("%"))
        raise AssertionError(self.operator)


@dataclass(frozen=True)
class Binding:
    event: str
    table: str | None
    conditions: tuple[Condition, ...] = ()
    select: tuple[str, ...] = ()
    leaves: bool = False

    @property
    def params(self) -> dict[str, Any]:
        params: dict[str, Any] = {"event": self.event, "schema": "oracle"}
        if self.table is not None:
            params["table"] = self.table
        if self.conditions:
            params["filter"] = ",".join(map(str, self.conditions))
        if self.select:
            params["select"] = list(self.select)
        if self.leaves:
            params["leaves"] = True
        return params

    def fits(self, kind: Kind, image: Mapping[str, Any]) -> bool:
        return self.table in (None, kind.name) and all(condition.holds(image) for condition in self.conditions)


def any_binding(chance: random.Random) -> Binding:
    event = chance.choice(["*", "*", "*", "INSERT", "UPDATE", "DELETE"])
    leaves = chance.random() < 0.4
    if chance.random() < 0.2:
        return Binding(event, None, leaves=leaves)
    conditions = chance.sample(
        [
            Condition("team", "eq", chance.choice(TEAMS)),
            Condition("team", "in", sorted(chance.sample(TEAMS, 3))),
            Condition("team", "not.eq", chance.choice(TEAMS)),
            Condition("owner", "eq", chance.choice(USERS)),
            Condition("size", "gt", chance.randrange(100)),
            Condition("size", "lte", chance.randrange(100)),
            Condition("size", "is", None),
            Condition("title", "like", f"tit-{chance.randrange(1, 10)}%"),
            Condition("id", "neq", chance.randrange(20)),
        ],
        chance.choice([0, 0, 1, 1, 2]),
    )
    select = (
        ("mark", *chance.sample(["owner", "title", "body"], chance.choice([1, 2]))) if chance.random() < 0.3 else ()
    )
    return Binding(event, chance.choice(list(KINDS)), tuple(conditions), select, leaves)


class Told(NamedTuple):
    """A message of one change. `record` and `old` are None where they must be absent."""

    table: str
    action: str
    ids: frozenset[int]
    columns: tuple[str, ...]
    record: str | None
    old: str | None

    @classmethod
    def of(
        cls,
        table: str,
        action: str,
        ids: Iterable[int],
        columns: Iterable[str],
        record: Image | None,
        old: Image | None,
    ) -> Told:
        texts = (None if image is None else json.dumps(image, sort_keys=True) for image in (record, old))
        return cls(table, action, frozenset(ids), tuple(columns), *texts)

    @property
    def key(self) -> tuple[str, int]:
        """The row it is about."""
        image = json.loads(self.old if self.record is None else self.record)  # type: ignore[arg-type]
        return self.table, image["id"]


class Expected(NamedTuple):
    """`is_sure`: False, where the server may not be able to find out what to tell."""

    change: Change
    told: Told
    is_sure: bool


@dataclass(frozen=True)
class Judgement:
    """The rules, as they are written above, on the images of the ledger. `members`: pairs of a team and a user."""

    source: Source
    members: frozenset[tuple[int, str]]

    def sees(self, who: Who, kind: Kind, image: Image | None) -> bool:
        if image is None:
            return False
        if who.role == "service_role":
            return True
        match kind.rule:
            case "own":
                return who.user is not None and image["owner"] == who.user
            case "team":
                return (image["team"], who.user) in self.members
        return True

    def expect(self, who: Who, bindings: Sequence[Binding], change: Change) -> list[Told]:
        kind, old, new = change.kind, change.old, change.new
        is_bound = kind.is_secured and who.role != "service_role"
        # From the log the old row is known where the whole of it is the replica identity.
        knows_old = self.source == "trigger" or kind.is_full
        sees_old = (knows_old or not is_bound) and self.sees(who, kind, old)
        identity: tuple[str, ...] = GRANTED if kind.is_full else ("id",)
        groups: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
        for id, binding in enumerate(bindings, start=1):
            columns = tuple(name for name in GRANTED if not binding.select or name in ("id", *binding.select))
            if new is None:
                assert old is not None
                known = {name: value for name, value in old.items() if kind.is_full or name == "id"}
                if (
                    binding.event in ("*", "DELETE")
                    and binding.fits(kind, known)
                    and (sees_old if knows_old and is_bound else True)
                ):
                    groups["DELETE", columns].append(id)
                continue
            stays = binding.fits(kind, new) and self.sees(who, kind, new)
            if stays and binding.event in ("*", change.action):
                groups[change.action, columns].append(id)
            elif (
                not stays
                and binding.leaves
                and binding.event in ("*", "DELETE")
                and old is not None
                and knows_old
                and binding.fits(kind, old)
                and self.sees(who, kind, old)
            ):
                groups["DELETE", columns].append(id)
        told = []
        for (action, columns), ids in groups.items():
            record = old_record = None
            if action != "DELETE":
                assert new is not None
                record = {name: new[name] for name in columns if not self._is_left_out(change, name)}
            if action != "INSERT":
                assert old is not None
                is_whole = sees_old if action == "UPDATE" else new is None and not kind.is_secured
                shown = identity if is_whole else ("id",)
                old_record = {name: old[name] for name in columns if name in shown}
            told.append(Told.of(kind.name, action, ids, columns, record, old_record))
        return told

    def is_sure(self, change: Change, later: Iterable[Change]) -> bool:
        """Of a large value that an UPDATE left alone the log knows nothing: it is looked up in the row, if that is still there."""
        return not (
            change.kind.is_secured
            and self._is_left_out(change, "body")
            and any(
                one.old is not None and change.new is not None and one.old["id"] == change.new["id"] for one in later
            )
        )

    def _is_left_out(self, change: Change, name: str) -> bool:
        return (
            name == "body"
            and self.source == "wal"
            and change.action == "UPDATE"
            and not change.kind.is_full
            and change.old is not None
            and change.new is not None
            and change.old[name] == change.new[name]
            and len(change.new[name] or "") >= BIG
        )


class Who(NamedTuple):
    role: str
    user: str | None

    @property
    def token(self) -> str:
        return make_token(self.role) if self.user is None else make_token(self.role, sub=self.user)


# -- followers


class Heard(NamedTuple):
    epoch: int
    told: Told


@dataclass
class Epoch:
    """One subscription. What was committed before `begun` may not come, what is committed after `sure` must."""

    begun: Snapshot
    sure: Snapshot | None = None


class BroadcastSubscription:
    """A client with one channel of bindings and one for the fence. It comes again for ever."""

    def __init__(self, name: str, oracle: RowOracle, who: Who, bindings: Sequence[Binding]) -> None:
        self.name = name
        self.oracle = oracle
        self.who = who
        self.bindings = list(bindings)
        self.url = oracle.server.websocket_url
        self.epochs: list[Epoch] = []
        self.heard: list[Heard] = []
        self.fence = 0
        self.secrets: set[str] = set()
        # What was said of the subscription: that it works, that something is missing, that something is wrong.
        self.confirmations = 0
        self.gaps: list[str] = []
        self.errors: list[str] = []
        self.extras: set[str] = set()
        self.losses: Counter[str] = Counter()
        self._socket: ClientConnection | None = None
        self._ref = 10

    @property
    def tables(self) -> set[str]:
        return {binding.table or "*" for binding in self.bindings}

    @property
    def is_confirmed(self) -> bool:
        return bool(self.epochs) and self.epochs[-1].sure is not None

    async def run(self) -> None:
        while True:
            try:
                await self._stay()
            except (Lost, OSError, TimeoutError, WebSocketException, psycopg.OperationalError) as error:
                self.losses[f"{type(error).__name__}: {error}"[:100]] += 1
            finally:
                self._socket = None
            if self.epochs:
                self.epochs[-1].sure = None
            await asyncio.sleep(COME_AGAIN_S)

    async def _stay(self) -> None:
        query = urlencode({"vsn": "2.0.0", "apikey": self.oracle.server.anon_key})
        async with connect(
            f"{self.url}?{query}",
            compression=None,
            max_size=None,
            open_timeout=5,
            # What it would have to say may stand behind very many changes.
            ping_interval=None,
            close_timeout=0.5,
        ) as socket:
            self._socket = socket
            await self._join("fence", [{"event": "INSERT", "schema": "fence", "table": "fence"}])
            await self.subscribe()
            async for frame in socket:
                assert isinstance(frame, str)
                await self._handle(frame)

    async def subscribe(self) -> None:
        """Join anew, with the bindings of now. Where the channel was joined already, that ends."""
        self.epochs.append(Epoch(await self.oracle.snapshot()))
        await self._join("rows", [binding.params for binding in self.bindings])

    async def change_claims(self, who: Who) -> None:
        """A new token on the same channel."""
        self.who = who
        self.epochs.append(Epoch(await self.oracle.snapshot()))
        await self._say("rows", "access_token", {"access_token": who.token})

    async def _join(self, topic: str, bindings: list[dict[str, Any]]) -> None:
        await self._say(topic, "phx_join", {"config": {"postgres_changes": bindings}, "access_token": self.who.token})

    async def _say(self, topic: str, event: str, payload: dict[str, Any]) -> None:
        assert self._socket is not None, "connected"
        self._ref += 1
        await self._socket.send(json.dumps([str(self._ref), str(self._ref), f"realtime:{topic}", event, payload]))

    async def _handle(self, frame: str) -> None:
        self.secrets.update(SECRET.findall(frame))
        _, _, topic, event, payload = json.loads(frame)
        match topic, event:
            case "realtime:fence", "postgres_changes":
                self.fence = max(self.fence, payload["data"]["record"]["id"])
            case "realtime:rows", "postgres_changes":
                self.heard.append(Heard(len(self.epochs) - 1, self._read(payload)))
            case "realtime:rows", "system":
                await self._hear_word(payload)
            case _, "phx_reply" if payload["status"] != "ok":
                raise Lost(str(payload))
            case _, "phx_error":
                raise Lost(f"{topic}: {event}")

    def _read(self, payload: dict[str, Any]) -> Told:
        data = payload["data"]
        assert data["errors"] is None, payload
        assert data["commit_timestamp"] is not None
        assert data["schema"] == "oracle"
        names = [column["name"] for column in data["columns"]]
        self.extras.update(name for name in names if name.startswith(EXTRA))
        return Told.of(
            data["table"],
            data["type"],
            payload["ids"],
            [name for name in names if not name.startswith(EXTRA)],
            _without_extras(data.get("record")),
            _without_extras(data.get("old_record")),
        )

    async def _hear_word(self, payload: dict[str, Any]) -> None:
        match payload["status"]:
            case "ok":
                self.confirmations += 1
                self.epochs[-1].sure = await self.oracle.snapshot()
            case "gap":
                self.gaps.append(payload["message"])
                # From here on nothing is missing, unless there is nothing to read changes from: then it will be confirmed anew.
                is_over = "another way" not in payload["message"]
                self.epochs[-1].sure = await self.oracle.snapshot() if is_over else None
            case "error":
                self.errors.append(payload["message"])
                self.epochs[-1].sure = None


def _without_extras(image: Image | None) -> Image | None:
    return None if image is None else {name: value for name, value in image.items() if not name.startswith(EXTRA)}


# -- the run


@dataclass(frozen=True)
class RowSize:
    """How much of a run: the short ones are for every run of the tests."""

    name: str
    writers: int
    transactions: int
    phases: int
    followers: int
    rounds: int
    bulk: int

    @property
    def is_long(self) -> bool:
        return self.name == "long"


ROWS_SHORT: Final = RowSize("short", writers=4, transactions=12, phases=2, followers=6, rounds=1, bulk=5_000)
ROWS_LONG: Final = RowSize("long", writers=8, transactions=60, phases=6, followers=25, rounds=3, bulk=100_000)


@dataclass
class RowOracle:
    """One run on a database of its own: tables, writers, followers, and the verdict."""

    server: Server
    source: Source
    size: RowSize
    seed: int
    followers: list[BroadcastSubscription] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._looked_at = 0
        self._database = self.server.database
        with self._database.connect() as db:
            db.execute(SETUP)
            for kind in KINDS.values():
                identity = "full" if kind.is_full else "default"
                db.execute(TABLE.format(name=kind.name, identity=identity).encode())
                if kind.is_secured:
                    rule = RULES[kind.rule].format(name=kind.name)
                    db.execute(f"create policy told on oracle.{kind.name} for select using ({rule})".encode())
                    db.execute(f"alter table oracle.{kind.name} enable row level security".encode())
                for id in range(15):
                    db.execute(
                        f"insert into oracle.{kind.name} (id, owner, team, size) values (%s, %s, %s, %s)".encode(),
                        (id, self.chance.choice(USERS), self.chance.choice(TEAMS), self.chance.randrange(100)),
                    )
            self._invite(db)

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        with self._database.connect() as db:
            cursor = db.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    async def pause(self, shortest_s: float, longest_s: float) -> None:
        await asyncio.sleep(self.chance.uniform(shortest_s, longest_s))

    async def snapshot(self) -> Snapshot:
        """What is committed now; waits for the database."""
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(
                    self._database.url, autocommit=True, connect_timeout=5
                ) as db:
                    cursor = await db.execute("select pg_current_snapshot()::text")
                    [(text,)] = await cursor.fetchall()
                    return Snapshot.parse(text)
            except psycopg.OperationalError:
                await asyncio.sleep(COME_AGAIN_S)

    # -- followers

    def anybody(self) -> Who:
        kind = self.chance.random()
        if kind < 0.1:
            return Who("anon", None)
        if kind < 0.2:
            return Who("service_role", None)
        return Who("authenticated", self.chance.choice(USERS))

    def any_bindings(self) -> list[Binding]:
        return [any_binding(self.chance) for _ in range(self.chance.choice([1, 1, 2, 3, 4]))]

    def add(self, *followers: BroadcastSubscription) -> None:
        for subscription in followers:
            self.followers.append(subscription)
            self._tasks.add(asyncio.create_task(subscription.run(), name=subscription.name))

    def add_crowd(self, *, url: str | None = None) -> None:
        crowd = [
            BroadcastSubscription(f"follower {number}", self, self.anybody(), self.any_bindings())
            for number in range(self.size.followers)
        ]
        # Whatever chance says, somebody asks for everything.
        everything = [Binding("*", None, leaves=True)]
        crowd += [
            BroadcastSubscription(f"all of {user[-1]}", self, Who("authenticated", user), everything)
            for user in USERS[:2]
        ]
        for subscription in crowd:
            subscription.url = url or subscription.url
        self.add(*crowd)

    async def confirmed(self, followers: Iterable[BroadcastSubscription] | None = None) -> None:
        """Wait until all know that they will be told of what is committed from now on."""
        chosen = list(followers or self.followers)
        try:
            await until(lambda: all(one.is_confirmed for one in chosen), "every subscription", self._look)
        except AssertionError as error:
            error.add_note(self.state())
            raise

    # -- writers

    async def write(self, *, transactions: int | None = None) -> None:
        """All writers at once, until each has ended its transactions."""
        seeds = [self.chance.randrange(10**9) for _ in range(self.size.writers)]
        count = transactions or self.size.transactions
        await asyncio.gather(
            *(keep_writing(self._database.url, random.Random(seed), count, self._attempt) for seed in seeds)
        )

    async def _attempt(self, db: psycopg.AsyncConnection[Any], chance: random.Random) -> None:
        try:
            await self._transaction(db, chance)
        except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
            await db.rollback()

    async def _transaction(self, db: psycopg.AsyncConnection[Any], chance: random.Random) -> None:
        for _ in range(chance.choice([1, 1, 1, 2, 4, 8])):
            async with perhaps_undone(db, chance):
                await db.execute(self._statement(chance).encode())
            await asyncio.sleep(chance.choice([0, 0, 0, 0.001, 0.02]))
        if chance.random() < 0.8:
            await db.commit()
        else:
            await db.rollback()

    def _statement(self, chance: random.Random) -> str:
        table = f"oracle.{chance.choice(list(KINDS))}"
        id = chance.randrange(20)
        owner = chance.choice([f"'{chance.choice(USERS)}'", f"'{chance.choice(USERS)}'", "null"])
        team = chance.choice([*TEAMS, "null"])
        size = chance.choice([chance.randrange(100), "null"])
        body = chance.choice(["null", "'short'", f"repeat(md5(random()::text), {BIG // 32 + 1})"])
        match chance.randrange(12):
            case 0 | 1 | 2 | 3:
                return (
                    f"insert into {table} (id, owner, team, size, body) values ({id}, {owner}, {team}, {size}, {body})"
                    " on conflict (id) do update set size = excluded.size, owner = excluded.owner"
                )
            case 4:
                return f"update {table} set size = {size} where id = {id}"
            case 5:
                return f"update {table} set owner = {owner} where id = {id}"
            case 6:
                return f"update {table} set team = {team}, size = {size} where team = {chance.choice(TEAMS)}"
            case 7:
                return f"update {table} set body = {body} where id = {id}"
            case 8:
                return f"update {table} set id = id + 100 where id = {id}"
            case 9:
                return f"update {table} set id = id - 100, owner = {owner} where id = {id + 100}"
            case 10:
                return f"delete from {table} where id in ({id}, {id + 100})"
        return f"delete from {table} where team = {chance.choice(TEAMS)} and size > 70"

    # -- quiet points

    async def pass_fence(self, sure: Collection[BroadcastSubscription] | None = None) -> None:
        """Wait until everybody has been told of a row that was committed after all others, and so of all others.

        `sure`: those who must know that their subscriptions work; as a rule all.
        """
        sure = self.followers if sure is None else sure
        [(first,)] = self.execute("insert into fence.fence default values returning id")

        async def repeat() -> None:
            # For those who were not there.
            while True:
                await asyncio.sleep(0.5)
                with contextlib.suppress(psycopg.OperationalError):
                    await asyncio.to_thread(self.execute, "insert into fence.fence default values")

        repeating = asyncio.create_task(repeat())
        try:
            await until(
                lambda: all(one.fence >= first for one in self.followers) and all(one.is_confirmed for one in sure),
                "everybody to pass the fence",
                self._look,
                limit_s=2 * CHECKPOINT_INTERVAL_S,
            )
        except AssertionError as error:
            error.add_note(self.state())
            raise
        finally:
            repeating.cancel()
            await asyncio.wait({repeating})

    async def verdict(
        self,
        *,
        gaps: bool = False,
        but: Sequence[BroadcastSubscription] = (),
        perhaps: Collection[str] = (),
        anyhow: Collection[str] = (),
    ) -> int:
        """At a quiet point: hold each follower to the ledger; how many changes were told. `gaps`: they may have been told of one.

        Of tables in `perhaps` nobody must have been told, of those in `anyhow` anything may have been.
        """
        await self.pass_fence([one for one in self.followers if one not in but])
        changes = self.ledger()
        judgement = Judgement(self.source, frozenset(self.members()))
        problems, count = [], 0
        for subscription in self.followers:
            if subscription not in but:
                problems += [
                    f"{subscription.name}, {subscription.who}: {problem}"
                    for problem in judge(subscription, judgement, changes, perhaps, anyhow)
                ]
                if subscription.gaps and not gaps:
                    problems.append(f"{subscription.name} was told of a gap: {subscription.gaps}")
                if subscription.errors:
                    problems.append(f"{subscription.name} was told of an error: {subscription.errors}")
            count += len(subscription.heard)
            subscription.heard.clear()
            subscription.secrets.clear()
            subscription.gaps.clear()
            subscription.errors.clear()
        assert not problems, "\n".join([f"seed {self.seed}, {len(changes)} changes", *problems[:20], self.state()])
        if changes:
            self._looked_at = changes[-1].number
        return count

    def ledger(self) -> list[Change]:
        """What was committed since the last verdict."""
        rows = self.execute(
            f"select number, xid, name, old, new from oracle.ledger where number > {self._looked_at} order by number"
        )
        return [
            Change(number, int(xid), KINDS[name], old, new) for number, xid, name, old, new in rows if name in KINDS
        ]

    def members(self) -> list[tuple[int, str]]:
        return [(team, str(who)) for team, who in self.execute("select team, who from oracle.members")]

    async def change_everything(self) -> None:
        """Memberships, claims and subscriptions; at a quiet point only."""
        with self._database.connect() as db:
            self._invite(db)
        for subscription in self.followers:
            match self.chance.randrange(4):
                case 0:
                    subscription.bindings = self.any_bindings()
                    await subscription.subscribe()
                case 1 if subscription.who.user is not None:
                    # A new token of the same user is no new subscription, which would be confirmed.
                    others = [user for user in USERS if user != subscription.who.user]
                    await subscription.change_claims(Who("authenticated", self.chance.choice(others)))
        await self.confirmed()

    def _invite(self, db: psycopg.Connection[Any]) -> None:
        db.execute("delete from oracle.members")
        pairs = [(team, user) for team in TEAMS for user in USERS if self.chance.random() < 0.4]
        with db.cursor() as cursor:
            cursor.executemany("insert into oracle.members values (%s, %s)", pairs)

    def state(self) -> str:
        return "\n".join(
            f"{one.name}: {len(one.heard)} heard, fence {one.fence}, {len(one.epochs)} epochs, sure {one.is_confirmed},"
            f" gaps {one.gaps}, errors {one.errors}, {dict(one.losses)}"
            for one in self.followers
        )

    async def aclose(self) -> None:
        await end(self._tasks)
        # The next one comes to the same database.
        await asyncio.to_thread(self.execute, "drop schema oracle, fence cascade")

    def _look(self) -> None:
        look(self._tasks)


def judge(
    subscription: BroadcastSubscription,
    judgement: Judgement,
    changes: Sequence[Change],
    perhaps: Collection[str],
    anyhow: Collection[str],
) -> list[str]:
    """What is wrong with what a follower was told; a line each."""
    problems = []
    heard: dict[int, dict[tuple[str, int], list[Told]]] = defaultdict(lambda: defaultdict(list))
    for number, told in subscription.heard:
        heard[number][told.key].append(told)
    by_row: dict[tuple[str, int], list[Change]] = defaultdict(list)
    for change in changes:
        for image in (change.old, change.new):
            if image is not None and change not in by_row[change.kind.name, image["id"]]:
                by_row[change.kind.name, image["id"]].append(change)
    seen: set[str] = set()
    last = len(subscription.epochs) - 1
    for number, epoch in enumerate(subscription.epochs):
        if number not in heard and number != last:
            continue
        expected: dict[tuple[str, int], list[Expected]] = defaultdict(list)
        for change in changes:
            if not epoch.begun.sees(change.xid):
                later = by_row[change.kind.name, change.new["id"]] if change.new is not None else []
                is_sure = judgement.is_sure(change, [one for one in later if one.number > change.number])
                for told in judgement.expect(subscription.who, subscription.bindings, change):
                    expected[told.key].append(Expected(change, told, is_sure))
        for key in {*expected, *heard[number]}:
            table, _ = key
            if table in anyhow:
                continue
            must = table not in perhaps and number == last
            its = [
                (one, must and one.is_sure and epoch.sure is not None and not epoch.sure.sees(one.change.xid))
                for one in expected[key]
            ]
            if (problem := compare(its, heard[number][key])) is not None:
                problems.append(f"{key}, epoch {number} of {last + 1}, bindings {subscription.bindings}: {problem}")
        for told in (told for its in heard[number].values() for told in its):
            seen.update(SECRET.findall(f"{told.record} {told.old}"))
    if strange := subscription.secrets - seen:
        problems.append(f"secrets outside of changes: {sorted(strange)[:3]}")
    if hidden := {secret for secret in subscription.secrets if secret.startswith("sec-")}:
        problems.append(f"a column that nobody may select: {sorted(hidden)[:3]}")
    subscription.epochs[:-1] = []
    return problems


def compare(expected: Sequence[tuple[Expected, bool]], heard: Sequence[Told]) -> str | None:
    """Whether what was heard is what was expected, in this order; only what must come has to. What one change is told in has no order."""
    groups = [list(group) for _, group in groupby(expected, key=lambda pair: pair[0].change.number)]

    @cache
    def agree(at: int, heard_at: int) -> bool:
        if at == len(groups):
            return heard_at == len(heard)
        told = Counter(one.told for one, _ in groups[at])
        least = sum(is_required for _, is_required in groups[at])
        return any(
            Counter(heard[heard_at : heard_at + count]) <= told and agree(at + 1, heard_at + count)
            for count in range(min(len(groups[at]), len(heard) - heard_at), least - 1, -1)
        )

    if agree(0, 0):
        return None
    lines = [
        f"expected {'' if is_required else '(maybe) '}{one.change.number} {one.told}" for one, is_required in expected
    ]
    lines += [f"heard {told}" for told in heard]
    known = {one.told for one, _ in expected}
    head = (
        "what it should not be told" if any(told not in known for told in heard) else "missing, doubled or out of order"
    )
    return "\n    ".join([head, *(re.sub(r"([0-9a-f]{32}){2,}", "...", line) for line in lines)])


# -- fixtures


@pytest.fixture(
    params=[
        pytest.param(ROWS_SHORT, id="short", marks=pytest.mark.timeout(300)),
        pytest.param(ROWS_LONG, id="long", marks=[pytest.mark.faults, pytest.mark.timeout(900)]),
    ]
)
def row_size(request: pytest.FixtureRequest) -> RowSize:
    found: RowSize = request.param
    return found


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest) -> Source:
    found: Source = request.param
    return found


@asynccontextmanager
async def rows_server(
    cluster: FaultCluster, source: Source, *, link: Proxy | None = None, **settings: str
) -> AsyncIterator[Server]:
    """A server that may be broken, on a database that may be, too. `link`: what it goes through to its database."""
    database = cluster.cluster.create("core@head")
    with cluster.administer() as db:
        db.execute(f"alter role {OWNER} {'' if source == 'wal' else 'no'}replication")
    if link is not None:
        settings["database_url"] = conninfo.make_conninfo(database.url, port=link.port)
    try:
        async with aclosing(Server(database, changes=source, max_joins_per_second="0", **settings)) as server:
            yield await server.start()
    finally:
        # Links go on meanwhile: a database is not dropped before every backend of the cluster has noticed, and one whose login is on a
        # link that stands still does so after `authentication_timeout`.
        await asyncio.to_thread(_drop, cluster, database)


def _drop(cluster: FaultCluster, database: TestDatabase) -> None:
    with cluster.administer() as db:
        # A slot is held until the walsender notices that its client is gone.
        name = conninfo.conninfo_to_dict(database.url)["dbname"]
        of_this = "from pg_replication_slots where database = %s"
        db.execute(f"select pg_terminate_backend(active_pid, 5000) {of_this} and active", (name,))
        db.execute(f"select pg_drop_replication_slot(slot_name) {of_this}", (name,))
    cluster.cluster.drop(database)


@pytest.fixture(scope="module")
async def row_link(fault_cluster: FaultCluster) -> AsyncIterator[Proxy]:
    """Between `row_server` and its database."""
    port = conninfo.conninfo_to_dict(fault_cluster.cluster.administrator_url)["port"]
    async with aclosing(Proxy(int(str(port)))) as link:
        yield await link.start()


@pytest.fixture(scope="module")
async def row_server(fault_cluster: FaultCluster, source: Source, row_link: Proxy) -> AsyncIterator[Server]:
    """One for each source, for all faults but those that need settings of their own."""
    async with rows_server(fault_cluster, source, link=row_link) as server:
        yield server


RowServerFactory = Callable[..., Awaitable[Server]]


@pytest.fixture
async def start_row_server(fault_cluster: FaultCluster, source: Source) -> AsyncIterator[RowServerFactory]:
    """`await start_row_server(policy_timeout_s="1")`: a server for this test alone."""
    async with AsyncExitStack() as stack:

        async def start(*, link: Proxy | None = None, **settings: str) -> Server:
            return await stack.enter_async_context(rows_server(fault_cluster, source, link=link, **settings))

        yield start


RowOracleFactory = Callable[[Server], RowOracle]


@pytest.fixture
async def row_oracle_of(
    request: pytest.FixtureRequest, source: Source, row_size: RowSize, start_row_server: RowServerFactory
) -> AsyncIterator[RowOracleFactory]:
    """`row_oracle_of(server)`: an oracle that prints its seed; REALTIME_TEST_SEED replays one. It ends before the servers do."""
    seed = int(os.environ.get("REALTIME_TEST_SEED", random.randrange(10**6)))
    oracles: list[RowOracle] = []

    def make(server: Server) -> RowOracle:
        print(f"{request.node.name}: REALTIME_TEST_SEED={seed}")
        oracles.append(RowOracle(server, source, row_size, seed))
        return oracles[-1]

    yield make
    for oracle in oracles:
        await oracle.aclose()
