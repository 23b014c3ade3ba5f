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
