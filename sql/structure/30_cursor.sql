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
