-- The outbox of captured row changes: triggers write it, servers read it.

-- What is written must not depend on the writer: hence definer rights, and settings that give equal values equal texts.
create or replace function realtime_internal.capture_change()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
as $$
declare
    v_record jsonb;
    v_old_record jsonb;
    v_columns text[];
begin
    begin
        v_record := case when tg_op <> 'DELETE' then to_jsonb(format('%s', new)) end;
        v_old_record := case when tg_op <> 'INSERT' then to_jsonb(format('%s', old)) end;
        -- The table may be altered before the row is read.
        if current_setting('transaction_isolation') = 'read committed' then
            v_columns := array(
                select a.attname::text
                from pg_attribute as a
                where a.attrelid = tg_relid and a.attnum > 0 and not a.attisdropped
                order by a.attnum
            );
        else
            -- The table may have been altered since the snapshot of catalog reads; types are read as they are now.
            execute format('select array(select json_object_keys(row_to_json(row))) from (select (null::%s).*) as row', tg_relid::regclass)
            into v_columns;
        end if;
    exception when others then
        -- The writer must not fail because of it: values may take up to 256 MB.
        v_record := null;
        v_old_record := null;
    end;
    insert into realtime_internal.changes (relation, action, record, old_record, columns)
    values (tg_argv[0]::oid, tg_op, v_record, v_old_record, v_columns);
    return null;
end
$$;
comment on function realtime_internal.capture_change() is
    'Writes the row change to realtime_internal.changes, without its rows where these are too large. On tables of the publication; the argument is the oid of the table as the publication names it.';
revoke all on function realtime_internal.capture_change() from public;

-- Returns exactly the rows that were not visible in "position" and are visible now, as realtime_internal.messages_since does for messages.
create or replace function realtime_internal.captured_since("position" pg_snapshot)
returns table (
    seq bigint,
    relation oid,
    action text,
    changed_at double precision,
    columns text[],
    record text,
    old_record text,
    xid bigint,
    snapshot text
)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with current as materialized (
        select pg_catalog.pg_current_snapshot() as snapshot
    ),
    committed as materialized (
        select c.*
        from realtime_internal.changes as c
        where c.xid >= pg_catalog.pg_snapshot_xmax("position")
            and c.xid < (select pg_catalog.pg_snapshot_xmax(current.snapshot) from current)
        union all
        select c.*
        from realtime_internal.changes as c
        where c.xid = any (array(select pg_catalog.pg_snapshot_xip("position")))
    )
    select null, null, null, null, null, null, null, null, current.snapshot::text
    from current
    union all
    select
        c.seq,
        c.relation,
        c.action,
        extract(epoch from c.changed_at)::double precision,
        c.columns,
        -- A row without columns was written in another format, by an older trigger.
        case when c.columns is not null then c.record #>> '{}' end,
        case when c.columns is not null then c.old_record #>> '{}' end,
        c.xid::text::bigint,
        null
    from committed as c
    order by 1 asc nulls first
$$;
comment on function realtime_internal.captured_since(pg_snapshot) is
    'Captured changes committed since a snapshot, in the order written, their rows as texts; the first row carries the snapshot to continue from.';
revoke all on function realtime_internal.captured_since(pg_snapshot) from public;

create or replace function realtime_internal.dropped_change_xid()
returns xid8
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select case when stream.dropped_change_in_life = realtime.life() then stream.dropped_change_xid else '0' end
    from realtime_internal.stream
$$;
comment on function realtime_internal.dropped_change_xid() is 'Highest transaction id among captured changes that were dropped in this incarnation of the database.';
revoke all on function realtime_internal.dropped_change_xid() from public;

create or replace function realtime_internal.note_dropped_change(xid xid8)
returns void
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    update realtime_internal.stream
    set
        dropped_change_xid = note_dropped_change.xid,
        dropped_change_in_life = realtime.life()
    where note_dropped_change.xid > realtime_internal.dropped_change_xid()
$$;
comment on function realtime_internal.note_dropped_change(xid8) is 'Records that captured changes of transactions up to this one were dropped.';
revoke all on function realtime_internal.note_dropped_change(xid8) from public;

-- In ranges of blocks: an index on the time would cost every writer, and without one a large table is too much for one statement.
create or replace function realtime_internal.drop_old_changes(retention interval default '1 hour', from_block bigint default 0, blocks bigint default 4294967295)
returns table (dropped bigint, next_block bigint)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_end bigint := least(drop_old_changes.from_block + drop_old_changes.blocks, 4294967295);
    v_xid xid8;
begin
    -- A lock on a row that only the owner can reach, because any role can take an advisory lock.
    perform from realtime_internal.maintenance as m where m.task = 'changes' for update skip locked;
    if not found then
        return;
    end if;
    with gone as (
        delete from realtime_internal.changes as c
        where c.ctid >= format('(%s,0)', drop_old_changes.from_block)::tid
            and c.ctid < format('(%s,0)', v_end)::tid
            and c.changed_at < now() - drop_old_changes.retention
        returning c.xid
    )
    select
        count(*),
        -- Without ids of another cluster, as in a restored dump: no reader's position is after them.
        max(gone.xid::text::numeric) filter (where gone.xid < pg_snapshot_xmax(pg_current_snapshot()))
    into dropped, v_xid
    from gone;
    perform realtime_internal.note_dropped_change(v_xid);
    next_block := v_end;
    if v_end * current_setting('block_size')::bigint >= pg_relation_size('realtime_internal.changes') then
        next_block := null;
        update realtime_internal.maintenance as m set succeeded_at = now() where m.task = 'changes';
    end if;
    return next;
end
$$;
comment on function realtime_internal.drop_old_changes(interval, bigint, bigint) is
    'Deletes captured changes older than the retention from so many blocks of the table; returns their number, and the block to continue from, null at the end. No row: another server is doing it. A server that has not read them by then reports a gap.';
revoke all on function realtime_internal.drop_old_changes(interval, bigint, bigint) from public;

create or replace function realtime_internal.has_change_reader()
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select exists (
        select from pg_stat_activity where application_name = 'realtime-server changes' and datname = current_database()
    )
$$;
comment on function realtime_internal.has_change_reader() is 'Whether a server reads captured changes now.';
revoke all on function realtime_internal.has_change_reader() from public;

create or replace function realtime_internal.empty_changes()
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '0.1s'
as $$
declare
    v_xid xid8;
begin
    if pg_relation_size('realtime_internal.changes') = 0
        or realtime_internal.has_change_reader()
        or exists (select from realtime_internal.capture_triggers())
    then
        return false;
    end if;
    -- After the lock, checked again for anybody who has begun to write or to read meanwhile.
    lock table realtime_internal.changes in access exclusive mode;
    perform pg_stat_clear_snapshot();
    if realtime_internal.has_change_reader() or exists (select from realtime_internal.capture_triggers()) then
        return false;
    end if;
    select c.xid into v_xid
    from realtime_internal.changes as c
    where c.xid < pg_snapshot_xmax(pg_current_snapshot())
    order by c.xid desc
    limit 1;
    perform realtime_internal.note_dropped_change(v_xid);
    truncate realtime_internal.changes;
    return true;
exception when lock_not_available then
    return false;
end
$$;
comment on function realtime_internal.empty_changes() is
    'Truncates the captured changes, if no table is captured and no server reads them; returns whether it did.';
revoke all on function realtime_internal.empty_changes() from public;
