-- The retention horizon of the stream of messages, and the incarnation of the database.

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
    from realtime_internal.stream
    cross join pg_control_system() as control
$$;
comment on function realtime.life() is
    'Names the incarnation of the database. A restore, a promotion or a new cluster changes it: transaction ids of one mean nothing in another. '
    'Example: select realtime.life();';

create or replace function realtime_internal.dropped_xid()
returns xid8
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select case when stream.dropped_in_life = realtime.life() then stream.dropped_xid else '0' end
    from realtime_internal.stream
$$;
comment on function realtime_internal.dropped_xid() is 'The retention horizon: highest transaction id among messages that were dropped in this incarnation of the database.';
revoke all on function realtime_internal.dropped_xid() from public;

create or replace function realtime_internal.note_dropped(xid xid8, is_covered boolean default false)
returns void
language sql
volatile
begin atomic
    -- Transaction ids of another incarnation mean nothing.
    delete from realtime_internal.dropped_topics
    where note_dropped.xid is not null
        and not exists (select from realtime_internal.stream where dropped_in_life = realtime.life());
    update realtime_internal.stream
    set
        dropped_xid = greatest(realtime_internal.dropped_xid()::text::numeric, note_dropped.xid::text::numeric)::text::xid8,
        dropped_anywhere_xid = greatest(
            case when dropped_in_life = realtime.life() then dropped_anywhere_xid else '0' end::text::numeric,
            case when is_covered then 0 else note_dropped.xid::text::numeric end
        )::text::xid8,
        dropped_in_life = realtime.life()
    where note_dropped.xid is not null;
end;
comment on function realtime_internal.note_dropped(xid8, boolean) is
    'Records that messages up to this transaction are no longer kept, in the transaction that drops them. is_covered: their topics are in realtime_internal.dropped_topics.';
revoke all on function realtime_internal.note_dropped(xid8, boolean) from public;

create or replace function realtime_internal.note_dropped_topics(messages regclass)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_xid xid8;
begin
    execute format('select xid from %s where xid < pg_snapshot_xmax(pg_current_snapshot()) order by xid desc limit 1', messages) into v_xid;
    -- Reading all of a large partition would delay maintenance: 1 GB takes seconds.
    if pg_relation_size(messages) > 256 * 1024 * 1024 then
        perform realtime_internal.note_dropped(v_xid);
        return;
    end if;
    perform realtime_internal.note_dropped(v_xid, true);
    execute format(
        'insert into realtime_internal.dropped_topics as known (topic_hash, xid, seq)'
        ' select hashtextextended(topic, 0), max(xid::text::numeric)::text::xid8, max(seq)'
        ' from %s where extension = ''broadcast'' and xid < pg_snapshot_xmax(pg_current_snapshot()) group by 1'
        ' on conflict (topic_hash) do update set'
        ' xid = greatest(known.xid::text::numeric, excluded.xid::text::numeric)::text::xid8, seq = greatest(known.seq, excluded.seq)',
        messages
    );
    perform realtime_internal.trim_dropped_topics();
end
$$;
comment on function realtime_internal.note_dropped_topics(regclass) is
    'Records the topics of the messages of a partition, in the transaction that drops it.';
revoke all on function realtime_internal.note_dropped_topics(regclass) from public;

-- At most 100,000 topics are recorded, about 10 MB; the oldest are removed first.
create or replace function realtime_internal.trim_dropped_topics()
returns void
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    with left_out as (
        delete from realtime_internal.dropped_topics
        where topic_hash in (select topic_hash from realtime_internal.dropped_topics order by xid desc offset 100000)
        returning xid
    )
    select realtime_internal.note_dropped(max(xid::text::numeric)::text::xid8) from left_out
$$;
comment on function realtime_internal.trim_dropped_topics() is
    'Keeps realtime_internal.dropped_topics within its bound: what is removed counts as dropped of all topics.';
revoke all on function realtime_internal.trim_dropped_topics() from public;
