"""realtime.authorize gives PostgreSQL's own answer: that of plain inserts and selects under the role, rolled back.

The plain way, two probe rows and some ten statements, is how Supabase Realtime asks; here it is the oracle.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, LiteralString

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from tests.fix_database import Cluster, TestDatabase

Connection = psycopg.Connection[tuple[Any, ...]]
Answer = dict[str, tuple[bool, bool]]

MEMBER, OTHER = "00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000b"
TOPIC = "room:1"
BOTH, NEITHER = (True, True), (False, False)
EXTENSIONS = ["broadcast", "presence"]


def claims_of(user: str) -> str:
    return f'{{"sub": "{user}", "role": "authenticated", "groups": ["{user[-1]}"]}}'


def prepare(database: TestDatabase) -> None:
    database.execute("create table members (topic text, user_id uuid)")
    database.execute("insert into members values (%s, %s)", TOPIC, MEMBER)
    database.execute("grant select on members to anon, authenticated")


@pytest.fixture
def rooms(any_database: TestDatabase) -> TestDatabase:
    """One room with one member, and no policy."""
    prepare(any_database)
    return any_database


def set_up(db: Connection, topic: str, role: str, claims: str, headers: str) -> None:
    db.execute(
        "select set_config('realtime.topic', %s, true), set_config('request.jwt.claims', %s, true),"
        " set_config('request.jwt.claim.sub', %s::jsonb ->> 'sub', true),"
        " set_config('request.jwt.claim.role', %s, true), set_config('request.headers', %s, true),"
        " set_config('role', %s, true)",
        (topic, claims, claims, role, headers, role),
    )


def plain_way(
    db: Connection, topic: str, role: str, claims: str, headers: str, extension: str
) -> tuple[bool | None, bool | None]:
    """May read, may write. None: there was an error other than a refusal."""
    can_read: bool | None
    can_write: bool | None
    try:
        with db.transaction(force_rollback=True):
            (probe,) = db.execute(
                "insert into realtime.messages (topic, extension, inserted_at, xid, seq)"
                " values (%s, %s, '1970-01-01', '0', 0) returning id",
                (topic, extension),
            ).fetchone() or (None,)
            set_up(db, topic, role, claims, headers)
            can_read = db.execute("select from realtime.messages where id = %s", (probe,)).rowcount == 1
    except psycopg.errors.InsufficientPrivilege:
        can_read = False
    except psycopg.Error:
        can_read = None
    try:
        with db.transaction(force_rollback=True):
            set_up(db, topic, role, claims, headers)
            db.execute("insert into realtime.messages (topic, extension) values (%s, %s)", (topic, extension))
            can_write = True
    except psycopg.errors.InvalidParameterValue as error:
        # What a message must be is checked behind row-level security.
        can_write = True if error.diag.constraint_name == "messages_sound" else None
    except psycopg.errors.InsufficientPrivilege:
        can_write = False
    except psycopg.Error:
        can_write = None
    return can_read, can_write


def authorize(
    db: Connection, topic: str = TOPIC, role: str = "authenticated", claims: str = "{}", headers: str = "{}"
) -> Answer:
    rows = db.execute(
        "select extension, can_read, can_write from realtime.authorize(%s, %s, %s, %s)", (topic, role, claims, headers)
    ).fetchall()
    assert [extension for extension, _, _ in rows] == EXTENSIONS
    return {extension: (can_read, can_write) for extension, can_read, can_write in rows}


def both_ways(
    database: TestDatabase,
    topic: str = TOPIC,
    role: str = "authenticated",
    claims: str = claims_of(MEMBER),
    headers: str = "{}",
) -> Answer:
    """The answer, once it is the plain way's as well (an error allows nothing), and leaves nothing behind."""
    answer, plain = compare(database, topic, role, claims, headers)
    assert answer == {extension: NEITHER if None in rights else rights for extension, rights in plain.items()}
    return answer


def compare(
    database: TestDatabase, topic: str, role: str, claims: str, headers: str
) -> tuple[Answer, dict[str, tuple[bool | None, bool | None]]]:
    with database.connect() as db:
        plain = {extension: plain_way(db, topic, role, claims, headers, extension) for extension in EXTENSIONS}
        answer = authorize(db, topic, role, claims, headers)
        assert db.execute("select count(*) from realtime.messages").fetchone() == (0,)
    return answer, plain


IS_MEMBER: LiteralString = (
    "exists (select from members as m where m.topic = realtime.topic() and m.user_id = (select auth.uid()))"
)


numbers = itertools.count()


def policy(database: TestDatabase, text: LiteralString) -> None:
    database.execute(f"create policy policy_{next(numbers)} on realtime.messages {text}")


def test_without_policy_nobody_may_do_anything(rooms: TestDatabase) -> None:
    for role in ("anon", "authenticated"):
        assert both_ways(rooms, role=role) == {"broadcast": NEITHER, "presence": NEITHER}
    assert both_ways(rooms, role="service_role") == {"broadcast": BOTH, "presence": BOTH}


def test_members_may_and_others_may_not(rooms: TestDatabase) -> None:
    policy(rooms, f"for select to authenticated using ({IS_MEMBER})")
    policy(rooms, f"for insert to authenticated with check ({IS_MEMBER})")
    assert both_ways(rooms) == {"broadcast": BOTH, "presence": BOTH}
    for refused in (
        both_ways(rooms, claims=claims_of(OTHER)),
        both_ways(rooms, topic="room:2"),
        both_ways(rooms, role="anon"),
        both_ways(rooms, claims="{}"),
    ):
        assert refused == {"broadcast": NEITHER, "presence": NEITHER}


@pytest.mark.parametrize(
    ("policies", "broadcast", "presence"),
    [
        (["for select using (extension = 'broadcast')"], (True, False), NEITHER),
        (["for insert with check (extension = 'presence')"], NEITHER, (False, True)),
        (["for select using (true)", "for insert with check (extension = 'presence')"], (True, False), BOTH),
        (["for all using (extension = 'broadcast') with check (extension = 'presence')"], (True, False), (False, True)),
        (["for all using (true)"], BOTH, BOTH),
        (["for all using (true)", "as restrictive for select using (extension = 'presence')"], (False, True), BOTH),
        (["for all using (true)", "as restrictive for insert with check (false)"], (True, False), (True, False)),
        (["for all using (true)", "as restrictive for all using (extension = 'presence')"], NEITHER, BOTH),
        (["as restrictive for all using (true)"], NEITHER, NEITHER),
        (["for select to anon using (true)", "for insert to public with check (true)"], (False, True), (False, True)),
        (["for all using (realtime.topic() = 'room:1' and topic = 'room:1')"], BOTH, BOTH),
        (["for all using (realtime.topic() = 'room:2')"], NEITHER, NEITHER),
        (["for all using (auth.jwt() -> 'groups' ? 'a')"], BOTH, BOTH),
        (["for all using (auth.jwt() -> 'groups' ? 'b')"], NEITHER, NEITHER),
        (["for all using (auth.role() = 'authenticated' and current_user = 'authenticated')"], BOTH, BOTH),
        (["for all using (current_setting('request.headers')::json ->> 'x-key' = 'k')"], BOTH, BOTH),
        (["for all using (current_setting('request.headers')::json ->> 'x-key' = 'other')"], NEITHER, NEITHER),
        (["for all using (private is false and payload is null and event is null)"], BOTH, BOTH),
        (["for all using (extension = 'presence' or 1 / (length(topic) - 6) = 1)"], NEITHER, BOTH),
        (["for select using (1 / (length(topic) - 6) = 1)", "for insert with check (true)"], NEITHER, NEITHER),
        (["for select using (true)", "for insert with check (1 / (length(topic) - 6) = 1)"], NEITHER, NEITHER),
        (["for select using (1 / (length(topic) - 6) = 1)"], NEITHER, NEITHER),
        (["for all using (exists (select from realtime.alembic_version))"], NEITHER, NEITHER),
        (["for all using ((select count(*) from realtime.messages) >= 0)"], NEITHER, NEITHER),
    ],
    ids=lambda value: " + ".join(value) if isinstance(value, list) else "",
)
def test_the_answer_is_that_of_plain_inserts_and_selects(
    rooms: TestDatabase, policies: list[LiteralString], broadcast: tuple[bool, bool], presence: tuple[bool, bool]
) -> None:
    for text in policies:
        policy(rooms, text)
    assert both_ways(rooms, headers='{"x-key": "k"}') == {"broadcast": broadcast, "presence": presence}


RAISES = "1 / (length(topic) - 6) = 1"
EXPRESSIONS = st.sampled_from(
    [
        "true",
        "false",
        "null",
        "extension = 'broadcast'",
        "extension = 'presence'",
        "topic = realtime.topic()",
        "auth.uid() is not null",
        "auth.jwt() ->> 'role' = 'authenticated'",
        "private",
        "not private",
        IS_MEMBER,
        f"not {IS_MEMBER}",
        RAISES,
    ]
)
POLICIES = st.tuples(
    st.sampled_from(["permissive", "permissive", "restrictive"]),
    st.sampled_from(["all", "select", "insert"]),
    st.sampled_from(["public", "anon", "authenticated"]),
    EXPRESSIONS,
    EXPRESSIONS,
)


@pytest.fixture(scope="module", params=["newest", "oldest"])
def shared_rooms(request: pytest.FixtureRequest) -> Iterator[TestDatabase]:
    """One database for many examples; each undoes its policies."""
    cluster: Cluster = request.getfixturevalue("cluster" if request.param == "newest" else "old_cluster")
    database = cluster.create("core@head")
    prepare(database)
    yield database
    cluster.drop(database)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policies=st.lists(POLICIES, min_size=1, max_size=4),
    role=st.sampled_from(["anon", "authenticated", "service_role"]),
    user=st.sampled_from([MEMBER, OTHER]),
)
def test_any_combination_of_policies_gives_the_answer_of_the_plain_way(
    shared_rooms: TestDatabase, policies: list[tuple[str, str, str, str, str]], role: str, user: str
) -> None:
    with shared_rooms.connect() as db:
        for number, (kind, command, to, using, check) in enumerate(policies):
            clauses = "" if command == "insert" else f" using ({using})"
            clauses += "" if command == "select" else f" with check ({check})"
            name = sql.Identifier(f"generated_{number}")
            text = f" on realtime.messages as {kind} for {command} to {to}{clauses}"
            db.execute(sql.SQL("create policy {}{}").format(name, sql.SQL(text)))
        try:
            answer, plain = compare(shared_rooms, TOPIC, role, claims_of(user), "{}")
        finally:
            for number in range(len(policies)):
                name = sql.Identifier(f"generated_{number}")
                db.execute(sql.SQL("drop policy {} on realtime.messages").format(name))
    for extension in EXTENSIONS:
        if any(RAISES in policy for policy in policies):
            # Whether a policy that raises is asked at all depends on the order in which PostgreSQL asks, which differs between
            # SELECT and RETURNING. What holds: nothing is allowed that is not allowed the plain way.
            pairs = zip(answer[extension], plain[extension], strict=True)
            assert all(theirs is True for ours, theirs in pairs if ours)
        else:
            assert answer[extension] == plain[extension]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("new.updated_at := '2000-01-01'; return new;", BOTH),
        ("new.topic := 'another'; return new;", (True, False)),
        ("if new.extension = 'broadcast' then return null; end if; return new;", BOTH),
        ("raise insufficient_privilege;", (True, False)),
        ("raise exception 'no';", NEITHER),
    ],
    ids=["fills what the probe leaves null", "changes what policies see", "drops the row", "refuses", "raises"],
)
def test_triggers_before_the_insert_take_part(
    rooms: TestDatabase, body: LiteralString, expected: tuple[bool, bool]
) -> None:
    policy(rooms, "for all using (topic = 'room:1')")
    rooms.execute(f"create function before() returns trigger language plpgsql as $$ begin {body} end $$")
    rooms.execute(
        "create trigger before before insert on realtime.messages for each row"
        " when (current_user = 'authenticated') execute function before()"
    )
    assert both_ways(rooms)["broadcast"] == expected


@pytest.mark.parametrize(
    "raised", ["not_null_violation", "sqlstate 'RT000'", "check_violation"], ids=["23502", "RT000", "23514"]
)
@pytest.mark.parametrize("command", ["select using", "insert with check", "all using"])
def test_a_policy_that_raises_what_the_check_itself_uses_allows_nothing(
    rooms: TestDatabase, raised: LiteralString, command: LiteralString
) -> None:
    rooms.execute(
        "create function raise_it() returns boolean language plpgsql as"
        f" $$ begin if current_user = 'authenticated' then raise {raised}; end if; return true; end $$"
    )
    policy(rooms, f"for {command} (raise_it())")
    if command != "all using":
        policy(rooms, "for select using (true)")
        policy(rooms, "for insert with check (true)")
    # Permissive policies are joined by OR, which need not ask the second: make sure that it is asked.
    rooms.execute("drop policy if exists service_role_may_do_everything on realtime.messages")
    policy(rooms, f"as restrictive for {command} (raise_it())")
    assert both_ways(rooms) == {"broadcast": NEITHER, "presence": NEITHER}
    (problem,) = {
        problem
        for (problem,) in rooms.execute("select problem from realtime.authorize('room:1', 'authenticated', '{}')")
    }
    assert problem is not None


def problems(db: Connection, role: str | None) -> list[tuple[Any, ...]]:
    return db.execute(
        "select can_read, can_write, left(problem, 5) from realtime.authorize('room:1', %s, '{}')", (role,)
    ).fetchall()


@pytest.mark.parametrize("role", ["nobody_has_this_name", "", "none", None, "postgres"])
def test_a_role_that_does_not_exist_or_may_not_be_taken_allows_nothing(rooms: TestDatabase, role: str | None) -> None:
    """To set_config null and "none" mean the session's own role, which owns the table and sees everything."""
    with rooms.connect() as db:
        code = "42501" if role == "postgres" else "22023"
        assert problems(db, role) == [(False, False, code)] * 2


READS_MEMBERS: LiteralString = "(exists (select from public.members as m where m.topic = realtime.topic()))"
COMMANDS: tuple[LiteralString, ...] = ("select using", "insert with check", "all using")


def test_missing_grant_of_what_a_policy_reads_is_a_problem_and_denies_only_what_it_guards(rooms: TestDatabase) -> None:
    with rooms.connect() as db:

        def asked() -> tuple[Any, ...]:
            (answer,) = set(
                db.execute(
                    "select can_read, can_write, problem from realtime.authorize('room:1', 'authenticated', '{}')"
                ).fetchall()
            )
            return answer

        for command, other in itertools.product(COMMANDS, (None, *COMMANDS[:2])):
            with db.transaction(force_rollback=True):
                db.execute(f"create policy reading on realtime.messages for {command} {READS_MEMBERS}")
                if other is not None:
                    db.execute(f"create policy other on realtime.messages for {other} (realtime.topic() <> 'room:1')")
                granted = asked()
                db.execute("revoke select on members from authenticated")
                guards = (command != "insert with check", command != "select using")
                assert granted == (*guards, None)
                assert asked() == (False, False, "42501: permission denied for table members")
                if other is not None and other != command and command != "all using":
                    db.execute("alter policy other on realtime.messages " + other.partition(" ")[2] + " (true)")
                    free = (other == "select using", other == "insert with check")
                    assert asked() == (*free, "42501: permission denied for table members")


def test_where_nothing_can_be_written_there_is_no_answer(rooms: TestDatabase) -> None:
    """As on a standby: that is no "no", which clients would take for the last word."""
    with rooms.connect() as db:
        db.execute("set default_transaction_read_only = on")
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            db.execute("select * from realtime.authorize('room:1', 'authenticated', '{}')")


def test_policy_that_may_not_write_is_a_problem_of_its_own(rooms: TestDatabase) -> None:
    """It may read somewhere else, where nothing can be written; here it can, so others have their answer."""
    rooms.execute(
        "create function fail() returns boolean language plpgsql as $$"
        " begin raise exception using errcode = 'read_only_sql_transaction'; end $$"
    )
    policy(rooms, "for all using (case when realtime.topic() = 'room:1' then fail() else true end)")
    answers = rooms.execute(
        "select question, extension, can_read, can_write, left(problem, 5) from realtime_internal.authorize_batch("
        "array['room:1', 'room:2'], array['authenticated', 'authenticated'], '{\"{}\", \"{}\"}', '{\"{}\", \"{}\"}') order by 1, 2"
    )
    assert answers == [
        (1, "broadcast", False, False, "25006"),
        (1, "presence", False, False, "25006"),
        (2, "broadcast", True, True, None),
        (2, "presence", True, True, None),
    ]


def test_a_sub_that_is_no_uuid_is_a_problem_and_allows_nothing(rooms: TestDatabase) -> None:
    policy(rooms, "for all using (auth.uid() is not null)")
    answer = rooms.execute(
        "select can_read, can_write, problem from realtime.authorize('room:1', 'authenticated', '{\"sub\": \"x\"}')"
    )
    assert answer == [(False, False, '22P02: invalid input syntax for type uuid: "x"')] * 2


def test_a_batch_answers_in_order_and_a_failing_question_harms_no_other(rooms: TestDatabase) -> None:
    policy(rooms, f"for all to authenticated using ({IS_MEMBER})")
    questions = [
        (TOPIC, "authenticated", claims_of(MEMBER), BOTH, False),
        (TOPIC, "authenticated", claims_of(OTHER), NEITHER, False),
        (TOPIC, "authenticated", '{"sub": "no uuid"}', NEITHER, True),
        (TOPIC, "authenticated", claims_of(MEMBER), BOTH, False),
        (TOPIC, "no such role", claims_of(MEMBER), NEITHER, True),
        (TOPIC, "anon", claims_of(MEMBER), NEITHER, False),
        ("room:2", "authenticated", claims_of(MEMBER), NEITHER, False),
        (TOPIC, "service_role", "{}", BOTH, False),
        (TOPIC, "authenticated", claims_of(MEMBER), BOTH, False),
    ]
    topics, roles, claims, _, _ = (list(column) for column in zip(*questions, strict=True))
    rows = rooms.execute(
        "select question, extension, can_read, can_write, problem is not null"
        " from realtime_internal.authorize_batch(%s::text[], %s::text[], %s::jsonb[], array_fill('{}'::jsonb, array[%s]))",
        topics,
        roles,
        claims,
        len(questions),
    )
    assert rows == [
        (number, extension, *allowed, is_problem)
        for number, (_, _, _, allowed, is_problem) in enumerate(questions, start=1)
        for extension in EXTENSIONS
    ]


SETTINGS = [
    "role",
    "realtime.topic",
    "request.jwt.claims",
    "request.jwt.claim.sub",
    "request.jwt.claim.role",
    "request.headers",
]


@pytest.mark.parametrize("user", [MEMBER, OTHER, "no uuid"])
def test_role_and_settings_are_as_before_in_the_same_transaction(rooms: TestDatabase, user: str) -> None:
    policy(rooms, f"for all to authenticated using ({IS_MEMBER})")
    read: LiteralString = (
        "select array(select coalesce(current_setting(name, true), '') from unnest(%s::text[]) as name)"
    )
    with rooms.connect() as db, db.transaction():
        for before in (None, "before"):
            if before:
                for name in SETTINGS[1:]:
                    db.execute("select set_config(%s, %s, true)", (name, before))
            wanted = db.execute(read, (SETTINGS,)).fetchone()
            authorize(db, claims=f'{{"sub": "{user}"}}')
            assert db.execute(read, (SETTINGS,)).fetchone() == wanted
            assert db.execute("select current_user = session_user").fetchone() == (True,)


def test_a_batch_takes_no_transaction_id_a_question_and_writes_nothing_where_all_is_allowed(
    rooms: TestDatabase,
) -> None:
    policy(rooms, f"for all to authenticated using ({IS_MEMBER})")
    next_id: LiteralString = "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
    with rooms.connect() as db:
        before = db.execute(next_id).fetchone() or (0,)
        allowed = db.execute(
            "select count(*) from realtime_internal.authorize_batch(array_fill(%s::text, array[50]),"
            " array_fill('authenticated'::text, array[50]), array_fill(%s::jsonb, array[50]),"
            " array_fill('{}'::jsonb, array[50])) where can_read and can_write",
            (TOPIC, claims_of(MEMBER)),
        ).fetchone()
        after = db.execute(next_id).fetchone() or (0,)
        assert allowed == (100,)
        # Autovacuum may take some as well.
        assert after[0] - before[0] < 10
        assert partitions_written(db) == []

        # Where writing is denied, reading is asked of a real row: in the unlogged partition, and rolled back.
        assert authorize(db, claims=claims_of(OTHER)) == {"broadcast": NEITHER, "presence": NEITHER}
        assert db.execute("select count(*) from realtime.messages").fetchone() == (0,)
        assert partitions_written(db) == ["messages_probe"]


def partitions_written(db: Connection) -> list[str]:
    """Also those whose rows were rolled back."""
    rows = db.execute(
        "select relname::text from pg_class where relnamespace = 'realtime'::regnamespace"
        " and relname ~ '^messages' and relkind = 'r' and pg_relation_size(oid) > 0"
    )
    return [name for (name,) in rows]


def test_a_check_rings_no_bell_that_is_heard(rooms: TestDatabase) -> None:
    """The probe rows' own bell is rolled back with them."""
    with rooms.connect() as sleeper, rooms.connect() as listener, rooms.connect() as db:
        listener.execute("listen realtime")
        sleeper.execute("select pg_advisory_lock(7237125663275445356)")
        authorize(db)
        rooms.execute("select pg_notify('realtime', 'mark')")
        assert [notify.payload for notify in listener.notifies(timeout=10, stop_after=1)] == ["mark"]


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
def test_user_roles_may_not_ask(rooms: TestDatabase, role: str) -> None:
    with rooms.connect() as db, db.transaction():
        db.execute("select set_config('role', %s, true)", (role,))
        with pytest.raises(psycopg.errors.InsufficientPrivilege), db.transaction():
            db.execute("select realtime.authorize('room:1', 'service_role', '{}')")
