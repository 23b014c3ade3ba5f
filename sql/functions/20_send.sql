-- Functions that write messages: applications, their triggers and psql call them, with the caller's rights.
-- Those that insert have no SET clause, because the caller's policies and triggers run inside and would see it. So every name and every
-- operator in them is qualified.

-- Rules for every message, written by realtime.send or by an insert.
create or replace function realtime_internal.check_message(topic text, event text, payload jsonb, binary_payload bytea)
returns boolean
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    -- Beyond half a gigabyte of bytes PostgreSQL could not send the row to the servers, and they could not read on.
    c_most_bytes constant bigint := 16777216;
    v_bytes constant bigint := coalesce(octet_length(binary_payload), octet_length(payload::text));
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
    elsif v_bytes > c_most_bytes then
        raise exception using
            errcode = 'invalid_parameter_value', schema = 'realtime', constraint = 'messages_sound',
            message = format('payload must have at most %s bytes, not %s', c_most_bytes, v_bytes),
            hint = 'Store what is larger, and send where to find it.';
    -- A number with so many digits needs a longer text.
    elsif v_bytes > 308
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
comment on function realtime_internal.check_message(text, text, jsonb, bytea) is
    'Returns true for a message that clients can receive; raises an error that says what is wrong with any other.';

-- This check of the table is created here, because it needs the function. It does not apply to messages for the servers, and not to the
-- probe rows of authorization checks.
do $$
begin
    if not exists (
        select from pg_catalog.pg_constraint
        where conrelid = 'realtime.messages'::regclass and conname = 'messages_sound'
    ) then
        alter table realtime.messages add constraint messages_sound check (
            extension = 'revalidate'
            or inserted_at < '1970-01-02'
            or realtime_internal.check_message(topic, event, payload, binary_payload)
        );
    end if;
end
$$;

create or replace function realtime_internal.stamp_message()
returns trigger
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    -- A row that an UPDATE moves to another partition passes here with the values that it has.
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
comment on function realtime_internal.stamp_message() is
    'Sets the transaction id and the sequence number of a message that has none, or future ones, and adds the key "id" to a JSON object without it.';
revoke all on function realtime_internal.stamp_message() from public;

-- Probe rows are left out: realtime.authorize fails some on purpose by a null here, and sets all values of the others.
create or replace trigger stamp_message
    before insert on realtime.messages
    for each row
    when (new.updated_at is not null and new.inserted_at >= '1970-01-02')
    execute function realtime_internal.stamp_message();
comment on trigger stamp_message on realtime.messages is 'Sets the columns that writers do not choose.';

create or replace function realtime_internal.refuse_probe_row()
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
comment on function realtime_internal.refuse_probe_row() is 'Raises at commit: a committed row in the partition of probe rows would be delivered, and then lost.';
revoke all on function realtime_internal.refuse_probe_row() from public;

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
            execute function realtime_internal.refuse_probe_row();
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
    -- INSERT policies may call realtime.topic(). A null would break NOT NULL, whose error has no hint.
    perform pg_catalog.set_config('realtime.topic', coalesce(message_topic, ''), true);
    insert into realtime.messages (topic, event, payload, binary_payload, private, extension)
    values (coalesce(message_topic, ''), message_event, message_payload, message_binary_payload, message_private, 'broadcast');
    perform pg_catalog.set_config('realtime.topic', coalesce(v_topic_before, ''), true);
end
$$;
comment on function realtime.write_message(text, text, jsonb, bytea, boolean) is
    'Writes one message, which the table checks. Internal: call realtime.send or realtime.send_binary. '
    'Example: select realtime.write_message(''room:1'', ''greeting'', ''{"text": "hello"}'', null, true);';

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
        -- No exception block: each block that writes costs a transaction id.
        perform realtime.write_message(topic, event, payload, null, private);
    end if;
end
$$;
comment on function realtime.send(jsonb, text, text, boolean) is
    'Sends a JSON object to a topic at commit. Adds the key "id" where absent. Raises when the message cannot be written; '
    'after "set realtime.send_errors = ''warning''" it warns instead and continues. '
    'Example: select realtime.send(''{"text": "hello"}'', ''greeting'', ''room:1'');';

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
    'Sends bytes to a topic at commit; clients of protocol 1.0.0 do not get them. Raises as realtime.send does. '
    'Example: select realtime.send_binary(''\x00ff'', ''frame'', ''room:1'');';

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
    'Sends a changed row to a private topic; to be called in row-level triggers. '
    'Example: perform realtime.broadcast_changes(''room:'' || new.room_id, tg_op, tg_op, tg_table_name, tg_table_schema, new, old);';

-- Only some columns are granted, but an administrator may grant more, later or by default privileges. A row that is dropped early would be
-- a gap for everybody. And clients may not write messages for the servers.
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

-- For servers whose service_role lacks BYPASSRLS.
drop policy if exists service_role_may_do_everything on realtime.messages;
create policy service_role_may_do_everything on realtime.messages
    for all
    to service_role
    using (true)
    with check (true);
