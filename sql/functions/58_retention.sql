-- Partitions: created ahead, and dropped when their messages are older than the retention.

-- Maintenance runs with the server's rights, and runs no code of users: functions that users create in public must not be found.
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
        -- Rows that arrived before their partition stay in the default one; such a day gets no partition.
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
    'Creates the missing partitions from yesterday to days_ahead days from now (UTC); returns their names.';
revoke all on function realtime_internal.create_partitions(integer) from public;

-- Messages of a restored dump carry transaction ids of another cluster. Ids that this one has not reached would hide them now and deliver
-- them as new later, so they get the lowest id: older than everything else. Rows of the current transaction are its own.
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
    'Gives the lowest transaction id to messages whose id this database has not reached, as in a restored dump; returns their number.';
revoke all on function realtime_internal.adopt_messages() from public;

-- The retention horizon ignores transaction ids of another cluster: no cursor can be after them.
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
    -- First, because recording removes what was recorded in another incarnation of the database.
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
    'Deletes messages written before this time (UTC) from a partition, at most so many; returns their number. Waits for no reader.';
revoke all on function realtime_internal.delete_messages(regclass, timestamp, bigint) from public;

-- Dropping a partition takes a lock that waits for every transaction that has read a message, and every later writer and reader waits for
-- the lock. So the wait is short, and repeated later. Any client role can keep such a transaction open for ever: an hour after their time
-- the messages are deleted instead, which waits for nobody, and the empty partition is dropped later.
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
            -- The lock waits for current writers and keeps out new ones, so exactly what is recorded is dropped. Both commit together.
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
    'Drops partitions that are entirely before now() - retention, and old rows of the default one; returns what was done: dropped, waiting (for a transaction that has read messages, or because there is more to delete), emptied (that transaction has lasted an hour: the messages were deleted). Cursors before them get a gap.';
revoke all on function realtime_internal.drop_old_messages(interval) from public;

-- Every server calls it; a lock on a row that nobody else can reach lets one at a time do the work.
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
        -- Until then the rows go to the default partition.
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
    'Creates partitions ahead and drops those older than the retention; returns what was done: created, dropped, emptied or waiting, as realtime_internal.drop_old_messages does. No row: nothing was due, or another session is doing it. Safe to call at any time. '
    'Example: select * from realtime.maintain(''72 hours'');';
revoke all on function realtime.maintain(interval) from public;

create or replace function realtime_internal.last_maintenance()
returns timestamptz
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select m.succeeded_at from realtime_internal.maintenance as m where m.task = 'messages'
$$;
comment on function realtime_internal.last_maintenance() is 'When realtime.maintain last completed all that was due.';
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
comment on view realtime.partitions is 'The partitions of realtime.messages, with their bounds and sizes.';
comment on column realtime.partitions.partition is 'Name of the table, in schema realtime.';
comment on column realtime.partitions.bounds is 'UTC days that it contains.';
comment on column realtime.partitions.estimated_rows is 'Rows at the last analyze; 0 before the first.';
comment on column realtime.partitions.bytes is 'Size on disk, indexes included.';

do $$
begin
    perform realtime_internal.create_partitions();
end
$$;
