-- Reading from a place on: paged, exact, and with a plain word where something is missing.
--
-- A cursor is "since" and "seq": behind all that the snapshot "since" sees; no row whose transaction got its id later has a sequence number
-- up to "seq", so a read may start there, but for what realtime.overlapping names. Or it is "since", "until" and "seq": behind all that
-- "since" sees and, of what the later snapshot "until" sees as well, behind "seq".

create or replace function realtime.life()
returns text
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select substr(
        md5(concat_ws(
            '/',
            stream.epoch,
            control.system_identifier,
            case when pg_is_in_recovery() then 'standby' else substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) end,
            (select oid from pg_database where datname = current_database())
        )),
        1,
        12
    )
    from realtime.stream
    cross join pg_control_system() as control
$$;
comment on function realtime.life() is
    'Names this life of the database. A restore, a promotion or a new cluster changes it: transaction ids of one mean nothing in another.';

create or replace function realtime.dropped_xid()
returns xid8
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select case when stream.dropped_in_life = realtime.life() then stream.dropped_xid else '0' end
    from realtime.stream
$$;
comment on function realtime.dropped_xid() is 'Highest transaction id among messages that were dropped in this life of the database.';
revoke all on function realtime.dropped_xid() from public;

create or replace function realtime.note_dropped(xid xid8, is_covered boolean default false)
returns void
language sql
volatile
begin atomic
    -- Transaction ids of another life mean nothing.
    delete from realtime.dropped_topics
    where note_dropped.xid is not null
        and not exists (select from realtime.stream where dropped_in_life = realtime.life());
    update realtime.stream
    set
        dropped_xid = greatest(realtime.dropped_xid()::text::numeric, note_dropped.xid::text::numeric)::text::xid8,
        dropped_anywhere_xid = greatest(
            case when dropped_in_life = realtime.life() then dropped_anywhere_xid else '0' end::text::numeric,
            case when is_covered then 0 else note_dropped.xid::text::numeric end
        )::text::xid8,
        dropped_in_life = realtime.life()
    where note_dropped.xid is not null;
end;
comment on function realtime.note_dropped(xid8, boolean) is
    'Remembers that messages up to this transaction are no longer kept, in the transaction that drops them. is_covered: realtime.dropped_topics says of which topics.';
revoke all on function realtime.note_dropped(xid8, boolean) from public;

create or replace function realtime.note_dropped_topics(messages regclass)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_xid xid8;
begin
    execute format('select xid from %s where xid < pg_snapshot_xmax(pg_current_snapshot()) order by xid desc limit 1', messages) into v_xid;
    -- To read all of a large partition would hold up maintenance: 1 GB takes seconds.
    if pg_relation_size(messages) > 256 * 1024 * 1024 then
        perform realtime.note_dropped(v_xid);
        return;
    end if;
    perform realtime.note_dropped(v_xid, true);
    execute format(
        'insert into realtime.dropped_topics as known (topic_hash, xid, seq)'
        ' select hashtextextended(topic, 0), max(xid::text::numeric)::text::xid8, max(seq)'
        ' from %s where extension = ''broadcast'' and xid < pg_snapshot_xmax(pg_current_snapshot()) group by 1'
        ' on conflict (topic_hash) do update set'
        ' xid = greatest(known.xid::text::numeric, excluded.xid::text::numeric)::text::xid8, seq = greatest(known.seq, excluded.seq)',
        messages
    );
    perform realtime.trim_dropped_topics();
end
$$;
comment on function realtime.note_dropped_topics(regclass) is
    'Remembers of which topics the messages of a partition are no longer kept, in the transaction that drops it.';
revoke all on function realtime.note_dropped_topics(regclass) from public;

-- At most 100,000 topics are remembered, about 10 MB; the oldest of them make room.
create or replace function realtime.trim_dropped_topics()
returns void
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    with left_out as (
        delete from realtime.dropped_topics
        where topic_hash in (select topic_hash from realtime.dropped_topics order by xid desc offset 100000)
        returning xid
    )
    select realtime.note_dropped(max(xid::text::numeric)::text::xid8) from left_out
$$;
comment on function realtime.trim_dropped_topics() is
    'Keeps realtime.dropped_topics within its bound: what does not fit counts as dropped of all topics.';
revoke all on function realtime.trim_dropped_topics() from public;

-- At most 1,000 transactions in progress are named. Beyond, the snapshot is cut down to what it surely sees; realtime.overlapping, which
-- knows how many may have been running but not how many of those beyond had ended, may then miss the newest.
create or replace function realtime.snapshot_text("snapshot" pg_snapshot)
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
comment on function realtime.snapshot_text(pg_snapshot) is 'A snapshot as it stands in a cursor: xmin.xmax and what was in progress.';

create or replace function realtime.snapshot_from_text(part text)
returns pg_snapshot
language sql
immutable
strict
begin atomic
    select pg_catalog.translate(
        pg_catalog.regexp_replace(part, '^([0-9]+)[.]([0-9]+)[.]?', '\1:\2:'), '.', ','
    )::pg_snapshot;
end;
comment on function realtime.snapshot_from_text(text) is 'The reverse of realtime.snapshot_text.';

create or replace function realtime.format_cursor(life text, since pg_snapshot, until pg_snapshot, seq bigint)
returns realtime.cursor
language sql
immutable
begin atomic
    select pg_catalog.concat_ws('-', '1', life, realtime.snapshot_text(since), realtime.snapshot_text(until), seq)::realtime.cursor;
end;
comment on function realtime.format_cursor(text, pg_snapshot, pg_snapshot, bigint) is 'A cursor from its parts; until may be null.';

create or replace function realtime.xid_after(xid bigint)
returns bigint
language sql
immutable
strict
begin atomic
    select xid + case when (xid + 1) % 4294967296 = 0 then 2 else 1 end;
end;
comment on function realtime.xid_after(bigint) is
    'The next id that a snapshot may begin at: those of which the lower 32 bits are zero are none, and PostgreSQL refuses them.';
revoke all on function realtime.xid_after(bigint) from public;

-- A crash forgets transactions that left nothing on disk and gives their ids to others. So a cursor claims no id above that of the newest
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
            realtime.xid_after(greatest(
                2,
                realtime.dropped_xid()::text::bigint,
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
    'The same messages as in the snapshot, seen by transactions that a crash of the database cannot take back.';
revoke all on function realtime.durable(pg_snapshot) from public;
grant execute on function realtime.durable(pg_snapshot) to anon, authenticated, service_role;

create or replace function realtime.cursor()
returns realtime.cursor
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    -- Any row that is visible will do for "seq"; the newest transaction has a high one.
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
comment on function realtime.cursor() is 'The place behind everything that is committed now: take it, then follow from it.';

create or replace function realtime.oldest_cursor()
returns realtime.cursor
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select realtime.format_cursor(
        realtime.life(),
        format('%1$s:%1$s:', realtime.xid_after(greatest(realtime.dropped_xid()::text::bigint, 2)))::pg_snapshot,
        null,
        0
    )
$$;
comment on function realtime.oldest_cursor() is 'The place before everything that is still kept.';

create or replace function realtime.sees_dropped("snapshot" pg_snapshot, xid xid8)
returns boolean
language sql
stable
begin atomic
    -- Nothing was dropped of who still runs: nobody else sees what it has written, nor gets the lock of a partition that holds it.
    select pg_catalog.pg_snapshot_xmax("snapshot") > xid
        and not exists (
            select
            from pg_catalog.pg_snapshot_xip("snapshot") as xip
            where xip <= xid and pg_catalog.pg_visible_in_snapshot(xip, pg_catalog.pg_current_snapshot())
        );
end;
comment on function realtime.sees_dropped(pg_snapshot, xid8) is 'Whether a snapshot sees all that was dropped of transactions up to this one.';
revoke all on function realtime.sees_dropped(pg_snapshot, xid8) from public;

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
    v_dropped xid8 := realtime.dropped_xid();
    v_of_topic realtime.dropped_topics;
    v_problem text;
begin
    if topic is not null then
        select dropped_anywhere_xid into v_dropped from realtime.stream where dropped_in_life = realtime.life();
        select known.* into v_of_topic
        from realtime.dropped_topics as known
        where topic_hash = hashtextextended(topic, 0) and v_dropped is not null;
        v_dropped := coalesce(v_dropped, '0');
    end if;
    -- Its life has no name of its own, so that every cursor would seem to be of another one.
    if pg_is_in_recovery() then
        raise exception using
            errcode = 'read_only_sql_transaction', message = 'this is a standby', hint = 'Messages are read from the primary.';
    end if;
    begin
        since := realtime.snapshot_from_text(v_parts[3]);
        if cardinality(v_parts) = 5 then
            until := realtime.snapshot_from_text(v_parts[4]);
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
    elsif not realtime.sees_dropped(since, v_dropped)
        or not realtime.sees_dropped(since, v_of_topic.xid)
        and not (until is not null and v_of_topic.seq <= seq and realtime.sees_dropped(until, v_of_topic.xid))
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
    'Takes a cursor apart. Raises RT001 (a gap; detail: the oldest cursor) when messages of the topic behind it are gone, of any topic where it is null; 22023 when it is malformed, 25006 on a standby.';
-- Not for everybody: it tells whether anything was sent to a topic.
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
    'Takes a cursor apart. Raises RT001 (a gap; detail: the oldest cursor) when messages behind it are gone, 22023 when it is malformed, 25006 on a standby.';

-- A snapshot's xmax is one past the highest id that had *ended*: transactions at or above it may have been running, and may have written
-- already. All ids from there up to the highest one given out by then were running, so they are no more than there can be at one time.
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
        -- Sessions, workers of the server itself, prepared transactions.
        where written.number < current_setting('max_connections')::integer
            + current_setting('max_worker_processes')::integer
            + current_setting('max_wal_senders')::integer
            + current_setting('autovacuum_max_workers')::integer
            + current_setting('max_prepared_transactions')::integer
    )
    select coalesce(array_agg(written.xid), '{}') from written
$$;
comment on function realtime.overlapping(pg_snapshot) is
    'Transactions at or above the xmax of a snapshot that have written messages, as many as may have been running when it was taken.';
revoke all on function realtime.overlapping(pg_snapshot) from public;
grant execute on function realtime.overlapping(pg_snapshot) to anon, authenticated, service_role;

-- A cursor with "until" is finished before the present is looked at, so that all pages but the last are cut by sequence number alone.
-- No SET clause, because the caller's policies run inside: every name and every operator is qualified.
create or replace function realtime.messages_after(
    topic text,
    after realtime.cursor,
    max_rows integer default 100,
    private boolean default null
)
returns table (
    id uuid,
    event text,
    payload jsonb,
    binary_payload bytea,
    is_private boolean,
    inserted_at timestamp,
    xid xid8,
    cursor text
)
language plpgsql
volatile
as $$
#variable_conflict use_column
declare
    v_life pg_catalog.text := realtime.life();
    v_since pg_catalog.pg_snapshot;
    v_until pg_catalog.pg_snapshot;
    v_seq bigint;
    v_left integer := least(greatest(max_rows, 0), 10000);
    v_found integer;
    v_is_present boolean;
    v_overlapping pg_catalog.xid8[];
    -- A cursor without its last part; taken together once, because a page has many.
    v_within pg_catalog.text;
    v_behind pg_catalog.text;
    v_is_trusted pg_catalog.bool := pg_catalog.has_function_privilege('realtime.read_cursor(realtime.cursor, pg_catalog.text)', 'execute');
begin
    if v_is_trusted then
        select place.since, place.until, place.seq into v_since, v_until, v_seq
        from realtime.read_cursor(after, messages_after.topic) as place;
    else
        select place.since, place.until, place.seq into v_since, v_until, v_seq from realtime.read_cursor(after) as place;
    end if;
    perform pg_catalog.set_config('realtime.topic', messages_after.topic, true);
    loop
        v_is_present := v_until is null;
        if v_is_present then
            v_until := pg_catalog.pg_current_snapshot();
            v_overlapping := realtime.overlapping(v_since);
        end if;
        v_within := pg_catalog.regexp_replace(realtime.format_cursor(v_life, v_since, v_until, 0), '0$', '');
        v_behind := pg_catalog.regexp_replace(realtime.format_cursor(v_life, realtime.durable(v_until), null, 0), '0$', '');
        return query
        select
            page.id,
            page.event,
            page.payload,
            page.binary_payload,
            page.private,
            page.inserted_at,
            page.xid,
            case when pg_catalog.lead(page.seq) over (order by page.seq) is null then v_behind else v_within end operator(pg_catalog.||) page.seq::pg_catalog.text
        from (
            (
                select m.*
                from realtime.messages as m
                where m.topic operator(pg_catalog.=) messages_after.topic
                    and m.extension operator(pg_catalog.=) 'broadcast'
                    and m.seq operator(pg_catalog.>) v_seq
                    and m.xid operator(pg_catalog.>=) pg_catalog.pg_snapshot_xmax(v_since)
                    and pg_catalog.pg_visible_in_snapshot(m.xid, v_until)
                    and (messages_after.private is null or m.private operator(pg_catalog.=) messages_after.private)
                order by m.seq
                limit v_left operator(pg_catalog.+) 1
            )
            union all
            (
                select m.*
                from realtime.messages as m
                where m.topic operator(pg_catalog.=) messages_after.topic
                    and m.extension operator(pg_catalog.=) 'broadcast'
                    and (v_is_present or m.seq operator(pg_catalog.>) v_seq)
                    and m.xid operator(pg_catalog.=) any (array(select pg_catalog.pg_snapshot_xip(v_since)))
                    and pg_catalog.pg_visible_in_snapshot(m.xid, v_until)
                    and (messages_after.private is null or m.private operator(pg_catalog.=) messages_after.private)
                order by m.seq
                limit v_left operator(pg_catalog.+) 1
            )
            union all
            (
                select m.*
                from realtime.messages as m
                where v_is_present
                    and m.topic operator(pg_catalog.=) messages_after.topic
                    and m.extension operator(pg_catalog.=) 'broadcast'
                    and m.seq operator(pg_catalog.<=) v_seq
                    and m.xid operator(pg_catalog.=) any (v_overlapping)
                    and pg_catalog.pg_visible_in_snapshot(m.xid, v_until)
                    and (messages_after.private is null or m.private operator(pg_catalog.=) messages_after.private)
                order by m.seq
                limit v_left operator(pg_catalog.+) 1
            )
        ) as page
        order by page.seq
        limit v_left;
        get diagnostics v_found = row_count;
        v_left := v_left operator(pg_catalog.-) v_found;
        exit when v_is_present or v_left operator(pg_catalog.=) 0;
        v_since := v_until;
        v_until := null;
    end loop;
    -- What was dropped since the cursor was looked at may not have been read: the read waits while a partition is dropped.
    if v_is_trusted then
        perform realtime.read_cursor(after, messages_after.topic);
    else
        perform realtime.read_cursor(after);
    end if;
end
$$;
comment on function realtime.messages_after(text, realtime.cursor, integer, boolean) is
    'Messages of a topic behind a cursor that the caller may see, in order, at most 10,000, each with the cursor to go on from. private: null for both rooms of the name. Raises RT001 where messages are missing.';

create or replace function realtime.messages_between(topic text, since timestamptz, max_rows integer)
returns table (id uuid, event text, payload jsonb, binary_payload bytea, xid xid8)
language sql
stable
begin atomic
    select newest.id, newest.event, newest.payload, newest.binary_payload, newest.xid
    from (
        select m.id, m.event, m.payload, m.binary_payload, m.xid, m.seq
        from realtime.messages as m
        where m.topic = messages_between.topic
            and m.extension = 'broadcast'
            and m.private
            and m.inserted_at >= since at time zone 'utc'
            and m.inserted_at < (now() + interval '1 minute') at time zone 'utc'
        order by m.seq desc
        limit max_rows
    ) as newest
    order by newest.seq;
end;
comment on function realtime.messages_between(text, timestamptz, integer) is
    'The newest messages of a private topic since a time, oldest first: the replay of clients that know no cursors.';
revoke all on function realtime.messages_between(text, timestamptz, integer) from public;

-- One statement, so one database snapshot for both halves; the caller's rights hold for the rows.
create or replace function realtime.snapshot(query text, out rows jsonb, out cursor realtime.cursor)
language plpgsql
volatile
as $$
begin
    execute pg_catalog.format(
        'select coalesce(pg_catalog.jsonb_agg(q), ''[]''), realtime.cursor() from (%s) as q', query
    ) into rows, cursor;
end
$$;
comment on function realtime.snapshot(text) is
    'The rows of a query, as the caller sees them, and the cursor of the same moment: load the list, then follow from the cursor, and nothing is missed or doubled.';

-- An outbox row for the servers themselves: read in order by each of them, lost by none.
create or replace function realtime.revalidate(topic text default null, sub text default null)
returns void
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
    insert into realtime.messages (topic, extension, payload, private)
    values (coalesce(revalidate.topic, ''), 'revalidate', jsonb_build_object('topic', revalidate.topic, 'sub', revalidate.sub), true)
$$;
comment on function realtime.revalidate(text, text) is
    'Asks the policies again for joined private channels of a topic, of a user (claim "sub"), of both, or of all; who lost the right loses the channel within a second of the commit. Call it in a trigger on the table that policies read.';
revoke all on function realtime.revalidate(text, text) from public;
grant execute on function realtime.revalidate(text, text) to service_role;
