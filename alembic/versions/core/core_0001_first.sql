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
comment on column realtime.messages.extension is '"broadcast" or "presence"; policies tell the two rights apart by it.';
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
create index messages_topic_idx on realtime.messages (topic, inserted_at desc) where extension = 'broadcast';

-- An insert never fails for want of a partition.
create table realtime.messages_default partition of realtime.messages default;
comment on table realtime.messages_default is 'Rows of days for which no partition was made in time.';

-- Probe rows of authorization checks go here: unlogged, so that a check writes no WAL, and always rolled back.
create unlogged table realtime.messages_probe
    partition of realtime.messages for values from (minvalue) to ('1970-01-02');
comment on table realtime.messages_probe is 'Probe rows of authorization checks, always rolled back.';

alter table realtime.messages enable row level security;

-- Writers choose neither xid nor seq, so these columns are not granted.
grant select on realtime.messages to anon, authenticated, service_role;
grant insert (topic, extension, payload, event, private, updated_at, inserted_at, id, binary_payload)
    on realtime.messages to anon, authenticated, service_role;
grant usage on sequence realtime.messages_seq to anon, authenticated, service_role;

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
    elsif message_binary_payload is null and pg_catalog.jsonb_typeof(message_payload) is distinct from 'object' then
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
    if payload is null then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'payload must not be null',
            hint = 'Send ''\x''::bytea for an empty message.';
    end if;
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
-- NOT NULL on purpose tells "allowed" (23502) from "denied" (42501) and leaves nothing behind: no row, no WAL, no transaction id.
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
    v_found bigint;
begin
    foreach extension in array extensions loop
        can_read := false;
        can_write := false;
        problem := null;
        begin
            perform
                pg_catalog.set_config('realtime.topic', authorize.topic, true),
                pg_catalog.set_config('request.jwt.claims', claims::text, true),
                pg_catalog.set_config('request.jwt.claim.sub', coalesce(claims ->> 'sub', ''), true),
                pg_catalog.set_config('request.jwt.claim.role', authorize.role, true),
                pg_catalog.set_config('request.headers', headers::text, true),
                pg_catalog.set_config('role', authorize.role, true);

            begin
                insert into realtime.messages (topic, extension, updated_at, inserted_at)
                values (authorize.topic, authorize.extension, null, c_probe_time);
            exception
                when not_null_violation then
                    can_write := true;
                when insufficient_privilege then
                    null;
            end;

            if can_write then
                begin
                    insert into realtime.messages (topic, extension, updated_at, inserted_at)
                    values (authorize.topic, authorize.extension, null, c_probe_time)
                    returning id into v_id;
                exception
                    when not_null_violation then
                        can_read := true;
                    when insufficient_privilege then
                        null;
                end;
            else
                begin
                    perform pg_catalog.set_config('role', 'none', true);
                    insert into realtime.messages (id, topic, extension, inserted_at)
                    values (v_id, authorize.topic, authorize.extension, c_probe_time);
                    perform pg_catalog.set_config('role', authorize.role, true);
                    select count(*) into v_found from realtime.messages as m where m.id = v_id and m.inserted_at = c_probe_time;
                    raise exception using errcode = 'RT000';
                exception
                    when sqlstate 'RT000' then
                        can_read := v_found > 0;
                    when insufficient_privilege then
                        null;
                end;
            end if;
        exception when others then
            -- A policy that raises, a role that does not exist: this question alone is answered "no".
            can_read := false;
            can_write := false;
            problem := sqlstate || ': ' || sqlerrm;
        end;
        perform pg_catalog.set_config('role', 'none', true);
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
    if pg_catalog.pg_try_advisory_lock_shared(realtime.doorbell_key()) then
        perform pg_catalog.pg_advisory_unlock_shared(realtime.doorbell_key());
    else
        perform pg_catalog.pg_notify('realtime', '');
    end if;
    return null;
end
$$;
comment on function realtime.ring_doorbell() is 'Wakes the relay at commit if it sleeps.';

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
-- dump). One row with the new position always comes, last and without a message.
create or replace function realtime.messages_since("position" pg_snapshot)
returns table (
    seq bigint,
    id uuid,
    topic text,
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
    committed as (
        select m.*
        from realtime.messages as m
        where m.xid >= pg_catalog.pg_snapshot_xmax("position")
            and m.xid < (select pg_catalog.pg_snapshot_xmax(current.snapshot) from current)
        union all
        select m.*
        from realtime.messages as m
        where m.xid = any (array(select pg_catalog.pg_snapshot_xip("position")))
    )
    select c.seq, c.id, c.topic, c.event, c.private, c.payload::text, c.binary_payload, null
    from committed as c
    where c.extension = 'broadcast'
    union all
    select null, null, null, null, null, null, null, current.snapshot::text
    from current
    order by 1 asc nulls last
$$;
comment on function realtime.messages_since(pg_snapshot) is
    'Messages committed since a snapshot, in the order written; the last row carries the snapshot to go on from.';
revoke all on function realtime.messages_since(pg_snapshot) from public;

create or replace function realtime.create_partitions(days_ahead integer default 3)
returns setof text
language plpgsql
volatile
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

do $$
begin
    perform realtime.create_partitions();
end
$$;
