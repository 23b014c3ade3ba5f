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
    elsif message_binary_payload is not null and pg_catalog.octet_length(message_topic) > 246 then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'topic of a binary message must have at most 246 bytes',
            hint = 'Longer names do not fit into the frames that carry bytes.';
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
    elsif message_payload is null and message_binary_payload is null then
        raise exception using
            errcode = 'invalid_parameter_value',
            message = 'payload must not be null',
            hint = 'An empty message is ''{}'', or ''\x''::bytea with realtime.send_binary.';
    elsif pg_catalog.jsonb_typeof(message_payload) <> 'object' then
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

-- Who may write may choose the time, because tools do, but no other day: a row that is dropped early would be a gap for everybody. The probe's
-- time is allowed as well. And what is for the servers, clients do not write.
drop policy if exists writers_keep_to_their_day on realtime.messages;
create policy writers_keep_to_their_day on realtime.messages
    as restrictive
    for insert
    to public
    with check (
        extension in ('broadcast', 'presence')
        and (
            inserted_at between (now() at time zone 'utc') - interval '1 day' and (now() at time zone 'utc') + interval '1 day'
            or inserted_at = '1970-01-01'
        )
    );

-- A server without BYPASSRLS for service_role is served as well.
drop policy if exists service_role_may_do_everything on realtime.messages;
create policy service_role_may_do_everything on realtime.messages
    for all
    to service_role
    using (true)
    with check (true);
