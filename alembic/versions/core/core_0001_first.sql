-- Schemas and roles. Runs once, as the role that will own all objects: an ordinary role that owns the database.

create schema if not exists realtime;
comment on schema realtime is 'Realtime messages: what applications and people call.';
create schema if not exists realtime_internal;
comment on schema realtime_internal is 'Tables and functions of the servers; clients'' roles have no right to use it.';

create table realtime_internal.applied_functions (
    branch text primary key,
    digest text not null,
    applied_at timestamptz not null default now()
);
comment on table realtime_internal.applied_functions is
    'Version of the functions, triggers, policies and views in this database: a migration applies the files of a branch again when they have changed.';
comment on column realtime_internal.applied_functions.branch is 'core, or a sample.';
comment on column realtime_internal.applied_functions.digest is 'SHA-256 of the files, in hexadecimal.';
comment on column realtime_internal.applied_functions.applied_at is 'When they were applied.';

-- Tokens act as one of these roles; the owner must be allowed to set each of them.
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
                -- Only a superuser, or a role that has BYPASSRLS, may grant it; for our own tables the policies below replace it.
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
-- The outbox: every message for clients is a row here, written in the transaction of the data that it is about.

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

comment on table realtime.messages is 'Messages for clients, one partition for each UTC day. Row-level security decides who may join a private topic and send to it.';
comment on column realtime.messages.topic is 'Topic that clients join, without "realtime:" in front.';
comment on column realtime.messages.extension is
    '"broadcast" or "presence", by which policies distinguish the two rights; "revalidate": for the servers.';
comment on column realtime.messages.payload is 'JSON object for the clients; null when binary_payload is set.';
comment on column realtime.messages.event is 'Name that clients filter by.';
comment on column realtime.messages.private is 'Which of the two rooms of this name: private (authorized by policies) or public.';
comment on column realtime.messages.updated_at is 'UTC; equal to inserted_at. Kept for tools that expect it.';
comment on column realtime.messages.inserted_at is 'UTC, start of the writing transaction; determines the partition.';
comment on column realtime.messages.id is 'Clients get it as meta.id and may deduplicate by it.';
comment on column realtime.messages.binary_payload is 'Bytes for the clients; null when payload is set.';
comment on column realtime.messages.xid is 'Transaction that wrote the row: the relay reads by it. Set by the trigger stamp_message.';
comment on column realtime.messages.seq is 'Order of writing. Set by the trigger stamp_message.';

create index messages_xid_idx on realtime.messages (xid);
create index messages_topic_idx on realtime.messages (topic, seq) where extension = 'broadcast';

-- The default partition, so that an insert never fails for want of one.
create table realtime.messages_default partition of realtime.messages default;
comment on table realtime.messages_default is 'Rows of days for which no partition was made in time.';

-- Probe rows of authorization checks go here: unlogged, so that a check writes no WAL, and always rolled back.
create unlogged table realtime.messages_probe
    partition of realtime.messages for values from (minvalue) to ('1970-01-02');
comment on table realtime.messages_probe is 'Probe rows of authorization checks, always rolled back.';

-- The partitions need it too: where default privileges grant new tables to everybody, only this protects them from direct queries.
alter table realtime.messages enable row level security;
alter table realtime.messages_default enable row level security;
alter table realtime.messages_probe enable row level security;

-- Writers choose neither id nor time nor order of a message, so these columns are not granted. What default privileges have granted in
-- addition is revoked.
revoke all on realtime.messages from anon, authenticated, service_role;
grant select on realtime.messages to anon, authenticated, service_role;
grant insert (topic, extension, payload, event, private, updated_at, binary_payload)
    on realtime.messages to anon, authenticated, service_role;
grant usage on sequence realtime.messages_seq to anon, authenticated, service_role;
-- Positions in the stream of messages: clients and workers return them to continue where they stopped.

-- Strict, because clients send it: version, incarnation of the database, a snapshot, possibly a later one, and a sequence number.
create domain realtime.cursor as text
    constraint cursor_format check (
        length(value) <= 40000
        and length(value) - length(replace(value, '.', '')) <= 2002
        and value ~ '^1-[0-9a-f]{12}(-[0-9]{1,19}([.][0-9]{1,19})+){1,2}-[0-9]{1,19}$'
    );
comment on domain realtime.cursor is 'Position in the stream of messages. Opaque to clients, who return it unchanged.';

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
comment on table realtime_internal.stream is 'One row: the identity of the stream, and its retention horizon. Only maintenance writes it.';
comment on column realtime_internal.stream.only_row is 'Always true: there is one row.';
comment on column realtime_internal.stream.epoch is 'Random, drawn at installation: cursors of another installation are refused.';
comment on column realtime_internal.stream.dropped_in_life is 'Incarnation of the database that dropped_xid belongs to: in another it means nothing.';
comment on column realtime_internal.stream.dropped_xid is 'Retention horizon: highest transaction id among dropped messages of all topics; the relay''s position must be after it.';
comment on column realtime_internal.stream.dropped_anywhere_xid is
    'Highest transaction id among dropped messages that realtime_internal.dropped_topics does not cover: cursors of every topic must be after it.';
comment on column realtime_internal.stream.dropped_change_xid is 'The same for captured row changes.';
comment on column realtime_internal.stream.dropped_change_in_life is 'Incarnation of the database that dropped_change_xid belongs to.';
alter table realtime_internal.stream enable row level security;  -- no policies: for its owner only
insert into realtime_internal.stream default values;

-- Bounded by realtime_internal.trim_dropped_topics: what is removed raises realtime_internal.stream.dropped_anywhere_xid instead.
create table realtime_internal.dropped_topics (
    topic_hash bigint primary key,
    xid xid8 not null,
    seq bigint not null
);
comment on table realtime_internal.dropped_topics is
    'Retention horizon of each topic of which messages were dropped: a cursor must be after it. Only maintenance writes it.';
comment on column realtime_internal.dropped_topics.topic_hash is 'hashtextextended(topic, 0): topics with the same hash share the horizon.';
comment on column realtime_internal.dropped_topics.xid is 'Highest transaction id among dropped messages of the topic.';
comment on column realtime_internal.dropped_topics.seq is 'Highest sequence number among dropped messages of the topic.';
alter table realtime_internal.dropped_topics enable row level security;  -- no policies: for its owner only

-- One row for each task: its lock lets one session at a time do the work. Any role could take advisory locks.
create table realtime_internal.maintenance (
    task text primary key,
    succeeded_at timestamptz not null default now()
);
comment on table realtime_internal.maintenance is 'Periodic tasks of the servers, each done by one server at a time.';
comment on column realtime_internal.maintenance.task is
    'messages: partitions and retention; changes: retention of captured row changes; capture: triggers on the tables of the publication.';
comment on column realtime_internal.maintenance.succeeded_at is 'When the task was last completed.';
alter table realtime_internal.maintenance enable row level security;  -- no policies: for its owner only
insert into realtime_internal.maintenance (task) values ('messages'), ('changes'), ('capture');
-- Presence, as the servers know it. Unlogged: it is valid only as long as the servers run.

create unlogged table realtime_internal.nodes (
    id uuid primary key,
    started_at timestamptz not null default now(),
    last_seen_at timestamptz not null default now()
);
comment on table realtime_internal.nodes is 'The servers on this database.';
comment on column realtime_internal.nodes.id is 'Drawn by the server when it starts.';
comment on column realtime_internal.nodes.started_at is 'When it first wrote here.';
comment on column realtime_internal.nodes.last_seen_at is 'Written every few seconds; a server not seen for half a minute counts as dead.';

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
comment on table realtime_internal.presence_entries is 'Presence entries, written by the servers a moment after clients have received them. Read the view realtime.presence.';
comment on column realtime_internal.presence_entries.node is 'Server that the client is connected to.';
comment on column realtime_internal.presence_entries.ref is 'phx_ref of the entry.';
comment on column realtime_internal.presence_entries.topic is 'Topic without "realtime:" in front.';
comment on column realtime_internal.presence_entries.private is 'Which of the two rooms of this name: private or public.';
comment on column realtime_internal.presence_entries.key is 'Presence key of the client.';
comment on column realtime_internal.presence_entries.payload is 'What the client tracks.';
comment on column realtime_internal.presence_entries.since is 'When the entry was written here.';

-- No policies: for their owner only.
alter table realtime_internal.nodes enable row level security;
alter table realtime_internal.presence_entries enable row level security;
-- Row changes: the publication, and the outbox of the triggers that capture changes.

-- A table publishes changes if and only if it is in this publication; an existing publication stays with its owner.
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
comment on column realtime_internal.changes.changed_at is 'When the row was changed; a trigger does not know the time of the commit.';
comment on column realtime_internal.changes.record is 'The new row in its text form, in parentheses; null for DELETE. Both rows are null where they are too large.';
comment on column realtime_internal.changes.old_record is 'The old row; null for INSERT.';
comment on column realtime_internal.changes.columns is 'Names of the columns, in the order of the values in the rows.';

create index changes_xid_idx on realtime_internal.changes (xid);
alter table realtime_internal.changes enable row level security;  -- no policies: for its owner only
