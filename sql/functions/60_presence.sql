-- Presence, readable in SQL.

create or replace view realtime.presence as
select entry.topic, entry.private, entry.key, entry.payload, entry.since, entry.ref, entry.node
from realtime_internal.presence_entries as entry
join realtime_internal.nodes as node on node.id = entry.node
where node.last_seen_at > now() - interval '30 seconds';
comment on view realtime.presence is 'Presence entries: the clients present in each topic now, with what they track.';
comment on column realtime.presence.topic is 'Topic without "realtime:" in front.';
comment on column realtime.presence.private is 'Which of the two rooms of this name: private or public.';
comment on column realtime.presence.key is 'Presence key of the client.';
comment on column realtime.presence.payload is 'What the client tracks.';
comment on column realtime.presence.since is 'When the entry was written here.';
comment on column realtime.presence.ref is 'phx_ref of the entry.';
comment on column realtime.presence.node is 'Server that the client is connected to.';

create or replace function realtime_internal.write_presence(node uuid, entries jsonb, gone text[])
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_is_new boolean;
begin
    delete from realtime_internal.nodes where last_seen_at < now() - interval '30 seconds' and id <> write_presence.node;
    insert into realtime_internal.nodes (id) values (write_presence.node)
    on conflict (id) do update set last_seen_at = now()
    returning started_at = last_seen_at into v_is_new;
    delete from realtime_internal.presence_entries as e where e.node = write_presence.node and e.ref = any (gone);
    insert into realtime_internal.presence_entries (node, ref, topic, private, key, payload)
    select write_presence.node, entry.ref, entry.topic, entry.private, entry.key, entry.payload
    from jsonb_to_recordset(entries) as entry (ref text, topic text, private boolean, key text, payload jsonb)
    on conflict do nothing;
    return v_is_new;
end
$$;
comment on function realtime_internal.write_presence(uuid, jsonb, text[]) is
    'Writes presence entries; each server calls it every few seconds and when presence has changed. Returns true when the server was unknown: then it must write all entries.';
revoke all on function realtime_internal.write_presence(uuid, jsonb, text[]) from public;
