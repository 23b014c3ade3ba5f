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
    if pg_catalog.pg_try_advisory_lock_shared(realtime.doorbell_key()) then
        perform pg_catalog.pg_advisory_unlock_shared(realtime.doorbell_key());
    else
        perform pg_catalog.pg_notify('realtime', '');
    end if;
    return null;
end
$$;
comment on function realtime.ring_doorbell() is 'Wakes the relay at commit if it sleeps.';

create or replace trigger ring_doorbell
    after insert on realtime.messages
    for each statement
    execute function realtime.ring_doorbell();
comment on trigger ring_doorbell on realtime.messages is 'Wakes the relay at commit if it sleeps.';

create or replace function realtime.doorbell_is_held(backend integer)
returns boolean
language sql
volatile
as $$
    select exists (
        select
        from pg_catalog.pg_locks
        where locktype = 'advisory'
            and database = (select oid from pg_catalog.pg_database where datname = current_database())
            and classid::bigint = realtime.doorbell_key() >> 32
            and objid::bigint = realtime.doorbell_key() & 4294967295
            and objsubid = 1
            and mode = 'ExclusiveLock'
            and pid = backend
    )
$$;
comment on function realtime.doorbell_is_held(integer) is
    'Whether this backend holds the doorbell lock or stands in the queue for it; in both cases writers ring.';
revoke all on function realtime.doorbell_is_held(integer) from public;

-- Exactly the rows that were not visible in "position" and are visible now. A row has no snapshot of its own: only its xid is compared.
-- Two branches, so that each uses the index on xid. The bound at the top hides transaction ids of another cluster's counter (a restored
-- dump). One row with the new position always comes, last and without a message.
create or replace function realtime.messages_since("position" pg_snapshot)
returns table (
    seq bigint,
    id uuid,
    topic text,
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
    select c.seq, c.id, c.topic, c.event, c.private, c.payload::text, c.binary_payload, null
    from committed as c
    where c.extension = 'broadcast'
    union all
    select null, null, null, null, null, null, null, current.snapshot::text
    from current
    order by 1 asc nulls last
$$;
comment on function realtime.messages_since(pg_snapshot) is
    'Messages committed since a snapshot, in the order written; the last row carries the snapshot to go on from.';
revoke all on function realtime.messages_since(pg_snapshot) from public;

create or replace function realtime.create_partitions(days_ahead integer default 3)
returns setof text
language plpgsql
volatile
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

do $$
begin
    perform realtime.create_partitions();
end
$$;
