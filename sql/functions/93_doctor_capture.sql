-- Checks of the triggers that capture row changes.

create or replace function realtime_internal.doctor_capture(source text)
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with present as materialized (
        select t.tgrelid as oid, t.tgenabled <> 'D' as is_enabled, realtime_internal.table_name(t.tgrelid) as title
        from pg_trigger as t
        where t.tgfoid = 'realtime_internal.capture_change()'::regprocedure and not t.tgisinternal and t.tgparentid = 0
    ),
    tables as materialized (
        select
            t.relation,
            format('%I.%I', t.schema, t.name) as title,
            present.is_enabled,
            pg_has_role(c.relowner, 'usage') as is_ours,
            has_schema_privilege(c.relnamespace, 'usage') and has_table_privilege(c.oid, 'trigger') as may_capture
        from realtime_internal.published_tables('{}') as t
        join pg_class as c on c.oid = t.relation
        left join present on present.oid = t.relation
    ),
    world as materialized (
        select
            exists (select from realtime_internal.nodes where last_seen_at > now() - interval '30 seconds') as has_server,
            realtime_internal.has_change_reader() as has_reader
    )
    select
        'capture',
        case when not t.may_capture or world.has_server or t.is_enabled is not null then 'problem' else 'note' end,
        format(
            case when t.is_enabled is null then '%s has no capture trigger: its changes are not told' else 'the capture trigger of %s is disabled: its changes are not told' end,
            t.title
        ),
        case
            when not t.may_capture and t.is_enabled is null
                then format('role %I may not put one on it: "grant trigger on %s to %1$I", or let the log be read', current_user, t.title)
            when t.is_enabled is not null and not t.is_ours
                then format('its owner runs "alter table %s enable always trigger %I"', t.title, realtime_internal.capture_trigger(t.relation))
            else 'a server that reads triggers puts it right within a second, where the table is in use or it was refused within ten; at once: select * from realtime_internal.sync_capture()'
        end
    from tables as t
    cross join world
    where source = 'trigger' and t.is_enabled is not true
    union all
    select
        'capture',
        'note',
        format('%s is not owned by role %I: what arrives there by replication is not captured, and only its owner can drop the capture trigger', t.title, current_user),
        format('its owner runs "alter table %s enable always trigger %I"', t.title, realtime_internal.capture_trigger(t.relation))
    from tables as t
    where source = 'trigger' and t.is_enabled and not t.is_ours
    union all
    select
        'outbox',
        'note',
        format(
            'capture triggers write to realtime_internal.changes (%s), and no server runs that reads and empties it',
            pg_size_pretty(pg_total_relation_size('realtime_internal.changes'))
        ),
        'start a server; if none is to come: select * from realtime_internal.sync_capture(false)'
    from world
    where source = 'trigger' and not world.has_server and exists (select from present)
    union all
    select
        'capture_left',
        case when world.has_reader then 'note' else 'problem' end,
        format(
            case
                when source = 'trigger' then '%s has a capture trigger and is not in the publication'
                when world.has_reader then '%s has a capture trigger for a server, while another one reads the log'
                else '%s has a capture trigger, and nobody reads what it writes at each change'
            end,
            present.title
        ),
        case
            when source = 'trigger' then 'select * from realtime_internal.sync_capture()'
            when world.has_reader then 'let all servers read from one source: see REALTIME_CHANGES'
            else 'select * from realtime_internal.release_capture()'
        end
    from present
    cross join world
    where source is distinct from 'trigger' or present.oid not in (select t.relation from tables as t)
$$;
comment on function realtime_internal.doctor_capture(text) is
    'For realtime.doctor: capture triggers that are missing, and those that are not needed. source: wal or trigger.';
revoke all on function realtime_internal.doctor_capture(text) from public;
