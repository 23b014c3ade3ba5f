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
