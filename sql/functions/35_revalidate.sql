-- Announces that rights have changed.

-- The announcement is an outbox row for the servers themselves: each of them reads it in order, and none can miss it.
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
    'Reauthorizes joined private channels of a topic, of a user (claim "sub"), of both, or of all; a client without the right loses the channel within a second of the commit. Call it in a SECURITY DEFINER trigger on the table that policies read. '
    'Example: select realtime.revalidate(topic => ''room:1'');';
revoke all on function realtime.revalidate(text, text) from public;
grant execute on function realtime.revalidate(text, text) to service_role;
