-- What the relay reads, and how it is woken. Called by the server only.

create or replace function realtime.doorbell_key()
returns bigint
language sql
immutable
as $$
    select 7237125663275445356  -- 'doorbell' as ASCII digits of a bigint; any fixed number would do
$$;
comment on function realtime.doorbell_key() is 'Advisory lock that a relay holds while it sleeps.';

-- Writers ask in passing whether a relay sleeps (it then holds the lock exclusively) and ring only then: NOTIFY in every transaction
-- would put all commits of the database behind one lock.
create or replace function realtime.ring_doorbell()
returns trigger
language plpgsql
volatile
as $$
begin
    if pg_catalog.current_setting('realtime.doorbell', true) = 'off' then
        -- For transactions that are to be prepared: PREPARE TRANSACTION refuses those that notify.
        return null;
    elsif pg_catalog.pg_try_advisory_lock_shared(realtime.doorbell_key()) then
        perform pg_catalog.pg_advisory_unlock_shared(realtime.doorbell_key());
    else
        perform pg_catalog.pg_notify('realtime', '');
    end if;
    return null;
end
$$;
comment on function realtime.ring_doorbell() is
    'Wakes the relay at commit if it sleeps. "set local realtime.doorbell = ''off''" keeps it silent, for PREPARE TRANSACTION; the relay then finds the messages within seconds.';

create or replace trigger ring_doorbell
    after insert on realtime.messages
    for each statement
    execute function realtime.ring_doorbell();
comment on trigger ring_doorbell on realtime.messages is 'Wakes the relay at commit if it sleeps.';

create or replace function realtime.doorbell_is_held(backend integer, key bigint)
returns boolean
language sql
volatile
as $$
    select exists (
        select
        from pg_catalog.pg_locks
        where locktype = 'advisory'
            and database = (select oid from pg_catalog.pg_database where datname = current_database())
            and classid::bigint = key >> 32
            and objid::bigint = key & 4294967295
            and objsubid = 1
            and mode = 'ExclusiveLock'
            and pid = backend
    )
$$;
comment on function realtime.doorbell_is_held(integer, bigint) is
    'Whether this backend holds the lock of a doorbell or stands in the queue for it; in both cases writers ring.';
revoke all on function realtime.doorbell_is_held(integer, bigint) from public;

-- Exactly the rows that were not visible in "position" and are visible now. A row has no snapshot of its own: only its xid is compared.
-- Two branches, so that each uses the index on xid. The bound at the top hides transaction ids of another cluster's counter (a restored
-- dump). One row without a message always comes first and carries the new position.
create or replace function realtime.messages_since("position" pg_snapshot)
returns table (
    seq bigint,
    id uuid,
    topic text,
    extension text,
    event text,
    private boolean,
    payload text,
    binary_payload bytea,
    snapshot text
)
language sql
stable
as $$
    with current as materialized (
        select pg_catalog.pg_current_snapshot() as snapshot
    ),
    committed as materialized (
        select m.*
        from realtime.messages as m
        where m.xid >= pg_catalog.pg_snapshot_xmax("position")
            and m.xid < (select pg_catalog.pg_snapshot_xmax(current.snapshot) from current)
        union all
        select m.*
        from realtime.messages as m
        where m.xid = any (array(select pg_catalog.pg_snapshot_xip("position")))
    )
    select null, null, null, null, null, null, null, null, current.snapshot::text
    from current
    union all
    select c.seq, c.id, c.topic, c.extension, c.event, c.private, c.payload::text, c.binary_payload, null
    from committed as c
    order by 1 asc nulls first
$$;
comment on function realtime.messages_since(pg_snapshot) is
    'Messages committed since a snapshot, in the order written; the first row carries the snapshot to go on from.';
revoke all on function realtime.messages_since(pg_snapshot) from public;

-- Maintenance runs with the server's rights, and no code of users runs inside: who may create functions in public must not be found.
create or replace function realtime.create_partitions(days_ahead integer default 3)
returns setof text
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_day date;
    v_name text;
begin
    for v_day in
        select day::date
        from generate_series(
            (now() at time zone 'utc')::date - 1,
            (now() at time zone 'utc')::date + days_ahead,
            interval '1 day'
        ) as day
    loop
        v_name := to_char(v_day, '"messages_"YYYY_MM_DD');
        continue when to_regclass('realtime.' || v_name) is not null;
        -- Rows that came before their partition stay in the default one; such a day gets no partition.
        continue when exists (
            select from realtime.messages_default where inserted_at >= v_day and inserted_at < v_day + 1
        );
        execute format('create table realtime.%I (like realtime.messages including defaults including constraints)', v_name);
        execute format('alter table realtime.%I enable row level security', v_name);
        execute format(
            'alter table realtime.messages attach partition realtime.%I for values from (%L) to (%L)',
            v_name, v_day, v_day + 1
        );
        return next v_name;
    end loop;
end
$$;
comment on function realtime.create_partitions(integer) is
    'Makes the partitions from yesterday to days_ahead days from now (UTC) that are missing; returns their names.';
revoke all on function realtime.create_partitions(integer) from public;

create or replace function realtime.drop_old_messages(retention interval)
returns setof text
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_before timestamp := (now() at time zone 'utc') - retention;
    v_partition record;
begin
    for v_partition in
        select child.relname, to_date(right(child.relname, 10), 'YYYY_MM_DD') as day
        from pg_catalog.pg_inherits
        join pg_catalog.pg_class as child on child.oid = inhrelid
        where inhparent = 'realtime.messages'::regclass
            and child.relname ~ '^messages_[0-9]{4}_[0-9]{2}_[0-9]{2}$'
        order by child.relname
    loop
        continue when v_partition.day + 1 > v_before;
        -- Whoever still writes to it is waited for, and nobody begins to: what is dropped is what was noted. Both commit together.
        execute format('lock table realtime.%I in share mode', v_partition.relname);
        perform realtime.note_dropped_topics(format('realtime.%I', v_partition.relname)::regclass, 'infinity');
        execute format('drop table realtime.%I', v_partition.relname);
        return next v_partition.relname;
    end loop;

    if exists (select from realtime.messages_default where inserted_at < v_before) then
        lock table realtime.messages_default in share row exclusive mode;
        perform realtime.note_dropped_topics('realtime.messages_default', v_before);
        delete from realtime.messages_default
        where inserted_at < v_before;
    end if;

    -- Probes are rolled back; what is here somebody put by hand.
    delete from realtime.messages_probe;
end
$$;
comment on function realtime.drop_old_messages(interval) is
    'Drops the partitions that lie wholly before now() - retention and old rows of the default one; returns the names. Cursors before them get a gap.';
revoke all on function realtime.drop_old_messages(interval) from public;

-- Called by every server; one at a time does the work. A lock that is not had within the timeout is for the next time: the drop of a
-- partition would otherwise stand in the queue before all writers.
create or replace function realtime.maintain(retention interval default '72 hours')
returns table (partition text, action text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '2s'
as $$
begin
    if not pg_catalog.pg_try_advisory_xact_lock(realtime.doorbell_key() + 1) then
        return;
    end if;
    return query select created, 'created' from realtime.create_partitions() as created;
    begin
        return query select dropped, 'dropped' from realtime.drop_old_messages(retention) as dropped;
    exception when lock_not_available then
        raise warning 'old messages are in use and were not dropped; the next run tries again';
    end;
end
$$;
comment on function realtime.maintain(interval) is
    'Makes partitions ahead and drops what is older than the retention; what was done. Safe to call at any time.';
revoke all on function realtime.maintain(interval) from public;

create or replace view realtime.partitions as
select
    child.relname::text as partition,
    pg_catalog.pg_get_expr(child.relpartbound, child.oid) as bounds,
    greatest(child.reltuples, 0)::bigint as estimated_rows,
    pg_catalog.pg_total_relation_size(child.oid) as bytes
from pg_catalog.pg_inherits
join pg_catalog.pg_class as child on child.oid = inhrelid
where inhparent = 'realtime.messages'::regclass
order by child.relname;
comment on view realtime.partitions is 'What is kept: the partitions of realtime.messages, their bounds and sizes.';
comment on column realtime.partitions.partition is 'Name of the table, in schema realtime.';
comment on column realtime.partitions.bounds is 'UTC days it holds.';
comment on column realtime.partitions.estimated_rows is 'Rows at the last analyze; 0 before the first.';
comment on column realtime.partitions.bytes is 'Size on disk, indexes included.';

do $$
begin
    perform realtime.create_partitions();
end
$$;
