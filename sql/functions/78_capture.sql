-- Capture triggers, created and dropped to match the publication.

-- The oid in the name distinguishes it from users' triggers, and from the clone of its root's trigger on a partition. Triggers fire in the
-- order of their names: what other triggers write because of a change must come after it.
create or replace function realtime_internal.capture_trigger(relation oid)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select '!realtime_capture_' || relation::text
$$;
comment on function realtime_internal.capture_trigger(oid) is 'Name of the capture trigger on this table.';
revoke all on function realtime_internal.capture_trigger(oid) from public;

create or replace function realtime_internal.capture_triggers()
returns table (relation oid, name text, events text[], is_sound boolean)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        t.tgrelid,
        t.tgname::text,
        -- Bits of pg_trigger.tgtype.
        pg_catalog.array_remove(array[
            case when t.tgtype & 4 > 0 then 'INSERT' end,
            case when t.tgtype & 16 > 0 then 'UPDATE' end,
            case when t.tgtype & 8 > 0 then 'DELETE' end
        ], null),
        -- Its clones on partitions have its name.
        t.tgname <> all (array(
            select disabled.tgname
            from pg_catalog.pg_trigger as disabled
            where disabled.tgfoid = 'realtime_internal.capture_change()'::pg_catalog.regprocedure and disabled.tgenabled = 'D'
        ))
            and t.tgname = realtime_internal.capture_trigger(t.tgrelid)
            and t.tgargs = pg_catalog.convert_to(t.tgrelid::text, 'UTF8') || '\x00'::bytea
    from pg_catalog.pg_trigger as t
    where t.tgfoid = 'realtime_internal.capture_change()'::pg_catalog.regprocedure and not t.tgisinternal and t.tgparentid = 0
$$;
comment on function realtime_internal.capture_triggers() is
    'The capture triggers, without the clones on partitions. Not sound: disabled, even on one partition only, or created for another table, as in a restored dump.';
revoke all on function realtime_internal.capture_triggers() from public;

create or replace function realtime_internal.capture_marks()
returns table (relation oid, mark text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select t.tgrelid, concat_ws('/', t.oid, t.xmin)
    from pg_trigger as t
    where t.tgfoid = to_regprocedure('realtime_internal.capture_change()') and not t.tgisinternal and t.tgparentid = 0 and t.tgenabled <> 'D'
$$;
comment on function realtime_internal.capture_marks() is
    'For each captured table a fingerprint that changes if it was not captured for a moment: its trigger was dropped or disabled, and is there again.';
revoke all on function realtime_internal.capture_marks() from public;

create or replace function realtime_internal.capture_plan(is_wanted boolean default true)
returns table (relation oid, name text, events text[])
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with wanted as materialized (
        select
            c.oid,
            array_remove(array[
                case when p.pubinsert then 'INSERT' end,
                case when p.pubupdate then 'UPDATE' end,
                case when p.pubdelete then 'DELETE' end
            ], null) as events
        from pg_publication as p
        join pg_publication_tables as pt on pt.pubname = p.pubname
        join pg_namespace as n on n.nspname = pt.schemaname
        join pg_class as c on c.relnamespace = n.oid and c.relname = pt.tablename
        where p.pubname = 'supabase_realtime'
            and n.nspname not in ('realtime', 'realtime_internal')
            and is_wanted
            and (p.pubinsert or p.pubupdate or p.pubdelete)
    ),
    present as materialized (
        select
            t.relation as oid,
            min(t.events) as events,
            count(*) = 1 and bool_and(t.is_sound) as is_sound
        from realtime_internal.capture_triggers() as t
        group by t.relation
    )
    select coalesce(wanted.oid, present.oid), realtime_internal.table_name(coalesce(wanted.oid, present.oid)), coalesce(wanted.events, '{}')
    from wanted
    full join present on present.oid = wanted.oid
    where present.is_sound is not true or wanted.events is distinct from present.events
    order by wanted.oid is not null, 1
$$;
comment on function realtime_internal.capture_plan(boolean) is
    'Tables whose capture trigger is to be dropped (no events), created or replaced, in this order. capture_plan(false): all are to be dropped.';
revoke all on function realtime_internal.capture_plan(boolean) from public;

-- While a lock request waits, all later ones wait behind it. So the wait is short, and best no other table is locked at the time.
create or replace function realtime_internal.capture_table(relation oid, events text[], patience interval default '0.1 s')
returns table (action text, problem text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '1s'
as $$
#variable_conflict use_column
declare
    v_table text := realtime_internal.table_name(capture_table.relation);
    v_trigger text := realtime_internal.capture_trigger(capture_table.relation);
    v_present text;
begin
    if v_table is null then
        -- The table was dropped.
        return;
    end if;
    begin
        -- Of servers that do this at the same time, one does it. A row that only the owner can lock, because any role can take an advisory
        -- lock.
        perform from realtime_internal.maintenance as m where m.task = 'capture' for update;
        perform set_config('lock_timeout', greatest(1, extract(epoch from patience) * 1000)::integer::text, true);
        for v_present in
            select t.name
            from realtime_internal.capture_triggers() as t
            where t.relation = capture_table.relation and not (t.is_sound and t.events = capture_table.events)
        loop
            execute format('drop trigger %I on %s', v_present, v_table);
            action := 'released';
        end loop;
        if cardinality(capture_table.events) > 0
            and not exists (select from realtime_internal.capture_triggers() as t where t.relation = capture_table.relation)
        then
            execute format(
                'create trigger %I after %s on %s for each row execute function realtime_internal.capture_change(%L)',
                v_trigger,
                concat_ws(
                    ' or ',
                    case when 'INSERT' = any (capture_table.events) then 'insert' end,
                    case when 'UPDATE' = any (capture_table.events) then 'update' end,
                    case when 'DELETE' = any (capture_table.events) then 'delete' end
                ),
                v_table,
                capture_table.relation
            );
            -- ENABLE ALWAYS, so that it captures what the log has, also what arrives by replication. Only the table's owner may set it.
            if pg_has_role((select c.relowner from pg_class as c where c.oid = capture_table.relation), 'usage') then
                execute format('alter table %s enable always trigger %I', v_table, v_trigger);
            end if;
            action := 'captured';
        end if;
    exception
        when lock_not_available then
            action := 'waiting';
            problem := 'the table is in use';
        -- Whatever fails (rights, an event trigger, a table that was dropped), it concerns this table alone.
        when others then
            action := 'refused';
            problem := sqlerrm;
    end;
    if action is not null then
        return next;
    end if;
end
$$;
comment on function realtime_internal.capture_table(oid, text[], interval) is
    'Creates the capture trigger of a table for these events, or drops it if there are none; returns what was done (captured, released), or why nothing was (waiting, refused). No row: nothing was to do. Waits for each lock up to patience.';
revoke all on function realtime_internal.capture_table(oid, text[], interval) from public;

create or replace function realtime_internal.sync_capture(is_wanted boolean default true)
returns table (relation oid, name text, action text, problem text)
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    select plan.relation, plan.name, done.action, done.problem
    from realtime_internal.capture_plan(is_wanted) as plan
    cross join lateral realtime_internal.capture_table(plan.relation, plan.events, '0.01 s') as done
$$;
comment on function realtime_internal.sync_capture(boolean) is
    'Creates capture triggers on the tables of the publication and drops all others; returns what was done, and what failed. sync_capture(false) drops all. For use by hand: servers process one table at a time, so that no lock is kept while waiting for another one.';
revoke all on function realtime_internal.sync_capture(boolean) from public;

create or replace function realtime_internal.release_capture()
returns table (relation oid, name text, action text, problem text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    if not realtime_internal.has_change_reader() then
        return query select released.* from realtime_internal.sync_capture(false) as released;
    end if;
end
$$;
comment on function realtime_internal.release_capture() is 'Drops the capture triggers, unless a server reads what they write.';
revoke all on function realtime_internal.release_capture() from public;
