-- Checks of the source of row changes.

-- Follows the server's choice. To another server a slot in use is an obstacle; here it is a sign of health.
create or replace function realtime_internal.doctor_obstacle(obstacle text)
returns text
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(
        nullif(
            realtime_internal.wal_obstacle('supabase_realtime', realtime_internal.slot_name()),
            format('replication slot %I is in use by another server', realtime_internal.slot_name())
        ),
        doctor_obstacle.obstacle
    )
$$;
comment on function realtime_internal.doctor_obstacle(text) is
    'For realtime.doctor: why no server can read the log of this database; the argument is a further obstacle.';
revoke all on function realtime_internal.doctor_obstacle(text) from public;

create or replace function realtime_internal.doctor_changes(changes text, obstacle text)
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        'changes',
        case when changes = 'trigger' or obstacle is null then 'ok' when changes = 'auto' then 'note' else 'problem' end,
        case
            when changes = 'trigger' then 'row changes come from capture triggers, as the settings ask for it'
            when obstacle is null then 'row changes come from the log'
            when changes = 'auto' then format('row changes come from capture triggers: %s', obstacle)
            else format('there are no row changes, the log cannot be read: %s', obstacle)
        end,
        case
            when changes = 'trigger' or obstacle is null then null
            when changes = 'auto' then 'nothing, if writers can afford one more row for each; else make the log readable, and the server goes over to it within some minutes'
            else 'make the log readable, or set REALTIME_CHANGES to auto'
        end
    union all
    select
        'wal_level',
        case when is_enough then 'ok' when changes = 'auto' then 'note' else 'problem' end,
        case
            when is_enough then format('wal_level is %s', wal_level)
            else format('wal_level is %s: the log does not say which rows have changed', wal_level)
        end,
        case when not is_enough then 'an administrator runs "alter system set wal_level = logical" and restarts PostgreSQL' end
    from (
        select
            current_setting('wal_level') as wal_level,
            -- Since PostgreSQL 19 the first logical slot raises the level.
            current_setting('wal_level') = 'logical'
                or current_setting('wal_level') = 'replica' and current_setting('server_version_num')::integer >= 190000 as is_enough
    ) as log
    where changes <> 'trigger'
    union all
    select
        'replication',
        case when may_replicate then 'ok' when changes = 'auto' then 'note' else 'problem' end,
        format(case when may_replicate then 'role %I may replicate' else 'role %I may not replicate' end, current_user),
        case when not may_replicate then format('an administrator runs "alter role %I replication"', current_user) end
    from (
        select exists (
            select
            from pg_roles as r
            where pg_has_role(current_user, r.oid, 'usage')
                and (r.rolname = current_user and (r.rolreplication or r.rolsuper) or r.rolname = 'rds_replication')
        ) as may_replicate
    ) as login
    where changes <> 'trigger'
$$;
comment on function realtime_internal.doctor_changes(text, text) is
    'For realtime.doctor: where row changes come from, and why. changes: as REALTIME_CHANGES; obstacle: why the log cannot be read.';
revoke all on function realtime_internal.doctor_changes(text, text) from public;

create or replace function realtime_internal.doctor_slots()
returns table ("check" text, level text, finding text, advice text)
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    with ours as materialized (
        select * from realtime.slot_status()
    )
    select
        'slot',
        case
            when wal_status = 'lost' or wal_status = 'unreserved' and active then 'problem'
            when active then 'ok'
            else 'note'
        end,
        format(
            'replication slot %I: %s; PostgreSQL keeps %s of log for it, of which %s are to be read',
            slot,
            case when active then 'a server reads' else 'nobody reads' end,
            pg_size_pretty(coalesce(retained_bytes, 0)),
            pg_size_pretty(coalesce(unconfirmed_bytes, 0))
        ),
        case when not active or wal_status in ('lost', 'unreserved') then problem end
    from ours
    union all
    select
        'slot',
        'problem',
        format(
            'the replication slot is being created and waits for a transaction: there are no row changes until then (pid %s, role %s, application %L)',
            pid,
            role,
            application
        ),
        case
            when pid = 0 then 'commit it or roll it back: see pg_prepared_xacts'
            else format('wait for it, or select pg_terminate_backend(%s)', pid)
        end
    from realtime_internal.slot_waits()
    union all
    select
        'max_slot_wal_keep_size',
        case when active then 'note' else 'problem' end,
        'max_slot_wal_keep_size is not set: while nobody reads the slot, the log grows until the disk is full',
        'an administrator runs "alter system set max_slot_wal_keep_size = ''10GB''" (what the disk can spare) and "select pg_reload_conf()"'
    from ours
    where current_setting('max_slot_wal_keep_size') = '-1'
    union all
    select
        'other_slots',
        'note',
        format(
            'replication slot %I, which is not ours%s, keeps %s of log',
            s.slot_name,
            case when not s.active then ' and which nobody reads' end,
            pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn))
        ),
        format('if nobody comes for it any more: select pg_drop_replication_slot(%L)', s.slot_name)
    from pg_replication_slots as s
    where s.slot_name <> realtime_internal.slot_name()
        and not s.temporary
        and s.restart_lsn is not null
        and (not s.active or pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn) > 1073741824)
$$;
comment on function realtime_internal.doctor_slots() is 'For realtime.doctor: which slots keep how much of the log.';
revoke all on function realtime_internal.doctor_slots() from public;

create or replace function realtime_internal.doctor_publication()
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with publication as materialized (
        select * from pg_publication where pubname = 'supabase_realtime'
    ),
    published as materialized (
        select format('%I.%I', schemaname, tablename) as title, row_number() over (order by schemaname, tablename) as number
        from pg_publication_tables
        where pubname = 'supabase_realtime' and schemaname not in ('realtime', 'realtime_internal')
    )
    select
        'publication',
        'problem',
        'there is no publication supabase_realtime: no table tells its changes',
        'create publication supabase_realtime'
    where not exists (select from publication)
    union all
    select
        'publication',
        case when count(title) > 0 then 'ok' else 'note' end,
        case count(title)
            when 0 then 'the publication supabase_realtime has no tables: none tells its changes'
            else format(
                'tables of the publication supabase_realtime: %s%s',
                string_agg(title, ', ' order by number) filter (where number <= 10),
                case when count(title) > 10 then format(', ... (%s in all)', count(title)) end
            )
        end,
        case when count(title) = 0 then 'alter publication supabase_realtime add table ...' end
    from publication
    left join published on true
    having count(publication.oid) > 0
    union all
    select
        'publication',
        'note',
        'the publication has the server''s own tables in it: clients are told nothing of them, but their changes pass through the log in vain',
        'publish the tables of the application only'
    where exists (select from pg_publication_tables where pubname = 'supabase_realtime' and schemaname in ('realtime', 'realtime_internal'))
    union all
    select
        'publication',
        'note',
        format(
            'the publication tells nothing of %s',
            concat_ws(
                ', ',
                case when not pubinsert then 'INSERT' end,
                case when not pubupdate then 'UPDATE' end,
                case when not pubdelete then 'DELETE' end
            )
        ),
        'alter publication supabase_realtime set (publish = ''insert, update, delete'')'
    from publication
    where not (pubinsert and pubupdate and pubdelete)
    union all
    select
        'partitioned',
        'note',
        format('changes of %s are told under the names of its partitions', realtime_internal.table_name(c.oid)),
        'to have them under its own name: alter publication supabase_realtime set (publish_via_partition_root = true)'
    from publication
    join pg_publication_rel as member on member.prpubid = publication.oid
    join pg_class as c on c.oid = member.prrelid and c.relkind = 'p'
    where not publication.pubviaroot
$$;
comment on function realtime_internal.doctor_publication() is 'For realtime.doctor: which tables publish their changes.';
revoke all on function realtime_internal.doctor_publication() from public;
