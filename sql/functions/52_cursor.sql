-- Reading from a cursor: paged, exact, and with an explicit gap where messages are missing.
--
-- A cursor is either "since" and "seq": after all that the snapshot "since" sees. Transactions with later ids have no sequence number up to
-- "seq", so a read may start there, except for those that realtime.overlapping returns. Or it is "since", "until" and "seq": after all that
-- "since" sees and, among what the later snapshot "until" sees as well, after "seq".

-- A cursor names at most 1,000 transactions in progress. With more, the snapshot is reduced to what it surely sees. realtime.overlapping
-- knows how many may have been running, but not how many of the others had ended, so it may then miss the newest.
create or replace function realtime_internal.snapshot_text("snapshot" pg_snapshot)
returns text
language sql
immutable
strict
begin atomic
    select concat_ws(
        '.',
        pg_catalog.pg_snapshot_xmin("snapshot"),
        coalesce(
            (select xip from pg_catalog.pg_snapshot_xip("snapshot") as xip order by xip offset 1000 limit 1),
            pg_catalog.pg_snapshot_xmax("snapshot")
        ),
        (
            select pg_catalog.string_agg(first.xip::text, '.' order by first.xip)
            from (select xip from pg_catalog.pg_snapshot_xip("snapshot") as xip order by xip limit 1000) as first
        )
    );
end;
comment on function realtime_internal.snapshot_text(pg_snapshot) is 'Formats a snapshot for a cursor: xmin.xmax and the transactions in progress.';

create or replace function realtime_internal.snapshot_from_text(part text)
returns pg_snapshot
language sql
immutable
strict
begin atomic
    select pg_catalog.translate(
        pg_catalog.regexp_replace(part, '^([0-9]+)[.]([0-9]+)[.]?', '\1:\2:'), '.', ','
    )::pg_snapshot;
end;
comment on function realtime_internal.snapshot_from_text(text) is 'The reverse of realtime_internal.snapshot_text.';

create or replace function realtime.format_cursor(life text, since pg_snapshot, until pg_snapshot, seq bigint)
returns realtime.cursor
language sql
immutable
begin atomic
    select pg_catalog.concat_ws('-', '1', life, realtime_internal.snapshot_text(since), realtime_internal.snapshot_text(until), seq)::realtime.cursor;
end;
comment on function realtime.format_cursor(text, pg_snapshot, pg_snapshot, bigint) is 'Makes a cursor from its parts; until may be null. Example: select realtime.format_cursor(realtime.life(), pg_current_snapshot(), null, 0);';

create or replace function realtime_internal.xid_after(xid bigint)
returns bigint
language sql
immutable
strict
begin atomic
    select xid + case when (xid + 1) % 4294967296 = 0 then 2 else 1 end;
end;
comment on function realtime_internal.xid_after(bigint) is
    'The next id that a snapshot may begin at: PostgreSQL never assigns ids whose lower 32 bits are zero, and refuses them.';
revoke all on function realtime_internal.xid_after(bigint) from public;

-- After a crash, ids of transactions that left nothing on disk are assigned again. So a cursor names no id above that of the newest
-- message, which is on disk; ids above it, up to the snapshot's, wrote no message or were still running.
create or replace function realtime.durable("snapshot" pg_snapshot)
returns pg_snapshot
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select format(
        '%s:%s:%s',
        least(pg_snapshot_xmin("snapshot")::text::bigint, bound.xmax),
        bound.xmax,
        (
            select string_agg(xip::text, ',' order by xip)
            from pg_snapshot_xip("snapshot") as xip
            where xip::text::bigint < bound.xmax
        )
    )::pg_snapshot
    from (
        select least(
            pg_snapshot_xmax("snapshot")::text::bigint,
            realtime_internal.xid_after(greatest(
                2,
                realtime_internal.dropped_xid()::text::bigint,
                (
                    select m.xid::text::bigint
                    from realtime.messages as m
                    where m.xid < pg_snapshot_xmax("snapshot") and pg_visible_in_snapshot(m.xid, "snapshot")
                    order by m.xid desc
                    limit 1
                )
            ))
        ) as xmax
    ) as bound
$$;
comment on function realtime.durable(pg_snapshot) is
    'A snapshot that sees the same messages, by transactions that a crash of the database cannot undo. '
    'Example: select realtime.durable(pg_current_snapshot());';
revoke all on function realtime.durable(pg_snapshot) from public;
grant execute on function realtime.durable(pg_snapshot) to anon, authenticated, service_role;

create or replace function realtime.cursor()
returns realtime.cursor
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    -- Any visible row gives a valid "seq"; the newest transaction has a high one.
    select realtime.format_cursor(
        realtime.life(),
        realtime.durable(pg_current_snapshot()),
        null,
        coalesce(
            (
                select m.seq
                from realtime.messages as m
                where m.xid < pg_snapshot_xmax(pg_current_snapshot())
                order by m.xid desc
                limit 1
            ),
            0
        )
    )
$$;
comment on function realtime.cursor() is 'The position after everything that is committed now: take it, then read messages from it. Example: select realtime.cursor();';

create or replace function realtime.oldest_cursor()
returns realtime.cursor
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select realtime.format_cursor(
        realtime.life(),
        format('%1$s:%1$s:', realtime_internal.xid_after(greatest(realtime_internal.dropped_xid()::text::bigint, 2)))::pg_snapshot,
        null,
        0
    )
$$;
comment on function realtime.oldest_cursor() is 'The position before all messages that are still kept. Example: select * from realtime.messages_after(''room:1'', realtime.oldest_cursor());';

create or replace function realtime_internal.sees_dropped("snapshot" pg_snapshot, xid xid8)
returns boolean
language sql
stable
begin atomic
    -- Nothing of a running transaction was dropped: no other session sees its rows, or gets the lock of a partition that contains them.
    select pg_catalog.pg_snapshot_xmax("snapshot") > xid
        and not exists (
            select
            from pg_catalog.pg_snapshot_xip("snapshot") as xip
            where xip <= xid and pg_catalog.pg_visible_in_snapshot(xip, pg_catalog.pg_current_snapshot())
        );
end;
comment on function realtime_internal.sees_dropped(pg_snapshot, xid8) is 'Whether a snapshot sees all dropped messages of transactions up to this one.';
revoke all on function realtime_internal.sees_dropped(pg_snapshot, xid8) from public;

create or replace function realtime.read_cursor(
    place realtime.cursor, topic text, out since pg_snapshot, out until pg_snapshot, out seq bigint
)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_parts text[] := string_to_array(place, '-');
    v_dropped xid8 := realtime_internal.dropped_xid();
    v_of_topic realtime_internal.dropped_topics;
    v_problem text;
begin
    if topic is not null then
        select dropped_anywhere_xid into v_dropped from realtime_internal.stream where dropped_in_life = realtime.life();
        select known.* into v_of_topic
        from realtime_internal.dropped_topics as known
        where topic_hash = hashtextextended(topic, 0) and v_dropped is not null;
        v_dropped := coalesce(v_dropped, '0');
    end if;
    -- A standby cannot name its incarnation, so every cursor would seem to belong to another one.
    if pg_is_in_recovery() then
        raise exception using
            errcode = 'read_only_sql_transaction', message = 'this is a standby', hint = 'Messages are read from the primary.';
    end if;
    begin
        since := realtime_internal.snapshot_from_text(v_parts[3]);
        if cardinality(v_parts) = 5 then
            until := realtime_internal.snapshot_from_text(v_parts[4]);
        end if;
        seq := v_parts[cardinality(v_parts)]::bigint;
    exception when invalid_text_representation or numeric_value_out_of_range then
        since := null;
    end;
    if since is null then
        raise exception using
            errcode = 'invalid_parameter_value', message = 'malformed cursor', hint = 'Hand a cursor back as it came.';
    end if;

    if v_parts[2] <> realtime.life() then
        v_problem := 'the cursor is of another life of this database (restored, promoted or upgraded since)';
    elsif pg_snapshot_xmax(since) > pg_snapshot_xmax(pg_current_snapshot()) then
        v_problem := 'the cursor is ahead of this database';
    elsif not realtime_internal.sees_dropped(since, v_dropped)
        or not realtime_internal.sees_dropped(since, v_of_topic.xid)
        and not (until is not null and v_of_topic.seq <= seq and realtime_internal.sees_dropped(until, v_of_topic.xid))
    then
        v_problem := 'the cursor is older than what is kept';
    end if;
    if v_problem is not null then
        raise exception using
            errcode = 'RT001',
            message = 'gap: ' || v_problem,
            detail = realtime.oldest_cursor(),
            hint = 'Load the present state and follow from realtime.cursor(). The detail is the oldest cursor that can be read from.';
    end if;
end
$$;
comment on function realtime.read_cursor(realtime.cursor, text) is
    'Parses a cursor. Raises RT001 (a gap; detail: the oldest cursor) when messages of the topic after it are gone, of any topic where it is null; 22023 when it is malformed, 25006 on a standby. '
    'Example: select * from realtime.read_cursor(realtime.cursor(), ''room:1'');';
-- Not granted to everybody: it reveals whether anything was sent to a topic.
revoke all on function realtime.read_cursor(realtime.cursor, text) from public;
grant execute on function realtime.read_cursor(realtime.cursor, text) to service_role;

create or replace function realtime.read_cursor(place realtime.cursor, out since pg_snapshot, out until pg_snapshot, out seq bigint)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select * from realtime.read_cursor(place, null)
$$;
comment on function realtime.read_cursor(realtime.cursor) is
    'Parses a cursor. Raises RT001 (a gap; detail: the oldest cursor) when messages after it are gone, 22023 when it is malformed, 25006 on a standby. '
    'Example: select * from realtime.read_cursor(realtime.cursor());';

-- A snapshot's xmax is one past the highest id that had *ended*: transactions at or above it may have been running, and may have written
-- already. All ids from there up to the highest one assigned by then were running, so they are at most as many as can run at one time.
create or replace function realtime.overlapping(since pg_snapshot)
returns xid8[]
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    with recursive written as (
        (select m.xid, 1 as number from realtime.messages as m where m.xid >= pg_snapshot_xmax(since) order by m.xid limit 1)
        union all
        select following.xid, written.number + 1
        from written
        cross join lateral (
            select m.xid from realtime.messages as m where m.xid > written.xid order by m.xid limit 1
        ) as following
        -- Sessions, the server's own workers, prepared transactions.
        where written.number < current_setting('max_connections')::integer
            + current_setting('max_worker_processes')::integer
            + current_setting('max_wal_senders')::integer
            + current_setting('autovacuum_max_workers')::integer
            + current_setting('max_prepared_transactions')::integer
    )
    select coalesce(array_agg(written.xid), '{}') from written
$$;
comment on function realtime.overlapping(pg_snapshot) is
    'Transactions at or above the xmax of a snapshot that have written messages, as many as may have been running when it was taken. '
    'Example: select realtime.overlapping(pg_current_snapshot());';
revoke all on function realtime.overlapping(pg_snapshot) from public;
grant execute on function realtime.overlapping(pg_snapshot) to anon, authenticated, service_role;
