-- Schemas and roles. Runs once, as the role that will own everything here: an ordinary role that owns the database.

create schema if not exists realtime;
comment on schema realtime is 'Realtime messages: what applications and people call.';
create schema if not exists realtime_internal;
comment on schema realtime_internal is 'What the servers keep and call; clients'' roles have no right to use it.';

create table realtime_internal.applied_functions (
    branch text primary key,
    digest text not null,
    applied_at timestamptz not null default now()
);
comment on table realtime_internal.applied_functions is
    'Which functions, triggers, policies and views this database has: a migration applies the files of a branch again when they have changed.';
comment on column realtime_internal.applied_functions.branch is 'core, or a sample.';
comment on column realtime_internal.applied_functions.digest is 'SHA-256 of the files, in hexadecimal.';
comment on column realtime_internal.applied_functions.applied_at is 'When they were applied.';

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
    private boolean not null default false,
    updated_at timestamp not null default (now() at time zone 'utc'),
    inserted_at timestamp not null default (now() at time zone 'utc'),
    id uuid not null default gen_random_uuid(),
    binary_payload bytea,
    xid xid8 not null,
    seq bigint not null,
    constraint messages_pkey primary key (id, inserted_at),
    constraint messages_payload_exclusive check (payload is null or binary_payload is null),
    constraint messages_extension check (extension in ('broadcast', 'presence', 'revalidate'))
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

create table realtime_internal.stream (
    only_row boolean primary key default true,
    epoch uuid not null default gen_random_uuid(),
    dropped_xid xid8 not null default '0',
    dropped_in_life text not null default '',
    dropped_anywhere_xid xid8 not null default '0',
    dropped_change_xid xid8 not null default '0',
    dropped_change_in_life text not null default '',
    constraint stream_only_row check (only_row)
);
comment on table realtime_internal.stream is 'One row: which stream this is, and how far back it reaches. Written by maintenance only.';
comment on column realtime_internal.stream.only_row is 'Always true: there is one row.';
comment on column realtime_internal.stream.epoch is 'Drawn at install: cursors of another installation do not fit.';
comment on column realtime_internal.stream.dropped_in_life is 'Life of the database in which dropped_xid was drawn: in another it means nothing.';
comment on column realtime_internal.stream.dropped_xid is 'Highest transaction id among dropped messages of all topics; the relay must lie wholly behind it.';
comment on column realtime_internal.stream.dropped_anywhere_xid is
    'Highest transaction id among dropped messages that realtime_internal.dropped_topics does not cover: cursors of every topic must lie behind it.';
comment on column realtime_internal.stream.dropped_change_xid is 'The same for captured row changes.';
comment on column realtime_internal.stream.dropped_change_in_life is 'Life of the database in which dropped_change_xid was drawn.';
alter table realtime_internal.stream enable row level security;  -- no policies: for its owner only
insert into realtime_internal.stream default values;

-- Bounded by realtime_internal.note_dropped_topics: what does not fit raises realtime_internal.stream.dropped_anywhere_xid instead.
create table realtime_internal.dropped_topics (
    topic_hash bigint primary key,
    xid xid8 not null,
    seq bigint not null
);
comment on table realtime_internal.dropped_topics is
    'How far back each topic reaches, where messages of it were dropped: a cursor must lie behind these. Written by maintenance only.';
comment on column realtime_internal.dropped_topics.topic_hash is 'hashtextextended(topic, 0): topics that share one share the bound.';
comment on column realtime_internal.dropped_topics.xid is 'Highest transaction id among dropped messages of the topic.';
comment on column realtime_internal.dropped_topics.seq is 'Highest sequence number among dropped messages of the topic.';
alter table realtime_internal.dropped_topics enable row level security;  -- no policies: for its owner only

-- A row a task: its lock lets one session at a time do the work. Advisory locks would not do, any role can take those.
create table realtime_internal.maintenance (
    task text primary key,
    succeeded_at timestamptz not null default now()
);
comment on table realtime_internal.maintenance is 'What the servers do from time to time, one of them at a time.';
comment on column realtime_internal.maintenance.task is
    'messages: partitions and retention; changes: retention of captured row changes; capture: triggers on the tables of the publication.';
comment on column realtime_internal.maintenance.succeeded_at is 'When all of it was last done.';
alter table realtime_internal.maintenance enable row level security;  -- no policies: for its owner only
insert into realtime_internal.maintenance (task) values ('messages'), ('changes'), ('capture');
-- Who is present where, as the servers know it. Unlogged: it is true only as long as the servers live.

create unlogged table realtime_internal.nodes (
    id uuid primary key,
    started_at timestamptz not null default now(),
    last_seen_at timestamptz not null default now()
);
comment on table realtime_internal.nodes is 'The servers on this database.';
comment on column realtime_internal.nodes.id is 'Drawn by the server when it starts.';
comment on column realtime_internal.nodes.started_at is 'When it first wrote here.';
comment on column realtime_internal.nodes.last_seen_at is 'Written every few seconds; a server not seen for half a minute is taken for dead.';

create unlogged table realtime_internal.presence_entries (
    node uuid not null references realtime_internal.nodes (id) on delete cascade,
    ref text not null,
    topic text not null,
    private boolean not null,
    key text not null,
    payload jsonb not null,
    since timestamptz not null default now(),
    constraint presence_entries_pkey primary key (node, ref)
);
comment on table realtime_internal.presence_entries is 'What clients track, written by the servers a moment after the clients saw it. Read the view realtime.presence.';
comment on column realtime_internal.presence_entries.node is 'Server that the client is connected to.';
comment on column realtime_internal.presence_entries.ref is 'phx_ref of the entry.';
comment on column realtime_internal.presence_entries.topic is 'Without "realtime:" in front.';
comment on column realtime_internal.presence_entries.private is 'Which of the two rooms of this name.';
comment on column realtime_internal.presence_entries.key is 'Presence key of the client.';
comment on column realtime_internal.presence_entries.payload is 'What the client tracks.';
comment on column realtime_internal.presence_entries.since is 'When it was written here.';

-- No policies: for their owner only.
alter table realtime_internal.nodes enable row level security;
alter table realtime_internal.presence_entries enable row level security;
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

create sequence realtime_internal.changes_seq as bigint;
comment on sequence realtime_internal.changes_seq is 'Order of writing. Cache must stay 1, or order between sessions is lost.';

create table realtime_internal.changes (
    seq bigint not null default nextval('realtime_internal.changes_seq'),
    xid xid8 not null default pg_current_xact_id(),
    relation oid not null,
    action text not null,
    changed_at timestamptz not null default clock_timestamp(),
    record jsonb,
    old_record jsonb,
    columns text[]
);
alter sequence realtime_internal.changes_seq owned by realtime_internal.changes.seq;

comment on table realtime_internal.changes is 'Captured row changes, for the servers only. A server deletes what is older than an hour, every five minutes, and all of it when no table is captured and no server reads here.';
comment on column realtime_internal.changes.seq is 'Order of writing.';
comment on column realtime_internal.changes.xid is 'Transaction that wrote the row: the servers read by it.';
comment on column realtime_internal.changes.relation is 'Table, as the publication names it: of a partition maybe the root.';
comment on column realtime_internal.changes.action is 'INSERT, UPDATE or DELETE.';
comment on column realtime_internal.changes.changed_at is 'When the row was changed; the time of the commit is not known to a trigger.';
comment on column realtime_internal.changes.record is 'The new row as a string, the text of its values in brackets; null for DELETE. Both are null where they are too large.';
comment on column realtime_internal.changes.old_record is 'The old row; null for INSERT.';
comment on column realtime_internal.changes.columns is 'Names of the columns, in the order of the values in the rows.';

create index changes_xid_idx on realtime_internal.changes (xid);
alter table realtime_internal.changes enable row level security;  -- no policies: for its owner only
