-- Reading kept messages: pages after a cursor, the replay of clients without cursors, and a consistent initial state.

-- A cursor with "until" is read to its end before newer messages are, so that all pages but the last are bounded by sequence number alone.
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
    -- The cursor without its last part; built once, because a page has many rows.
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
    -- Messages dropped since the cursor was checked may not have been read: the read waits while a partition is dropped.
    if v_is_trusted then
        perform realtime.read_cursor(after, messages_after.topic);
    else
        perform realtime.read_cursor(after);
    end if;
end
$$;
comment on function realtime.messages_after(text, realtime.cursor, integer, boolean) is
    'Messages of a topic after a cursor that the caller may see, in order, at most 10,000, each with the cursor to continue from. private: null for both rooms of the name. Raises RT001 where messages are missing. '
    'Example: select event, payload, cursor from realtime.messages_after(''room:1'', realtime.oldest_cursor(), 100);';

create or replace function realtime_internal.messages_between(topic text, since timestamptz, max_rows integer)
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
comment on function realtime_internal.messages_between(text, timestamptz, integer) is
    'The newest messages of a private topic since a time, oldest first: the replay of clients without cursors.';
revoke all on function realtime_internal.messages_between(text, timestamptz, integer) from public;

-- One statement, so both parts have the same database snapshot; the rows are those that the caller may see.
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
    'The rows of a query, as the caller sees them, and the cursor of the same moment: load the list, then read messages from the cursor, and none is lost or repeated. '
    'Example: select rows, cursor from realtime.snapshot(''select * from todos'');';
