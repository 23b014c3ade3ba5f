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
