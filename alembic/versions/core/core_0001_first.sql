-- Schemas and roles. Runs once, as the role that will own everything here: an ordinary role that owns the database.

create schema if not exists realtime;
comment on schema realtime is 'Realtime messages, their authorization and their delivery.';

-- Tokens act as one of these roles; the owner must be allowed to take each of them on.
do $$
declare
    v_role text;
begin
    foreach v_role in array array['anon', 'authenticated', 'service_role'] loop
        if not exists (select from pg_catalog.pg_roles where rolname = v_role) then
            begin
                execute format(
                    'create role %I nologin noinherit%s',
                    v_role,
                    case when v_role = 'service_role' then ' bypassrls' end
                );
            exception when insufficient_privilege then
                -- Only a superuser, or a role that has BYPASSRLS, hands it on; policies below do for our own tables.
                execute format('create role %I nologin noinherit', v_role);
            end;
        end if;
        if current_setting('server_version_num')::int < 160000 then
            if not pg_has_role(current_user, v_role, 'member') then
                execute format('grant %I to current_user', v_role);
            end if;
        elsif not pg_has_role(current_user, v_role, 'set') then
            execute format('grant %I to current_user with inherit false, set true', v_role);
        end if;
    end loop;
exception when insufficient_privilege then
    raise exception using
        errcode = 'insufficient_privilege',
        message = format('role %I may not create or use the roles anon, authenticated and service_role', current_user),
        hint = 'An administrator runs the statements that "realtime-server migrate" prints; then migrate again.';
end
$$;

grant usage on schema realtime to anon, authenticated, service_role;

-- The outbox: every message for clients is a row here, written in the transaction of the data it tells of.

create sequence realtime.messages_seq as bigint;
comment on sequence realtime.messages_seq is 'Order of writing over all topics. Cache must stay 1, or order between sessions is lost.';

create table realtime.messages (
    topic text not null,
    extension text not null,
    payload jsonb,
    event text,
    private boolean default false,
    updated_at timestamp not null default (now() at time zone 'utc'),
    inserted_at timestamp not null default (now() at time zone 'utc'),
    id uuid not null default gen_random_uuid(),
    binary_payload bytea,
    xid xid8 not null default pg_current_xact_id(),
    seq bigint not null default nextval('realtime.messages_seq'),
    constraint messages_pkey primary key (id, inserted_at),
    constraint messages_payload_exclusive check (payload is null or binary_payload is null)
) partition by range (inserted_at);

alter sequence realtime.messages_seq owned by realtime.messages.seq;

comment on table realtime.messages is 'Messages for clients, a partition a UTC day. Row-level security decides who may join a private topic and send to it.';
comment on column realtime.messages.topic is 'What clients join, without "realtime:" in front.';
comment on column realtime.messages.extension is
    '"broadcast" or "presence": policies tell the two rights apart by it; "revalidate": for the servers.';
comment on column realtime.messages.payload is 'JSON object for the clients; null when binary_payload is set.';
comment on column realtime.messages.event is 'Name that clients filter by.';
comment on column realtime.messages.private is 'Which of the two rooms of this name: private (authorized by policies) or public.';
comment on column realtime.messages.updated_at is 'UTC; equal to inserted_at. Kept for tools that expect it.';
comment on column realtime.messages.inserted_at is 'UTC, start of the writing transaction; chooses the partition.';
comment on column realtime.messages.id is 'Clients see it as meta.id and may drop what they have seen.';
comment on column realtime.messages.binary_payload is 'Bytes for the clients; null when payload is set.';
comment on column realtime.messages.xid is 'Transaction that wrote the row: the relay reads by it. Never set by writers.';
comment on column realtime.messages.seq is 'Order of writing. Never set by writers.';

create index messages_xid_idx on realtime.messages (xid);
create index messages_topic_idx on realtime.messages (topic, seq) where extension = 'broadcast';

-- An insert never fails for want of a partition.
create table realtime.messages_default partition of realtime.messages default;
comment on table realtime.messages_default is 'Rows of days for which no partition was made in time.';

-- Probe rows of authorization checks go here: unlogged, so that a check writes no WAL, and always rolled back.
create unlogged table realtime.messages_probe
    partition of realtime.messages for values from (minvalue) to ('1970-01-02');
comment on table realtime.messages_probe is 'Probe rows of authorization checks, always rolled back.';

-- The partitions too: where default privileges grant new tables to everybody, only this guards what is asked of them directly.
alter table realtime.messages enable row level security;
alter table realtime.messages_default enable row level security;
alter table realtime.messages_probe enable row level security;

-- Writers choose neither xid nor seq, so these columns are not granted.
grant select on realtime.messages to anon, authenticated, service_role;
grant insert (topic, extension, payload, event, private, updated_at, inserted_at, id, binary_payload)
    on realtime.messages to anon, authenticated, service_role;
grant usage on sequence realtime.messages_seq to anon, authenticated, service_role;

-- Places in the stream of messages: what clients and workers hand back in order to go on where they stopped.

-- Strict, because it is clients' text: version, life of the database, a snapshot, maybe a later one, and a sequence number.
create domain realtime.cursor as text
    constraint cursor_format check (
        length(value) <= 40000
        and length(value) - length(replace(value, '.', '')) <= 2002
        and value ~ '^1-[0-9a-f]{12}(-[0-9]{1,19}([.][0-9]{1,19})+){1,2}-[0-9]{1,19}$'
    );
comment on domain realtime.cursor is 'Place in the stream of messages. Opaque to clients; hand it back as it came.';

create table realtime.stream (
    only_row boolean primary key default true,
    epoch uuid not null default gen_random_uuid(),
    dropped_xid xid8 not null default '0',
    dropped_in_life text not null default '',
    constraint stream_only_row check (only_row)
);
comment on table realtime.stream is 'One row: which stream this is, and how far back it reaches. Written by maintenance only.';
comment on column realtime.stream.only_row is 'Always true: there is one row.';
comment on column realtime.stream.epoch is 'Drawn at install: cursors of another installation do not fit.';
comment on column realtime.stream.dropped_in_life is 'Life of the database in which dropped_xid was drawn: in another it means nothing.';
comment on column realtime.stream.dropped_xid is 'Highest transaction id among dropped messages; a cursor must lie wholly behind it.';
alter table realtime.stream enable row level security;  -- no policies: for its owner only
insert into realtime.stream default values;

-- Who is present where, as the servers know it. Unlogged: it is true only as long as the servers live.

create unlogged table realtime.nodes (
    id uuid primary key,
    started_at timestamptz not null default now(),
    last_seen_at timestamptz not null default now()
);
comment on table realtime.nodes is 'The servers on this database.';
comment on column realtime.nodes.id is 'Drawn by the server when it starts.';
comment on column realtime.nodes.started_at is 'When it first wrote here.';
comment on column realtime.nodes.last_seen_at is 'Written every few seconds; a server not seen for half a minute is taken for dead.';

create unlogged table realtime.presence_entries (
    node uuid not null references realtime.nodes (id) on delete cascade,
    ref text not null,
    topic text not null,
    private boolean not null,
    key text not null,
    payload jsonb not null,
    since timestamptz not null default now(),
    constraint presence_entries_pkey primary key (node, ref)
);
comment on table realtime.presence_entries is 'What clients track, written by the servers a moment after the clients saw it. Read the view realtime.presence.';
comment on column realtime.presence_entries.node is 'Server that the client is connected to.';
comment on column realtime.presence_entries.ref is 'phx_ref of the entry.';
comment on column realtime.presence_entries.topic is 'Without "realtime:" in front.';
comment on column realtime.presence_entries.private is 'Which of the two rooms of this name.';
comment on column realtime.presence_entries.key is 'Presence key of the client.';
comment on column realtime.presence_entries.payload is 'What the client tracks.';
comment on column realtime.presence_entries.since is 'When it was written here.';

-- No policies: for their owner only.
alter table realtime.nodes enable row level security;
alter table realtime.presence_entries enable row level security;

-- What policies ask: who is calling, and about which topic.

create or replace function realtime.topic()
returns text
language sql
stable
as $$
    select nullif(pg_catalog.current_setting('realtime.topic', true), '')
$$;
comment on function realtime.topic() is 'Topic being joined or sent to; null outside of realtime. For policies on realtime.messages.';

-- The helpers of schema auth belong to whoever brought them; only what is missing is made.
do $$
begin
    if to_regnamespace('auth') is null then
        create schema auth;
        comment on schema auth is 'Who is calling, read from the claims of the current request.';
        grant usage on schema auth to anon, authenticated, service_role;
    end if;

    if to_regprocedure('auth.jwt()') is null then
        create function auth.jwt()
        returns jsonb
        language sql
        stable
        as $f$
            select nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb
        $f$;
        comment on function auth.jwt() is 'All claims of the current request; null when there is none.';
    end if;

    if to_regprocedure('auth.uid()') is null then
        create function auth.uid()
        returns uuid
        language sql
        stable
        as $f$
            select coalesce(
                nullif(pg_catalog.current_setting('request.jwt.claim.sub', true), ''),
                nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
            )::uuid
        $f$;
        comment on function auth.uid() is 'Claim "sub" of the current request; null when there is none.';
    end if;

    if to_regprocedure('auth.role()') is null then
        create function auth.role()
        returns text
        language sql
        stable
        as $f$
            select coalesce(
                nullif(pg_catalog.current_setting('request.jwt.claim.role', true), ''),
                nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb ->> 'role'
            )
        $f$;
        comment on function auth.role() is 'Claim "role" of the current request; null when there is none.';
    end if;
end
$$;

-- Writing messages: called by applications, by their triggers and in psql, with the caller's rights.
-- No SET clause on these: the caller's policies and triggers run inside, and would see it. So every name is qualified.

create or replace function realtime.write_message(
    message_topic text,
    message_event text,
    message_payload jsonb,
    message_binary_payload bytea,
    message_private boolean
)
returns void
language plpgsql
volatile
as $$
declare
    v_id uuid := pg_catalog.gen_random_uuid();
    v_topic_before text := pg_catalog.current_setting('realtime.topic', true);
begin
    if message_topic is null or message_topic = '' or pg_catalog.octet_length(message_topic) > 255 then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'topic must have 1 to 255 bytes',
            hint = 'Give the name that clients join, without "realtime:" in front.';
    elsif message_binary_payload is not null and pg_catalog.octet_length(message_topic) > 246 then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'topic of a binary message must have at most 246 bytes',
            hint = 'Longer names do not fit into the frames that carry bytes.';
    elsif message_event is null or message_event = '' or pg_catalog.octet_length(message_event) > 255 then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'event must have 1 to 255 bytes',
            hint = 'Give the event name that clients listen to.';
    elsif message_private is null then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'private must be true or false',
            hint = 'Public and private topics of one name are different rooms.';
    elsif message_payload is null and message_binary_payload is null then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'payload must not be null',
            hint = 'An empty message is ''{}'', or ''\x''::bytea with realtime.send_binary.';
    elsif pg_catalog.jsonb_typeof(message_payload) <> 'object' then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'payload must be a JSON object',
            hint = 'Wrap other values: jsonb_build_object(''value'', ...).';
    end if;

    if message_payload is not null and not message_payload ? 'id' then
        message_payload := pg_catalog.jsonb_set(message_payload, '{id}', pg_catalog.to_jsonb(v_id));
    end if;

    -- INSERT policies may ask realtime.topic().
    perform pg_catalog.set_config('realtime.topic', message_topic, true);
    insert into realtime.messages (id, topic, event, payload, binary_payload, private, extension)
    values (v_id, message_topic, message_event, message_payload, message_binary_payload, message_private, 'broadcast');
    perform pg_catalog.set_config('realtime.topic', coalesce(v_topic_before, ''), true);
end
$$;
comment on function realtime.write_message(text, text, jsonb, bytea, boolean) is
    'Checks and writes one message. Internal: call realtime.send or realtime.send_binary.';

create or replace function realtime.send(payload jsonb, event text, topic text, private boolean default true)
returns void
language plpgsql
volatile
as $$
begin
    if pg_catalog.current_setting('realtime.send_errors', true) = 'warning' then
        begin
            perform realtime.write_message(topic, event, payload, null, private);
        exception when others then
            raise warning 'message not sent: %', sqlerrm using errcode = sqlstate;
        end;
    else
        -- No exception block: each one that writes costs a transaction id.
        perform realtime.write_message(topic, event, payload, null, private);
    end if;
end
$$;
comment on function realtime.send(jsonb, text, text, boolean) is
    'Sends a JSON object to a topic at commit. Adds the key "id" where absent. Raises when the message cannot be written; '
    'after "set realtime.send_errors = ''warning''" it warns instead and goes on.';

create or replace function realtime.send_binary(payload bytea, event text, topic text, private boolean default true)
returns void
language plpgsql
volatile
as $$
begin
    if pg_catalog.current_setting('realtime.send_errors', true) = 'warning' then
        begin
            perform realtime.write_message(topic, event, null, payload, private);
        exception when others then
            raise warning 'message not sent: %', sqlerrm using errcode = sqlstate;
        end;
    else
        perform realtime.write_message(topic, event, null, payload, private);
    end if;
end
$$;
comment on function realtime.send_binary(bytea, text, text, boolean) is
    'Sends bytes to a topic at commit; clients of protocol 1.0.0 do not get them. Raises as realtime.send does.';

create or replace function realtime.broadcast_changes(
    topic_name text,
    event_name text,
    operation text,
    table_name text,
    table_schema text,
    new record,
    old record,
    level text default 'ROW'
)
returns void
language plpgsql
volatile
as $$
begin
    if level is distinct from 'ROW' then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'broadcast_changes works in row-level triggers only',
            hint = 'Create the trigger with "for each row".';
    elsif operation is null or operation not in ('INSERT', 'UPDATE', 'DELETE') then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = pg_catalog.format('operation must be INSERT, UPDATE or DELETE, not %L', operation),
            hint = 'Pass TG_OP.';
    end if;
    perform realtime.send(
        pg_catalog.jsonb_build_object(
            'schema', table_schema,
            'table', table_name,
            'operation', operation,
            'record', new,
            'old_record', old
        ),
        event_name,
        topic_name
    );
end
$$;
comment on function realtime.broadcast_changes(text, text, text, text, text, record, record, text) is
    'Sends a changed row to a private topic; for row-level triggers: broadcast_changes(topic, TG_OP, TG_OP, TG_TABLE_NAME, TG_TABLE_SCHEMA, NEW, OLD).';

-- Who may write may choose the time, because tools do, but no other day: a row that is dropped early would be a gap for everybody. The probe's
-- time is allowed as well. And what is for the servers, clients do not write.
drop policy if exists writers_keep_to_their_day on realtime.messages;
create policy writers_keep_to_their_day on realtime.messages
    as restrictive
    for insert
    to public
    with check (
        extension in ('broadcast', 'presence')
        and (
            inserted_at between (now() at time zone 'utc') - interval '1 day' and (now() at time zone 'utc') + interval '1 day'
            or inserted_at = '1970-01-01'
        )
    );

-- A server without BYPASSRLS for service_role is served as well.
drop policy if exists service_role_may_do_everything on realtime.messages;
create policy service_role_may_do_everything on realtime.messages
    for all
    to service_role
    using (true)
    with check (true);

-- Who may join a private topic and send to it: asked of PostgreSQL itself, under the client's role and claims.
-- Called by the server only. SECURITY INVOKER, because a definer may not change its role.

-- A write is allowed when the row passes the INSERT policies: these are checked before NOT NULL, so an insert that breaks
-- NOT NULL on purpose tells "allowed" (23502) from "denied" (42501) and leaves nothing behind: no row, no garbage. (The default of
-- column xid takes one transaction id a call, and that of seq a number.)
-- RETURNING adds the SELECT policies to the same question. Only where writing is denied is a real row needed to ask for reading;
-- it goes to an unlogged partition and is rolled back.
create or replace function realtime.authorize(
    topic text,
    role text,
    claims jsonb,
    headers jsonb default '{}',
    extensions text[] default array['broadcast', 'presence']
)
returns table (extension text, can_read boolean, can_write boolean, problem text)
language plpgsql
volatile
as $$
#variable_conflict use_column
declare
    c_probe_time constant timestamp := '1970-01-01';
    v_id uuid := pg_catalog.gen_random_uuid();
    v_passed boolean;
    v_is_done boolean;
    v_table text;
begin
    foreach extension in array extensions loop
        can_read := null;
        can_write := false;
        problem := null;
        v_is_done := false;
        begin
            -- To set_config these mean "as the session's own role", which row-level security does not bind.
            if coalesce(authorize.role, 'none') = 'none' then
                raise exception using errcode = 'invalid_parameter_value', message = 'a role must be named';
            end if;
            perform
                pg_catalog.set_config('realtime.topic', authorize.topic, true),
                pg_catalog.set_config('request.jwt.claims', claims::text, true),
                pg_catalog.set_config('request.jwt.claim.sub', coalesce(claims ->> 'sub', ''), true),
                pg_catalog.set_config('request.jwt.claim.role', authorize.role, true),
                pg_catalog.set_config('request.headers', headers::text, true),
                pg_catalog.set_config('role', authorize.role, true);

            -- RT000 undoes a row that was written after all: a BEFORE trigger may have filled what is null here. The variable tells
            -- our own RT000 from one that a policy raises, the table our own broken NOT NULL from one that a policy ran into.
            v_passed := false;
            begin
                insert into realtime.messages (topic, extension, updated_at, inserted_at)
                values (authorize.topic, authorize.extension, null, c_probe_time);
                v_passed := true;
                raise exception using errcode = 'RT000';
            exception
                when not_null_violation then
                    get stacked diagnostics v_table = table_name;
                    if v_table <> 'messages_probe' then
                        raise;
                    end if;
                    can_write := true;
                when insufficient_privilege then
                    null;
                when sqlstate 'RT000' then
                    if not v_passed then
                        raise;
                    end if;
                    can_write := true;
            end;

            if can_write then
                v_passed := false;
                begin
                    insert into realtime.messages (topic, extension, updated_at, inserted_at)
                    values (authorize.topic, authorize.extension, null, c_probe_time)
                    returning id is not null into can_read;
                    v_passed := true;
                    raise exception using errcode = 'RT000';
                exception
                    when not_null_violation then
                        get stacked diagnostics v_table = table_name;
                        if v_table <> 'messages_probe' then
                            raise;
                        end if;
                        can_read := true;
                    when insufficient_privilege then
                        can_read := false;
                    when sqlstate 'RT000' then
                        if not v_passed then
                            raise;
                        end if;
                end;
            end if;

            if can_read is null then
                v_passed := false;
                begin
                    perform pg_catalog.set_config('role', 'none', true);
                    insert into realtime.messages (id, topic, extension, inserted_at)
                    values (v_id, authorize.topic, authorize.extension, c_probe_time);
                    perform pg_catalog.set_config('role', authorize.role, true);
                    select count(*) > 0 into can_read from realtime.messages as m where m.id = v_id and m.inserted_at = c_probe_time;
                    v_passed := true;
                    raise exception using errcode = 'RT000';
                exception
                    when insufficient_privilege then
                        can_read := false;
                    when sqlstate 'RT000' then
                        if not v_passed then
                            raise;
                        end if;
                end;
            end if;

            -- Takes role and settings back, whatever they were.
            v_is_done := true;
            raise exception using errcode = 'RT000';
        exception when others then
            -- A policy that raises, a role that does not exist: this question alone is answered "no".
            if not v_is_done then
                can_read := false;
                can_write := false;
                problem := sqlstate || ': ' || sqlerrm;
            end if;
        end;
        return next;
    end loop;
end
$$;
comment on function realtime.authorize(text, text, jsonb, jsonb, text[]) is
    'What a client with these claims may do on a private topic. Leaves nothing behind. problem: SQLSTATE and text when a policy could not be evaluated; then nothing is allowed.';
revoke all on function realtime.authorize(text, text, jsonb, jsonb, text[]) from public;

create or replace function realtime.authorize_batch(topics text[], roles text[], claims jsonb[], headers jsonb[])
returns table (question bigint, extension text, can_read boolean, can_write boolean, problem text)
language sql
volatile
as $$
    select asked.question, answer.extension, answer.can_read, answer.can_write, answer.problem
    from unnest(topics, roles, claims, headers) with ordinality as asked (topic, role, claims, headers, question)
    cross join lateral realtime.authorize(asked.topic, asked.role, asked.claims, asked.headers) as answer
$$;
comment on function realtime.authorize_batch(text[], text[], jsonb[], jsonb[]) is
    'realtime.authorize for many clients in one round trip; question counts from 1 in the order of the arrays.';
revoke all on function realtime.authorize_batch(text[], text[], jsonb[], jsonb[]) from public;

-- What the relay reads, and how it is woken. Called by the server only.

create or replace function realtime.doorbell_key()
returns bigint
language sql
immutable
as $$
    select 7237125663275445356  -- 'doorbell' as ASCII digits of a bigint; any fixed number would do
$$;
comment on function realtime.doorbell_key() is 'Advisory lock that a relay holds while it sleeps.';

-- Writers ask in passing whether a relay sleeps (it then holds the lock exclusively) and ring only then: NOTIFY in every transaction
-- would put all commits of the database behind one lock.
create or replace function realtime.ring_doorbell()
returns trigger
language plpgsql
volatile
as $$
begin
    if pg_catalog.current_setting('realtime.doorbell', true) = 'off' then
        -- For transactions that are to be prepared: PREPARE TRANSACTION refuses those that notify.
        return null;
    elsif pg_catalog.pg_try_advisory_lock_shared(realtime.doorbell_key()) then
        perform pg_catalog.pg_advisory_unlock_shared(realtime.doorbell_key());
    else
        perform pg_catalog.pg_notify('realtime', '');
    end if;
    return null;
end
$$;
comment on function realtime.ring_doorbell() is
    'Wakes the relay at commit if it sleeps. "set local realtime.doorbell = ''off''" keeps it silent, for PREPARE TRANSACTION; the relay then finds the messages within seconds.';

create or replace trigger ring_doorbell
    after insert on realtime.messages
    for each statement
    execute function realtime.ring_doorbell();
comment on trigger ring_doorbell on realtime.messages is 'Wakes the relay at commit if it sleeps.';

create or replace function realtime.doorbell_is_held(backend integer)
returns boolean
language sql
volatile
as $$
    select exists (
        select
        from pg_catalog.pg_locks
        where locktype = 'advisory'
            and database = (select oid from pg_catalog.pg_database where datname = current_database())
            and classid::bigint = realtime.doorbell_key() >> 32
            and objid::bigint = realtime.doorbell_key() & 4294967295
            and objsubid = 1
            and mode = 'ExclusiveLock'
            and pid = backend
    )
$$;
comment on function realtime.doorbell_is_held(integer) is
    'Whether this backend holds the doorbell lock or stands in the queue for it; in both cases writers ring.';
revoke all on function realtime.doorbell_is_held(integer) from public;

-- Exactly the rows that were not visible in "position" and are visible now. A row has no snapshot of its own: only its xid is compared.
-- Two branches, so that each uses the index on xid. The bound at the top hides transaction ids of another cluster's counter (a restored
-- dump). One row without a message always comes first and carries the new position.
create or replace function realtime.messages_since("position" pg_snapshot)
returns table (
    seq bigint,
    id uuid,
    topic text,
    extension text,
    event text,
    private boolean,
    payload text,
    binary_payload bytea,
    snapshot text
)
language sql
stable
as $$
    with current as materialized (
        select pg_catalog.pg_current_snapshot() as snapshot
    ),
    committed as materialized (
        select m.*
        from realtime.messages as m
        where m.xid >= pg_catalog.pg_snapshot_xmax("position")
            and m.xid < (select pg_catalog.pg_snapshot_xmax(current.snapshot) from current)
        union all
        select m.*
        from realtime.messages as m
        where m.xid = any (array(select pg_catalog.pg_snapshot_xip("position")))
    )
    select null, null, null, null, null, null, null, null, current.snapshot::text
    from current
    union all
    select c.seq, c.id, c.topic, c.extension, c.event, c.private, c.payload::text, c.binary_payload, null
    from committed as c
    order by 1 asc nulls first
$$;
comment on function realtime.messages_since(pg_snapshot) is
    'Messages committed since a snapshot, in the order written; the first row carries the snapshot to go on from.';
revoke all on function realtime.messages_since(pg_snapshot) from public;

-- Maintenance runs with the server's rights, and no code of users runs inside: who may create functions in public must not be found.
create or replace function realtime.create_partitions(days_ahead integer default 3)
returns setof text
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_day date;
    v_name text;
begin
    for v_day in
        select day::date
        from generate_series(
            (now() at time zone 'utc')::date - 1,
            (now() at time zone 'utc')::date + days_ahead,
            interval '1 day'
        ) as day
    loop
        v_name := to_char(v_day, '"messages_"YYYY_MM_DD');
        continue when to_regclass('realtime.' || v_name) is not null;
        -- Rows that came before their partition stay in the default one; such a day gets no partition.
        continue when exists (
            select from realtime.messages_default where inserted_at >= v_day and inserted_at < v_day + 1
        );
        execute format('create table realtime.%I (like realtime.messages including defaults including constraints)', v_name);
        execute format('alter table realtime.%I enable row level security', v_name);
        execute format(
            'alter table realtime.messages attach partition realtime.%I for values from (%L) to (%L)',
            v_name, v_day, v_day + 1
        );
        return next v_name;
    end loop;
end
$$;
comment on function realtime.create_partitions(integer) is
    'Makes the partitions from yesterday to days_ahead days from now (UTC) that are missing; returns their names.';
revoke all on function realtime.create_partitions(integer) from public;

create or replace function realtime.drop_old_messages(retention interval)
returns setof text
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_before timestamp := (now() at time zone 'utc') - retention;
    v_day date;
    v_partition record;
    v_dropped xid8;
begin
    for v_partition in
        select child.relname, to_date(right(child.relname, 10), 'YYYY_MM_DD') as day
        from pg_catalog.pg_inherits
        join pg_catalog.pg_class as child on child.oid = inhrelid
        where inhparent = 'realtime.messages'::regclass
            and child.relname ~ '^messages_[0-9]{4}_[0-9]{2}_[0-9]{2}$'
        order by child.relname
    loop
        continue when v_partition.day + 1 > v_before;
        execute format('select max(xid::text::numeric)::text::xid8 from realtime.%I', v_partition.relname) into v_dropped;
        -- First the word, then the deed: both commit together.
        perform realtime.note_dropped(v_dropped);
        execute format('drop table realtime.%I', v_partition.relname);
        return next v_partition.relname;
    end loop;

    with deleted as (
        delete from realtime.messages_default
        where inserted_at < v_before
        returning xid
    )
    select max(xid::text::numeric)::text::xid8 into v_dropped from deleted;
    perform realtime.note_dropped(v_dropped);

    -- Probes are rolled back; what is here somebody put by hand.
    delete from realtime.messages_probe;
end
$$;
comment on function realtime.drop_old_messages(interval) is
    'Drops the partitions that lie wholly before now() - retention and old rows of the default one; returns the names. Cursors before them get a gap.';
revoke all on function realtime.drop_old_messages(interval) from public;

-- Called by every server; one at a time does the work. A lock that is not had within the timeout is for the next time: the drop of a
-- partition would otherwise stand in the queue before all writers.
create or replace function realtime.maintain(retention interval default '72 hours')
returns table (partition text, action text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '2s'
as $$
begin
    if not pg_catalog.pg_try_advisory_xact_lock(realtime.doorbell_key() + 1) then
        return;
    end if;
    return query select created, 'created' from realtime.create_partitions() as created;
    begin
        return query select dropped, 'dropped' from realtime.drop_old_messages(retention) as dropped;
    exception when lock_not_available then
        raise warning 'old messages are in use and were not dropped; the next run tries again';
    end;
end
$$;
comment on function realtime.maintain(interval) is
    'Makes partitions ahead and drops what is older than the retention; what was done. Safe to call at any time.';
revoke all on function realtime.maintain(interval) from public;

create or replace view realtime.partitions as
select
    child.relname::text as partition,
    pg_catalog.pg_get_expr(child.relpartbound, child.oid) as bounds,
    greatest(child.reltuples, 0)::bigint as estimated_rows,
    pg_catalog.pg_total_relation_size(child.oid) as bytes
from pg_catalog.pg_inherits
join pg_catalog.pg_class as child on child.oid = inhrelid
where inhparent = 'realtime.messages'::regclass
order by child.relname;
comment on view realtime.partitions is 'What is kept: the partitions of realtime.messages, their bounds and sizes.';
comment on column realtime.partitions.partition is 'Name of the table, in schema realtime.';
comment on column realtime.partitions.bounds is 'UTC days it holds.';
comment on column realtime.partitions.estimated_rows is 'Rows at the last analyze; 0 before the first.';
comment on column realtime.partitions.bytes is 'Size on disk, indexes included.';

do $$
begin
    perform realtime.create_partitions();
end
$$;

-- Reading from a place on: paged, exact, and with a plain word where something is missing.
--
-- A cursor is "since" and "seq": behind all that the snapshot "since" sees; no row whose transaction got its id later has a sequence number
-- up to "seq", so a read may start there, but for what realtime.overlapping names. Or it is "since", "until" and "seq": behind all that
-- "since" sees and, of what the later snapshot "until" sees as well, behind "seq".

create or replace function realtime.life()
returns text
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select substr(
        md5(concat_ws(
            '/',
            stream.epoch,
            control.system_identifier,
            case when pg_is_in_recovery() then 'standby' else substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) end,
            (select oid from pg_database where datname = current_database())
        )),
        1,
        12
    )
    from realtime.stream
    cross join pg_control_system() as control
$$;
comment on function realtime.life() is
    'Names this life of the database. A restore, a promotion or a new cluster changes it: transaction ids of one mean nothing in another.';

create or replace function realtime.dropped_xid()
returns xid8
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select case when stream.dropped_in_life = realtime.life() then stream.dropped_xid else '0' end
    from realtime.stream
$$;
comment on function realtime.dropped_xid() is 'Highest transaction id among messages that were dropped in this life of the database.';
revoke all on function realtime.dropped_xid() from public;

create or replace function realtime.note_dropped(xid xid8)
returns void
language sql
volatile
as $$
    update realtime.stream
    set
        dropped_xid = greatest(realtime.dropped_xid()::text::numeric, note_dropped.xid::text::numeric)::text::xid8,
        dropped_in_life = realtime.life()
    where note_dropped.xid is not null
$$;
comment on function realtime.note_dropped(xid8) is 'Remembers that messages up to this transaction are no longer kept, in the transaction that drops them.';
revoke all on function realtime.note_dropped(xid8) from public;

-- At most 1,000 transactions in progress are named. Beyond, the snapshot is cut down to what it surely sees: messages come twice, none is lost.
create or replace function realtime.snapshot_text("snapshot" pg_snapshot)
returns text
language sql
immutable
strict
as $$
    select concat_ws(
        '.',
        pg_catalog.pg_snapshot_xmin("snapshot"),
        coalesce(
            (select xip from pg_catalog.pg_snapshot_xip("snapshot") as xip order by xip offset 1000 limit 1),
            pg_catalog.pg_snapshot_xmax("snapshot")
        ),
        (
            select pg_catalog.string_agg(first.xip::text, '.' order by first.xip)
            from (select xip from pg_catalog.pg_snapshot_xip("snapshot") as xip order by xip limit 1000) as first
        )
    )
$$;
comment on function realtime.snapshot_text(pg_snapshot) is 'A snapshot as it stands in a cursor: xmin.xmax and what was in progress.';

create or replace function realtime.snapshot_from_text(part text)
returns pg_snapshot
language sql
immutable
strict
as $$
    select pg_catalog.translate(
        pg_catalog.regexp_replace(part, '^([0-9]+)[.]([0-9]+)[.]?', '\1:\2:'), '.', ','
    )::pg_snapshot
$$;
comment on function realtime.snapshot_from_text(text) is 'The reverse of realtime.snapshot_text.';

create or replace function realtime.format_cursor(life text, since pg_snapshot, until pg_snapshot, seq bigint)
returns realtime.cursor
language sql
immutable
as $$
    select pg_catalog.concat_ws('-', '1', life, realtime.snapshot_text(since), realtime.snapshot_text(until), seq)::realtime.cursor
$$;
comment on function realtime.format_cursor(text, pg_snapshot, pg_snapshot, bigint) is 'A cursor from its parts; until may be null.';

-- A crash forgets transactions that left nothing on disk and gives their ids to others. So a cursor claims no id above that of the newest
-- message, which is on disk; ids above it, up to the snapshot's, wrote no message or were still running.
create or replace function realtime.durable("snapshot" pg_snapshot)
returns pg_snapshot
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select format(
        '%s:%s:%s',
        least(pg_snapshot_xmin("snapshot")::text::bigint, bound.xmax),
        bound.xmax,
        (
            select string_agg(xip::text, ',' order by xip)
            from pg_snapshot_xip("snapshot") as xip
            where xip::text::bigint < bound.xmax
        )
    )::pg_snapshot
    from (
        select least(
            pg_snapshot_xmax("snapshot")::text::bigint,
            1 + greatest(
                2,
                realtime.dropped_xid()::text::bigint,
                (
                    select m.xid::text::bigint
                    from realtime.messages as m
                    where m.xid < pg_snapshot_xmax("snapshot") and pg_visible_in_snapshot(m.xid, "snapshot")
                    order by m.xid desc
                    limit 1
                )
            )
        ) as xmax
    ) as bound
$$;
comment on function realtime.durable(pg_snapshot) is
    'The same messages as in the snapshot, seen by transactions that a crash of the database cannot take back.';
revoke all on function realtime.durable(pg_snapshot) from public;
grant execute on function realtime.durable(pg_snapshot) to anon, authenticated, service_role;

create or replace function realtime.cursor()
returns realtime.cursor
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    -- Any row that is visible will do for "seq"; the newest transaction has a high one.
    select realtime.format_cursor(
        realtime.life(),
        realtime.durable(pg_current_snapshot()),
        null,
        coalesce((select m.seq from realtime.messages as m order by m.xid desc limit 1), 0)
    )
$$;
comment on function realtime.cursor() is 'The place behind everything that is committed now: take it, then follow from it.';

create or replace function realtime.oldest_cursor()
returns realtime.cursor
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select realtime.format_cursor(
        realtime.life(), format('%1$s:%1$s:', greatest(realtime.dropped_xid()::text::numeric, 2) + 1)::pg_snapshot, null, 0
    )
$$;
comment on function realtime.oldest_cursor() is 'The place before everything that is still kept.';

create or replace function realtime.read_cursor(place realtime.cursor, out since pg_snapshot, out until pg_snapshot, out seq bigint)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_parts text[] := string_to_array(place, '-');
    v_problem text;
begin
    begin
        since := realtime.snapshot_from_text(v_parts[3]);
        if cardinality(v_parts) = 5 then
            until := realtime.snapshot_from_text(v_parts[4]);
        end if;
        seq := v_parts[cardinality(v_parts)]::bigint;
    exception when invalid_text_representation or numeric_value_out_of_range then
        since := null;
    end;
    if since is null then
        raise exception using
            errcode = 'invalid_parameter_value', message = 'malformed cursor', hint = 'Hand a cursor back as it came.';
    end if;

    if v_parts[2] <> realtime.life() then
        v_problem := 'the cursor is of another life of this database (restored, promoted or upgraded since)';
    elsif pg_snapshot_xmax(since) > pg_snapshot_xmax(pg_current_snapshot()) then
        v_problem := 'the cursor is ahead of this database';
    elsif pg_snapshot_xmin(since) <= realtime.dropped_xid() then
        v_problem := 'the cursor is older than what is kept';
    end if;
    if v_problem is not null then
        raise exception using
            errcode = 'RT001',
            message = 'gap: ' || v_problem,
            detail = realtime.oldest_cursor(),
            hint = 'Load the present state and follow from realtime.cursor(). The detail is the oldest cursor that can be read from.';
    end if;
end
$$;
comment on function realtime.read_cursor(realtime.cursor) is
    'Takes a cursor apart. Raises RT001 (a gap; detail: the oldest cursor) when messages behind it are gone, 22023 when it is malformed.';

-- A snapshot's xmax is one past the highest id that had *ended*: transactions at or above it may have been running, and may have written
-- already. All ids from there up to the highest one given out by then were running, so they are no more than there can be at one time.
create or replace function realtime.overlapping(since pg_snapshot)
returns xid8[]
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    with recursive written as (
        (select m.xid, 1 as number from realtime.messages as m where m.xid >= pg_snapshot_xmax(since) order by m.xid limit 1)
        union all
        select following.xid, written.number + 1
        from written
        cross join lateral (
            select m.xid from realtime.messages as m where m.xid > written.xid order by m.xid limit 1
        ) as following
        -- Sessions, workers of the server itself, prepared transactions.
        where written.number < current_setting('max_connections')::integer
            + current_setting('max_worker_processes')::integer
            + current_setting('max_wal_senders')::integer
            + current_setting('autovacuum_max_workers')::integer
            + current_setting('max_prepared_transactions')::integer
    )
    select coalesce(array_agg(written.xid), '{}') from written
$$;
comment on function realtime.overlapping(pg_snapshot) is
    'Transactions at or above the xmax of a snapshot that have written messages, as many as may have been running when it was taken.';
revoke all on function realtime.overlapping(pg_snapshot) from public;
grant execute on function realtime.overlapping(pg_snapshot) to anon, authenticated, service_role;

-- A cursor with "until" is finished before the present is looked at, so that all pages but the last are cut by sequence number alone.
create or replace function realtime.messages_after(
    topic text,
    after realtime.cursor,
    max_rows integer default 100,
    private boolean default null
)
returns table (
    id uuid,
    event text,
    payload jsonb,
    binary_payload bytea,
    is_private boolean,
    inserted_at timestamp,
    xid xid8,
    cursor text
)
language plpgsql
volatile
as $$
#variable_conflict use_column
declare
    v_life text := realtime.life();
    v_since pg_snapshot;
    v_until pg_snapshot;
    v_seq bigint;
    v_left integer := least(greatest(max_rows, 0), 10000);
    v_found integer;
    v_is_present boolean;
    v_overlapping xid8[];
    -- A cursor without its last part; taken together once, because a page has many.
    v_within text;
    v_behind text;
begin
    select place.since, place.until, place.seq into v_since, v_until, v_seq from realtime.read_cursor(after) as place;
    perform pg_catalog.set_config('realtime.topic', messages_after.topic, true);
    loop
        v_is_present := v_until is null;
        if v_is_present then
            v_until := pg_catalog.pg_current_snapshot();
            v_overlapping := realtime.overlapping(v_since);
        end if;
        v_within := pg_catalog.regexp_replace(realtime.format_cursor(v_life, v_since, v_until, 0), '0$', '');
        v_behind := pg_catalog.regexp_replace(realtime.format_cursor(v_life, realtime.durable(v_until), null, 0), '0$', '');
        return query
        select
            page.id,
            page.event,
            page.payload,
            page.binary_payload,
            page.private,
            page.inserted_at,
            page.xid,
            case when pg_catalog.lead(page.seq) over (order by page.seq) is null then v_behind else v_within end || page.seq
        from (
            (
                select m.*
                from realtime.messages as m
                where m.topic = messages_after.topic
                    and m.extension = 'broadcast'
                    and m.seq > v_seq
                    and m.xid >= pg_catalog.pg_snapshot_xmax(v_since)
                    and pg_catalog.pg_visible_in_snapshot(m.xid, v_until)
                    and (messages_after.private is null or m.private = messages_after.private)
                order by m.seq
                limit v_left + 1
            )
            union all
            (
                select m.*
                from realtime.messages as m
                where m.topic = messages_after.topic
                    and m.extension = 'broadcast'
                    and (v_is_present or m.seq > v_seq)
                    and m.xid = any (array(select pg_catalog.pg_snapshot_xip(v_since)))
                    and pg_catalog.pg_visible_in_snapshot(m.xid, v_until)
                    and (messages_after.private is null or m.private = messages_after.private)
                order by m.seq
                limit v_left + 1
            )
            union all
            (
                select m.*
                from realtime.messages as m
                where v_is_present
                    and m.topic = messages_after.topic
                    and m.extension = 'broadcast'
                    and m.seq <= v_seq
                    and m.xid = any (v_overlapping)
                    and pg_catalog.pg_visible_in_snapshot(m.xid, v_until)
                    and (messages_after.private is null or m.private = messages_after.private)
                order by m.seq
                limit v_left + 1
            )
        ) as page
        order by page.seq
        limit v_left;
        get diagnostics v_found = row_count;
        v_left := v_left - v_found;
        exit when v_is_present or v_left = 0;
        v_since := v_until;
        v_until := null;
    end loop;
end
$$;
comment on function realtime.messages_after(text, realtime.cursor, integer, boolean) is
    'Messages of a topic behind a cursor that the caller may see, in order, at most 10,000, each with the cursor to go on from. private: null for both rooms of the name. Raises RT001 where messages are missing.';

create or replace function realtime.messages_between(topic text, since timestamptz, max_rows integer)
returns table (id uuid, event text, payload jsonb, binary_payload bytea, xid xid8)
language sql
stable
as $$
    select newest.id, newest.event, newest.payload, newest.binary_payload, newest.xid
    from (
        select m.id, m.event, m.payload, m.binary_payload, m.xid, m.seq
        from realtime.messages as m
        where m.topic = messages_between.topic
            and m.extension = 'broadcast'
            and m.private
            and m.inserted_at >= since at time zone 'utc'
            and m.inserted_at < (now() + interval '1 minute') at time zone 'utc'
        order by m.seq desc
        limit max_rows
    ) as newest
    order by newest.seq
$$;
comment on function realtime.messages_between(text, timestamptz, integer) is
    'The newest messages of a private topic since a time, oldest first: the replay of clients that know no cursors.';
revoke all on function realtime.messages_between(text, timestamptz, integer) from public;

-- One statement, so one database snapshot for both halves; the caller's rights hold for the rows.
create or replace function realtime.snapshot(query text, out rows jsonb, out cursor realtime.cursor)
language plpgsql
volatile
as $$
begin
    execute pg_catalog.format(
        'select coalesce(pg_catalog.jsonb_agg(q), ''[]''), realtime.cursor() from (%s) as q', query
    ) into rows, cursor;
end
$$;
comment on function realtime.snapshot(text) is
    'The rows of a query, as the caller sees them, and the cursor of the same moment: load the list, then follow from the cursor, and nothing is missed or doubled.';

-- An outbox row for the servers themselves: read in order by each of them, lost by none.
create or replace function realtime.revalidate(topic text default null, sub text default null)
returns void
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
    insert into realtime.messages (topic, extension, payload, private)
    values (coalesce(revalidate.topic, ''), 'revalidate', jsonb_build_object('topic', revalidate.topic, 'sub', revalidate.sub), true)
$$;
comment on function realtime.revalidate(text, text) is
    'Asks the policies again for joined private channels of a topic, of a user (claim "sub"), of both, or of all; who lost the right loses the channel within a second of the commit. Call it in a trigger on the table that policies read.';
revoke all on function realtime.revalidate(text, text) from public;
grant execute on function realtime.revalidate(text, text) to service_role;

-- Presence for people who ask in SQL.

create or replace view realtime.presence as
select entry.topic, entry.private, entry.key, entry.payload, entry.since, entry.ref, entry.node
from realtime.presence_entries as entry
join realtime.nodes as node on node.id = entry.node
where node.last_seen_at > now() - interval '30 seconds';
comment on view realtime.presence is 'Who is present where now, with what they track.';
comment on column realtime.presence.topic is 'Without "realtime:" in front.';
comment on column realtime.presence.private is 'Which of the two rooms of this name.';
comment on column realtime.presence.key is 'Presence key of the client.';
comment on column realtime.presence.payload is 'What the client tracks.';
comment on column realtime.presence.since is 'When it was written here.';
comment on column realtime.presence.ref is 'phx_ref of the entry.';
comment on column realtime.presence.node is 'Server that the client is connected to.';

create or replace function realtime.write_presence(node uuid, entries jsonb, gone text[])
returns boolean
language plpgsql
volatile
as $$
declare
    v_is_new boolean;
begin
    delete from realtime.nodes where last_seen_at < now() - interval '30 seconds' and id <> write_presence.node;
    insert into realtime.nodes (id) values (write_presence.node)
    on conflict (id) do update set last_seen_at = now()
    returning started_at = last_seen_at into v_is_new;
    delete from realtime.presence_entries as e where e.node = write_presence.node and e.ref = any (gone);
    insert into realtime.presence_entries (node, ref, topic, private, key, payload)
    select write_presence.node, entry.ref, entry.topic, entry.private, entry.key, entry.payload
    from jsonb_to_recordset(entries) as entry (ref text, topic text, private boolean, key text, payload jsonb)
    on conflict do nothing;
    return v_is_new;
end
$$;
comment on function realtime.write_presence(uuid, jsonb, text[]) is
    'Called by each server every few seconds and when presence changed. True when the server was not known: then it must write everything.';
revoke all on function realtime.write_presence(uuid, jsonb, text[]) from public;
