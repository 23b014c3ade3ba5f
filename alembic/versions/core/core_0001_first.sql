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

-- What a message must be, whoever writes it: one truth for realtime.send and for inserts.
create function realtime.check_message(topic text, event text, payload jsonb, binary_payload bytea)
returns boolean
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if topic = '' or octet_length(topic) > 255 then
        raise exception using
            errcode = 'invalid_parameter_value', schema = 'realtime', constraint = 'messages_sound',
            message = 'topic must have 1 to 255 bytes',
            hint = 'Give the name that clients join, without "realtime:" in front.';
    elsif binary_payload is not null and octet_length(topic) > 246 then
        raise exception using
            errcode = 'invalid_parameter_value', schema = 'realtime', constraint = 'messages_sound',
            message = 'topic of a binary message must have at most 246 bytes',
            hint = 'Longer names do not fit into the frames that carry bytes.';
    elsif event is null or event = '' or octet_length(event) > 255 then
        raise exception using
            errcode = 'invalid_parameter_value', schema = 'realtime', constraint = 'messages_sound',
            message = 'event must have 1 to 255 bytes',
            hint = 'Give the event name that clients listen to.';
    elsif payload is null and binary_payload is null then
        raise exception using
            errcode = 'invalid_parameter_value', schema = 'realtime', constraint = 'messages_sound',
            message = 'payload must not be null',
            hint = 'An empty message is ''{}'', or ''\x''::bytea with realtime.send_binary.';
    elsif jsonb_typeof(payload) <> 'object' then
        raise exception using
            errcode = 'invalid_parameter_value', schema = 'realtime', constraint = 'messages_sound',
            message = 'payload must be a JSON object',
            hint = 'Wrap other values: jsonb_build_object(''value'', ...).';
    -- Only a longer text can have a number in it with so many digits.
    elsif octet_length(payload::text) > 308
        and jsonb_path_exists(
            payload,
            '$.** ? (@.type() == "number" && (@ > 1.7976931348623157e308 || @ < -1.7976931348623157e308))'
        )
    then
        raise exception using
            errcode = 'invalid_parameter_value', schema = 'realtime', constraint = 'messages_sound',
            message = 'numbers in payload must be in the range of double precision',
            hint = 'Clients read numbers of JSON as such; send larger ones as strings.';
    end if;
    return true;
end
$$;
comment on function realtime.check_message(text, text, jsonb, bytea) is
    'True for a message that clients can receive; raises what is wrong with another one.';

create sequence realtime.messages_seq as bigint;
comment on sequence realtime.messages_seq is 'Order of writing over all topics. Cache must stay 1, or order between sessions is lost.';

create table realtime.messages (
    topic text not null,
    extension text not null,
    payload jsonb,
    event text,
    private boolean not null default false,
    updated_at timestamp not null default (now() at time zone 'utc'),
    inserted_at timestamp not null default (now() at time zone 'utc'),
    id uuid not null default gen_random_uuid(),
    binary_payload bytea,
    xid xid8 not null,
    seq bigint not null,
    constraint messages_pkey primary key (id, inserted_at),
    constraint messages_payload_exclusive check (payload is null or binary_payload is null),
    constraint messages_extension check (extension in ('broadcast', 'presence', 'revalidate')),
    -- Not what is for the servers, and not the probe rows of authorization checks.
    constraint messages_sound check (
        extension = 'revalidate'
        or inserted_at < '1970-01-02'
        or realtime.check_message(topic, event, payload, binary_payload)
    )
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
comment on column realtime.messages.xid is 'Transaction that wrote the row: the relay reads by it. Set by the trigger stamp_message.';
comment on column realtime.messages.seq is 'Order of writing. Set by the trigger stamp_message.';

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

-- Writers choose neither identity nor time nor order of a message, so these columns are not granted. What default privileges have granted
-- on top of it is taken back.
revoke all on realtime.messages from anon, authenticated, service_role;
grant select on realtime.messages to anon, authenticated, service_role;
grant insert (topic, extension, payload, event, private, updated_at, binary_payload)
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
    dropped_anywhere_xid xid8 not null default '0',
    dropped_change_xid xid8 not null default '0',
    dropped_change_in_life text not null default '',
    constraint stream_only_row check (only_row)
);
comment on table realtime.stream is 'One row: which stream this is, and how far back it reaches. Written by maintenance only.';
comment on column realtime.stream.only_row is 'Always true: there is one row.';
comment on column realtime.stream.epoch is 'Drawn at install: cursors of another installation do not fit.';
comment on column realtime.stream.dropped_in_life is 'Life of the database in which dropped_xid was drawn: in another it means nothing.';
comment on column realtime.stream.dropped_xid is 'Highest transaction id among dropped messages of all topics; the relay must lie wholly behind it.';
comment on column realtime.stream.dropped_anywhere_xid is
    'Highest transaction id among dropped messages that realtime.dropped_topics does not cover: cursors of every topic must lie behind it.';
comment on column realtime.stream.dropped_change_xid is 'The same for captured row changes.';
comment on column realtime.stream.dropped_change_in_life is 'Life of the database in which dropped_change_xid was drawn.';
alter table realtime.stream enable row level security;  -- no policies: for its owner only
insert into realtime.stream default values;

-- Bounded by realtime.note_dropped_topics: what does not fit raises realtime.stream.dropped_anywhere_xid instead.
create table realtime.dropped_topics (
    topic_hash bigint primary key,
    xid xid8 not null,
    seq bigint not null
);
comment on table realtime.dropped_topics is
    'How far back each topic reaches, where messages of it were dropped: a cursor must lie behind these. Written by maintenance only.';
comment on column realtime.dropped_topics.topic_hash is 'hashtextextended(topic, 0): topics that share one share the bound.';
comment on column realtime.dropped_topics.xid is 'Highest transaction id among dropped messages of the topic.';
comment on column realtime.dropped_topics.seq is 'Highest sequence number among dropped messages of the topic.';
alter table realtime.dropped_topics enable row level security;  -- no policies: for its owner only

-- A row a task: its lock lets one session at a time do the work. Advisory locks would not do, any role can take those.
create table realtime.maintenance (
    task text primary key,
    succeeded_at timestamptz not null default now()
);
comment on table realtime.maintenance is 'What the servers do from time to time, one of them at a time.';
comment on column realtime.maintenance.task is
    'messages: partitions and retention; changes: retention of captured row changes; capture: triggers on the tables of the publication.';
comment on column realtime.maintenance.succeeded_at is 'When all of it was last done.';
alter table realtime.maintenance enable row level security;  -- no policies: for its owner only
insert into realtime.maintenance (task) values ('messages'), ('changes'), ('capture');
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
-- Row changes: which tables tell theirs, and the outbox of the triggers that capture them.

-- A table emits changes if and only if it is in this publication; where it exists already, it belongs to whoever made it.
do $$
begin
    if not exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime') then
        create publication supabase_realtime;
        comment on publication supabase_realtime is 'Tables whose row changes clients may subscribe to.';
    end if;
end
$$;

create sequence realtime.changes_seq as bigint;
comment on sequence realtime.changes_seq is 'Order of writing. Cache must stay 1, or order between sessions is lost.';

create table realtime.changes (
    seq bigint not null default nextval('realtime.changes_seq'),
    xid xid8 not null default pg_current_xact_id(),
    relation oid not null,
    action text not null,
    changed_at timestamptz not null default clock_timestamp(),
    record jsonb,
    old_record jsonb,
    columns text[]
);
alter sequence realtime.changes_seq owned by realtime.changes.seq;

comment on table realtime.changes is 'Captured row changes, for the servers only. A server deletes what is older than an hour, every five minutes, and all of it when no table is captured and no server reads here.';
comment on column realtime.changes.seq is 'Order of writing.';
comment on column realtime.changes.xid is 'Transaction that wrote the row: the servers read by it.';
comment on column realtime.changes.relation is 'Table, as the publication names it: of a partition maybe the root.';
comment on column realtime.changes.action is 'INSERT, UPDATE or DELETE.';
comment on column realtime.changes.changed_at is 'When the row was changed; the time of the commit is not known to a trigger.';
comment on column realtime.changes.record is 'The new row as a string, the text of its values in brackets; null for DELETE. Both are null where they are too large.';
comment on column realtime.changes.old_record is 'The old row; null for INSERT.';
comment on column realtime.changes.columns is 'Names of the columns, in the order of the values in the rows.';

create index changes_xid_idx on realtime.changes (xid);
alter table realtime.changes enable row level security;  -- no policies: for its owner only
-- What policies ask: who is calling, and about which topic. Functions in SQL have bodies that PostgreSQL parses when they are created: a name
-- means the same on every search path, and PostgreSQL can still inline them.

create or replace function realtime.topic()
returns text
language sql
stable
return nullif(pg_catalog.current_setting('realtime.topic', true), '');
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
        return nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb;
        comment on function auth.jwt() is 'All claims of the current request; null when there is none.';
    end if;

    if to_regprocedure('auth.uid()') is null then
        create function auth.uid()
        returns uuid
        language sql
        stable
        return coalesce(
            nullif(pg_catalog.current_setting('request.jwt.claim.sub', true), ''),
            nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
        )::uuid;
        comment on function auth.uid() is 'Claim "sub" of the current request; null when there is none.';
    end if;

    if to_regprocedure('auth.role()') is null then
        create function auth.role()
        returns text
        language sql
        stable
        return coalesce(
            nullif(pg_catalog.current_setting('request.jwt.claim.role', true), ''),
            nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb ->> 'role'
        );
        comment on function auth.role() is 'Claim "role" of the current request; null when there is none.';
    end if;
end
$$;
-- Writing messages: called by applications, by their triggers and in psql, with the caller's rights.
-- No SET clause on those that insert: the caller's policies and triggers run inside, and would see it. So every name and every operator in
-- them is qualified.

create or replace function realtime.stamp_message()
returns trigger
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    -- A row that an UPDATE moves to another partition comes by here with those it has.
    if new.xid is null
        or new.seq is null
        or new.xid >= pg_snapshot_xmax(pg_current_snapshot())
        or new.xid = pg_current_xact_id_if_assigned()
        or new.seq > coalesce(pg_sequence_last_value('realtime.messages_seq'), 0)
    then
        new.xid := pg_current_xact_id();
        new.seq := nextval('realtime.messages_seq');
    end if;
    if jsonb_typeof(new.payload) = 'object' and not new.payload ? 'id' then
        new.payload := jsonb_set(new.payload, '{id}', to_jsonb(new.id));
    end if;
    return new;
end
$$;
comment on function realtime.stamp_message() is
    'Sets the transaction and the number of a message that has none, or one that is yet to come, and adds the key "id" to a JSON object without it.';
revoke all on function realtime.stamp_message() from public;

-- Not for probe rows: those that realtime.authorize means to fail have a null here, and it gives the others what they need.
create or replace trigger stamp_message
    before insert on realtime.messages
    for each row
    when (new.updated_at is not null and new.inserted_at >= '1970-01-02')
    execute function realtime.stamp_message();
comment on trigger stamp_message on realtime.messages is 'Sets what is not for writers to choose.';

create or replace function realtime.refuse_probe_row()
returns trigger
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception using
        errcode = 'invalid_parameter_value',
        message = 'probe rows of authorization checks are never committed',
        hint = 'Leave inserted_at to its default.';
end
$$;
comment on function realtime.refuse_probe_row() is 'Raises at commit: a row in the partition of probe rows would be delivered and be gone afterwards.';
revoke all on function realtime.refuse_probe_row() from public;

do $$
begin
    if not exists (
        select from pg_catalog.pg_trigger
        where tgrelid = 'realtime.messages_probe'::regclass and tgname = 'refuse_probe_row'
    ) then
        create constraint trigger refuse_probe_row
            after insert on realtime.messages_probe
            deferrable initially deferred
            for each row
            execute function realtime.refuse_probe_row();
        comment on trigger refuse_probe_row on realtime.messages_probe is 'Probe rows are rolled back.';
    end if;
end
$$;

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
    v_topic_before constant pg_catalog.text := pg_catalog.current_setting('realtime.topic', true);
begin
    if message_private is null then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'private must be true or false',
            hint = 'Public and private topics of one name are different rooms.';
    end if;
    -- INSERT policies may ask realtime.topic(). A null would break NOT NULL, whose error has no hint.
    perform pg_catalog.set_config('realtime.topic', coalesce(message_topic, ''), true);
    insert into realtime.messages (topic, event, payload, binary_payload, private, extension)
    values (coalesce(message_topic, ''), message_event, message_payload, message_binary_payload, message_private, 'broadcast');
    perform pg_catalog.set_config('realtime.topic', coalesce(v_topic_before, ''), true);
end
$$;
comment on function realtime.write_message(text, text, jsonb, bytea, boolean) is
    'Writes one message, which the table checks. Internal: call realtime.send or realtime.send_binary.';

create or replace function realtime.send(payload jsonb, event text, topic text, private boolean default true)
returns void
language plpgsql
volatile
as $$
begin
    if pg_catalog.current_setting('realtime.send_errors', true) operator(pg_catalog.=) 'warning' then
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
    if pg_catalog.current_setting('realtime.send_errors', true) operator(pg_catalog.=) 'warning' then
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
    if level is null or level operator(pg_catalog.<>) 'ROW' then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'broadcast_changes works in row-level triggers only',
            hint = 'Create the trigger with "for each row".';
    elsif operation is null or operation operator(pg_catalog.<>) all (array['INSERT', 'UPDATE', 'DELETE']) then
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

-- Columns are granted, but what an administrator grants later, or by default to new tables, comes on top of it. A row that is dropped early
-- would be a gap for everybody. And what is for the servers, clients do not write.
drop policy if exists writers_keep_to_their_day on realtime.messages;
drop policy if exists writers_choose_neither_time_nor_order on realtime.messages;
create policy writers_choose_neither_time_nor_order on realtime.messages
    as restrictive
    for insert
    to public
    with check (
        extension in ('broadcast', 'presence')
        and inserted_at = (now() at time zone 'utc')
        and (xid is null or xid = pg_current_xact_id_if_assigned())
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
-- NOT NULL on purpose tells "allowed" (23502) from "denied" (42501) and leaves nothing behind: no row, no garbage, no transaction id.
-- RETURNING adds the SELECT policies to the same question. Only where writing is denied is a real row needed to ask for reading;
-- it goes to an unlogged partition and is rolled back.
-- Policies' functions find names as they were written for it, on the search path that is usual for applications; nothing of ours does.
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
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    c_path_of_policies constant text := 'public, extensions, pg_temp';
    c_probe_time constant timestamp := '1970-01-01';
    c_never_null constant text[] := '{updated_at,xid,seq}';
    v_id uuid := gen_random_uuid();
    v_passed boolean;
    v_is_done boolean;
    v_schema text;
    v_column text;
    v_constraint text;
    -- Row-level security and a missing GRANT both raise 42501: only the text tells them apart, and only where it is not translated.
    v_is_english constant boolean := current_setting('lc_messages') ~* '^(c|posix|en)([._]|$)';
    c_denied_by_policy constant text := 'new row violates row-level security policy%';
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
                pg_catalog.set_config('search_path', c_path_of_policies, true),
                pg_catalog.set_config('role', authorize.role, true);
            -- From here to the end of the block, names and operators are qualified.

            -- RT000 undoes a row that was written after all: a BEFORE trigger may have filled what is null here. The variable tells
            -- our own RT000 from one that a policy raises, the column or constraint what is wrong with our own row from what a policy ran into.
            v_passed := false;
            begin
                insert into realtime.messages (topic, extension, updated_at)
                values (authorize.topic, authorize.extension, null);
                v_passed := true;
                raise exception using errcode = 'RT000';
            exception
                when not_null_violation or invalid_parameter_value then
                    get stacked diagnostics v_schema = schema_name, v_column = column_name, v_constraint = constraint_name;
                    if v_schema operator(pg_catalog.<>) 'realtime'
                        or v_column operator(pg_catalog.<>) all (c_never_null) and v_constraint operator(pg_catalog.<>) 'messages_sound'
                    then
                        raise;
                    end if;
                    can_write := true;
                when insufficient_privilege then
                    if v_is_english and sqlerrm operator(pg_catalog.!~~) c_denied_by_policy then
                        problem := pg_catalog.concat(sqlstate, ': ', sqlerrm);
                    end if;
                when sqlstate 'RT000' then
                    if not v_passed then
                        raise;
                    end if;
                    can_write := true;
            end;

            if can_write then
                v_passed := false;
                begin
                    insert into realtime.messages (topic, extension, updated_at)
                    values (authorize.topic, authorize.extension, null)
                    returning id is not null into can_read;
                    v_passed := true;
                    raise exception using errcode = 'RT000';
                exception
                    when not_null_violation or invalid_parameter_value then
                        get stacked diagnostics v_schema = schema_name, v_column = column_name, v_constraint = constraint_name;
                        if v_schema operator(pg_catalog.<>) 'realtime'
                            or v_column operator(pg_catalog.<>) all (c_never_null) and v_constraint operator(pg_catalog.<>) 'messages_sound'
                        then
                            raise;
                        end if;
                        can_read := true;
                    when insufficient_privilege then
                        if v_is_english and sqlerrm operator(pg_catalog.!~~) c_denied_by_policy then
                            problem := pg_catalog.concat(sqlstate, ': ', sqlerrm);
                        end if;
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
                    insert into realtime.messages (id, topic, extension, inserted_at, xid, seq)
                    values (v_id, authorize.topic, authorize.extension, c_probe_time, '0', 0);
                    perform pg_catalog.set_config('role', authorize.role, true);
                    can_read := exists (
                        select
                        from realtime.messages as m
                        where m.id operator(pg_catalog.=) v_id and m.inserted_at operator(pg_catalog.=) c_probe_time
                    );
                    v_passed := true;
                    raise exception using errcode = 'RT000';
                exception
                    when insufficient_privilege then
                        -- Row-level security hides rows and raises nothing.
                        problem := pg_catalog.concat(sqlstate, ': ', sqlerrm);
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
            -- A standby, or maintenance: no policy was asked, so there is no answer.
            if sqlstate = '25006' and pg_catalog.current_setting('transaction_read_only')::boolean then
                raise;
            end if;
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
    'What a client with these claims may do on a private topic. Leaves nothing behind. problem: SQLSTATE and text when a policy could not be evaluated, or may not read what it needs; then what it guards is not allowed.';
revoke all on function realtime.authorize(text, text, jsonb, jsonb, text[]) from public;

create or replace function realtime.authorize_batch(topics text[], roles text[], claims jsonb[], headers jsonb[])
returns table (question bigint, extension text, can_read boolean, can_write boolean, problem text)
language sql
volatile
begin atomic
    select asked.question, answer.extension, answer.can_read, answer.can_write, answer.problem
    from unnest(topics, roles, claims, headers) with ordinality as asked (topic, role, claims, headers, question)
    cross join lateral realtime.authorize(asked.topic, asked.role, asked.claims, asked.headers) as answer;
end;
comment on function realtime.authorize_batch(text[], text[], jsonb[], jsonb[]) is
    'realtime.authorize for many clients in one round trip; question counts from 1 in the order of the arrays.';
revoke all on function realtime.authorize_batch(text[], text[], jsonb[], jsonb[]) from public;
-- What the relay reads, and how it is woken. Called by the server only.

create or replace function realtime.doorbell_key()
returns bigint
language sql
immutable
begin atomic
    -- 'doorbell' as ASCII digits of a bigint; any fixed number would do.
    select 7237125663275445356;
end;
comment on function realtime.doorbell_key() is 'Advisory lock that a relay holds while it sleeps.';

-- Writers ask in passing whether a relay sleeps (it then holds the lock exclusively) and ring only then: NOTIFY in every transaction
-- would put all commits of the database behind one lock.
create or replace function realtime.ring_doorbell()
returns trigger
language plpgsql
volatile
as $$
begin
    if pg_catalog.current_setting('realtime.doorbell', true) operator(pg_catalog.=) 'off' then
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

create or replace function realtime.doorbell_is_held(backend integer, key bigint)
returns boolean
language sql
volatile
begin atomic
    select exists (
        select
        from pg_catalog.pg_locks
        where locktype = 'advisory'
            and database = (select oid from pg_catalog.pg_database where datname = current_database())
            and classid::bigint = key >> 32
            and objid::bigint = key & 4294967295
            and objsubid = 1
            and mode = 'ExclusiveLock'
            and pid = backend
    );
end;
comment on function realtime.doorbell_is_held(integer, bigint) is
    'Whether this backend holds the lock of a doorbell or stands in the queue for it; in both cases writers ring.';
revoke all on function realtime.doorbell_is_held(integer, bigint) from public;

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
begin atomic
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
    order by 1 asc nulls first;
end;
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

-- Messages of a restored dump carry transaction ids of another cluster. Ids that this one has not reached would hide them now and have them
-- delivered as new one day, so they get the lowest one there is: written before everything else. Rows of this very transaction are its own.
create or replace function realtime.adopt_messages()
returns bigint
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    with adopted as (
        update realtime.messages
        set xid = '3'
        where xid >= pg_snapshot_xmax(pg_current_snapshot())
            and xid is distinct from pg_current_xact_id_if_assigned()
        returning xid
    )
    select count(*) from adopted
$$;
comment on function realtime.adopt_messages() is
    'Gives messages whose transaction id this database has not reached, as in a restored dump, the lowest one; how many there were.';
revoke all on function realtime.adopt_messages() from public;

-- Transaction ids of another cluster are left out of what was dropped: no cursor can be behind them.
create or replace function realtime.delete_messages(partition regclass, before timestamp, max_rows bigint)
returns bigint
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_deleted bigint;
    v_dropped xid8;
begin
    -- Before anything is noted: what was noted of another life of the database goes.
    perform realtime.note_dropped('0', true);
    execute format(
        'with deleted as (
            delete from %1$s
            where ctid = any (array(select ctid from %1$s where inserted_at < $1 limit $2))
            returning topic, extension, xid, seq
        ),
        ours as (
            select topic, extension, xid, seq from deleted where xid < pg_snapshot_xmax(pg_current_snapshot())
        ),
        noted as (
            insert into realtime.dropped_topics as known (topic_hash, xid, seq)
            select hashtextextended(topic, 0), max(xid::text::numeric)::text::xid8, max(seq)
            from ours
            where extension = ''broadcast''
            group by 1
            on conflict (topic_hash) do update set
                xid = greatest(known.xid::text::numeric, excluded.xid::text::numeric)::text::xid8,
                seq = greatest(known.seq, excluded.seq)
        )
        select (select count(*) from deleted), (select max(xid::text::numeric)::text::xid8 from ours)',
        partition
    ) into v_deleted, v_dropped using before, max_rows;
    perform realtime.note_dropped(v_dropped, true);
    perform realtime.trim_dropped_topics();
    return v_deleted;
end
$$;
comment on function realtime.delete_messages(regclass, timestamp, bigint) is
    'Deletes messages written before this time (UTC) from a partition, at most so many; how many it were. Waits for no reader.';
revoke all on function realtime.delete_messages(regclass, timestamp, bigint) from public;

-- To drop a partition takes a lock that waits for every transaction that has read a message, and that every writer and reader then waits
-- for. So it is waited for only for a moment and tried again later. Any client role can keep such a transaction open for ever: an hour after
-- its time the messages are deleted all the same, which waits for nobody, and the empty partition is dropped some other time.
create or replace function realtime.drop_old_messages(retention interval)
returns table (partition text, action text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '0.2s'
as $$
#variable_conflict use_column
declare
    c_most_rows constant bigint := 1000000;
    v_before constant timestamp := (now() at time zone 'utc') - retention;
    v_day date;
begin
    for partition, v_day in
        select child.relname::text, to_date(right(child.relname, 10), 'YYYY_MM_DD')
        from pg_inherits
        join pg_class as child on child.oid = inhrelid
        where inhparent = 'realtime.messages'::regclass
            and child.relname ~ '^messages_[0-9]{4}_[0-9]{2}_[0-9]{2}$'
        order by child.relname
    loop
        continue when v_day + 1 > v_before;
        begin
            -- Whoever still writes to it is waited for, and nobody begins to: what is dropped is what was noted. Both commit together.
            execute format('lock table realtime.%I in share mode', partition);
            perform realtime.note_dropped_topics(format('realtime.%I', partition)::regclass);
            execute format('drop table realtime.%I', partition);
            action := 'dropped';
        exception when lock_not_available then
            action := case
                when v_day + 1 >= v_before - interval '1 hour' then 'waiting'
                when realtime.delete_messages(format('realtime.%I', partition)::regclass, 'infinity', c_most_rows) < c_most_rows then 'emptied'
                else 'waiting'
            end;
        end;
        return next;
    end loop;
    if realtime.delete_messages('realtime.messages_default', v_before, c_most_rows) = c_most_rows then
        partition := 'messages_default';
        action := 'waiting';
        return next;
    end if;
end
$$;
comment on function realtime.drop_old_messages(interval) is
    'Drops the partitions that lie wholly before now() - retention and old rows of the default one; what was done to which: dropped, waiting (for a transaction that has read messages, or because there is more to delete), emptied (that transaction has gone on for an hour: the messages were deleted). Cursors before them get a gap.';
revoke all on function realtime.drop_old_messages(interval) from public;

-- Called by every server; one at a time does the work, by a lock on a row that nobody else can reach.
create or replace function realtime.maintain(retention interval default '72 hours')
returns table (partition text, action text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '0.2s'
as $$
#variable_conflict use_column
declare
    v_is_complete boolean := true;
begin
    perform from realtime.maintenance as m where m.task = 'messages' for update skip locked;
    if not found then
        return;
    end if;
    perform realtime.adopt_messages();
    begin
        return query select created, 'created' from realtime.create_partitions() as created;
    exception when lock_not_available then
        -- Meanwhile the rows go to the default partition.
        partition := 'messages_default';
        action := 'waiting';
        v_is_complete := false;
        return next;
    end;
    for partition, action in select dropped.partition, dropped.action from realtime.drop_old_messages(retention) as dropped loop
        v_is_complete := v_is_complete and action <> 'waiting';
        return next;
    end loop;
    if v_is_complete then
        update realtime.maintenance as m set succeeded_at = now() where m.task = 'messages';
    end if;
end
$$;
comment on function realtime.maintain(interval) is
    'Makes partitions ahead and drops what is older than the retention; what was done: created, dropped, emptied or waiting, as realtime.drop_old_messages tells it. No row: nothing was to do, or another session is at it. Safe to call at any time.';
revoke all on function realtime.maintain(interval) from public;

create or replace function realtime.last_maintenance()
returns timestamptz
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select m.succeeded_at from realtime.maintenance as m where m.task = 'messages'
$$;
comment on function realtime.last_maintenance() is 'When realtime.maintain last did all that was to do.';
revoke all on function realtime.last_maintenance() from public;

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

create or replace function realtime.note_dropped(xid xid8, is_covered boolean default false)
returns void
language sql
volatile
begin atomic
    -- Transaction ids of another life mean nothing.
    delete from realtime.dropped_topics
    where note_dropped.xid is not null
        and not exists (select from realtime.stream where dropped_in_life = realtime.life());
    update realtime.stream
    set
        dropped_xid = greatest(realtime.dropped_xid()::text::numeric, note_dropped.xid::text::numeric)::text::xid8,
        dropped_anywhere_xid = greatest(
            case when dropped_in_life = realtime.life() then dropped_anywhere_xid else '0' end::text::numeric,
            case when is_covered then 0 else note_dropped.xid::text::numeric end
        )::text::xid8,
        dropped_in_life = realtime.life()
    where note_dropped.xid is not null;
end;
comment on function realtime.note_dropped(xid8, boolean) is
    'Remembers that messages up to this transaction are no longer kept, in the transaction that drops them. is_covered: realtime.dropped_topics says of which topics.';
revoke all on function realtime.note_dropped(xid8, boolean) from public;

create or replace function realtime.note_dropped_topics(messages regclass)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_xid xid8;
begin
    execute format('select xid from %s where xid < pg_snapshot_xmax(pg_current_snapshot()) order by xid desc limit 1', messages) into v_xid;
    -- To read all of a large partition would hold up maintenance: 1 GB takes seconds.
    if pg_relation_size(messages) > 256 * 1024 * 1024 then
        perform realtime.note_dropped(v_xid);
        return;
    end if;
    perform realtime.note_dropped(v_xid, true);
    execute format(
        'insert into realtime.dropped_topics as known (topic_hash, xid, seq)'
        ' select hashtextextended(topic, 0), max(xid::text::numeric)::text::xid8, max(seq)'
        ' from %s where extension = ''broadcast'' and xid < pg_snapshot_xmax(pg_current_snapshot()) group by 1'
        ' on conflict (topic_hash) do update set'
        ' xid = greatest(known.xid::text::numeric, excluded.xid::text::numeric)::text::xid8, seq = greatest(known.seq, excluded.seq)',
        messages
    );
    perform realtime.trim_dropped_topics();
end
$$;
comment on function realtime.note_dropped_topics(regclass) is
    'Remembers of which topics the messages of a partition are no longer kept, in the transaction that drops it.';
revoke all on function realtime.note_dropped_topics(regclass) from public;

-- At most 100,000 topics are remembered, about 10 MB; the oldest of them make room.
create or replace function realtime.trim_dropped_topics()
returns void
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    with left_out as (
        delete from realtime.dropped_topics
        where topic_hash in (select topic_hash from realtime.dropped_topics order by xid desc offset 100000)
        returning xid
    )
    select realtime.note_dropped(max(xid::text::numeric)::text::xid8) from left_out
$$;
comment on function realtime.trim_dropped_topics() is
    'Keeps realtime.dropped_topics within its bound: what does not fit counts as dropped of all topics.';
revoke all on function realtime.trim_dropped_topics() from public;

-- At most 1,000 transactions in progress are named. Beyond, the snapshot is cut down to what it surely sees; realtime.overlapping, which
-- knows how many may have been running but not how many of those beyond had ended, may then miss the newest.
create or replace function realtime.snapshot_text("snapshot" pg_snapshot)
returns text
language sql
immutable
strict
begin atomic
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
    );
end;
comment on function realtime.snapshot_text(pg_snapshot) is 'A snapshot as it stands in a cursor: xmin.xmax and what was in progress.';

create or replace function realtime.snapshot_from_text(part text)
returns pg_snapshot
language sql
immutable
strict
begin atomic
    select pg_catalog.translate(
        pg_catalog.regexp_replace(part, '^([0-9]+)[.]([0-9]+)[.]?', '\1:\2:'), '.', ','
    )::pg_snapshot;
end;
comment on function realtime.snapshot_from_text(text) is 'The reverse of realtime.snapshot_text.';

create or replace function realtime.format_cursor(life text, since pg_snapshot, until pg_snapshot, seq bigint)
returns realtime.cursor
language sql
immutable
begin atomic
    select pg_catalog.concat_ws('-', '1', life, realtime.snapshot_text(since), realtime.snapshot_text(until), seq)::realtime.cursor;
end;
comment on function realtime.format_cursor(text, pg_snapshot, pg_snapshot, bigint) is 'A cursor from its parts; until may be null.';

create or replace function realtime.xid_after(xid bigint)
returns bigint
language sql
immutable
strict
begin atomic
    select xid + case when (xid + 1) % 4294967296 = 0 then 2 else 1 end;
end;
comment on function realtime.xid_after(bigint) is
    'The next id that a snapshot may begin at: those of which the lower 32 bits are zero are none, and PostgreSQL refuses them.';
revoke all on function realtime.xid_after(bigint) from public;

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
            realtime.xid_after(greatest(
                2,
                realtime.dropped_xid()::text::bigint,
                (
                    select m.xid::text::bigint
                    from realtime.messages as m
                    where m.xid < pg_snapshot_xmax("snapshot") and pg_visible_in_snapshot(m.xid, "snapshot")
                    order by m.xid desc
                    limit 1
                )
            ))
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
        coalesce(
            (
                select m.seq
                from realtime.messages as m
                where m.xid < pg_snapshot_xmax(pg_current_snapshot())
                order by m.xid desc
                limit 1
            ),
            0
        )
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
        realtime.life(),
        format('%1$s:%1$s:', realtime.xid_after(greatest(realtime.dropped_xid()::text::bigint, 2)))::pg_snapshot,
        null,
        0
    )
$$;
comment on function realtime.oldest_cursor() is 'The place before everything that is still kept.';

create or replace function realtime.sees_dropped("snapshot" pg_snapshot, xid xid8)
returns boolean
language sql
stable
begin atomic
    -- Nothing was dropped of who still runs: nobody else sees what it has written, nor gets the lock of a partition that holds it.
    select pg_catalog.pg_snapshot_xmax("snapshot") > xid
        and not exists (
            select
            from pg_catalog.pg_snapshot_xip("snapshot") as xip
            where xip <= xid and pg_catalog.pg_visible_in_snapshot(xip, pg_catalog.pg_current_snapshot())
        );
end;
comment on function realtime.sees_dropped(pg_snapshot, xid8) is 'Whether a snapshot sees all that was dropped of transactions up to this one.';
revoke all on function realtime.sees_dropped(pg_snapshot, xid8) from public;

create or replace function realtime.read_cursor(
    place realtime.cursor, topic text, out since pg_snapshot, out until pg_snapshot, out seq bigint
)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_parts text[] := string_to_array(place, '-');
    v_dropped xid8 := realtime.dropped_xid();
    v_of_topic realtime.dropped_topics;
    v_problem text;
begin
    if topic is not null then
        select dropped_anywhere_xid into v_dropped from realtime.stream where dropped_in_life = realtime.life();
        select known.* into v_of_topic
        from realtime.dropped_topics as known
        where topic_hash = hashtextextended(topic, 0) and v_dropped is not null;
        v_dropped := coalesce(v_dropped, '0');
    end if;
    -- Its life has no name of its own, so that every cursor would seem to be of another one.
    if pg_is_in_recovery() then
        raise exception using
            errcode = 'read_only_sql_transaction', message = 'this is a standby', hint = 'Messages are read from the primary.';
    end if;
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
    elsif not realtime.sees_dropped(since, v_dropped)
        or not realtime.sees_dropped(since, v_of_topic.xid)
        and not (until is not null and v_of_topic.seq <= seq and realtime.sees_dropped(until, v_of_topic.xid))
    then
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
comment on function realtime.read_cursor(realtime.cursor, text) is
    'Takes a cursor apart. Raises RT001 (a gap; detail: the oldest cursor) when messages of the topic behind it are gone, of any topic where it is null; 22023 when it is malformed, 25006 on a standby.';
-- Not for everybody: it tells whether anything was sent to a topic.
revoke all on function realtime.read_cursor(realtime.cursor, text) from public;
grant execute on function realtime.read_cursor(realtime.cursor, text) to service_role;

create or replace function realtime.read_cursor(place realtime.cursor, out since pg_snapshot, out until pg_snapshot, out seq bigint)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select * from realtime.read_cursor(place, null)
$$;
comment on function realtime.read_cursor(realtime.cursor) is
    'Takes a cursor apart. Raises RT001 (a gap; detail: the oldest cursor) when messages behind it are gone, 22023 when it is malformed, 25006 on a standby.';

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
-- No SET clause, because the caller's policies run inside: every name and every operator is qualified.
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
    v_life pg_catalog.text := realtime.life();
    v_since pg_catalog.pg_snapshot;
    v_until pg_catalog.pg_snapshot;
    v_seq bigint;
    v_left integer := least(greatest(max_rows, 0), 10000);
    v_found integer;
    v_is_present boolean;
    v_overlapping pg_catalog.xid8[];
    -- A cursor without its last part; taken together once, because a page has many.
    v_within pg_catalog.text;
    v_behind pg_catalog.text;
    v_is_trusted pg_catalog.bool := pg_catalog.has_function_privilege('realtime.read_cursor(realtime.cursor, pg_catalog.text)', 'execute');
begin
    if v_is_trusted then
        select place.since, place.until, place.seq into v_since, v_until, v_seq
        from realtime.read_cursor(after, messages_after.topic) as place;
    else
        select place.since, place.until, place.seq into v_since, v_until, v_seq from realtime.read_cursor(after) as place;
    end if;
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
            case when pg_catalog.lead(page.seq) over (order by page.seq) is null then v_behind else v_within end operator(pg_catalog.||) page.seq::pg_catalog.text
        from (
            (
                select m.*
                from realtime.messages as m
                where m.topic operator(pg_catalog.=) messages_after.topic
                    and m.extension operator(pg_catalog.=) 'broadcast'
                    and m.seq operator(pg_catalog.>) v_seq
                    and m.xid operator(pg_catalog.>=) pg_catalog.pg_snapshot_xmax(v_since)
                    and pg_catalog.pg_visible_in_snapshot(m.xid, v_until)
                    and (messages_after.private is null or m.private operator(pg_catalog.=) messages_after.private)
                order by m.seq
                limit v_left operator(pg_catalog.+) 1
            )
            union all
            (
                select m.*
                from realtime.messages as m
                where m.topic operator(pg_catalog.=) messages_after.topic
                    and m.extension operator(pg_catalog.=) 'broadcast'
                    and (v_is_present or m.seq operator(pg_catalog.>) v_seq)
                    and m.xid operator(pg_catalog.=) any (array(select pg_catalog.pg_snapshot_xip(v_since)))
                    and pg_catalog.pg_visible_in_snapshot(m.xid, v_until)
                    and (messages_after.private is null or m.private operator(pg_catalog.=) messages_after.private)
                order by m.seq
                limit v_left operator(pg_catalog.+) 1
            )
            union all
            (
                select m.*
                from realtime.messages as m
                where v_is_present
                    and m.topic operator(pg_catalog.=) messages_after.topic
                    and m.extension operator(pg_catalog.=) 'broadcast'
                    and m.seq operator(pg_catalog.<=) v_seq
                    and m.xid operator(pg_catalog.=) any (v_overlapping)
                    and pg_catalog.pg_visible_in_snapshot(m.xid, v_until)
                    and (messages_after.private is null or m.private operator(pg_catalog.=) messages_after.private)
                order by m.seq
                limit v_left operator(pg_catalog.+) 1
            )
        ) as page
        order by page.seq
        limit v_left;
        get diagnostics v_found = row_count;
        v_left := v_left operator(pg_catalog.-) v_found;
        exit when v_is_present or v_left operator(pg_catalog.=) 0;
        v_since := v_until;
        v_until := null;
    end loop;
    -- What was dropped since the cursor was looked at may not have been read: the read waits while a partition is dropped.
    if v_is_trusted then
        perform realtime.read_cursor(after, messages_after.topic);
    else
        perform realtime.read_cursor(after);
    end if;
end
$$;
comment on function realtime.messages_after(text, realtime.cursor, integer, boolean) is
    'Messages of a topic behind a cursor that the caller may see, in order, at most 10,000, each with the cursor to go on from. private: null for both rooms of the name. Raises RT001 where messages are missing.';

create or replace function realtime.messages_between(topic text, since timestamptz, max_rows integer)
returns table (id uuid, event text, payload jsonb, binary_payload bytea, xid xid8)
language sql
stable
begin atomic
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
    order by newest.seq;
end;
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
set search_path = pg_catalog, pg_temp
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
-- Row changes: which tables tell theirs, what of them is wanted, and who may see it. Called by the servers only.
--
-- An image is a row as a JSON object, column by column: strings of the text that PostgreSQL writes for the values, null for null. So what is
-- read from it is what was written: bounds of arrays, and null in json, which is not null. A column that is not known is absent.
--
-- Most questions are about a few rows, and to plan a statement on the catalog takes longer than to execute it. So functions that are called
-- for each question are in PL/pgSQL, which keeps plans for the session, and with force_generic_plan, which keeps them for all arguments.

create or replace function realtime.table_name(relation oid)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select format('%I.%I', n.nspname, c.relname)
    from pg_class as c
    join pg_namespace as n on n.oid = c.relnamespace
    where c.oid = table_name.relation
$$;
comment on function realtime.table_name(oid) is 'A table with its schema, whatever the path: what users'' functions leave in a session must not be found instead.';
revoke all on function realtime.table_name(oid) from public;

create or replace function realtime.base_type(type oid)
returns oid
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
begin
    return (
        with recursive base as (
            select t.oid, t.typtype, t.typbasetype from pg_type as t where t.oid = base_type.type
            union all
            select t.oid, t.typtype, t.typbasetype from pg_type as t join base on t.oid = base.typbasetype and base.typtype = 'd'
        )
        select base.oid from base where base.typtype <> 'd'
    );
end
$$;
comment on function realtime.base_type(oid) is 'What a domain is made of, at the bottom; other types themselves.';

create or replace function realtime.is_inert(type oid)
returns boolean
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
begin
    return (
        with recursive part as (
            select t.oid, t.typtype, t.typelem from pg_type as t where t.oid = is_inert.type
            union all
            select t.oid, t.typtype, t.typelem from pg_type as t join part on t.oid = part.typelem and part.oid >= 16384
        )
        select bool_and(part.oid < 16384 or part.typtype = 'e' or part.typelem <> 0)
            and not exists (
                select from pg_cast as c where c.castsource in (select part.oid from part) and c.casttarget = 114 and c.oid >= 16384
            )
        from part
    );
end
$$;
comment on function realtime.is_inert(oid) is
    'Whether values of a type are read, compared and written by PostgreSQL alone: built-in types, enums and arrays of both. For other types functions of users may be called.';
revoke all on function realtime.is_inert(oid) from public;

create or replace function realtime.declared_type(relation oid, attnum smallint)
returns text
language plpgsql
stable
set search_path = ''
set plan_cache_mode = force_generic_plan
as $$
begin
    return (
        select case when realtime.base_type(a.atttypid) in (114, 3802) then 'text' else pg_catalog.format_type(a.atttypid, a.atttypmod) end
            || coalesce((
                select pg_catalog.format(' collate %I.%I', n.nspname, c.collname)
                from pg_catalog.pg_collation as c
                join pg_catalog.pg_namespace as n on n.oid = c.collnamespace
                where c.oid = a.attcollation and c.oid <> t.typcollation
            ), '')
        from pg_catalog.pg_attribute as a
        join pg_catalog.pg_type as t on t.oid = a.atttypid
        where a.attrelid = declared_type.relation and a.attnum = declared_type.attnum
    );
end
$$;
comment on function realtime.declared_type(oid, smallint) is
    'The type of a column, as in a list of column definitions for an image; text instead of json and jsonb, for which a string would be one of JSON.';
revoke all on function realtime.declared_type(oid, smallint) from public;

-- A row of which only some columns are known is none of its table, where a domain among the others does not allow null.
create or replace function realtime.populated(relation oid, image text, only_key boolean default false)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
begin
    return (
        select pg_catalog.format(
            '(select %s from pg_catalog.jsonb_to_record(%s) as image (%s)) as row',
            pg_catalog.string_agg(pg_catalog.format('image.%1$I::%2$s as %1$I', a.attname, known.type), ', ' order by a.attnum),
            populated.image,
            pg_catalog.string_agg(
                pg_catalog.format(
                    '%I %s',
                    a.attname,
                    case when t.typtype = 'd' and known.base not in (114, 3802) then known.type else realtime.declared_type(a.attrelid, a.attnum) end
                ),
                ', ' order by a.attnum
            )
        )
        from pg_catalog.pg_attribute as a
        join pg_catalog.pg_type as t on t.oid = a.atttypid
        cross join lateral (
            select base, pg_catalog.format_type(base, -1) as type from realtime.base_type(t.oid) as base
        ) as known
        where a.attrelid = populated.relation
            and a.attnum > 0
            and not a.attisdropped
            and (
                not only_key
                or exists (select from pg_catalog.pg_index as i where i.indrelid = a.attrelid and i.indisprimary and a.attnum = any (i.indkey::int2[]))
            )
    );
end
$$;
comment on function realtime.populated(oid, text, boolean) is 'A lateral item for FROM: "row", of a table''s columns or those of its primary key, from an expression that is an image. Columns that are absent become null.';
revoke all on function realtime.populated(oid, text, boolean) from public;

-- Only by its text does a whole row become one of its table's type, which policies may ask for, with each value read as it was written.
create or replace function realtime.row_texts(relation oid, images jsonb)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
begin
    return (
        select jsonb_agg(written.row order by i.n)
        from jsonb_array_elements(images) with ordinality as i (image, n)
        cross join lateral (
            select '(' || string_agg(
                coalesce('"' || replace(replace(i.image ->> a.attname, '\', '\\'), '"', '""') || '"', ''), ',' order by a.attnum
            ) || ')' as row
            from pg_attribute as a
            where a.attrelid = row_texts.relation and a.attnum > 0 and not a.attisdropped
        ) as written
    );
end
$$;
comment on function realtime.row_texts(oid, jsonb) is 'Images as the texts of rows of a table''s type, in order. Columns that are absent become null.';
revoke all on function realtime.row_texts(oid, jsonb) from public;

create or replace function realtime.written(value anyelement)
returns text
language sql
stable
strict
set search_path = pg_catalog, pg_temp
as $$
    select pg_catalog.format('%s', value)
$$;
comment on function realtime.written(anyelement) is 'The text that the type of a value writes for it, which a cast to text is not always.';
revoke all on function realtime.written(anyelement) from public;

-- Who reads a whole row reads all of it. A policy that takes a function's word reads what the function is given. And no row can be made
-- without a value that its domain insists on.
create or replace function realtime.policy_columns(relation oid)
returns text[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
begin
    return (
        select array(
            select a.attname::text
            from pg_attribute as a
            join pg_type as type on type.oid = a.atttypid
            where a.attrelid = policy_columns.relation
                and a.attnum > 0
                and not a.attisdropped
                and (
                    exists (
                        select
                        from pg_policy as p
                        where p.polrelid = a.attrelid
                            and p.polcmd in ('r', '*')
                            and (
                                strpos(p.polqual::text, ' :varattno 0 ') > 0
                                or exists (
                                    select
                                    from pg_depend as d
                                    where d.classid = 'pg_policy'::regclass
                                        and d.objid = p.oid
                                        and d.refclassid = 'pg_class'::regclass
                                        and d.refobjid = a.attrelid
                                        and d.refobjsubid = a.attnum
                                )
                            )
                    )
                    or type.typtype = 'd' and exists (
                        with recursive domain as (
                            select t.typnotnull, t.typbasetype from pg_type as t where t.oid = a.atttypid and t.typtype = 'd'
                            union all
                            select t.typnotnull, t.typbasetype from pg_type as t join domain on t.oid = domain.typbasetype and t.typtype = 'd'
                        )
                        select from domain where domain.typnotnull
                    )
                )
        )
    );
end
$$;
comment on function realtime.policy_columns(oid) is
    'The columns of a table that its policies for SELECT read, and those that are never null because of their domain: without them, a row cannot be judged.';
revoke all on function realtime.policy_columns(oid) from public;

create or replace function realtime.checked_columns(relation oid)
returns text[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
begin
    return (
        select array(
            select a.attname::text
            from pg_attribute as a
            join pg_type as type on type.oid = a.atttypid
            where a.attrelid = checked_columns.relation
                and a.attnum > 0
                and not a.attisdropped
                and type.typtype = 'd'
                and exists (
                    with recursive domain as (
                        select t.oid, t.typbasetype from pg_type as t where t.oid = a.atttypid and t.typtype = 'd'
                        union all
                        select t.oid, t.typbasetype from pg_type as t join domain on t.oid = domain.typbasetype and t.typtype = 'd'
                    )
                    select from domain join pg_constraint as c on c.contypid = domain.oid
                )
        )
    );
end
$$;
comment on function realtime.checked_columns(oid) is 'The columns of a table whose domain has a constraint, which may or may not allow null.';
revoke all on function realtime.checked_columns(oid) from public;

create or replace function realtime.published_tables(roles text[])
returns table (
    relation oid,
    schema text,
    name text,
    has_row_security boolean,
    has_whole_old boolean,
    row_filter text,
    is_captured boolean,
    events text[],
    columns jsonb,
    access jsonb,
    policy_columns text[]
)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with published as (
        select
            c.oid,
            n.nspname,
            n.oid as namespace,
            c.relname,
            c.relowner,
            c.relrowsecurity,
            c.relforcerowsecurity,
            -- What is written to the log is up to each partition, whatever the root says.
            case when c.relreplident <> 'f' or not exists (
                with recursive part as (
                    select i.inhrelid as oid from pg_inherits as i where i.inhparent = c.oid and c.relkind = 'p'
                    union all
                    select i.inhrelid from pg_inherits as i join part on i.inhparent = part.oid
                )
                select from part join pg_class as p on p.oid = part.oid where p.relkind = 'r' and p.relreplident <> 'f'
            ) then c.relreplident else 'd' end as relreplident,
            -- Row filters and column lists came with PostgreSQL 15.
            to_jsonb(p) ->> 'rowfilter' as rowfilter,
            to_jsonb(p) -> 'attnames' as attnames
        from pg_publication_tables as p
        join pg_namespace as n on n.nspname = p.schemaname
        join pg_class as c on c.relnamespace = n.oid and c.relname = p.tablename
        -- In a publication for all tables there are ours, too.
        where p.pubname = 'supabase_realtime' and n.nspname <> 'realtime'
    ),
    attribute as (
        select
            a.attrelid,
            a.attname,
            a.attnum,
            a.attgenerated <> '' as is_generated,
            a.atttypid,
            t.typname,
            realtime.base_type(a.atttypid) as base,
            -- Without the columns that an index only includes.
            coalesce(a.attnum = any ((primary_key.indkey::int2[])[0:primary_key.indnkeyatts - 1]), false) as is_key,
            -- A generated column is not in the list that stands for all columns, before PostgreSQL 18 it never is.
            published.attnames is null
                or published.attnames ? a.attname
                or (a.attgenerated <> '' and not exists (
                    select
                    from pg_attribute as plain
                    where plain.attrelid = published.oid
                        and plain.attnum > 0
                        and not plain.attisdropped
                        and plain.attgenerated = ''
                        and not published.attnames ? plain.attname
                )) as is_published
        from published
        join pg_attribute as a on a.attrelid = published.oid and a.attnum > 0 and not a.attisdropped
        join pg_type as t on t.oid = a.atttypid
        left join pg_index as primary_key on primary_key.indrelid = published.oid and primary_key.indisprimary
    ),
    identity as (
        select published.oid, array_agg(a.attname::text) as columns
        from published
        join pg_index as i on i.indrelid = published.oid
            and case published.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident end
        join pg_attribute as a on a.attrelid = published.oid and a.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1])
        group by published.oid
    )
    select
        published.oid,
        published.nspname::text,
        published.relname::text,
        published.relrowsecurity,
        published.relreplident = 'f',
        published.rowfilter,
        exists (
            select
            from pg_trigger as t
            where t.tgrelid = published.oid
                and t.tgfoid = to_regprocedure('realtime.capture_change()')
                and not t.tgisinternal
                -- What the clone of a root's trigger writes is told of the root.
                and t.tgparentid = 0
                and t.tgenabled <> 'D'
        ),
        array_remove(array[
            case when publication.pubinsert then 'INSERT' end,
            case when publication.pubupdate then 'UPDATE' end,
            case when publication.pubdelete then 'DELETE' end
        ], null),
        (
            select coalesce(
                jsonb_agg(
                    jsonb_build_object(
                        'name', a.attname,
                        'type', a.typname,
                        -- These two for servers of before.
                        'type_oid', a.atttypid::bigint,
                        'is_json', a.base in (114, 3802),
                        'is_bytea', a.base = 17,
                        'is_bool', a.base = 16,
                        'is_key', a.is_key,
                        'is_identity', published.relreplident = 'f' or coalesce(a.attname = any (identity.columns), false),
                        'is_generated', a.is_generated,
                        'is_published', a.is_published
                    )
                    order by a.attnum
                ),
                '[]'
            )
            from attribute as a
            where a.attrelid = published.oid
        ),
        (
            select coalesce(
                jsonb_object_agg(
                    r.rolname,
                    jsonb_build_object(
                        'columns', (
                            select coalesce(jsonb_agg(a.attname order by a.attnum), '[]')
                            from attribute as a
                            where a.attrelid = published.oid
                                and a.is_published
                                and has_schema_privilege(r.oid, published.namespace, 'usage')
                                and has_column_privilege(r.oid, published.oid, a.attnum, 'select')
                        ),
                        'is_bound', published.relrowsecurity
                            and not (r.rolsuper or r.rolbypassrls)
                            and (published.relforcerowsecurity or not pg_has_role(r.oid, published.relowner, 'usage'))
                    )
                ),
                '{}'
            )
            from pg_roles as r
            where r.rolname = any (roles)
        ),
        realtime.policy_columns(published.oid) || realtime.checked_columns(published.oid)
    from published
    cross join pg_publication as publication
    left join identity on identity.oid = published.oid
    where publication.pubname = 'supabase_realtime'
    order by published.oid
$$;
comment on function realtime.published_tables(text[]) is
    'The tables of the publication: columns in order, and for each role which of the published ones it may read and whether row-level security binds it.';
revoke all on function realtime.published_tables(text[]) from public;

-- Rights and row-level security are looked at before each piece of changes. To read all of them each time would cost more than the changes:
-- this tells that one of the rows they are kept in was written.
create or replace function realtime.table_marks(relations oid[])
returns table (relation oid, mark text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
begin
    return query
        select
            c.oid,
            concat_ws(
                '/',
                c.xmin,
                n.xmin,
                (select string_agg(a.xmin::text, ',' order by a.attnum) from pg_attribute as a where a.attrelid = c.oid and a.attnum > 0),
                (select string_agg(m.xmin::text, ',' order by m.roleid, m.member) from pg_auth_members as m),
                p.xmin,
                (select string_agg(concat_ws(':', q.oid, q.xmin), ',' order by q.oid) from pg_policy as q where q.polrelid = c.oid),
                (select string_agg(r.oid::text, ',' order by r.oid) from pg_roles as r where r.rolsuper or r.rolbypassrls),
                -- What is put into the publication, or anew with another row filter, has the highest oid.
                (
                    select concat_ws(',', count(*), max(d.objid))
                    from pg_depend as d
                    where d.refclassid = 'pg_publication'::regclass and d.refobjid = p.oid
                )
            )
        from pg_class as c
        join pg_namespace as n on n.oid = c.relnamespace
        left join pg_publication as p on p.pubname = 'supabase_realtime'
        where c.oid = any (table_marks.relations);
end
$$;
comment on function realtime.table_marks(oid[]) is 'For each table a text that is another one as soon as its columns, its row-level security and policies, rights on it, who bypasses row-level security or what is in the publication have changed.';
revoke all on function realtime.table_marks(oid[]) from public;

-- The caller's claims, as policies read them. Until the end of the transaction, or of the exception block around it.
create or replace function realtime.take_identity(role text, claims jsonb)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    -- To set_config this means "as the session's own role", which row-level security does not bind.
    if coalesce(role, 'none') = 'none' then
        raise exception using errcode = 'invalid_parameter_value', message = 'a role must be named';
    end if;
    perform
        pg_catalog.set_config('request.jwt.claims', claims::text, true),
        pg_catalog.set_config('request.jwt.claim.sub', coalesce(claims ->> 'sub', ''), true),
        pg_catalog.set_config('request.jwt.claim.role', role, true),
        pg_catalog.set_config('role', role, true);
end
$$;
comment on function realtime.take_identity(text, jsonb) is 'Go on as a client with this role and these claims, to the end of the transaction.';
revoke all on function realtime.take_identity(text, jsonb) from public;

-- -- code of users

-- Policies, domains and generated columns call functions of users. A role that was only set could be reset by them, so they run inside a
-- SECURITY DEFINER function that the client's role owns, where PostgreSQL refuses to set a role. Its body is parsed when it is made, by the
-- server's role and under a path on which nobody can plant an operator; functions without a path of their own then run under the usual one.
-- What they change is rolled back together with the function, which therefore never depends on anything.
-- The temporary schema of a session comes with the first object in it, and is gone where that is rolled back. A schema that comes or goes
-- makes PostgreSQL plan all statements of the session anew. So it is made once, and committed. And a transaction that leaves nothing behind
-- need not wait for the disk.
create or replace function realtime.prepare_guarded()
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    perform set_config('synchronous_commit', 'off', true);
    if pg_my_temp_schema() = 0 then
        create temporary table realtime_nothing () on commit drop;
    end if;
end
$$;
comment on function realtime.prepare_guarded() is 'To be called before realtime.make_guarded, outside of what is rolled back.';
revoke all on function realtime.prepare_guarded() from public;

create or replace function realtime.make_guarded(
    name text, role text, arguments text, result text, query text, expressions text[] default '{}'
)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    -- Those of USING, IN, CASE, NULLIF, DISTINCT and ORDER BY are not named in the text of an expression.
    c_operators constant text := ':(?:opnos?|eqop|sortop) (\(o [0-9 ]+\)|[0-9]+)';
    v_operators text;
    v_expression text;
begin
    execute format(
        'create function pg_temp.%I(%s) returns %s language sql security definer set search_path = public, extensions, pg_temp'
        ' begin atomic %s; end',
        make_guarded.name, make_guarded.arguments, make_guarded.result, make_guarded.query
    );
    -- Operators of pg_catalog are found again. Those of users may not be, and have other oids.
    if exists (
        select
        from unnest(make_guarded.expressions) as e (expression)
        cross join regexp_matches(e.expression, c_operators, 'g') as found (operator)
        cross join regexp_matches(found.operator[1], '[0-9]+', 'g') as named (oid)
        where named.oid[1]::oid >= 16384
    ) then
        select string_agg(found.operator[1], ' ')
        into v_operators
        from pg_proc as p
        cross join regexp_matches(p.prosqlbody::text, c_operators, 'g') as found (operator)
        where p.oid = format('pg_temp.%I(%s)', make_guarded.name, make_guarded.arguments)::regprocedure;
        foreach v_expression in array make_guarded.expressions loop
            if strpos(
                concat(' ', v_operators, ' '),
                (
                    select concat(' ', string_agg(found.operator[1] || ' ', ''))
                    from regexp_matches(v_expression, c_operators, 'g') as found (operator)
                )
            ) = 0 then
                raise exception using
                    errcode = 'feature_not_supported',
                    message = 'an expression has an operator outside of pg_catalog that its text does not name';
            end if;
        end loop;
    end if;
    execute format('alter function pg_temp.%I(%s) owner to %I', make_guarded.name, make_guarded.arguments, make_guarded.role);
end
$$;
comment on function realtime.make_guarded(text, text, text, text, text, text[]) is
    'Makes a function in pg_temp that runs a query as a role which the code it calls cannot leave. To be rolled back. expressions: node trees whose text is part of the query; raises if they are not parsed as they were.';
revoke all on function realtime.make_guarded(text, text, text, text, text, text[]) from public;

create or replace function realtime.ask_guarded(role text, query text, argument jsonb, expressions text[] default '{}')
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_answer jsonb;
    v_is_done boolean := false;
begin
    perform realtime.prepare_guarded();
    begin
        perform realtime.make_guarded('realtime_question', ask_guarded.role, 'jsonb', 'jsonb', ask_guarded.query, expressions);
        perform realtime.take_identity(ask_guarded.role, '{}');
        execute 'select pg_temp.realtime_question($1)' into v_answer using ask_guarded.argument;
        v_is_done := true;
        raise exception using errcode = 'RT000';
    exception when others then
        if not v_is_done then
            raise;
        end if;
    end;
    return v_answer;
end
$$;
comment on function realtime.ask_guarded(text, text, jsonb, text[]) is
    'The answer of a query on $1, run as a role that the code it calls cannot leave; nothing else of it remains.';
revoke all on function realtime.ask_guarded(text, text, jsonb, text[]) from public;

-- -- filters

-- An operator of whoever made the type, or that of its operator class, which only a superuser can make. Others may be anybody's.
create or replace function realtime.filter_operator(type oid, symbol text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(
        (
            select format('operator(%I.%s)', n.nspname, o.oprname)
            from pg_type as t
            join pg_operator as o on o.oprowner = t.typowner and o.oprleft = t.oid
            join pg_namespace as n on n.oid = o.oprnamespace
            where t.oid = filter_operator.type and o.oprname = symbol and o.oprright in (t.oid, 25)
            order by o.oprright = t.oid desc, o.oprnamespace = t.typnamespace desc, o.oid
            limit 1
        ),
        (
            select format('operator(%I.%s)', n.nspname, case when symbol = '<>' then negator.oprname else o.oprname end)
            from pg_type as t
            join pg_opclass as c
                on c.opcintype = case
                    when t.typtype = 'c' then 'record'::regtype
                    when t.typtype = 'r' then 'anyrange'::regtype
                    when t.typtype = 'm' then 'anymultirange'::regtype
                    when t.typelem <> 0 then 'anyarray'::regtype
                    else t.oid
                end
            join pg_am as a on a.oid = c.opcmethod and a.amname = 'btree'
            join pg_amop as m on m.amopfamily = c.opcfamily and m.amoplefttype = c.opcintype and m.amoprighttype = c.opcintype
            join pg_operator as o on o.oid = m.amopopr
            join pg_namespace as n on n.oid = o.oprnamespace
            left join pg_operator as negator on negator.oid = o.oprnegate
            where t.oid = filter_operator.type
                and c.opcdefault
                and m.amopstrategy = array_position(array['<', '<=', '=', '>=', '>'], case symbol when '<>' then '=' else symbol end)
        ),
        format('operator(pg_catalog.%s)', symbol)
    )
$$;
comment on function realtime.filter_operator(oid, text) is 'An operator on two values of a type, written so that no other one is found.';
revoke all on function realtime.filter_operator(oid, text) from public;

-- The comparison of one operator, between a column and "v", the value of the filter, which is of the column's type already.
create or replace function realtime.comparison(operator text, is_negated boolean, value text)
returns text
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    v_text text;
begin
    if operator = 'is' then
        return 'x is ' || case when is_negated then 'not ' else '' end || value;
    end if;
    v_text := '{
        "eq": "x = v",
        "neq": "x <> v",
        "lt": "x < v",
        "lte": "x <= v",
        "gt": "x > v",
        "gte": "x >= v",
        "in": "x = any (v)",
        "like": "x like v",
        "ilike": "x ilike v",
        "match": "x ~ v",
        "imatch": "x ~* v",
        "isdistinct": "x is distinct from v"
    }'::jsonb ->> operator;
    return case when is_negated then 'not (' || v_text || ')' else v_text end;
end
$$;
comment on function realtime.comparison(text, boolean, text) is 'An operator of filters as SQL on x, the column, and v, the value; for "is" the value itself.';

create or replace function realtime.type_comparison(type oid, operator text, is_negated boolean, value text)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    v_operator text;
    v_text text;
begin
    if operator = 'is' or realtime.is_inert(type_comparison.type) then
        return realtime.comparison(operator, is_negated, value);
    end if;
    v_operator := realtime.filter_operator(
        type_comparison.type,
        '{
            "eq": "=",
            "neq": "<>",
            "lt": "<",
            "lte": "<=",
            "gt": ">",
            "gte": ">=",
            "in": "=",
            "like": "~~",
            "ilike": "~~*",
            "match": "~",
            "imatch": "~*",
            "isdistinct": "="
        }'::jsonb ->> operator
    );
    v_text := case operator
        when 'in' then format('x %s any (v)', v_operator)
        when 'isdistinct' then format(
            'case when x is not distinct from null or v is not distinct from null'
            ' then x is distinct from null or v is distinct from null else not (x %s v) end',
            v_operator
        )
        else format('x %s v', v_operator)
    end;
    return case when is_negated then 'not (' || v_text || ')' else v_text end;
end
$$;
comment on function realtime.type_comparison(oid, text, boolean, text) is
    'The same for values of a type that is no domain, with the operators that belong to the type.';
revoke all on function realtime.type_comparison(oid, text, boolean, text) from public;

-- Each comparison is made once, of the column's type and collation and not with null, because some can be written down but not made: those of
-- arrays of points, patterns under nondeterministic collations.
create or replace function realtime.check_filters(relation oid, role text, conditions jsonb, columns text[] default '{}')
returns table (n integer, is_exact boolean, vals text[])
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_condition jsonb;
    v_column text;
    v_operator text;
    v_value text;
    v_type text;
    v_base oid;
    v_collation text;
    v_comparison text;
    v_query text;
    v_answer jsonb;
    v_is_inert boolean;
    v_is_plain boolean;
    v_is_enum boolean;
begin
    foreach v_column in array check_filters.columns loop
        if not exists (
            select
            from pg_attribute as a
            where a.attrelid = check_filters.relation
                and a.attname = v_column
                and a.attnum > 0
                and has_column_privilege(check_filters.role, a.attrelid, a.attnum, 'select')
        ) then
            raise exception 'invalid column for select %', v_column;
        end if;
    end loop;
    for v_condition, n in
        select c.condition, c.number::integer - 1 from jsonb_array_elements(conditions) with ordinality as c (condition, number)
    loop
        v_column := v_condition ->> 'column';
        v_operator := v_condition ->> 'operator';
        v_value := v_condition ->> 'value';
        v_type := null;
        select
            format_type(a.atttypid, -1),
            realtime.base_type(a.atttypid),
            realtime.is_inert(a.atttypid),
            t.typtype = 'e',
            coalesce(c.collisdeterministic, true),
            case when c.oid is null then '' else format(' collate %I.%I', n.nspname, c.collname) end
        into v_type, v_base, v_is_inert, v_is_enum, v_is_plain, v_collation
        from pg_attribute as a
        join pg_type as t on t.oid = a.atttypid
        left join pg_collation as c on c.oid = a.attcollation
        left join pg_namespace as n on n.oid = c.collnamespace
        where a.attrelid = check_filters.relation
            and a.attname = v_column
            and a.attnum > 0
            and has_column_privilege(check_filters.role, a.attrelid, a.attnum, 'select');
        if v_type is null then
            raise exception 'invalid column for filter %', v_column;
        end if;
        -- Types of which two values are equal exactly if their texts are, by operators that are leakproof.
        is_exact := not (v_condition ->> 'is_negated')::boolean
            and v_operator in ('eq', 'in')
            and v_is_plain
            and (v_base in (16, 19, 20, 21, 23, 25, 26, 1043, 2950) or v_is_enum);
        vals := null;
        if v_operator = 'is' then
            if v_value not in ('null', 'true', 'false', 'unknown') then
                raise exception 'invalid value for is filter: must be null, true, false, or unknown';
            elsif v_value <> 'null' and v_base <> 16 then
                raise exception 'is % filter requires a boolean column, got %', v_value, v_type;
            end if;
            return next;
            continue;
        end if;
        v_comparison := realtime.type_comparison(v_base, v_operator, false, null);
        v_query := case
            when v_operator = 'in' then format(
                $q$
                    select jsonb_build_object('count', items.count, 'vals', items.vals, 'is', (
                        select %s from (select ($1 ->> 'value')::%s[] as v, (items.vals ->> 0)::%s%s as x) as pair
                    ))
                    from (
                        select count(*) as count, coalesce(jsonb_agg(format('%%s', item)) filter (where item is not null), '[]') as vals
                        from unnest(($1 ->> 'value')::%s[]) as item
                    ) as items
                $q$,
                v_comparison, v_type, v_type, v_collation, v_type
            )
            when v_operator in ('like', 'ilike', 'match', 'imatch') then format(
                -- Of a domain only the value that was given is known to be one.
                $q$
                    select jsonb_build_object('is', %s) from (select ($1 ->> 'value')::%s%s as x, ($1 ->> 'pattern')::%s as v) as pair
                $q$,
                v_comparison, format_type(v_base, -1), v_collation, v_type
            )
            else format(
                $q$
                    select jsonb_build_object('vals', jsonb_build_array(format('%%s', v)), 'is', %s)
                    from (select ($1 ->> 'value')::%s%s as x, ($1 ->> 'value')::%s as v) as pair
                $q$,
                v_comparison, v_type, v_collation, v_type
            )
        end;
        if v_operator in ('like', 'ilike', 'match', 'imatch') then
            if v_operator in ('like', 'ilike') and (length(v_value) - length(rtrim(v_value, '\'))) % 2 = 1 then
                -- PostgreSQL finds this out when it gets so far, which depends on the row.
                raise exception using
                    errcode = 'invalid_escape_sequence',
                    message = 'LIKE pattern must not end with escape character';
            end if;
            begin
                if v_is_inert then
                    execute v_query into v_answer using jsonb_build_object('value', '', 'pattern', v_value);
                else
                    v_answer := realtime.ask_guarded(
                        check_filters.role, v_query, jsonb_build_object('value', '', 'pattern', v_value)
                    );
                end if;
            exception
                when undefined_function or ambiguous_function then
                    raise exception 'operator % requires a text-compatible column type, got %', v_operator, v_type;
                when invalid_regular_expression then
                    raise exception 'invalid regular expression for % filter: %', v_operator, sqlerrm;
            end;
        else
            if v_is_inert then
                execute v_query into v_answer using v_condition;
            else
                v_answer := realtime.ask_guarded(check_filters.role, v_query, v_condition);
            end if;
            if (v_answer ->> 'count')::bigint > 100 then
                raise exception 'too many values for `in` filter. Maximum 100';
            end if;
            vals := array(select jsonb_array_elements_text(v_answer -> 'vals'));
        end if;
        return next;
    end loop;
end
$$;
comment on function realtime.check_filters(oid, text, jsonb, text[]) is
    'Whether a role may filter by these conditions and select these columns; raises what is wrong. For each condition that compares for equality of text (is_exact) the texts that fit.';
revoke all on function realtime.check_filters(oid, text, jsonb, text[]) from public;

-- All conditions of one column and operator are one statement, however many values there are.
create or replace function realtime.match_changes(relation oid, role text, images jsonb, conditions jsonb)
returns table (image integer, condition integer)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_group record;
    v_query text;
    v_argument jsonb;
    v_answer jsonb;
begin
    for v_group in
        select
            c.condition ->> 'column' as column_name,
            c.condition ->> 'operator' as operator,
            (c.condition ->> 'is_negated')::boolean as is_negated,
            case when c.condition ->> 'operator' = 'is' then c.condition ->> 'value' end as keyword,
            jsonb_agg(c.condition ->> 'value') as vals,
            jsonb_agg(c.number - 1) as numbers,
            jsonb_agg(c.condition -> 'images') as images,
            format_type(a.atttypid, -1) as type,
            realtime.base_type(a.atttypid) as base,
            realtime.is_inert(a.atttypid) as is_inert,
            realtime.declared_type(a.attrelid, a.attnum) as declared
        from jsonb_array_elements(conditions) with ordinality as c (condition, number)
        join pg_attribute as a
            on a.attrelid = match_changes.relation and a.attname = c.condition ->> 'column' and a.attnum > 0 and not a.attisdropped
        group by 1, 2, 3, 4, a.attrelid, a.attnum, a.atttypid
    loop
        v_query := format(
            $q$
                with wanted as materialized (
                    select
                        ($1 -> 'numbers' -> (w.n::integer - 1))::integer as number,
                        $1 -> 'wanted' -> (w.n::integer - 1) as images,
                        w.value::%1$s%2$s as v
                    from jsonb_array_elements_text($1 -> 'vals') with ordinality as w (value, n)
                ),
                found as materialized (
                    select i.n::integer - 1 as n, row.x::%6$s as x
                    from jsonb_array_elements($1 -> 'images') with ordinality as i (image, n)
                    cross join lateral jsonb_to_record(jsonb_build_object('x', i.image -> %3$L)) as row (x %4$s)
                    where i.image ? %3$L
                )
                select coalesce(jsonb_agg(jsonb_build_array(asked.n, asked.number)), '[]')
                from (
                    select found.n, wanted.number, found.x, wanted.v
                    from wanted
                    cross join lateral jsonb_array_elements_text(case jsonb_typeof(wanted.images) when 'array' then wanted.images end) as image
                    join found on found.n = image::integer
                    where jsonb_typeof(wanted.images) = 'array'
                    union all
                    select found.n, wanted.number, found.x, wanted.v
                    from wanted
                    cross join found
                    where jsonb_typeof(wanted.images) is distinct from 'array'
                    offset 0
                ) as asked
                where %5$s
            $q$,
            case when v_group.operator = 'is' then 'text' else v_group.type end,
            case when v_group.operator = 'in' then '[]' else '' end,
            v_group.column_name,
            v_group.declared,
            realtime.type_comparison(v_group.base, v_group.operator, v_group.is_negated, v_group.keyword),
            v_group.type
        );
        v_argument := jsonb_build_object(
            'images', images, 'vals', v_group.vals, 'numbers', v_group.numbers, 'wanted', v_group.images
        );
        if v_group.is_inert then
            execute v_query into v_answer using v_argument;
        else
            v_answer := realtime.ask_guarded(match_changes.role, v_query, v_argument);
        end if;
        return query
            select (pair ->> 0)::integer, (pair ->> 1)::integer from jsonb_array_elements(v_answer) as pair;
    end loop;
end
$$;
comment on function realtime.match_changes(oid, text, jsonb, jsonb) is
    'Which images satisfy which conditions, both counted from 0, by PostgreSQL''s own comparison. A condition is evaluated on its own "images" only, if it has any listed. A column that is absent satisfies none.';
revoke all on function realtime.match_changes(oid, text, jsonb, jsonb) from public;

-- -- row-level security

-- The condition that PostgreSQL itself puts behind a SELECT of this role: no restrictive policy may say otherwise, and one permissive policy
-- must say yes. In that order, so that what would raise for a row is not asked where PostgreSQL would not ask.
create or replace function realtime.policy_condition(relation oid, role text, out condition text, out trees text[])
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
begin
    select
        case
            when count(*) filter (where p.is_permissive) = 0 then 'false'
            else concat(
                string_agg('(' || p.condition || ') is true and ', '' order by p.name) filter (where not p.is_permissive),
                '(',
                string_agg('(' || p.condition || ')', ' or ' order by p.name desc) filter (where p.is_permissive),
                ')'
            )
        end,
        case when count(*) filter (where p.is_permissive) = 0 then '{}' else array_agg(p.tree) end
    into policy_condition.condition, policy_condition.trees
    from (
        select p.polname as name, p.polpermissive as is_permissive, pg_get_expr(p.polqual, p.polrelid) as condition, p.polqual::text as tree
        from pg_policy as p
        where p.polrelid = policy_condition.relation
            and p.polcmd in ('r', '*')
            and p.polqual is not null
            and exists (
                select
                from unnest(p.polroles) as member (oid)
                where member.oid = 0 or pg_has_role(policy_condition.role, member.oid, 'usage')
            )
    ) as p;
end
$$;
comment on function realtime.policy_condition(oid, text) is
    'The policies for SELECT of a table, as they apply to a role: as one condition in which all names outside of pg_catalog are qualified, and the node trees that its parts are the texts of.';
revoke all on function realtime.policy_condition(oid, text) from public;

-- A policy knows its tables and functions; written out, it has to find them again. All names are qualified but those of pg_catalog. It is read
-- by the server's role, because the client's may not use a schema that the policy reaches into, as is advised for definer functions.
create or replace function realtime.make_visible(name text, relation oid, role text)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    perform realtime.make_guarded(
        make_visible.name,
        make_visible.role,
        'text[], integer[]',
        'integer[]',
        format(
            $q$
                select coalesce(array_agg(asked.n), '{}')
                from rows from (unnest($1), unnest($2)) as asked (row, n)
                where (select %s from cast(asked.row as %s) as %I)
            $q$,
            policies.condition,
            realtime.table_name(c.oid),
            c.relname
        ),
        policies.trees
    )
    from pg_class as c
    cross join realtime.policy_condition(make_visible.relation, make_visible.role) as policies
    where c.oid = make_visible.relation;
end
$$;
comment on function realtime.make_visible(text, oid, text) is
    'Makes a function in pg_temp that tells which of the rows $1, as texts, whose numbers are $2, a role may see by the policies for SELECT. To be rolled back.';
revoke all on function realtime.make_visible(text, oid, text) from public;

-- An image is judged, not the row as it is by now: what the row has become says nothing of who may see what it was. So the condition of the
-- policies is evaluated on the image itself, under the name of the table, by the role and with the claims of each client in turn. Each set
-- of claims stands alone: a policy that raises for one hides nothing from the others. Nothing that policies do remains.
create or replace function realtime.visible_changes(relation oid, images jsonb, roles text[], claims jsonb[], wanted jsonb)
returns table (question integer, visible integer[], problem text, unknown integer[])
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    c_mark constant text := (select mark from realtime.table_marks(array[visible_changes.relation]));
    c_rows constant jsonb := realtime.row_texts(visible_changes.relation, visible_changes.images);
    v_columns text[] := realtime.policy_columns(visible_changes.relation);
    v_unknown integer[];
    v_asked record;
    v_column text;
    v_role text;
    v_name text;
    v_number integer := 0;
    v_role_problem text;
    v_is_done boolean;
begin
    foreach v_column in array realtime.checked_columns(visible_changes.relation) loop
        if v_column <> all (v_columns)
            and exists (select from jsonb_array_elements(visible_changes.images) as i (image) where not i.image ? v_column)
        then
            begin
                perform realtime.ask_guarded(
                    'anon',
                    format('select to_jsonb(null::%s is null)', format_type(a.atttypid, -1)),
                    null
                )
                from pg_attribute as a
                where a.attrelid = visible_changes.relation and a.attname = v_column;
            exception when others then
                v_columns := v_columns || v_column;
            end;
        end if;
    end loop;
    v_unknown := array(
        select i.n - 1
        from jsonb_array_elements(visible_changes.images) with ordinality as i (image, n)
        where not i.image ?& v_columns
    );
    perform realtime.prepare_guarded();
    begin
        for v_asked in
            select
                c.role,
                c.claims,
                c.number::integer - 1 as number,
                w.numbers,
                w.rows,
                w.unknown
            from rows from (
                unnest(roles), unnest(visible_changes.claims), jsonb_array_elements(wanted)
            ) with ordinality as c (role, claims, wanted, number)
            -- Not all rows: EXECUTE copies its arguments.
            cross join lateral (
                select
                    array_agg(n::integer) filter (where is_known) as numbers,
                    array_agg(c_rows ->> n::integer) filter (where is_known) as rows,
                    coalesce(array_agg(n::integer) filter (where not is_known), '{}') as unknown
                from jsonb_array_elements_text(c.wanted) as n
                cross join lateral (select n::integer <> all (v_unknown) as is_known) as known
            ) as w
            order by c.role
        loop
            if v_role is distinct from v_asked.role then
                v_role := v_asked.role;
                v_number := v_number + 1;
                v_name := format('realtime_visible_%s', v_number);
                v_role_problem := null;
                begin
                    perform realtime.make_visible(v_name, visible_changes.relation, v_role);
                exception when others then
                    v_role_problem := sqlstate || ': ' || sqlerrm;
                end;
            end if;
            question := v_asked.number;
            unknown := v_asked.unknown;
            visible := '{}';
            problem := v_role_problem;
            if problem is null and cardinality(v_asked.numbers) > 0 then
                v_is_done := false;
                begin
                    perform realtime.take_identity(v_role, v_asked.claims);
                    execute format('select pg_temp.%I($1, $2)', v_name) into visible using v_asked.rows, v_asked.numbers;
                    v_is_done := true;
                    raise exception using errcode = 'RT000';
                exception when others then
                    if not v_is_done then
                        -- Was it the policy, or do the rows not go with a table that was altered meanwhile?
                        if c_mark is distinct from (select mark from realtime.table_marks(array[visible_changes.relation])) then
                            raise;
                        end if;
                        visible := '{}';
                        problem := sqlstate || ': ' || sqlerrm;
                    end if;
                end;
            end if;
            return next;
        end loop;
        v_is_done := null;
        raise exception using errcode = 'RT000';
    exception when others then
        if v_is_done is not null then
            raise;
        end if;
    end;
end
$$;
comment on function realtime.visible_changes(oid, jsonb, text[], jsonb[], jsonb) is
    'Which of the images that it asks for each client may see by the policies for SELECT. wanted: for each client a list of images, counted from 0. problem: when a policy could not be evaluated; then nothing is visible. unknown: images that lack a column that policies read.';
revoke all on function realtime.visible_changes(oid, jsonb, text[], jsonb[], jsonb) from public;

create or replace function realtime.render_changes(relation oid, images jsonb)
returns setof text
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
as $$
declare
    v_query text := format(
        'select jsonb_agg(to_jsonb(row.*)::text order by i.n)'
        ' from jsonb_array_elements($1) with ordinality as i (image, n) cross join lateral %s',
        realtime.populated(render_changes.relation, 'i.image')
    );
    v_answer jsonb;
begin
    if (
        select coalesce(bool_and(realtime.is_inert(realtime.base_type(a.atttypid))), true)
        from pg_attribute as a
        where a.attrelid = render_changes.relation and a.attnum > 0 and not a.attisdropped
    ) then
        execute v_query into v_answer using images;
    else
        v_answer := realtime.ask_guarded('anon', v_query, images);
    end if;
    return query select jsonb_array_elements_text(v_answer);
end
$$;
comment on function realtime.render_changes(oid, jsonb) is 'Images as to_jsonb writes rows, in order, whatever the database sets for everybody. Columns that are absent become null.';
revoke all on function realtime.render_changes(oid, jsonb) from public;

-- By the operators of its index, which belong to the types. Null where a type would have code of users called to read its values.
create or replace function realtime.key_condition(relation oid)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when bool_and(realtime.is_inert(known.base) or t.typtype = 'b' and t.typelem = 0)
        then string_agg(format('stored.%1$I operator(%2$I.%3$s) row.%1$I', a.attname, n.nspname, o.oprname), ' and ')
    end
    from pg_index as i
    cross join lateral unnest(i.indkey::int2[], i.indclass::oid[]) with ordinality as k (attnum, opclass, number)
    join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = k.attnum
    cross join lateral (select realtime.base_type(a.atttypid) as base) as known
    join pg_type as t on t.oid = known.base
    join pg_opclass as c on c.oid = k.opclass
    join pg_amop as m on m.amopfamily = c.opcfamily and m.amoplefttype = c.opcintype and m.amoprighttype = c.opcintype and m.amopstrategy = 3
    join pg_operator as o on o.oid = m.amopopr
    join pg_namespace as n on n.oid = o.oprnamespace
    where i.indrelid = key_condition.relation and i.indisprimary and k.number <= i.indnkeyatts
$$;
comment on function realtime.key_condition(oid) is 'That a row "stored" of a table has the primary key of "row".';
revoke all on function realtime.key_condition(oid) from public;

-- The log has no generated columns before PostgreSQL 18, no columns that are not published, and no large values that an UPDATE left as they
-- were. Those the table may still have: the row as it is now tells them if it is, in what is known, what it was at the change. Then clients
-- are told nothing that they could not select. Policies of the table are not asked: where they bind the server, it knows nothing.
create or replace function realtime.complete_changes(relation oid, images jsonb)
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set row_security = off
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
as $$
declare
    c_key constant text := realtime.key_condition(complete_changes.relation);
    v_generated text;
    v_expressions text[];
    v_stored text;
    v_is_read boolean;
    v_complete jsonb := images;
begin
    select
        string_agg(
            format(
                'case when i.image ?& %L::text[] then jsonb_build_object(%L, format(''%%s'', %s)) else ''{}'' end',
                array(
                    select source.attname
                    from pg_attribute as source
                    where source.attrelid = a.attrelid and strpos(d.adbin::text, concat(' :varattno ', source.attnum, ' ')) > 0
                ),
                a.attname,
                pg_get_expr(d.adbin, d.adrelid)
            ),
            ' || ' order by a.attnum
        ) filter (where a.attgenerated <> ''),
        array_agg(d.adbin::text) filter (where a.attgenerated <> ''),
        string_agg(format('array[%1$L, realtime.written(stored.%1$I)]', a.attname), ', ' order by a.attnum) filter (where a.attgenerated = ''),
        -- The table itself, which somebody may have locked, is read only for what cannot be computed.
        bool_or(a.attgenerated = '' and exists (
            select from jsonb_array_elements(images) as wanted (image) where not wanted.image ? a.attname
        ))
    into v_generated, v_expressions, v_stored, v_is_read
    from pg_attribute as a
    left join pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
    where a.attrelid = complete_changes.relation and a.attnum > 0 and not a.attisdropped;
    if v_is_read and c_key is not null then
        begin
            execute format(
                $q$
                    select jsonb_agg(coalesce(stored.image, '{}') || i.image order by i.n)
                    from jsonb_array_elements($1) with ordinality as i (image, n)
                    left join lateral (
                        select jsonb_object(array[%1$s]) as image from %2$s as stored cross join lateral %3$s where %4$s
                    ) as stored on stored.image @> (i.image - $2)
                $q$,
                v_stored,
                realtime.table_name(complete_changes.relation),
                realtime.populated(complete_changes.relation, 'i.image', true),
                c_key
            ) into v_complete using images, array(
                select a.attname::text
                from pg_attribute as a
                where a.attrelid = complete_changes.relation and a.attgenerated <> ''
            );
        exception when insufficient_privilege then
            v_complete := images;
        end;
    end if;
    if v_generated is not null then
        v_complete := realtime.ask_guarded(
            'anon',
            format(
                'select jsonb_agg(i.image || coalesce(generated.image, ''{}'') order by i.n)'
                ' from jsonb_array_elements($1) with ordinality as i (image, n)'
                ' left join lateral (select %s as image from %s) as generated on true',
                v_generated,
                realtime.populated(complete_changes.relation, 'i.image')
            ),
            v_complete,
            v_expressions
        );
    end if;
    return v_complete;
end
$$;
comment on function realtime.complete_changes(oid, jsonb) is
    'Images with their generated columns computed, and with columns that are not known from the row as it is stored now, if it is still the same otherwise.';
revoke all on function realtime.complete_changes(oid, jsonb) from public;

-- A row filter has only built-in types and functions in it, so no others are read for it.
create or replace function realtime.filter_changes(relation oid, images jsonb)
returns setof integer
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_filter text;
    v_name text;
    v_columns text;
    v_declared text;
begin
    select to_jsonb(p) ->> 'rowfilter', p.tablename into v_filter, v_name
    from pg_publication_tables as p
    join pg_namespace as n on n.nspname = p.schemaname
    join pg_class as c on c.relnamespace = n.oid and c.relname = p.tablename
    where p.pubname = 'supabase_realtime' and c.oid = filter_changes.relation;
    select
        string_agg(format('image.%1$I::%2$s as %1$I', a.attname, format_type(a.atttypid, a.atttypmod)), ', '),
        string_agg(format('%I %s', a.attname, realtime.declared_type(a.attrelid, a.attnum)), ', ')
    into v_columns, v_declared
    from pg_attribute as a
    where a.attrelid = filter_changes.relation and a.attnum > 0 and not a.attisdropped and a.atttypid < 16384;
    return query execute format(
        $q$
            select i.n::integer - 1
            from jsonb_array_elements($1) with ordinality as i (image, n)
            where (select %s from (select %s from jsonb_to_record(i.image) as image (%s)) as %I)
        $q$,
        coalesce(v_filter, 'true'),
        v_columns,
        v_declared,
        v_name
    ) using images;
end
$$;
comment on function realtime.filter_changes(oid, jsonb) is 'Which images, counted from 0, pass the row filter of the publication.';
revoke all on function realtime.filter_changes(oid, jsonb) from public;

-- -- capture by triggers

-- Whose row it is depends on nothing of the writer's: definer rights, and settings that make equal values equal texts.
create or replace function realtime.capture_change()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
as $$
declare
    v_record jsonb;
    v_old_record jsonb;
    v_columns text[];
begin
    begin
        v_record := case when tg_op <> 'DELETE' then to_jsonb(format('%s', new)) end;
        v_old_record := case when tg_op <> 'INSERT' then to_jsonb(format('%s', old)) end;
        -- The table may be altered before it is read.
        if current_setting('transaction_isolation') = 'read committed' then
            v_columns := array(
                select a.attname::text
                from pg_attribute as a
                where a.attrelid = tg_relid and a.attnum > 0 and not a.attisdropped
                order by a.attnum
            );
        else
            -- It may have been altered since the snapshot that tables are read by, those of the catalog too; types are known as they are.
            execute format('select array(select json_object_keys(row_to_json(row))) from (select (null::%s).*) as row', tg_relid::regclass)
            into v_columns;
        end if;
    exception when others then
        -- The writer is not to suffer for it: values may take up 256 MB.
        v_record := null;
        v_old_record := null;
    end;
    insert into realtime.changes (relation, action, record, old_record, columns)
    values (tg_argv[0]::oid, tg_op, v_record, v_old_record, v_columns);
    return null;
end
$$;
comment on function realtime.capture_change() is
    'Writes the row change to realtime.changes; without its rows, where these are too large. On tables of the publication; the argument is the oid of the table as the publication names it.';
revoke all on function realtime.capture_change() from public;

create or replace function realtime.change_doorbell_key()
returns bigint
language sql
immutable
begin atomic
    select realtime.doorbell_key() + 2;
end;
comment on function realtime.change_doorbell_key() is 'Advisory lock that a reader of realtime.changes holds while it sleeps.';
revoke all on function realtime.change_doorbell_key() from public;

create or replace function realtime.ring_change_doorbell()
returns trigger
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    if pg_catalog.current_setting('realtime.doorbell', true) = 'off' then
        return null;
    elsif pg_catalog.pg_try_advisory_lock_shared(realtime.change_doorbell_key()) then
        perform pg_catalog.pg_advisory_unlock_shared(realtime.change_doorbell_key());
    else
        perform pg_catalog.pg_notify('realtime_changes', '');
    end if;
    return null;
end
$$;
comment on function realtime.ring_change_doorbell() is 'Wakes the readers of realtime.changes at commit if one sleeps.';
revoke all on function realtime.ring_change_doorbell() from public;

create or replace trigger ring_doorbell
    after insert on realtime.changes
    for each statement
    execute function realtime.ring_change_doorbell();
comment on trigger ring_doorbell on realtime.changes is 'Wakes the readers at commit if one sleeps.';

-- Exactly the rows that were not visible in "position" and are visible now, as realtime.messages_since reads messages.
create or replace function realtime.captured_since("position" pg_snapshot)
returns table (
    seq bigint,
    relation oid,
    action text,
    changed_at double precision,
    columns text[],
    record text,
    old_record text,
    xid bigint,
    snapshot text
)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with current as materialized (
        select pg_catalog.pg_current_snapshot() as snapshot
    ),
    committed as materialized (
        select c.*
        from realtime.changes as c
        where c.xid >= pg_catalog.pg_snapshot_xmax("position")
            and c.xid < (select pg_catalog.pg_snapshot_xmax(current.snapshot) from current)
        union all
        select c.*
        from realtime.changes as c
        where c.xid = any (array(select pg_catalog.pg_snapshot_xip("position")))
    )
    select null, null, null, null, null, null, null, null, current.snapshot::text
    from current
    union all
    select
        c.seq,
        c.relation,
        c.action,
        extract(epoch from c.changed_at)::double precision,
        c.columns,
        -- Without columns it was written in another form, by a trigger of before.
        case when c.columns is not null then c.record #>> '{}' end,
        case when c.columns is not null then c.old_record #>> '{}' end,
        c.xid::text::bigint,
        null
    from committed as c
    order by 1 asc nulls first
$$;
comment on function realtime.captured_since(pg_snapshot) is
    'Captured changes committed since a snapshot, in the order written, their rows as texts; the first row carries the snapshot to go on from.';
revoke all on function realtime.captured_since(pg_snapshot) from public;

-- For servers of before, to which it tells only that there were changes that they cannot read.
create or replace function realtime.changes_since("position" pg_snapshot)
returns table (
    seq bigint,
    relation oid,
    action text,
    changed_at double precision,
    record text,
    old_record text,
    xid bigint,
    snapshot text
)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select c.seq, c.relation, c.action, c.changed_at, null, null, c.xid, c.snapshot
    from realtime.captured_since("position") as c
    order by c.seq asc nulls first
$$;
comment on function realtime.changes_since(pg_snapshot) is 'Captured changes committed since a snapshot, without their rows.';
revoke all on function realtime.changes_since(pg_snapshot) from public;

create or replace function realtime.dropped_change_xid()
returns xid8
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select case when stream.dropped_change_in_life = realtime.life() then stream.dropped_change_xid else '0' end
    from realtime.stream
$$;
comment on function realtime.dropped_change_xid() is 'Highest transaction id among captured changes that were dropped in this life of the database.';
revoke all on function realtime.dropped_change_xid() from public;

create or replace function realtime.note_dropped_change(xid xid8)
returns void
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    update realtime.stream
    set
        dropped_change_xid = note_dropped_change.xid,
        dropped_change_in_life = realtime.life()
    where note_dropped_change.xid > realtime.dropped_change_xid()
$$;
comment on function realtime.note_dropped_change(xid8) is 'Remembers that captured changes of transactions up to this one were dropped.';
revoke all on function realtime.note_dropped_change(xid8) from public;

-- Block by block: an index on the time would cost every writer, and without one a table that has grown large is too much for one statement.
create or replace function realtime.drop_old_changes(retention interval default '1 hour', from_block bigint default 0, blocks bigint default 4294967295)
returns table (dropped bigint, next_block bigint)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_end bigint := least(drop_old_changes.from_block + drop_old_changes.blocks, 4294967295);
    v_xid xid8;
begin
    -- A lock on a row that only the owner can reach; an advisory lock is for any role to take.
    perform from realtime.maintenance as m where m.task = 'changes' for update skip locked;
    if not found then
        return;
    end if;
    with gone as (
        delete from realtime.changes as c
        where c.ctid >= format('(%s,0)', drop_old_changes.from_block)::tid
            and c.ctid < format('(%s,0)', v_end)::tid
            and c.changed_at < now() - drop_old_changes.retention
        returning c.xid
    )
    select
        count(*),
        -- Not those of another cluster, as in a restored dump: nobody reads by them.
        max(gone.xid::text::numeric) filter (where gone.xid < pg_snapshot_xmax(pg_current_snapshot()))
    into dropped, v_xid
    from gone;
    perform realtime.note_dropped_change(v_xid);
    next_block := v_end;
    if v_end * current_setting('block_size')::bigint >= pg_relation_size('realtime.changes') then
        next_block := null;
        update realtime.maintenance as m set succeeded_at = now() where m.task = 'changes';
    end if;
    return next;
end
$$;
comment on function realtime.drop_old_changes(interval, bigint, bigint) is
    'Deletes captured changes older than the retention from so many blocks of the table; how many, and the block to go on from, null at the end. No row: another server is at it. A server that has not read them by then reports a gap.';
revoke all on function realtime.drop_old_changes(interval, bigint, bigint) from public;

create or replace function realtime.has_change_reader()
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select exists (
        select from pg_stat_activity where application_name = 'realtime-server changes' and datname = current_database()
    )
$$;
comment on function realtime.has_change_reader() is 'Whether a server reads captured changes now.';
revoke all on function realtime.has_change_reader() from public;

-- The oid in it keeps it apart from what users name, and from the clone that a partition gets of the trigger of its root. Triggers fire in
-- the order of their names: what others write because of a change is to come behind it.
create or replace function realtime.capture_trigger(relation oid)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select '!realtime_capture_' || relation::text
$$;
comment on function realtime.capture_trigger(oid) is 'Name of the capture trigger on this table.';
revoke all on function realtime.capture_trigger(oid) from public;

create or replace function realtime.capture_triggers()
returns table (relation oid, name text, events text[], is_sound boolean)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        t.tgrelid,
        t.tgname::text,
        -- Bits of pg_trigger.tgtype.
        pg_catalog.array_remove(array[
            case when t.tgtype & 4 > 0 then 'INSERT' end,
            case when t.tgtype & 16 > 0 then 'UPDATE' end,
            case when t.tgtype & 8 > 0 then 'DELETE' end
        ], null),
        -- Its clones on partitions have its name.
        t.tgname <> all (array(
            select disabled.tgname
            from pg_catalog.pg_trigger as disabled
            where disabled.tgfoid = 'realtime.capture_change()'::pg_catalog.regprocedure and disabled.tgenabled = 'D'
        ))
            and t.tgname = realtime.capture_trigger(t.tgrelid)
            and t.tgargs = pg_catalog.convert_to(t.tgrelid::text, 'UTF8') || '\x00'::bytea
    from pg_catalog.pg_trigger as t
    where t.tgfoid = 'realtime.capture_change()'::pg_catalog.regprocedure and not t.tgisinternal and t.tgparentid = 0
$$;
comment on function realtime.capture_triggers() is
    'The capture triggers, without the clones on partitions. Not sound: disabled, be it on one partition, or made for another table, as in a restored dump.';
revoke all on function realtime.capture_triggers() from public;

create or replace function realtime.capture_marks()
returns table (relation oid, mark text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select t.tgrelid, concat_ws('/', t.oid, t.xmin)
    from pg_trigger as t
    where t.tgfoid = to_regprocedure('realtime.capture_change()') and not t.tgisinternal and t.tgparentid = 0 and t.tgenabled <> 'D'
$$;
comment on function realtime.capture_marks() is
    'For each table that is captured a text that is another one if it was not for a moment: its trigger was dropped or disabled, and is there again.';
revoke all on function realtime.capture_marks() from public;

create or replace function realtime.capture_plan(is_wanted boolean default true)
returns table (relation oid, name text, events text[])
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with wanted as materialized (
        select
            c.oid,
            array_remove(array[
                case when p.pubinsert then 'INSERT' end,
                case when p.pubupdate then 'UPDATE' end,
                case when p.pubdelete then 'DELETE' end
            ], null) as events
        from pg_publication as p
        join pg_publication_tables as pt on pt.pubname = p.pubname
        join pg_namespace as n on n.nspname = pt.schemaname
        join pg_class as c on c.relnamespace = n.oid and c.relname = pt.tablename
        where p.pubname = 'supabase_realtime'
            and n.nspname <> 'realtime'
            and is_wanted
            and (p.pubinsert or p.pubupdate or p.pubdelete)
    ),
    present as materialized (
        select
            t.relation as oid,
            min(t.events) as events,
            count(*) = 1 and bool_and(t.is_sound) as is_sound
        from realtime.capture_triggers() as t
        group by t.relation
    )
    select coalesce(wanted.oid, present.oid), realtime.table_name(coalesce(wanted.oid, present.oid)), coalesce(wanted.events, '{}')
    from wanted
    full join present on present.oid = wanted.oid
    where present.is_sound is not true or wanted.events is distinct from present.events
    order by wanted.oid is not null, 1
$$;
comment on function realtime.capture_plan(boolean) is
    'Tables whose capture trigger is to be taken away (no events), made or made anew, in this order. capture_plan(false): all are to be taken away.';
revoke all on function realtime.capture_plan(boolean) from public;

-- While a lock is waited for, whoever comes later waits behind. So it is not waited for long, and with other tables' locks best not at all.
create or replace function realtime.capture_table(relation oid, events text[], patience interval default '0.1 s')
returns table (action text, problem text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '1s'
as $$
#variable_conflict use_column
declare
    v_table text := realtime.table_name(capture_table.relation);
    v_trigger text := realtime.capture_trigger(capture_table.relation);
    v_present text;
begin
    if v_table is null then
        -- It was dropped.
        return;
    end if;
    begin
        -- Servers that look at the same time do it once. A row that only the owner can lock; an advisory lock is for any role to take.
        perform from realtime.maintenance as m where m.task = 'capture' for update;
        perform set_config('lock_timeout', greatest(1, extract(epoch from patience) * 1000)::integer::text, true);
        for v_present in
            select t.name
            from realtime.capture_triggers() as t
            where t.relation = capture_table.relation and not (t.is_sound and t.events = capture_table.events)
        loop
            execute format('drop trigger %I on %s', v_present, v_table);
            action := 'released';
        end loop;
        if cardinality(capture_table.events) > 0
            and not exists (select from realtime.capture_triggers() as t where t.relation = capture_table.relation)
        then
            execute format(
                'create trigger %I after %s on %s for each row execute function realtime.capture_change(%L)',
                v_trigger,
                concat_ws(
                    ' or ',
                    case when 'INSERT' = any (capture_table.events) then 'insert' end,
                    case when 'UPDATE' = any (capture_table.events) then 'update' end,
                    case when 'DELETE' = any (capture_table.events) then 'delete' end
                ),
                v_table,
                capture_table.relation
            );
            -- As the log would: also what arrives by replication. Only its owner may say so.
            if pg_has_role((select c.relowner from pg_class as c where c.oid = capture_table.relation), 'usage') then
                execute format('alter table %s enable always trigger %I', v_table, v_trigger);
            end if;
            action := 'captured';
        end if;
    exception
        when lock_not_available then
            action := 'waiting';
            problem := 'the table is in use';
        -- Whatever it is (rights, an event trigger, a table that is gone by now), it is this table's alone.
        when others then
            action := 'refused';
            problem := sqlerrm;
    end;
    if action is not null then
        return next;
    end if;
end
$$;
comment on function realtime.capture_table(oid, text[], interval) is
    'Gives a table the capture trigger for these events, or takes it away if there are none; what was done (captured, released), or why nothing was (waiting, refused). No row: nothing was to do. Locks are waited for up to patience each.';
revoke all on function realtime.capture_table(oid, text[], interval) from public;

create or replace function realtime.empty_changes()
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '0.1s'
as $$
declare
    v_xid xid8;
begin
    if pg_relation_size('realtime.changes') = 0
        or realtime.has_change_reader()
        or exists (select from realtime.capture_triggers())
    then
        return false;
    end if;
    -- Whoever begins to write or to read meanwhile is seen behind the lock.
    lock table realtime.changes in access exclusive mode;
    perform pg_stat_clear_snapshot();
    if realtime.has_change_reader() or exists (select from realtime.capture_triggers()) then
        return false;
    end if;
    select c.xid into v_xid
    from realtime.changes as c
    where c.xid < pg_snapshot_xmax(pg_current_snapshot())
    order by c.xid desc
    limit 1;
    perform realtime.note_dropped_change(v_xid);
    truncate realtime.changes;
    return true;
exception when lock_not_available then
    return false;
end
$$;
comment on function realtime.empty_changes() is
    'Drops all captured changes and gives their space back, if no table is captured and no server reads; whether that was so.';
revoke all on function realtime.empty_changes() from public;

create or replace function realtime.sync_capture(is_wanted boolean default true)
returns table (relation oid, name text, action text, problem text)
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    select plan.relation, plan.name, done.action, done.problem
    from realtime.capture_plan(is_wanted) as plan
    cross join lateral realtime.capture_table(plan.relation, plan.events, '0.01 s') as done
$$;
comment on function realtime.sync_capture(boolean) is
    'Puts capture triggers on the tables of the publication and takes them from all others; what was done, and why something was not. sync_capture(false) takes them all away. By hand: servers take one table at a time, so that no lock is kept while another one is waited for.';
revoke all on function realtime.sync_capture(boolean) from public;

create or replace function realtime.release_capture()
returns table (relation oid, name text, action text, problem text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    if not realtime.has_change_reader() then
        return query select released.* from realtime.sync_capture(false) as released;
    end if;
end
$$;
comment on function realtime.release_capture() is 'Takes the capture triggers away, unless a server reads what they write.';
revoke all on function realtime.release_capture() from public;
-- Row changes from PostgreSQL's log: the server's replication slot, and what a DBA asks about it.

create or replace function realtime.slot_name()
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select 'realtime_changes_' || oid from pg_database where datname = current_database()
$$;
comment on function realtime.slot_name() is
    'Name of the replication slot that the server reads row changes of this database from. Slots are of the whole cluster, so it names the database.';
revoke all on function realtime.slot_name() from public;

create or replace function realtime.commits_wait_for_readers()
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select current_setting('synchronous_standby_names') ~ '(^|[\s,(])\*([\s,)]|$)'
$$;
comment on function realtime.commits_wait_for_readers() is
    'Whether synchronous_standby_names has a *: then a commit waits for whoever reads the log, who in turn waits for the commit.';
revoke all on function realtime.commits_wait_for_readers() from public;

-- Called before each connection of the reader; what only shows in the attempt (pg_hba.conf, max_wal_senders) is left to it.
create or replace function realtime.wal_obstacle(publication text, slot text)
returns text
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    select
        case
            when pg_is_in_recovery() then 'PostgreSQL is a standby here, and its changes are read from the primary'
            -- Since 19 the first logical slot raises the level.
            when current_setting('wal_level') <> 'logical'
                and not (
                    current_setting('wal_level') = 'replica'
                    and current_setting('server_version_num')::integer >= 190000
                )
                then format(
                    'wal_level is %s: set it to logical and restart PostgreSQL', current_setting('wal_level')
                )
            when realtime.commits_wait_for_readers()
                then 'synchronous_standby_names is *, which would make commits wait for this server, too: name the standbys'
            when not exists (
                select
                from pg_roles as allowed
                where pg_has_role(current_user, allowed.oid, 'usage')
                    -- REPLICATION is of the role itself; rds_replication is handed on.
                    and (
                        allowed.rolname = current_user and (allowed.rolreplication or allowed.rolsuper)
                        or allowed.rolname = 'rds_replication'
                    )
            )
                then format(
                    'role %I may not replicate: an administrator runs "alter role %I replication"',
                    current_user, current_user
                )
            when not exists (select from pg_publication where pubname = wal_obstacle.publication)
                then format('there is no publication %I', wal_obstacle.publication)
            when taken.slot_name is null
                and (select count(*) from pg_replication_slots) >= current_setting('max_replication_slots')::integer
                then format('all of max_replication_slots (%s) are taken', current_setting('max_replication_slots'))
            when taken.slot_name is not null
                and (taken.plugin is distinct from 'pgoutput' or taken.database <> current_database())
                then format('replication slot %I is of another kind or database', wal_obstacle.slot)
            when taken.active then format('replication slot %I is in use by another server', wal_obstacle.slot)
        end
    from (values (1)) as one
    left join pg_replication_slots as taken on taken.slot_name = wal_obstacle.slot
$$;
comment on function realtime.wal_obstacle(text, text) is
    'Why row changes cannot be read from the log of this database through this publication and slot; null when nothing is known to stand in the way.';
revoke all on function realtime.wal_obstacle(text, text) from public;

-- The log, and all that streams it, has 32 bits of a transaction id.
create or replace function realtime.full_xid(xid bigint, near bigint)
returns bigint
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select full_xid.near + (((full_xid.xid - full_xid.near) & 4294967295) # 2147483648) - 2147483648
$$;
comment on function realtime.full_xid(bigint, bigint) is
    'The transaction id of 64 bits with these lower 32 bits, at most 2^31 away from near.';
revoke all on function realtime.full_xid(bigint, bigint) from public;

-- A commit is in the log before other sessions see it, and much before where a synchronous standby is slow. Each statement here has a
-- snapshot of its own. All ids are asked about: transactions do not become visible in the order of their commits.
create or replace function realtime.wait_until_visible(xids bigint[], timeout interval)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_end timestamptz := clock_timestamp() + wait_until_visible.timeout;
    v_snapshot pg_snapshot;
begin
    loop
        v_snapshot := pg_current_snapshot();
        if not exists (
            select
            from unnest(wait_until_visible.xids) as waited (xid)
            where not pg_visible_in_snapshot(
                realtime.full_xid(waited.xid, pg_snapshot_xmax(v_snapshot)::text::bigint)::text::xid8, v_snapshot
            )
        ) then
            return true;
        end if;
        if clock_timestamp() >= v_end then
            return false;
        end if;
        perform pg_sleep(0.001);
    end loop;
end
$$;
comment on function realtime.wait_until_visible(bigint[], interval) is
    'Waits until transactions that are known to have committed are visible to other sessions, too; false when that took longer than the timeout. The ids may be of 32 bits.';
revoke all on function realtime.wait_until_visible(bigint[], interval) from public;

create or replace function realtime.backend_started(backend integer)
returns numeric
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select extract(epoch from backend_start) from pg_stat_activity where pid = backend_started.backend
$$;
comment on function realtime.backend_started(integer) is
    'When the process with this id began, in seconds since 1970; null when there is none. It tells it from another one of the same id.';
revoke all on function realtime.backend_started(integer) from public;

-- Told to end, a process first says so to its client, and where that one does not read, it stays at it until it is told again.
create or replace function realtime.end_walsender(backend integer, started numeric)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set client_min_messages = 'error'
as $$
begin
    for attempt in 1 .. 10 loop
        -- What is seen of other processes stays the same in a transaction, otherwise.
        perform pg_stat_clear_snapshot();
        if realtime.backend_started(backend) is distinct from started or pg_terminate_backend(backend, 300) then
            return true;
        end if;
    end loop;
    return false;
end
$$;
comment on function realtime.end_walsender(integer, numeric) is
    'Ends a connection that its client has lost, and that still holds the slot; whether it is gone.';
revoke all on function realtime.end_walsender(integer, numeric) from public;

create or replace function realtime.slot_waits()
returns table (pid integer, role name, application text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select blocking.pid, a.usename, coalesce(a.application_name, 'a prepared transaction')
    from pg_replication_slots as s
    cross join lateral unnest(pg_blocking_pids(s.active_pid)) as blocking (pid)
    left join pg_stat_activity as a on a.pid = blocking.pid
    where s.slot_name = realtime.slot_name() and s.confirmed_flush_lsn is null
$$;
comment on function realtime.slot_waits() is
    'Whose transaction the creation of the slot waits for now: that of one session after the other, pid 0 for a prepared one.';
revoke all on function realtime.slot_waits() from public;

create or replace function realtime.slot_status()
returns table (
    slot text,
    active boolean,
    retained_bytes bigint,
    unconfirmed_bytes bigint,
    wal_status text,
    safe_wal_size bigint,
    problem text
)
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    with here as materialized (
        select case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end as lsn
    )
    select
        s.slot_name::text,
        s.active,
        pg_wal_lsn_diff(here.lsn, s.restart_lsn)::bigint,
        pg_wal_lsn_diff(here.lsn, s.confirmed_flush_lsn)::bigint,
        s.wal_status,
        s.safe_wal_size,
        case
            when s.wal_status = 'lost' and s.active is not true
                then 'changes are lost, because nobody read them in time: a server that reads the log makes a new slot, else call realtime.drop_slot()'
            when s.active is not true
                then 'nobody reads, and PostgreSQL keeps its log until somebody does: start a server, or call realtime.drop_slot()'
            when s.wal_status = 'unreserved'
                then 'the reader is so late that PostgreSQL may remove the log before it is read: raise max_slot_wal_keep_size'
            when current_setting('max_slot_wal_keep_size') = '-1'
                then 'max_slot_wal_keep_size is not set: when nobody reads, the log grows until the disk is full'
        end
    from pg_replication_slots as s
    cross join here
    where s.slot_name = realtime.slot_name()
$$;
comment on function realtime.slot_status() is
    'The slot that the server reads row changes from, no row when there is none: whether somebody reads, bytes of log that are kept for it and that are not confirmed yet, wal_status and safe_wal_size as in pg_replication_slots, and what is wrong.';
revoke all on function realtime.slot_status() from public;

create or replace function realtime.drop_slot()
returns boolean
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    select count(pg_drop_replication_slot(slot_name)) > 0
    from pg_replication_slots
    where slot_name = realtime.slot_name()
$$;
comment on function realtime.drop_slot() is
    'Gives up the slot that the server reads row changes from, so that PostgreSQL keeps no log for it; whether there was one. Fails while a server reads.';
revoke all on function realtime.drop_slot() from public;
-- What is in the way of messages and row changes, or may be one day, and what to do about it. Called by people in psql and by the command
-- "realtime-server doctor", which adds what only a client of the database sees. Each function looks at one theme; none changes anything.
--
-- level: ok; note, which is worth knowing and may be meant so; problem, of which somebody gets less than expected.

create or replace function realtime.doctor_servers()
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        'servers',
        case when count(*) > 0 then 'ok' else 'note' end,
        case
            when count(*) = 0 then 'no server runs on this database'
            else format('servers on this database in the last half minute: %s', count(*))
        end,
        case when count(*) = 0 then 'realtime-server run' end
    from realtime.nodes
    where last_seen_at > now() - interval '30 seconds'
$$;
comment on function realtime.doctor_servers() is 'For realtime.doctor: how many servers there are.';
revoke all on function realtime.doctor_servers() from public;

create or replace function realtime.doctor_roles(roles text[])
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with asked as materialized (
        select
            w.name,
            w.number,
            r.oid is not null as is_there,
            case
                when r.oid is null then false
                when current_setting('server_version_num')::integer >= 160000 then pg_has_role(r.oid, 'set')
                else pg_has_role(r.oid, 'member')
            end as is_ours,
            r.rolsuper or r.rolbypassrls as is_free
        from unnest(roles) with ordinality as w (name, number)
        left join pg_roles as r on r.rolname = w.name
    )
    select 'roles', 'ok', format('the server may act as %s', string_agg(name, ', ' order by number)), null
    from asked
    where is_ours
    having count(*) > 0
    union all
    select
        'roles',
        'problem',
        case when is_there then format('role %I may not take on role %I', current_user, name) else format('there is no role %I', name) end,
        format(
            'an administrator runs "%sgrant %I to %I%s"',
            case when not is_there then format('create role %I nologin noinherit; ', name) end,
            name,
            current_user,
            case when current_setting('server_version_num')::integer >= 160000 then ' with inherit false, set true' end
        )
    from asked
    where not is_ours
    union all
    select
        'bypassrls',
        'problem',
        format('row-level security does not bind role %I: its clients see every row and join every channel', name),
        format('an administrator runs "alter role %I nosuperuser nobypassrls"', name)
    from asked
    where name in ('anon', 'authenticated') and is_free
    union all
    select
        'bypassrls',
        case when is_free then 'ok' else 'note' end,
        case
            when is_free then 'row-level security does not bind service_role'
            else 'row-level security binds service_role: who comes with the service key is told a row change only where a policy of the table says so'
        end,
        case when not is_free then 'an administrator runs "alter role service_role bypassrls", or write policies for service_role' end
    from asked
    where name = 'service_role' and is_there
$$;
comment on function realtime.doctor_roles(text[]) is
    'For realtime.doctor: whether the roles that tokens name are there, may be taken on and are bound by row-level security.';
revoke all on function realtime.doctor_roles(text[]) from public;

-- Functions in pg_temp evaluate what is of users. They are made by the server's role and belong to the client's.
create or replace function realtime.doctor_temporary(roles text[])
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        'temporary',
        'problem',
        format(
            'role %I has no right TEMPORARY on database %I: %s',
            r.rolname,
            current_database(),
            case
                when r.rolname = current_user then 'the server cannot evaluate policies of tables, so row changes are withheld from all whom policies bind'
                else 'the server cannot evaluate policies of tables for it, so row changes are withheld from its clients'
            end
        ),
        format('grant temporary on database %I to %I', current_database(), r.rolname)
    from pg_roles as r
    where (r.rolname = current_user or r.rolname = any (doctor_temporary.roles))
        and not has_database_privilege(r.oid, current_database(), 'temporary')
$$;
comment on function realtime.doctor_temporary(text[]) is
    'For realtime.doctor: whether policies of tables can be evaluated in pg_temp.';
revoke all on function realtime.doctor_temporary(text[]) from public;

-- Policies that are asked for clients: those of private topics, of published tables, and of the tables that such policies read.
create or replace function realtime.doctor_policies(roles text[])
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with recursive clients as materialized (
        select r.oid as role, r.rolname
        from pg_roles as r
        where r.rolname = any (roles) and not (r.rolsuper or r.rolbypassrls)
    ),
    policies as materialized (
        select p.oid as policy, p.polname, p.polrelid, p.polcmd, p.polpermissive, c.role, c.rolname
        from pg_policy as p
        join pg_class as guarded on guarded.oid = p.polrelid and guarded.relrowsecurity
        join clients as c
            on exists (select from unnest(p.polroles) as r (oid) where r.oid = 0 or pg_has_role(c.role, r.oid, 'usage'))
        where p.polcmd in ('r', '*') or p.polcmd = 'a' and p.polrelid = 'realtime.messages'::regclass
    ),
    needed as materialized (
        select p.policy, p.polname, p.polrelid, p.role, p.rolname, d.refclassid, d.refobjid, array_agg(d.refobjsubid) as columns
        from policies as p
        join pg_depend as d on d.classid = 'pg_policy'::regclass and d.objid = p.policy
        where d.refclassid in ('pg_class'::regclass, 'pg_proc'::regclass) and d.refobjid <> p.polrelid
        group by p.policy, p.polname, p.polrelid, p.role, p.rolname, d.refclassid, d.refobjid
    ),
    evaluated (role, relation) as (
        select c.role, asked.relation
        from clients as c
        cross join (
            select 'realtime.messages'::regclass::oid
            union
            select member.prrelid
            from pg_publication as publication
            join pg_publication_rel as member on member.prpubid = publication.oid
            where publication.pubname = 'supabase_realtime'
        ) as asked (relation)
        union
        select n.role, n.refobjid
        from evaluated as e
        join needed as n on n.role = e.role and n.polrelid = e.relation and n.refclassid = 'pg_class'::regclass
    )
    select
        'policies',
        -- The role of the public key is often meant to stay outside.
        case when c.rolname = 'anon' and others.may_receive then 'ok' else 'note' end,
        format('no policy on realtime.messages lets role %I receive: its joins of private topics are all refused', c.rolname),
        case
            when not (c.rolname = 'anon' and others.may_receive)
                then format('for private topics: create policy ... on realtime.messages for select to %I using (...)', c.rolname)
        end
    from clients as c
    cross join lateral (
        select coalesce(bool_or(p.role <> c.role and p.rolname <> 'service_role'), false) as may_receive, coalesce(bool_or(p.role = c.role), false) as is_one
        from policies as p
        where p.polrelid = 'realtime.messages'::regclass and p.polpermissive and p.polcmd in ('r', '*')
    ) as others
    where not others.is_one
    union all
    select
        'policy_rights',
        'problem',
        format(
            'policy %I of %s needs %s, and role %I may not %s: permission denied, so what the policy guards is refused',
            n.polname,
            realtime.table_name(n.polrelid),
            needs.title,
            n.rolname,
            case when needs.is_function then 'execute it' else 'select from it' end
        ),
        format(
            case when needs.is_function then 'grant execute on function %s to %I' else 'grant select on %s to %I' end,
            needs.title,
            n.rolname
        )
    from evaluated as e
    join needed as n on n.role = e.role and n.polrelid = e.relation
    cross join lateral (
        select
            n.refclassid = 'pg_proc'::regclass as is_function,
            case when n.refclassid = 'pg_proc'::regclass then n.refobjid::regprocedure::text else realtime.table_name(n.refobjid) end as title
    ) as needs
    where case
        when needs.is_function then not has_function_privilege(n.role, n.refobjid, 'execute')
        else not has_table_privilege(n.role, n.refobjid, 'select')
            and (
                not has_any_column_privilege(n.role, n.refobjid, 'select')
                or exists (
                    select from unnest(n.columns) as c (number)
                    where c.number > 0 and not has_column_privilege(n.role, n.refobjid, c.number::smallint, 'select')
                )
            )
    end
$$;
comment on function realtime.doctor_policies(text[]) is
    'For realtime.doctor: whether clients may join private topics at all, and may read what the policies read that are asked for them.';
revoke all on function realtime.doctor_policies(text[]) from public;

create or replace function realtime.doctor_partitions()
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with present as materialized (
        select to_date(right(child.relname, 10), 'YYYY_MM_DD') as day
        from pg_inherits
        join pg_class as child on child.oid = inhrelid
        where inhparent = 'realtime.messages'::regclass and child.relname ~ '^messages_[0-9]{4}_[0-9]{2}_[0-9]{2}$'
    ),
    lacking as materialized (
        select
            wanted.day,
            exists (
                select from realtime.messages_default as m where m.inserted_at >= wanted.day and m.inserted_at < wanted.day + 1
            ) as is_begun
        from (values ((now() at time zone 'utc')::date), ((now() at time zone 'utc')::date + 1)) as wanted (day)
        where wanted.day not in (select present.day from present)
    )
    select 'partitions', 'ok', format('realtime.messages has partitions until %s', max(present.day)), null
    from present
    where not exists (select from lacking)
    union all
    select
        'partitions',
        case when is_begun then 'note' else 'problem' end,
        case
            when is_begun then format('messages of %s are in realtime.messages_default, because they came before their partition', day)
            else format('realtime.messages has no partition for %s', day)
        end,
        case
            when is_begun then 'nothing is lost, and the next day has a partition again; see that a server runs, or call realtime.maintain() every day'
            else 'select * from realtime.maintain(), which a running server does every hour'
        end
    from lacking
$$;
comment on function realtime.doctor_partitions() is 'For realtime.doctor: whether messages of today and tomorrow have a partition.';
revoke all on function realtime.doctor_partitions() from public;

create or replace function realtime.doctor_maintenance()
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        'maintenance',
        case
            when exists (select from realtime.nodes where last_seen_at > now() - interval '30 seconds') then 'problem'
            else 'note'
        end,
        format(
            'the last maintenance that did all there was to do was at %s: old messages are kept, or days have no partition',
            to_char(realtime.last_maintenance() at time zone 'utc', 'YYYY-MM-DD HH24:MI "UTC"')
        ),
        'select * from realtime.maintain(); where it says "waiting", end the transaction that has read messages, which has the oldest xact_start in pg_stat_activity'
    -- A server does it every hour.
    where realtime.last_maintenance() < now() - interval '3 hours'
$$;
comment on function realtime.doctor_maintenance() is 'For realtime.doctor: whether partitions are made and old messages dropped.';
revoke all on function realtime.doctor_maintenance() from public;

-- As the server chooses. To another server a slot that is read is an obstacle; here it is a sign of health.
create or replace function realtime.doctor_obstacle(obstacle text)
returns text
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(
        nullif(
            realtime.wal_obstacle('supabase_realtime', realtime.slot_name()),
            format('replication slot %I is in use by another server', realtime.slot_name())
        ),
        doctor_obstacle.obstacle
    )
$$;
comment on function realtime.doctor_obstacle(text) is
    'For realtime.doctor: why no server can read the log of this database; the argument is what else stands in the way.';
revoke all on function realtime.doctor_obstacle(text) from public;

create or replace function realtime.doctor_changes(changes text, obstacle text)
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        'changes',
        case when changes = 'trigger' or obstacle is null then 'ok' when changes = 'auto' then 'note' else 'problem' end,
        case
            when changes = 'trigger' then 'row changes come from capture triggers, as the settings ask for it'
            when obstacle is null then 'row changes come from the log'
            when changes = 'auto' then format('row changes come from capture triggers: %s', obstacle)
            else format('there are no row changes, the log cannot be read: %s', obstacle)
        end,
        case
            when changes = 'trigger' or obstacle is null then null
            when changes = 'auto' then 'nothing, if writers can afford one more row for each; else make the log readable, and the server goes over to it within some minutes'
            else 'make the log readable, or set REALTIME_CHANGES to auto'
        end
    union all
    select
        'wal_level',
        case when is_enough then 'ok' when changes = 'auto' then 'note' else 'problem' end,
        case
            when is_enough then format('wal_level is %s', wal_level)
            else format('wal_level is %s: the log does not say which rows have changed', wal_level)
        end,
        case when not is_enough then 'an administrator runs "alter system set wal_level = logical" and restarts PostgreSQL' end
    from (
        select
            current_setting('wal_level') as wal_level,
            -- Since 19 the first logical slot raises the level.
            current_setting('wal_level') = 'logical'
                or current_setting('wal_level') = 'replica' and current_setting('server_version_num')::integer >= 190000 as is_enough
    ) as log
    where changes <> 'trigger'
    union all
    select
        'replication',
        case when may_replicate then 'ok' when changes = 'auto' then 'note' else 'problem' end,
        format(case when may_replicate then 'role %I may replicate' else 'role %I may not replicate' end, current_user),
        case when not may_replicate then format('an administrator runs "alter role %I replication"', current_user) end
    from (
        select exists (
            select
            from pg_roles as r
            where pg_has_role(current_user, r.oid, 'usage')
                and (r.rolname = current_user and (r.rolreplication or r.rolsuper) or r.rolname = 'rds_replication')
        ) as may_replicate
    ) as login
    where changes <> 'trigger'
$$;
comment on function realtime.doctor_changes(text, text) is
    'For realtime.doctor: where row changes come from, and why. changes: as REALTIME_CHANGES; obstacle: why the log cannot be read.';
revoke all on function realtime.doctor_changes(text, text) from public;

create or replace function realtime.doctor_slots()
returns table ("check" text, level text, finding text, advice text)
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    with ours as materialized (
        select * from realtime.slot_status()
    )
    select
        'slot',
        case
            when wal_status = 'lost' or wal_status = 'unreserved' and active then 'problem'
            when active then 'ok'
            else 'note'
        end,
        format(
            'replication slot %I: %s; PostgreSQL keeps %s of log for it, of which %s are to be read',
            slot,
            case when active then 'a server reads' else 'nobody reads' end,
            pg_size_pretty(coalesce(retained_bytes, 0)),
            pg_size_pretty(coalesce(unconfirmed_bytes, 0))
        ),
        case when not active or wal_status in ('lost', 'unreserved') then problem end
    from ours
    union all
    select
        'slot',
        'problem',
        format(
            'the replication slot is being created and waits for a transaction: there are no row changes until then (pid %s, role %s, application %L)',
            pid,
            role,
            application
        ),
        case
            when pid = 0 then 'commit it or roll it back: see pg_prepared_xacts'
            else format('wait for it, or select pg_terminate_backend(%s)', pid)
        end
    from realtime.slot_waits()
    union all
    select
        'max_slot_wal_keep_size',
        case when active then 'note' else 'problem' end,
        'max_slot_wal_keep_size is not set: while nobody reads the slot, the log grows until the disk is full',
        'an administrator runs "alter system set max_slot_wal_keep_size = ''10GB''" (what the disk can spare) and "select pg_reload_conf()"'
    from ours
    where current_setting('max_slot_wal_keep_size') = '-1'
    union all
    select
        'other_slots',
        'note',
        format(
            'replication slot %I, which is not ours%s, keeps %s of log',
            s.slot_name,
            case when not s.active then ' and which nobody reads' end,
            pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn))
        ),
        format('if nobody comes for it any more: select pg_drop_replication_slot(%L)', s.slot_name)
    from pg_replication_slots as s
    where s.slot_name <> realtime.slot_name()
        and not s.temporary
        and s.restart_lsn is not null
        and (not s.active or pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn) > 1073741824)
$$;
comment on function realtime.doctor_slots() is 'For realtime.doctor: who keeps how much of the log.';
revoke all on function realtime.doctor_slots() from public;

create or replace function realtime.doctor_publication()
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with publication as materialized (
        select * from pg_publication where pubname = 'supabase_realtime'
    ),
    published as materialized (
        select format('%I.%I', schemaname, tablename) as title, row_number() over (order by schemaname, tablename) as number
        from pg_publication_tables
        where pubname = 'supabase_realtime' and schemaname <> 'realtime'
    )
    select
        'publication',
        'problem',
        'there is no publication supabase_realtime: no table tells its changes',
        'create publication supabase_realtime'
    where not exists (select from publication)
    union all
    select
        'publication',
        case when count(title) > 0 then 'ok' else 'note' end,
        case count(title)
            when 0 then 'the publication supabase_realtime has no tables: none tells its changes'
            else format(
                'tables of the publication supabase_realtime: %s%s',
                string_agg(title, ', ' order by number) filter (where number <= 10),
                case when count(title) > 10 then format(', ... (%s in all)', count(title)) end
            )
        end,
        case when count(title) = 0 then 'alter publication supabase_realtime add table ...' end
    from publication
    left join published on true
    having count(publication.oid) > 0
    union all
    select
        'publication',
        'note',
        'the publication has the server''s own tables in it: clients are told nothing of them, but their changes pass through the log in vain',
        'publish the tables of the application only'
    where exists (select from pg_publication_tables where pubname = 'supabase_realtime' and schemaname = 'realtime')
    union all
    select
        'publication',
        'note',
        format(
            'the publication tells nothing of %s',
            concat_ws(
                ', ',
                case when not pubinsert then 'INSERT' end,
                case when not pubupdate then 'UPDATE' end,
                case when not pubdelete then 'DELETE' end
            )
        ),
        'alter publication supabase_realtime set (publish = ''insert, update, delete'')'
    from publication
    where not (pubinsert and pubupdate and pubdelete)
    union all
    select
        'partitioned',
        'note',
        format('changes of %s are told under the names of its partitions', realtime.table_name(c.oid)),
        'to have them under its own name: alter publication supabase_realtime set (publish_via_partition_root = true)'
    from publication
    join pg_publication_rel as member on member.prpubid = publication.oid
    join pg_class as c on c.oid = member.prrelid and c.relkind = 'p'
    where not publication.pubviaroot
$$;
comment on function realtime.doctor_publication() is 'For realtime.doctor: which tables tell their changes.';
revoke all on function realtime.doctor_publication() from public;

-- PostgreSQL refuses UPDATE and DELETE of a published table where it could not write to the log what was there before, whatever wal_level is.
create or replace function realtime.doctor_writes()
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with tables as materialized (
        select
            t.relation,
            format('%I.%I', t.schema, t.name) as title,
            t.has_whole_old,
            c.relkind,
            c.relreplident,
            array(
                select c.item ->> 'name' from jsonb_array_elements(t.columns) as c (item) where (c.item ->> 'is_published')::boolean
            ) as columns
        from realtime.published_tables('{}') as t
        join pg_class as c on c.oid = t.relation
        where t.events && '{UPDATE,DELETE}'
    ),
    members as materialized (
        select
            t.*,
            -- Row filters and column lists came with PostgreSQL 15.
            to_jsonb(member) ->> 'prattrs' is not null as has_list,
            to_jsonb(member) ->> 'prqual' is not null as has_filter,
            array(
                select d.refobjsubid::int2
                from pg_depend as d
                where d.classid = 'pg_publication_rel'::regclass
                    and d.objid = member.oid
                    and d.refclassid = 'pg_class'::regclass
                    and d.refobjid = t.relation
                    and d.refobjsubid > 0
            ) as columns_used,
            identity.columns as identity,
            identity.names as identity_names
        from tables as t
        join pg_publication as p on p.pubname = 'supabase_realtime'
        join pg_publication_rel as member on member.prpubid = p.oid and member.prrelid = t.relation
        cross join lateral (
            select coalesce(array_agg(a.attnum), '{}') as columns, coalesce(array_agg(a.attname::text), '{}') as names
            from pg_index as i
            join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1])
            where i.indrelid = t.relation
                and case t.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident else false end
        ) as identity
        -- Of partitions PostgreSQL goes by their own columns and identities.
        where t.relkind = 'r'
    )
    select
        'replica_identity',
        'problem',
        format('UPDATE and DELETE of %s fail for the application: it is published and has no replica identity', realtime.table_name(leaf.oid)),
        format('add a primary key, or: alter table %s replica identity full', realtime.table_name(leaf.oid))
    from tables as t
    cross join lateral (
        select t.relation where t.relkind = 'r'
        union
        select p.relid from pg_partition_tree(t.relation) as p where p.isleaf
    ) as p (relid)
    join pg_class as leaf on leaf.oid = p.relid
    where leaf.relreplident <> 'f'
        and not exists (
            select
            from pg_index as i
            where i.indrelid = leaf.oid
                and i.indisvalid
                and i.indimmediate
                and case leaf.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident else false end
        )
    union all
    select
        'replica_identity',
        'problem',
        format('UPDATE and DELETE of %s fail for the application: the column list of the publication does not cover the replica identity', title),
        case
            when has_whole_old then format('publish it without a column list, or: alter table %s replica identity default', title)
            else format('put these columns into the list, too: %s', array_to_string(identity_names, ', '))
        end
    from members
    where has_list and (has_whole_old or not identity_names <@ columns)
    union all
    select
        'replica_identity',
        'problem',
        format('UPDATE and DELETE of %s fail for the application: the row filter of the publication reads columns outside the replica identity', title),
        format('alter table %s replica identity full', title)
    from members
    -- With a list it is not known which columns the filter reads.
    where has_filter and not has_list and not has_whole_old and not columns_used <@ identity
$$;
comment on function realtime.doctor_writes() is 'For realtime.doctor: published tables that applications cannot update.';
revoke all on function realtime.doctor_writes() from public;

create or replace function realtime.doctor_tables(source text, roles text[], strict_deletes boolean)
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with tables as materialized (
        select
            t.*,
            format('%I.%I', t.schema, t.name) as title,
            array(
                select c.item ->> 'name'
                from jsonb_array_elements(t.columns) as c (item)
                where (c.item ->> 'is_key')::boolean and (c.item ->> 'is_published')::boolean
            ) as key,
            array(
                select c.item ->> 'name' from jsonb_array_elements(t.columns) as c (item) where (c.item ->> 'is_published')::boolean
            ) as names,
            has_schema_privilege(c.relnamespace, 'usage') as may_use,
            has_table_privilege(c.oid, 'select') as may_read
        from realtime.published_tables(roles) as t
        join pg_class as c on c.oid = t.relation
    ),
    access as materialized (
        select
            t.relation,
            t.title,
            t.key,
            a.role,
            (a.rights ->> 'is_bound')::boolean as is_bound,
            array(select jsonb_array_elements_text(a.rights -> 'columns')) as columns
        from tables as t
        cross join jsonb_each(t.access) as a (role, rights)
    )
    -- what clients are not told
    select
        'primary_key',
        'problem',
        format(
            '%s has no primary key%s: clients get "Error 400: Bad Request, no primary key" instead of rows',
            t.title,
            case
                when exists (select from pg_index as i where i.indrelid = t.relation and i.indisprimary)
                    then ' in the column list of the publication'
            end
        ),
        'add it'
    from tables as t
    where cardinality(t.key) = 0
    union all
    select
        'privileges',
        'problem',
        format('none of the roles may select from %s: whoever subscribes gets "Error 401: Unauthorized" instead of rows', a.title),
        format('grant usage on its schema and select on %s to authenticated, for instance', a.title)
    from access as a
    group by a.relation, a.title
    having bool_and(cardinality(a.columns) = 0)
    union all
    select
        'privileges',
        'problem',
        format(
            'role %I may select columns of %s, but not of its primary key (%s): its clients get "Error 401: Unauthorized" instead of rows',
            a.role,
            a.title,
            array_to_string(a.key, ', ')
        ),
        format('grant select (%s) on %s to %I', (select string_agg(quote_ident(k), ', ') from unnest(a.key) as k), a.title, a.role)
    from access as a
    where cardinality(a.columns) > 0 and not a.key <@ a.columns
    union all
    select
        'policies',
        'note',
        format(
            'row-level security of %s has no policy for SELECT: clients of %s are told nothing',
            a.title,
            string_agg(a.role, ', ' order by a.role)
        ),
        format('create policy ... on %s for select using (...)', a.title)
    from access as a
    where a.is_bound
        and cardinality(a.columns) > 0
        and not exists (select from pg_policy as p where p.polrelid = a.relation and p.polpermissive and p.polcmd in ('r', '*'))
    group by a.relation, a.title
    union all
    select
        'unlogged',
        'problem',
        format('%s is unlogged: the log has none of its changes', realtime.table_name(leaf.oid)),
        format('alter table %s set logged', realtime.table_name(leaf.oid))
    from tables as t
    cross join lateral (
        select t.relation
        union
        select p.relid from pg_partition_tree(t.relation) as p
    ) as p (relid)
    join pg_class as leaf on leaf.oid = p.relid and leaf.relkind = 'r'
    where source = 'wal' and leaf.relpersistence = 'u'
    union all
    select 'row_filter', 'note', format('of %s only rows are told that fulfil %s', t.title, t.row_filter), null
    from tables as t
    where t.row_filter is not null
    union all
    select 'column_list', 'note', format('of %s only these columns are told: %s', t.title, array_to_string(t.names, ', ')), null
    from tables as t
    join pg_publication as p on p.pubname = 'supabase_realtime'
    join pg_publication_rel as member on member.prpubid = p.oid and member.prrelid = t.relation
    where to_jsonb(member) ->> 'prattrs' is not null
    -- what clients are told, perhaps more than was meant
    union all
    select
        'row_security',
        'note',
        format('row-level security of %s is off and anon may select from it: whoever has the public key is told every change', a.title),
        format('if that is not meant: alter table %s enable row level security, and write policies', a.title)
    from access as a
    join tables as t on t.relation = a.relation
    where a.role = 'anon' and cardinality(a.columns) > 0 and not t.has_row_security
    union all
    select
        'deletes',
        'note',
        format(
            case
                when strict_deletes
                    then 'a DELETE in %s is told to nobody whom policies bind, because the log has no more than the key of the row'
                else 'a DELETE in %s tells the key to everybody who subscribed, because the log has no more of the row that policies could judge'
            end,
            t.title
        ),
        concat(
            format('alter table %s replica identity full lets the server judge it', t.title),
            case when exists (select from pg_partitioned_table as p where p.partrelid = t.relation) then ', done for each partition, too' end,
            case when not strict_deletes then '; REALTIME_STRICT_DELETES=true tells it to nobody whom policies bind' end
        )
    from tables as t
    where source = 'wal'
        and t.has_row_security
        and not t.has_whole_old
        and 'DELETE' = any (t.events)
        and cardinality(t.key) > 0
    -- what the server may not do
    union all
    select
        'rights',
        'problem',
        format('role %I may not use schema %I, so changes of %s cannot be told', current_user, t.schema, t.title),
        format('grant usage on schema %I to %I', t.schema, current_user)
    from tables as t
    where not t.may_use
    union all
    select
        'rights',
        'problem',
        format('role %I may not select from %s: where the log does not have a whole row, its change is not told', current_user, t.title),
        format('grant select on %s to %I', t.title, current_user)
    from tables as t
    where source = 'wal' and t.may_use and not t.may_read
$$;
comment on function realtime.doctor_tables(text, text[], boolean) is
    'For realtime.doctor: what clients are told of the tables of the publication. source: wal or trigger; roles: of clients; strict_deletes: as REALTIME_STRICT_DELETES.';
revoke all on function realtime.doctor_tables(text, text[], boolean) from public;

create or replace function realtime.doctor_capture(source text)
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with present as materialized (
        select t.tgrelid as oid, t.tgenabled <> 'D' as is_enabled, realtime.table_name(t.tgrelid) as title
        from pg_trigger as t
        where t.tgfoid = 'realtime.capture_change()'::regprocedure and not t.tgisinternal and t.tgparentid = 0
    ),
    tables as materialized (
        select
            t.relation,
            format('%I.%I', t.schema, t.name) as title,
            present.is_enabled,
            pg_has_role(c.relowner, 'usage') as is_ours,
            has_schema_privilege(c.relnamespace, 'usage') and has_table_privilege(c.oid, 'trigger') as may_capture
        from realtime.published_tables('{}') as t
        join pg_class as c on c.oid = t.relation
        left join present on present.oid = t.relation
    ),
    world as materialized (
        select
            exists (select from realtime.nodes where last_seen_at > now() - interval '30 seconds') as has_server,
            realtime.has_change_reader() as has_reader
    )
    select
        'capture',
        case when not t.may_capture or world.has_server or t.is_enabled is not null then 'problem' else 'note' end,
        format(
            case when t.is_enabled is null then '%s has no capture trigger: its changes are not told' else 'the capture trigger of %s is disabled: its changes are not told' end,
            t.title
        ),
        case
            when not t.may_capture and t.is_enabled is null
                then format('role %I may not put one on it: "grant trigger on %s to %1$I", or let the log be read', current_user, t.title)
            when t.is_enabled is not null and not t.is_ours
                then format('its owner runs "alter table %s enable always trigger %I"', t.title, realtime.capture_trigger(t.relation))
            else 'a server that reads triggers puts it right within a second, where the table is in use or it was refused within ten; at once: select * from realtime.sync_capture()'
        end
    from tables as t
    cross join world
    where source = 'trigger' and t.is_enabled is not true
    union all
    select
        'capture',
        'note',
        format('%s is not owned by role %I: what arrives there by replication is not captured, and only its owner can drop the capture trigger', t.title, current_user),
        format('its owner runs "alter table %s enable always trigger %I"', t.title, realtime.capture_trigger(t.relation))
    from tables as t
    where source = 'trigger' and t.is_enabled and not t.is_ours
    union all
    select
        'outbox',
        'note',
        format(
            'capture triggers write to realtime.changes (%s), and no server runs that reads and empties it',
            pg_size_pretty(pg_total_relation_size('realtime.changes'))
        ),
        'start a server; if none is to come: select * from realtime.sync_capture(false)'
    from world
    where source = 'trigger' and not world.has_server and exists (select from present)
    union all
    select
        'capture_left',
        case when world.has_reader then 'note' else 'problem' end,
        format(
            case
                when source = 'trigger' then '%s has a capture trigger and is not in the publication'
                when world.has_reader then '%s has a capture trigger for a server, while another one reads the log'
                else '%s has a capture trigger, and nobody reads what it writes at each change'
            end,
            present.title
        ),
        case
            when source = 'trigger' then 'select * from realtime.sync_capture()'
            when world.has_reader then 'let all servers read from one source: see REALTIME_CHANGES'
            else 'select * from realtime.release_capture()'
        end
    from present
    cross join world
    where source is distinct from 'trigger' or present.oid not in (select t.relation from tables as t)
$$;
comment on function realtime.doctor_capture(text) is
    'For realtime.doctor: capture triggers that are missing, and those that nobody needs. source: wal or trigger.';
revoke all on function realtime.doctor_capture(text) from public;

create or replace function realtime.doctor(
    login name default null,
    changes text default 'auto',
    obstacle text default null,
    roles text[] default '{anon,authenticated,service_role}',
    strict_deletes boolean default false
)
returns table ("check" text, level text, finding text, advice text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_role text := current_setting('role');
    v_login name := doctor.login;
    v_obstacle text;
    v_source text;
begin
    if pg_is_in_recovery() then
        return query values (
            'primary',
            'problem',
            'this is a standby: servers need the primary',
            'connect to the primary, or promote this one'
        );
        return;
    end if;
    if v_login is null then
        -- An administrator who asks means the server.
        select case when me.rolsuper then owner.rolname else me.rolname end into v_login
        from pg_roles as me
        cross join pg_namespace as n
        join pg_roles as owner on owner.oid = n.nspowner
        where me.rolname = current_user and n.nspname = 'realtime';
    end if;
    if v_login <> current_user then
        perform set_config('role', v_login, true);
    end if;
    return query select * from realtime.doctor_servers();
    return query select * from realtime.doctor_roles(doctor.roles);
    return query select * from realtime.doctor_temporary(doctor.roles);
    return query select * from realtime.doctor_policies(doctor.roles);
    return query select * from realtime.doctor_partitions();
    return query select * from realtime.doctor_maintenance();
    if doctor.changes <> 'trigger' then
        v_obstacle := realtime.doctor_obstacle(doctor.obstacle);
    end if;
    v_source := case
        when doctor.changes <> 'trigger' and v_obstacle is null then 'wal'
        when doctor.changes <> 'wal' then 'trigger'
    end;
    return query select * from realtime.doctor_changes(doctor.changes, v_obstacle);
    return query select * from realtime.doctor_slots();
    return query select * from realtime.doctor_publication();
    return query select * from realtime.doctor_writes();
    return query select * from realtime.doctor_tables(v_source, doctor.roles, doctor.strict_deletes);
    return query select * from realtime.doctor_capture(v_source);
    perform set_config('role', v_role, true);
end
$$;
comment on function realtime.doctor(name, text, text, text[], boolean) is
    'What is in the way of messages and row changes, or may be one day: level (ok, note, problem), what was found and what to do. login: role of the server, by default who asks, for a superuser the owner of schema realtime; changes, roles, strict_deletes: as REALTIME_CHANGES and so on; obstacle: what else keeps the server from reading the log. Changes nothing.';
revoke all on function realtime.doctor(name, text, text, text[], boolean) from public;
