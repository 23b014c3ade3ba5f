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
