-- Announcing that rights have changed.

-- An outbox row for the servers themselves: read in order by each of them, lost by none.
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
    'Asks the policies again for joined private channels of a topic, of a user (claim "sub"), of both, or of all; who lost the right loses the channel within a second of the commit. Call it in a trigger on the table that policies read.';
revoke all on function realtime.revalidate(text, text) from public;
grant execute on function realtime.revalidate(text, text) to service_role;
