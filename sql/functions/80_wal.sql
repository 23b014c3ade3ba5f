-- Row changes from PostgreSQL's log: the server's replication slot, and its status for administrators.

create or replace function realtime_internal.slot_name()
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select 'realtime_changes_' || oid from pg_database where datname = current_database()
$$;
comment on function realtime_internal.slot_name() is
    'Name of the replication slot that the server reads row changes of this database from. Slots belong to the whole cluster, so it names the database.';
revoke all on function realtime_internal.slot_name() from public;

create or replace function realtime_internal.commits_wait_for_readers()
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select current_setting('synchronous_standby_names') ~ '(^|[\s,(])\*([\s,)]|$)'
$$;
comment on function realtime_internal.commits_wait_for_readers() is
    'Whether synchronous_standby_names has a *: then a commit waits for the reader of the log, who in turn waits for the commit.';
revoke all on function realtime_internal.commits_wait_for_readers() from public;

-- Called before each connection of the reader; it does not find what only an attempt shows (pg_hba.conf, max_wal_senders).
create or replace function realtime_internal.wal_obstacle(publication text, slot text)
returns text
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    select
        case
            when pg_is_in_recovery() then 'PostgreSQL is a standby here, and its changes are read from the primary'
            -- Since PostgreSQL 19 the first logical slot raises the level.
            when current_setting('wal_level') <> 'logical'
                and not (
                    current_setting('wal_level') = 'replica'
                    and current_setting('server_version_num')::integer >= 190000
                )
                then format(
                    'wal_level is %s: set it to logical and restart PostgreSQL', current_setting('wal_level')
                )
            when realtime_internal.commits_wait_for_readers()
                then 'synchronous_standby_names is *, which would make commits wait for this server, too: name the standbys'
            when not exists (
                select
                from pg_roles as allowed
                where pg_has_role(current_user, allowed.oid, 'usage')
                    -- REPLICATION is not inherited; rds_replication is.
                    and (
                        allowed.rolname = current_user and (allowed.rolreplication or allowed.rolsuper)
                        or allowed.rolname = 'rds_replication'
                    )
            )
                then format(
                    'role %I may not replicate: an administrator runs "alter role %I replication"',
                    current_user, current_user
                )
            when not exists (select from pg_publication where pubname = wal_obstacle.publication)
                then format('there is no publication %I', wal_obstacle.publication)
            when taken.slot_name is null
                and (select count(*) from pg_replication_slots) >= current_setting('max_replication_slots')::integer
                then format('all of max_replication_slots (%s) are taken', current_setting('max_replication_slots'))
            when taken.slot_name is not null
                and (taken.plugin is distinct from 'pgoutput' or taken.database <> current_database())
                then format('replication slot %I is of another kind or database', wal_obstacle.slot)
            when taken.active then format('replication slot %I is in use by another server', wal_obstacle.slot)
        end
    from (values (1)) as one
    left join pg_replication_slots as taken on taken.slot_name = wal_obstacle.slot
$$;
comment on function realtime_internal.wal_obstacle(text, text) is
    'Why row changes cannot be read from the log of this database through this publication and slot; null when no obstacle is known.';
revoke all on function realtime_internal.wal_obstacle(text, text) from public;

-- The log, and its stream, have only 32 bits of a transaction id.
create or replace function realtime_internal.full_xid(xid bigint, near bigint)
returns bigint
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select full_xid.near + (((full_xid.xid - full_xid.near) & 4294967295) # 2147483648) - 2147483648
$$;
comment on function realtime_internal.full_xid(bigint, bigint) is
    'The transaction id of 64 bits with these lower 32 bits, at most 2^31 away from near.';
revoke all on function realtime_internal.full_xid(bigint, bigint) from public;

-- A commit is in the log before other sessions see it, and long before where a synchronous standby is slow. Each statement here has a
-- snapshot of its own. All ids are checked: transactions do not become visible in the order of their commits.
create or replace function realtime_internal.wait_until_visible(xids bigint[], timeout interval)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_end timestamptz := clock_timestamp() + wait_until_visible.timeout;
    v_snapshot pg_snapshot;
begin
    loop
        v_snapshot := pg_current_snapshot();
        if not exists (
            select
            from unnest(wait_until_visible.xids) as waited (xid)
            where not pg_visible_in_snapshot(
                realtime_internal.full_xid(waited.xid, pg_snapshot_xmax(v_snapshot)::text::bigint)::text::xid8, v_snapshot
            )
        ) then
            return true;
        end if;
        if clock_timestamp() >= v_end then
            return false;
        end if;
        perform pg_sleep(0.001);
    end loop;
end
$$;
comment on function realtime_internal.wait_until_visible(bigint[], interval) is
    'Waits until transactions that are known to have committed are visible to other sessions, too; false after the timeout. The ids may have 32 bits.';
revoke all on function realtime_internal.wait_until_visible(bigint[], interval) from public;

create or replace function realtime_internal.backend_started(backend integer)
returns numeric
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select extract(epoch from backend_start) from pg_stat_activity where pid = backend_started.backend
$$;
comment on function realtime_internal.backend_started(integer) is
    'When the process with this id started, in seconds since 1970; null when there is none. It distinguishes processes that reuse an id.';
revoke all on function realtime_internal.backend_started(integer) from public;

-- A process that is terminated first notifies its client, and where the client does not read, it blocks until it is terminated again.
create or replace function realtime_internal.end_walsender(backend integer, started numeric)
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set client_min_messages = 'error'
as $$
begin
    for attempt in 1 .. 10 loop
        -- Otherwise statistics of other processes stay the same within a transaction.
        perform pg_stat_clear_snapshot();
        if realtime_internal.backend_started(backend) is distinct from started or pg_terminate_backend(backend, 300) then
            return true;
        end if;
    end loop;
    return false;
end
$$;
comment on function realtime_internal.end_walsender(integer, numeric) is
    'Terminates a connection that its client has lost, and that still holds the slot; returns whether it is gone.';
revoke all on function realtime_internal.end_walsender(integer, numeric) from public;

create or replace function realtime_internal.slot_waits()
returns table (pid integer, role name, application text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select blocking.pid, a.usename, coalesce(a.application_name, 'a prepared transaction')
    from pg_replication_slots as s
    cross join lateral unnest(pg_blocking_pids(s.active_pid)) as blocking (pid)
    left join pg_stat_activity as a on a.pid = blocking.pid
    where s.slot_name = realtime_internal.slot_name() and s.confirmed_flush_lsn is null
$$;
comment on function realtime_internal.slot_waits() is
    'The transactions that the creation of the slot waits for now, one session after the other; pid 0 for a prepared one.';
revoke all on function realtime_internal.slot_waits() from public;

create or replace function realtime.slot_status()
returns table (
    slot text,
    active boolean,
    retained_bytes bigint,
    unconfirmed_bytes bigint,
    wal_status text,
    safe_wal_size bigint,
    problem text
)
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    with here as materialized (
        select case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end as lsn
    )
    select
        s.slot_name::text,
        s.active,
        pg_wal_lsn_diff(here.lsn, s.restart_lsn)::bigint,
        pg_wal_lsn_diff(here.lsn, s.confirmed_flush_lsn)::bigint,
        s.wal_status,
        s.safe_wal_size,
        case
            when s.wal_status = 'lost' and s.active is not true
                then 'changes are lost, because nobody read them in time: a server that reads the log makes a new slot, else call realtime.drop_slot()'
            when s.active is not true
                then 'nobody reads, and PostgreSQL keeps its log until somebody does: start a server, or call realtime.drop_slot()'
            when s.wal_status = 'unreserved'
                then 'the reader is so late that PostgreSQL may remove the log before it is read: raise max_slot_wal_keep_size'
            when current_setting('max_slot_wal_keep_size') = '-1'
                then 'max_slot_wal_keep_size is not set: when nobody reads, the log grows until the disk is full'
        end
    from pg_replication_slots as s
    cross join here
    where s.slot_name = realtime_internal.slot_name()
$$;
comment on function realtime.slot_status() is
    'The slot that the server reads row changes from, no row when there is none: whether a server reads it, bytes of log that are kept for it and that are not confirmed yet, wal_status and safe_wal_size as in pg_replication_slots, and what is wrong. '
    'Example: select * from realtime.slot_status();';
revoke all on function realtime.slot_status() from public;

create or replace function realtime.drop_slot()
returns boolean
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    select count(pg_drop_replication_slot(slot_name)) > 0
    from pg_replication_slots
    where slot_name = realtime_internal.slot_name()
$$;
comment on function realtime.drop_slot() is
    'Drops the slot that the server reads row changes from, so that PostgreSQL keeps no log for it; returns whether there was one. Fails while a server reads. '
    'Example: select realtime.drop_slot();';
revoke all on function realtime.drop_slot() from public;
