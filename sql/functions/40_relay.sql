-- What the relay reads, and what wakes it. Only servers call these functions.

-- Writers check whether a reader of the outbox sleeps (it then holds the lock exclusively), and notify only then: a NOTIFY in every
-- transaction would serialize all commits of the database. Arguments: the channel, and the key of the advisory lock, which the readers
-- know as well. The function runs with the writer's rights, and calls nothing that the writer has no right to.
create or replace function realtime_internal.ring_doorbell()
returns trigger
language plpgsql
volatile
as $$
begin
    if pg_catalog.current_setting('realtime.doorbell', true) operator(pg_catalog.=) 'off' then
        -- PREPARE TRANSACTION refuses transactions that notify.
        return null;
    elsif pg_catalog.pg_try_advisory_lock_shared(tg_argv[1]::pg_catalog.int8) then
        perform pg_catalog.pg_advisory_unlock_shared(tg_argv[1]::pg_catalog.int8);
    else
        perform pg_catalog.pg_notify(tg_argv[0], '');
    end if;
    return null;
end
$$;
comment on function realtime_internal.ring_doorbell() is
    'Wakes the readers of an outbox at commit if one sleeps. "set local realtime.doorbell = ''off''" disables it, for PREPARE TRANSACTION; the rows are then found within seconds.';
revoke all on function realtime_internal.ring_doorbell() from public;

create or replace trigger ring_doorbell
    after insert on realtime.messages
    for each statement
    execute function realtime_internal.ring_doorbell('realtime', '7237125663275445356');
comment on trigger ring_doorbell on realtime.messages is 'Wakes the relay at commit if it sleeps.';

create or replace trigger ring_doorbell
    after insert on realtime_internal.changes
    for each statement
    execute function realtime_internal.ring_doorbell('realtime_changes', '7237125663275445358');
comment on trigger ring_doorbell on realtime_internal.changes is 'Wakes the readers at commit if one sleeps.';

create or replace function realtime_internal.doorbell_is_held(backend integer, key bigint)
returns boolean
language sql
volatile
begin atomic
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
    );
end;
comment on function realtime_internal.doorbell_is_held(integer, bigint) is
    'Whether this backend holds the lock of a doorbell or waits for it; in both cases writers notify.';
revoke all on function realtime_internal.doorbell_is_held(integer, bigint) from public;

-- Returns exactly the rows that were not visible in "position" and are visible now. A row has no snapshot of its own: only its xid is
-- compared. The two branches let each use the index on xid. The upper bound hides transaction ids of another cluster's counter (a restored
-- dump). One row without a message always comes first and carries the new position.
create or replace function realtime_internal.messages_since("position" pg_snapshot)
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
begin atomic
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
    order by 1 asc nulls first;
end;
comment on function realtime_internal.messages_since(pg_snapshot) is
    'Messages committed since a snapshot, in the order written; the first row carries the snapshot to continue from.';
revoke all on function realtime_internal.messages_since(pg_snapshot) from public;
