-- Partitions: created ahead, and dropped when their messages are older than the retention.

-- Maintenance runs with the server's rights, and no code of users runs inside: who may create functions in public must not be found.
create or replace function realtime_internal.create_partitions(days_ahead integer default 3)
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
comment on function realtime_internal.create_partitions(integer) is
    'Makes the partitions from yesterday to days_ahead days from now (UTC) that are missing; returns their names.';
revoke all on function realtime_internal.create_partitions(integer) from public;

-- Messages of a restored dump carry transaction ids of another cluster. Ids that this one has not reached would hide them now and have them
-- delivered as new one day, so they get the lowest one there is: written before everything else. Rows of this very transaction are its own.
create or replace function realtime_internal.adopt_messages()
returns bigint
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    with adopted as (
        update realtime.messages
        set xid = '3'
        where xid >= pg_snapshot_xmax(pg_current_snapshot())
            and xid is distinct from pg_current_xact_id_if_assigned()
        returning xid
    )
    select count(*) from adopted
$$;
comment on function realtime_internal.adopt_messages() is
    'Gives messages whose transaction id this database has not reached, as in a restored dump, the lowest one; how many there were.';
revoke all on function realtime_internal.adopt_messages() from public;

-- Transaction ids of another cluster are left out of what was dropped: no cursor can be behind them.
create or replace function realtime_internal.delete_messages(partition regclass, before timestamp, max_rows bigint)
returns bigint
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_deleted bigint;
    v_dropped xid8;
begin
    -- Before anything is noted: what was noted of another life of the database goes.
    perform realtime_internal.note_dropped('0', true);
    execute format(
        'with deleted as (
            delete from %1$s
            where ctid = any (array(select ctid from %1$s where inserted_at < $1 limit $2))
            returning topic, extension, xid, seq
        ),
        ours as (
            select topic, extension, xid, seq from deleted where xid < pg_snapshot_xmax(pg_current_snapshot())
        ),
        noted as (
            insert into realtime_internal.dropped_topics as known (topic_hash, xid, seq)
            select hashtextextended(topic, 0), max(xid::text::numeric)::text::xid8, max(seq)
            from ours
            where extension = ''broadcast''
            group by 1
            on conflict (topic_hash) do update set
                xid = greatest(known.xid::text::numeric, excluded.xid::text::numeric)::text::xid8,
                seq = greatest(known.seq, excluded.seq)
        )
        select (select count(*) from deleted), (select max(xid::text::numeric)::text::xid8 from ours)',
        partition
    ) into v_deleted, v_dropped using before, max_rows;
    perform realtime_internal.note_dropped(v_dropped, true);
    perform realtime_internal.trim_dropped_topics();
    return v_deleted;
end
$$;
comment on function realtime_internal.delete_messages(regclass, timestamp, bigint) is
    'Deletes messages written before this time (UTC) from a partition, at most so many; how many it were. Waits for no reader.';
revoke all on function realtime_internal.delete_messages(regclass, timestamp, bigint) from public;

-- To drop a partition takes a lock that waits for every transaction that has read a message, and that every writer and reader then waits
-- for. So it is waited for only for a moment and tried again later. Any client role can keep such a transaction open for ever: an hour after
-- its time the messages are deleted all the same, which waits for nobody, and the empty partition is dropped some other time.
create or replace function realtime_internal.drop_old_messages(retention interval)
returns table (partition text, action text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '0.2s'
as $$
#variable_conflict use_column
declare
    c_most_rows constant bigint := 1000000;
    v_before constant timestamp := (now() at time zone 'utc') - retention;
    v_day date;
begin
    for partition, v_day in
        select child.relname::text, to_date(right(child.relname, 10), 'YYYY_MM_DD')
        from pg_inherits
        join pg_class as child on child.oid = inhrelid
        where inhparent = 'realtime.messages'::regclass
            and child.relname ~ '^messages_[0-9]{4}_[0-9]{2}_[0-9]{2}$'
        order by child.relname
    loop
        continue when v_day + 1 > v_before;
        begin
            -- Whoever still writes to it is waited for, and nobody begins to: what is dropped is what was noted. Both commit together.
            execute format('lock table realtime.%I in share mode', partition);
            perform realtime_internal.note_dropped_topics(format('realtime.%I', partition)::regclass);
            execute format('drop table realtime.%I', partition);
            action := 'dropped';
        exception when lock_not_available then
            action := case
                when v_day + 1 >= v_before - interval '1 hour' then 'waiting'
                when realtime_internal.delete_messages(format('realtime.%I', partition)::regclass, 'infinity', c_most_rows) < c_most_rows then 'emptied'
                else 'waiting'
            end;
        end;
        return next;
    end loop;
    if realtime_internal.delete_messages('realtime.messages_default', v_before, c_most_rows) = c_most_rows then
        partition := 'messages_default';
        action := 'waiting';
        return next;
    end if;
end
$$;
comment on function realtime_internal.drop_old_messages(interval) is
    'Drops the partitions that lie wholly before now() - retention and old rows of the default one; what was done to which: dropped, waiting (for a transaction that has read messages, or because there is more to delete), emptied (that transaction has gone on for an hour: the messages were deleted). Cursors before them get a gap.';
revoke all on function realtime_internal.drop_old_messages(interval) from public;

-- Called by every server; one at a time does the work, by a lock on a row that nobody else can reach.
create or replace function realtime.maintain(retention interval default '72 hours')
returns table (partition text, action text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '0.2s'
as $$
#variable_conflict use_column
declare
    v_is_complete boolean := true;
begin
    perform from realtime_internal.maintenance as m where m.task = 'messages' for update skip locked;
    if not found then
        return;
    end if;
    perform realtime_internal.adopt_messages();
    begin
        return query select created, 'created' from realtime_internal.create_partitions() as created;
    exception when lock_not_available then
        -- Meanwhile the rows go to the default partition.
        partition := 'messages_default';
        action := 'waiting';
        v_is_complete := false;
        return next;
    end;
    for partition, action in select dropped.partition, dropped.action from realtime_internal.drop_old_messages(retention) as dropped loop
        v_is_complete := v_is_complete and action <> 'waiting';
        return next;
    end loop;
    if v_is_complete then
        update realtime_internal.maintenance as m set succeeded_at = now() where m.task = 'messages';
    end if;
end
$$;
comment on function realtime.maintain(interval) is
    'Makes partitions ahead and drops what is older than the retention; what was done: created, dropped, emptied or waiting, as realtime_internal.drop_old_messages tells it. No row: nothing was to do, or another session is at it. Safe to call at any time.';
revoke all on function realtime.maintain(interval) from public;

create or replace function realtime_internal.last_maintenance()
returns timestamptz
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select m.succeeded_at from realtime_internal.maintenance as m where m.task = 'messages'
$$;
comment on function realtime_internal.last_maintenance() is 'When realtime.maintain last did all that was to do.';
revoke all on function realtime_internal.last_maintenance() from public;

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
    perform realtime_internal.create_partitions();
end
$$;
