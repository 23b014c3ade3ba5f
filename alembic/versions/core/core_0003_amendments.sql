-- It is there already where core_0003 was taken back, and comes again.
alter table realtime.changes add column if not exists columns text[];
comment on column realtime.changes.record is 'The new row as a string, the text of its values in brackets; null for DELETE. Both are null where they are too large.';
comment on column realtime.changes.columns is 'Names of the columns, in the order of the values in the rows.';

-- With what could not be judged.
drop function realtime.visible_changes(oid, jsonb, text[], jsonb[], jsonb);

-- Functions as they are now.

create or replace function realtime.authorize(
    topic text,
    role text,
    claims jsonb,
    headers jsonb default '{}',
    extensions text[] default array['broadcast', 'presence']
)
returns table (extension text, can_read boolean, can_write boolean, problem text)
language plpgsql
volatile
as $$
#variable_conflict use_column
declare
    c_probe_time constant timestamp := '1970-01-01';
    v_id uuid := pg_catalog.gen_random_uuid();
    v_passed boolean;
    v_is_done boolean;
    v_table text;
begin
    foreach extension in array extensions loop
        can_read := null;
        can_write := false;
        problem := null;
        v_is_done := false;
        begin
            -- To set_config these mean "as the session's own role", which row-level security does not bind.
            if coalesce(authorize.role, 'none') = 'none' then
                raise exception using errcode = 'invalid_parameter_value', message = 'a role must be named';
            end if;
            perform
                pg_catalog.set_config('realtime.topic', authorize.topic, true),
                pg_catalog.set_config('request.jwt.claims', claims::text, true),
                pg_catalog.set_config('request.jwt.claim.sub', coalesce(claims ->> 'sub', ''), true),
                pg_catalog.set_config('request.jwt.claim.role', authorize.role, true),
                pg_catalog.set_config('request.headers', headers::text, true),
                pg_catalog.set_config('role', authorize.role, true);

            -- RT000 undoes a row that was written after all: a BEFORE trigger may have filled what is null here. The variable tells
            -- our own RT000 from one that a policy raises, the table our own broken NOT NULL from one that a policy ran into.
            v_passed := false;
            begin
                insert into realtime.messages (topic, extension, updated_at, inserted_at)
                values (authorize.topic, authorize.extension, null, c_probe_time);
                v_passed := true;
                raise exception using errcode = 'RT000';
            exception
                when not_null_violation then
                    get stacked diagnostics v_table = table_name;
                    if v_table <> 'messages_probe' then
                        raise;
                    end if;
                    can_write := true;
                when insufficient_privilege then
                    null;
                when sqlstate 'RT000' then
                    if not v_passed then
                        raise;
                    end if;
                    can_write := true;
            end;

            if can_write then
                v_passed := false;
                begin
                    insert into realtime.messages (topic, extension, updated_at, inserted_at)
                    values (authorize.topic, authorize.extension, null, c_probe_time)
                    returning id is not null into can_read;
                    v_passed := true;
                    raise exception using errcode = 'RT000';
                exception
                    when not_null_violation then
                        get stacked diagnostics v_table = table_name;
                        if v_table <> 'messages_probe' then
                            raise;
                        end if;
                        can_read := true;
                    when insufficient_privilege then
                        can_read := false;
                    when sqlstate 'RT000' then
                        if not v_passed then
                            raise;
                        end if;
                end;
            end if;

            if can_read is null then
                v_passed := false;
                begin
                    perform pg_catalog.set_config('role', 'none', true);
                    insert into realtime.messages (id, topic, extension, inserted_at)
                    values (v_id, authorize.topic, authorize.extension, c_probe_time);
                    perform pg_catalog.set_config('role', authorize.role, true);
                    select count(*) > 0 into can_read from realtime.messages as m where m.id = v_id and m.inserted_at = c_probe_time;
                    v_passed := true;
                    raise exception using errcode = 'RT000';
                exception
                    when insufficient_privilege then
                        can_read := false;
                    when sqlstate 'RT000' then
                        if not v_passed then
                            raise;
                        end if;
                end;
            end if;

            -- Takes role and settings back, whatever they were.
            v_is_done := true;
            raise exception using errcode = 'RT000';
        exception when others then
            -- A standby, or maintenance: no policy was asked, so there is no answer.
            if sqlstate = '25006' and pg_catalog.current_setting('transaction_read_only')::boolean then
                raise;
            end if;
            -- A policy that raises, a role that does not exist: this question alone is answered "no".
            if not v_is_done then
                can_read := false;
                can_write := false;
                problem := sqlstate || ': ' || sqlerrm;
            end if;
        end;
        return next;
    end loop;
end
$$;
comment on function realtime.authorize(text, text, jsonb, jsonb, text[]) is
    'What a client with these claims may do on a private topic. Leaves nothing behind. problem: SQLSTATE and text when a policy could not be evaluated; then nothing is allowed.';
revoke all on function realtime.authorize(text, text, jsonb, jsonb, text[]) from public;

create or replace function realtime.drop_old_messages(retention interval)
returns setof text
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_before timestamp := (now() at time zone 'utc') - retention;
    v_partition record;
    v_dropped xid8;
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
        execute format('select xid from realtime.%I order by xid desc limit 1', v_partition.relname) into v_dropped;
        -- First the word, then the deed: both commit together.
        perform realtime.note_dropped(v_dropped);
        execute format('drop table realtime.%I', v_partition.relname);
        return next v_partition.relname;
    end loop;

    with deleted as (
        delete from realtime.messages_default
        where inserted_at < v_before
        returning xid
    )
    select max(xid::text::numeric)::text::xid8 into v_dropped from deleted;
    perform realtime.note_dropped(v_dropped);

    -- Probes are rolled back; what is here somebody put by hand.
    delete from realtime.messages_probe;
end
$$;
comment on function realtime.drop_old_messages(interval) is
    'Drops the partitions that lie wholly before now() - retention and old rows of the default one; returns the names. Cursors before them get a gap.';
revoke all on function realtime.drop_old_messages(interval) from public;

create or replace function realtime.xid_after(xid bigint)
returns bigint
language sql
immutable
strict
as $$
    select xid + case when (xid + 1) % 4294967296 = 0 then 2 else 1 end
$$;
comment on function realtime.xid_after(bigint) is
    'The next id that a snapshot may begin at: those of which the lower 32 bits are zero are none, and PostgreSQL refuses them.';
revoke all on function realtime.xid_after(bigint) from public;

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

create or replace function realtime.read_cursor(place realtime.cursor, out since pg_snapshot, out until pg_snapshot, out seq bigint)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_parts text[] := string_to_array(place, '-');
    v_dropped xid8 := realtime.dropped_xid();
    v_problem text;
begin
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
    elsif pg_snapshot_xmax(since) <= v_dropped
        or exists (
            -- Nothing was dropped of who still runs: nobody else sees what it has written, nor gets the lock of a partition that holds it.
            select
            from pg_snapshot_xip(since) as xip
            where xip <= v_dropped and pg_visible_in_snapshot(xip, pg_current_snapshot())
        )
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
comment on function realtime.read_cursor(realtime.cursor) is
    'Takes a cursor apart. Raises RT001 (a gap; detail: the oldest cursor) when messages behind it are gone, 22023 when it is malformed, 25006 on a standby.';

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
    v_life text := realtime.life();
    v_since pg_snapshot;
    v_until pg_snapshot;
    v_seq bigint;
    v_left integer := least(greatest(max_rows, 0), 10000);
    v_found integer;
    v_is_present boolean;
    v_overlapping xid8[];
    -- A cursor without its last part; taken together once, because a page has many.
    v_within text;
    v_behind text;
begin
    select place.since, place.until, place.seq into v_since, v_until, v_seq from realtime.read_cursor(after) as place;
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
            case when pg_catalog.lead(page.seq) over (order by page.seq) is null then v_behind else v_within end || page.seq
        from (
            (
                select m.*
                from realtime.messages as m
                where m.topic = messages_after.topic
                    and m.extension = 'broadcast'
                    and m.seq > v_seq
                    and m.xid >= pg_catalog.pg_snapshot_xmax(v_since)
                    and pg_catalog.pg_visible_in_snapshot(m.xid, v_until)
                    and (messages_after.private is null or m.private = messages_after.private)
                order by m.seq
                limit v_left + 1
            )
            union all
            (
                select m.*
                from realtime.messages as m
                where m.topic = messages_after.topic
                    and m.extension = 'broadcast'
                    and (v_is_present or m.seq > v_seq)
                    and m.xid = any (array(select pg_catalog.pg_snapshot_xip(v_since)))
                    and pg_catalog.pg_visible_in_snapshot(m.xid, v_until)
                    and (messages_after.private is null or m.private = messages_after.private)
                order by m.seq
                limit v_left + 1
            )
            union all
            (
                select m.*
                from realtime.messages as m
                where v_is_present
                    and m.topic = messages_after.topic
                    and m.extension = 'broadcast'
                    and m.seq <= v_seq
                    and m.xid = any (v_overlapping)
                    and pg_catalog.pg_visible_in_snapshot(m.xid, v_until)
                    and (messages_after.private is null or m.private = messages_after.private)
                order by m.seq
                limit v_left + 1
            )
        ) as page
        order by page.seq
        limit v_left;
        get diagnostics v_found = row_count;
        v_left := v_left - v_found;
        exit when v_is_present or v_left = 0;
        v_since := v_until;
        v_until := null;
    end loop;
    -- What was dropped since the cursor was looked at may not have been read: the read waits while a partition is dropped.
    perform realtime.read_cursor(after);
end
$$;
comment on function realtime.messages_after(text, realtime.cursor, integer, boolean) is
    'Messages of a topic behind a cursor that the caller may see, in order, at most 10,000, each with the cursor to go on from. private: null for both rooms of the name. Raises RT001 where messages are missing.';

create or replace function realtime.declared_type(relation oid, attnum smallint)
returns text
language sql
stable
set search_path = ''
as $$
    select case when realtime.base_type(a.atttypid) in (114, 3802) then 'text' else pg_catalog.format_type(a.atttypid, a.atttypmod) end
        || coalesce((
            select pg_catalog.format(' collate %I.%I', n.nspname, c.collname)
            from pg_catalog.pg_collation as c
            join pg_catalog.pg_namespace as n on n.oid = c.collnamespace
            where c.oid = a.attcollation and c.oid <> t.typcollation
        ), '')
    from pg_catalog.pg_attribute as a
    join pg_catalog.pg_type as t on t.oid = a.atttypid
    where a.attrelid = declared_type.relation and a.attnum = declared_type.attnum
$$;
comment on function realtime.declared_type(oid, smallint) is
    'The type of a column, as in a list of column definitions for an image; text instead of json and jsonb, for which a string would be one of JSON.';
revoke all on function realtime.declared_type(oid, smallint) from public;

create or replace function realtime.populated(relation oid, image text)
returns text
language sql
stable
set search_path = ''
as $$
    select pg_catalog.format(
        '(select %s from pg_catalog.jsonb_to_record(%s) as image (%s)) as row',
        pg_catalog.string_agg(pg_catalog.format('image.%1$I::%2$s as %1$I', a.attname, known.type), ', ' order by a.attnum),
        populated.image,
        pg_catalog.string_agg(
            pg_catalog.format(
                '%I %s',
                a.attname,
                case when t.typtype = 'd' and known.base not in (114, 3802) then known.type else realtime.declared_type(a.attrelid, a.attnum) end
            ),
            ', ' order by a.attnum
        )
    )
    from pg_catalog.pg_attribute as a
    join pg_catalog.pg_type as t on t.oid = a.atttypid
    cross join lateral (
        select base, pg_catalog.format_type(base, -1) as type from realtime.base_type(t.oid) as base
    ) as known
    where a.attrelid = populated.relation and a.attnum > 0 and not a.attisdropped
$$;
comment on function realtime.populated(oid, text) is 'A lateral item for FROM: "row", of a table''s columns, from an expression that is an image. Columns that are absent become null.';
revoke all on function realtime.populated(oid, text) from public;

create or replace function realtime.row_texts(relation oid, images jsonb)
returns jsonb
language plpgsql  -- which keeps its plan
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    return (
        select jsonb_agg(written.row order by i.n)
        from jsonb_array_elements(images) with ordinality as i (image, n)
        cross join lateral (
            select '(' || string_agg(
                coalesce('"' || replace(replace(i.image ->> a.attname, '\', '\\'), '"', '""') || '"', ''), ',' order by a.attnum
            ) || ')' as row
            from pg_attribute as a
            where a.attrelid = row_texts.relation and a.attnum > 0 and not a.attisdropped
        ) as written
    );
end
$$;
comment on function realtime.row_texts(oid, jsonb) is 'Images as the texts of rows of a table''s type, in order. Columns that are absent become null.';
revoke all on function realtime.row_texts(oid, jsonb) from public;

create or replace function realtime.written(value anyelement)
returns text
language sql
stable
strict
as $$
    select pg_catalog.format('%s', value)
$$;
comment on function realtime.written(anyelement) is 'The text that the type of a value writes for it, which a cast to text is not always.';
revoke all on function realtime.written(anyelement) from public;

create or replace function realtime.published_tables(roles text[])
returns table (
    relation oid,
    schema text,
    name text,
    has_row_security boolean,
    has_whole_old boolean,
    row_filter text,
    is_captured boolean,
    events text[],
    columns jsonb,
    access jsonb
)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with published as (
        select
            c.oid,
            n.nspname,
            n.oid as namespace,
            c.relname,
            c.relowner,
            c.relrowsecurity,
            c.relforcerowsecurity,
            -- What is written to the log is up to each partition, whatever the root says.
            case when c.relreplident <> 'f' or not exists (
                with recursive part as (
                    select i.inhrelid as oid from pg_inherits as i where i.inhparent = c.oid and c.relkind = 'p'
                    union all
                    select i.inhrelid from pg_inherits as i join part on i.inhparent = part.oid
                )
                select from part join pg_class as p on p.oid = part.oid where p.relkind = 'r' and p.relreplident <> 'f'
            ) then c.relreplident else 'd' end as relreplident,
            -- Row filters and column lists came with PostgreSQL 15.
            to_jsonb(p) ->> 'rowfilter' as rowfilter,
            to_jsonb(p) -> 'attnames' as attnames
        from pg_publication_tables as p
        join pg_namespace as n on n.nspname = p.schemaname
        join pg_class as c on c.relnamespace = n.oid and c.relname = p.tablename
        -- In a publication for all tables there are ours, too.
        where p.pubname = 'supabase_realtime' and n.nspname <> 'realtime'
    ),
    attribute as (
        select
            a.attrelid,
            a.attname,
            a.attnum,
            a.attgenerated <> '' as is_generated,
            a.atttypid,
            t.typname,
            realtime.base_type(a.atttypid) as base,
            -- Without the columns that an index only includes.
            coalesce(a.attnum = any ((primary_key.indkey::int2[])[0:primary_key.indnkeyatts - 1]), false) as is_key,
            -- A generated column is not in the list that stands for all columns, before PostgreSQL 18 it never is.
            published.attnames is null
                or published.attnames ? a.attname
                or (a.attgenerated <> '' and not exists (
                    select
                    from pg_attribute as plain
                    where plain.attrelid = published.oid
                        and plain.attnum > 0
                        and not plain.attisdropped
                        and plain.attgenerated = ''
                        and not published.attnames ? plain.attname
                )) as is_published
        from published
        join pg_attribute as a on a.attrelid = published.oid and a.attnum > 0 and not a.attisdropped
        join pg_type as t on t.oid = a.atttypid
        left join pg_index as primary_key on primary_key.indrelid = published.oid and primary_key.indisprimary
    ),
    identity as (
        select published.oid, array_agg(a.attname::text) as columns
        from published
        join pg_index as i on i.indrelid = published.oid
            and case published.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident end
        join pg_attribute as a on a.attrelid = published.oid and a.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1])
        group by published.oid
    )
    select
        published.oid,
        published.nspname::text,
        published.relname::text,
        published.relrowsecurity,
        published.relreplident = 'f',
        published.rowfilter,
        exists (
            select
            from pg_trigger as t
            where t.tgrelid = published.oid
                and t.tgfoid = to_regprocedure('realtime.capture_change()')
                and not t.tgisinternal
                -- What the clone of a root's trigger writes is told of the root.
                and t.tgparentid = 0
                and t.tgenabled <> 'D'
        ),
        array_remove(array[
            case when publication.pubinsert then 'INSERT' end,
            case when publication.pubupdate then 'UPDATE' end,
            case when publication.pubdelete then 'DELETE' end
        ], null),
        (
            select coalesce(
                jsonb_agg(
                    jsonb_build_object(
                        'name', a.attname,
                        'type', a.typname,
                        -- These two for servers of before.
                        'type_oid', a.atttypid::bigint,
                        'is_json', a.base in (114, 3802),
                        'is_bytea', a.base = 17,
                        'is_bool', a.base = 16,
                        'is_key', a.is_key,
                        'is_identity', published.relreplident = 'f' or coalesce(a.attname = any (identity.columns), false),
                        'is_generated', a.is_generated,
                        'is_published', a.is_published
                    )
                    order by a.attnum
                ),
                '[]'
            )
            from attribute as a
            where a.attrelid = published.oid
        ),
        (
            select coalesce(
                jsonb_object_agg(
                    r.rolname,
                    jsonb_build_object(
                        'columns', (
                            select coalesce(jsonb_agg(a.attname order by a.attnum), '[]')
                            from attribute as a
                            where a.attrelid = published.oid
                                and a.is_published
                                and has_schema_privilege(r.oid, published.namespace, 'usage')
                                and has_column_privilege(r.oid, published.oid, a.attnum, 'select')
                        ),
                        'is_bound', published.relrowsecurity
                            and not (r.rolsuper or r.rolbypassrls)
                            and (published.relforcerowsecurity or not pg_has_role(r.oid, published.relowner, 'usage'))
                    )
                ),
                '{}'
            )
            from pg_roles as r
            where r.rolname = any (roles)
        )
    from published
    cross join pg_publication as publication
    left join identity on identity.oid = published.oid
    where publication.pubname = 'supabase_realtime'
    order by published.oid
$$;
comment on function realtime.published_tables(text[]) is
    'The tables of the publication: columns in order, and for each role which of the published ones it may read and whether row-level security binds it.';
revoke all on function realtime.published_tables(text[]) from public;

create or replace function realtime.table_marks(relations oid[])
returns table (relation oid, mark text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        c.oid,
        concat_ws(
            '/',
            c.xmin,
            n.xmin,
            (select string_agg(a.xmin::text, ',' order by a.attnum) from pg_attribute as a where a.attrelid = c.oid and a.attnum > 0),
            (select string_agg(m.xmin::text, ',' order by m.roleid, m.member) from pg_auth_members as m),
            p.xmin,
            -- What is put into the publication, or anew with another row filter, has the highest oid.
            (
                select concat_ws(',', count(*), max(d.objid))
                from pg_depend as d
                where d.refclassid = 'pg_publication'::regclass and d.refobjid = p.oid
            )
        )
    from pg_class as c
    join pg_namespace as n on n.oid = c.relnamespace
    left join pg_publication as p on p.pubname = 'supabase_realtime'
    where c.oid = any (table_marks.relations)
$$;
comment on function realtime.table_marks(oid[]) is 'For each table a text that is another one as soon as its columns, its row-level security, rights on it or what is in the publication have changed.';
revoke all on function realtime.table_marks(oid[]) from public;

create or replace function realtime.check_filters(relation oid, role text, conditions jsonb, columns text[] default '{}')
returns table (n integer, is_exact boolean, vals text[])
language plpgsql
volatile
as $$
#variable_conflict use_column
declare
    v_condition jsonb;
    v_column text;
    v_operator text;
    v_value text;
    v_type text;
    v_base oid;
    v_collation text;
    v_is_plain boolean;
    v_is_enum boolean;
    v_count integer;
begin
    perform realtime.take_identity(check_filters.role, '{}');
    foreach v_column in array check_filters.columns loop
        if not exists (
            select
            from pg_catalog.pg_attribute as a
            where a.attrelid = check_filters.relation
                and a.attname = v_column
                and a.attnum > 0
                and pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'select')
        ) then
            raise exception 'invalid column for select %', v_column;
        end if;
    end loop;
    for v_condition, n in
        select c.condition, c.number::integer - 1 from pg_catalog.jsonb_array_elements(conditions) with ordinality as c (condition, number)
    loop
        v_column := v_condition ->> 'column';
        v_operator := v_condition ->> 'operator';
        v_value := v_condition ->> 'value';
        v_type := null;
        select
            pg_catalog.format_type(a.atttypid, -1),
            realtime.base_type(a.atttypid),
            t.typtype = 'e',
            coalesce(c.collisdeterministic, true),
            case when c.oid is null then '' else pg_catalog.format(' collate %I.%I', n.nspname, c.collname) end
        into v_type, v_base, v_is_enum, v_is_plain, v_collation
        from pg_catalog.pg_attribute as a
        join pg_catalog.pg_type as t on t.oid = a.atttypid
        left join pg_catalog.pg_collation as c on c.oid = a.attcollation
        left join pg_catalog.pg_namespace as n on n.oid = c.collnamespace
        where a.attrelid = check_filters.relation
            and a.attname = v_column
            and a.attnum > 0
            and pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'select');
        if v_type is null then
            raise exception 'invalid column for filter %', v_column;
        end if;
        -- Types of which two values are equal exactly if their texts are.
        is_exact := not (v_condition ->> 'is_negated')::boolean
            and v_operator in ('eq', 'in')
            and v_is_plain
            and (v_base in (16, 19, 20, 21, 23, 25, 26, 1043, 2950) or v_is_enum);
        vals := null;
        if v_operator = 'is' then
            if v_value not in ('null', 'true', 'false', 'unknown') then
                raise exception 'invalid value for is filter: must be null, true, false, or unknown';
            elsif v_value <> 'null' and v_base <> 16 then
                raise exception 'is % filter requires a boolean column, got %', v_value, v_type;
            end if;
        elsif v_operator = 'in' then
            execute pg_catalog.format(
                'select coalesce(array_agg(pg_catalog.format(''%%s'', item)) filter (where item is not null), ''{}''), count(*) from pg_catalog.unnest($1::%s[]) as item', v_type
            ) into vals, v_count using v_value;
            if v_count > 100 then
                raise exception 'too many values for `in` filter. Maximum 100';
            end if;
            execute pg_catalog.format(
                'select %s from (select $2::%s%s as x, $1::%s[] as v) as pair',
                realtime.comparison(v_operator, false, null),
                v_type,
                v_collation,
                v_type
            ) using v_value, vals[1];
        elsif v_operator in ('like', 'ilike', 'match', 'imatch') then
            if v_operator in ('like', 'ilike') and (pg_catalog.length(v_value) - pg_catalog.length(pg_catalog.rtrim(v_value, '\'))) % 2 = 1 then
                -- PostgreSQL finds this out when it gets so far, which depends on the row.
                raise exception using
                    errcode = 'invalid_escape_sequence',
                    message = 'LIKE pattern must not end with escape character';
            end if;
            begin
                -- Of a domain only the value that was given is known to be one.
                execute pg_catalog.format(
                    'select %s from (select $2::%s%s as x, $1::%s as v) as pair',
                    realtime.comparison(v_operator, false, null),
                    pg_catalog.format_type(v_base, -1),
                    v_collation,
                    v_type
                ) using v_value, '';
            exception
                when undefined_function or ambiguous_function then
                    raise exception 'operator % requires a text-compatible column type, got %', v_operator, v_type;
                when invalid_regular_expression then
                    raise exception 'invalid regular expression for % filter: %', v_operator, sqlerrm;
            end;
        else
            execute pg_catalog.format(
                'select array[pg_catalog.format(''%%s'', v)], %s from (select $1::%s%s as x, $1::%s as v) as pair',
                realtime.comparison(v_operator, false, null),
                v_type,
                v_collation,
                v_type
            ) into vals using v_value;
        end if;
        return next;
    end loop;
end
$$;
comment on function realtime.check_filters(oid, text, jsonb, text[]) is
    'Whether a role may filter by these conditions and select these columns; raises what is wrong. For each condition that compares for equality of text (is_exact) the texts that fit.';
revoke all on function realtime.check_filters(oid, text, jsonb, text[]) from public;

create or replace function realtime.match_changes(relation oid, role text, images jsonb, conditions jsonb)
returns table (image integer, condition integer)
language plpgsql
volatile
as $$
#variable_conflict use_column
declare
    v_group record;
    v_type text;
    v_declared jsonb;
begin
    select pg_catalog.jsonb_object_agg(a.attname, realtime.declared_type(a.attrelid, a.attnum)) into v_declared
    from pg_catalog.pg_attribute as a
    where a.attrelid = match_changes.relation and a.attnum > 0 and not a.attisdropped;
    perform realtime.take_identity(match_changes.role, '{}');
    for v_group in
        select
            c.condition ->> 'column' as column_name,
            c.condition ->> 'operator' as operator,
            (c.condition ->> 'is_negated')::boolean as is_negated,
            case when c.condition ->> 'operator' = 'is' then c.condition ->> 'value' end as keyword,
            pg_catalog.array_agg(c.condition ->> 'value') as vals,
            pg_catalog.array_agg(c.number::integer - 1) as numbers
        from pg_catalog.jsonb_array_elements(conditions) with ordinality as c (condition, number)
        group by 1, 2, 3, 4
    loop
        select pg_catalog.format_type(a.atttypid, -1) into v_type
        from pg_catalog.pg_attribute as a
        where a.attrelid = match_changes.relation and a.attname = v_group.column_name and not a.attisdropped;
        continue when not found;
        return query execute pg_catalog.format(
            $q$
                with wanted as materialized (
                    select w.number, w.value::%1$s%2$s as v
                    from rows from (pg_catalog.unnest($2), pg_catalog.unnest($3)) as w (value, number)
                ),
                found as materialized (
                    select i.n::integer - 1 as n, row.x::%6$s as x
                    from pg_catalog.jsonb_array_elements($1) with ordinality as i (image, n)
                    cross join lateral pg_catalog.jsonb_to_record(pg_catalog.jsonb_build_object('x', i.image -> %3$L)) as row (x %4$s)
                    where i.image ? %3$L
                )
                select found.n, wanted.number from found cross join wanted where %5$s
            $q$,
            case when v_group.operator = 'is' then 'text' else v_type end,
            case when v_group.operator = 'in' then '[]' else '' end,
            v_group.column_name,
            v_declared ->> v_group.column_name,
            realtime.comparison(v_group.operator, v_group.is_negated, v_group.keyword),
            v_type
        ) using images, v_group.vals, v_group.numbers;
    end loop;
end
$$;
comment on function realtime.match_changes(oid, text, jsonb, jsonb) is
    'Which images satisfy which conditions, both counted from 0, by PostgreSQL''s own comparison. A column that is absent satisfies none.';
revoke all on function realtime.match_changes(oid, text, jsonb, jsonb) from public;

create or replace function realtime.policy_columns(relation oid)
returns text[]
language plpgsql  -- which keeps its plan
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    v_columns text[];
    v_column text;
    v_type text;
begin
    v_columns := array(
        select a.attname::text
        from pg_attribute as a
        where a.attrelid = policy_columns.relation
            and a.attnum > 0
            and not a.attisdropped
            and exists (
                select
                from pg_policy as p
                where p.polrelid = a.attrelid
                    and p.polcmd in ('r', '*')
                    and (
                        strpos(p.polqual::text, ' :varattno 0 ') > 0
                        or exists (
                            select
                            from pg_depend as d
                            where d.classid = 'pg_policy'::regclass
                                and d.objid = p.oid
                                and d.refclassid = 'pg_class'::regclass
                                and d.refobjid = a.attrelid
                                and d.refobjsubid = a.attnum
                        )
                    )
            )
    );
    for v_column, v_type in
        select a.attname, format_type(a.atttypid, -1)
        from pg_attribute as a
        join pg_type as t on t.oid = a.atttypid
        where a.attrelid = policy_columns.relation and a.attnum > 0 and t.typtype = 'd' and a.attname <> all (v_columns)
    loop
        begin
            execute format('select null::%s', v_type);
        exception when others then
            v_columns := v_columns || v_column;
        end;
    end loop;
    return v_columns;
end
$$;
comment on function realtime.policy_columns(oid) is
    'The columns of a table that its policies for SELECT read, and those that are never null because of their domain: without them, a row cannot be judged.';
revoke all on function realtime.policy_columns(oid) from public;

create or replace function realtime.policy_query(relation oid, role text, path text, is_function boolean)
returns text
language plpgsql
volatile
set search_path = ''
as $$
declare
    v_query text;
    v_is_ambiguous boolean;
begin
    perform pg_catalog.set_config('search_path', policy_query.path, true);
    v_is_ambiguous := pg_catalog.strpos(realtime.policy_condition(policy_query.relation, policy_query.role), 'pg_catalog.') > 0;
    perform pg_catalog.set_config('search_path', '', true);
    select pg_catalog.format(
        $q$
            select coalesce(pg_catalog.array_agg(asked.n), '{}')
            from rows from (pg_catalog.unnest($1), pg_catalog.unnest($2)) as asked (row, n)
            where (select %s from cast(asked.row as %s) as %I)
        $q$,
        realtime.policy_condition(policy_query.relation, policy_query.role),
        realtime.table_name(policy_query.relation),
        c.relname
    )
    into v_query
    from pg_catalog.pg_class as c
    where c.oid = policy_query.relation;
    if not (policy_query.is_function or v_is_ambiguous) then
        return v_query;
    end if;
    execute pg_catalog.format(
        'create or replace function pg_temp.realtime_visible(text[], integer[]) returns integer[] begin atomic %s; end', v_query
    );
    grant execute on function pg_temp.realtime_visible(text[], integer[]) to public;
    return 'select pg_temp.realtime_visible($1, $2)';
end
$$;
comment on function realtime.policy_query(oid, text, text, boolean) is
    'Statement that tells which of the rows $1, as texts, whose numbers are $2, a role may see by the policies for SELECT. May make the function pg_temp.realtime_visible, which is to be dropped in the same transaction.';
revoke all on function realtime.policy_query(oid, text, text, boolean) from public;

create or replace function realtime.visible_changes(relation oid, images jsonb, roles text[], claims jsonb[], wanted jsonb)
returns table (question integer, visible integer[], problem text, unknown integer[])
language plpgsql
volatile
as $$
#variable_conflict use_column
declare
    c_path constant text := pg_catalog.current_setting('search_path');
    c_mark constant text := (select mark from realtime.table_marks(array[visible_changes.relation]));
    c_rows constant jsonb := realtime.row_texts(visible_changes.relation, visible_changes.images);
    c_columns constant text[] := realtime.policy_columns(visible_changes.relation);
    c_unknown constant integer[] := array(
        select i.n - 1
        from pg_catalog.jsonb_array_elements(visible_changes.images) with ordinality as i (image, n)
        where not i.image ?& c_columns
    );
    v_asked record;
    v_role text;
    v_query text;
    v_is_function boolean;
    v_is_done boolean;
begin
    for v_asked in
        select
            c.role,
            c.claims,
            c.number::integer - 1 as number,
            w.numbers,
            w.rows,
            w.unknown
        from rows from (
            pg_catalog.unnest(roles), pg_catalog.unnest(visible_changes.claims), pg_catalog.jsonb_array_elements(wanted)
        ) with ordinality as c (role, claims, wanted, number)
        -- Not all rows: EXECUTE copies its arguments.
        cross join lateral (
            select
                pg_catalog.array_agg(n::integer) filter (where is_known) as numbers,
                pg_catalog.array_agg(c_rows ->> n::integer) filter (where is_known) as rows,
                coalesce(pg_catalog.array_agg(n::integer) filter (where not is_known), '{}') as unknown
            from pg_catalog.jsonb_array_elements_text(c.wanted) as n
            cross join lateral (select n::integer <> all (c_unknown) as is_known) as known
        ) as w
        order by c.role
    loop
        question := v_asked.number;
        unknown := v_asked.unknown;
        if v_role is distinct from v_asked.role then
            v_role := v_asked.role;
            v_query := null;
            v_is_function := false;
        end if;
        -- Twice for the first one of a role, where it turns out that it has to be a function.
        for attempt in 1 .. 2 loop
            visible := '{}';
            problem := null;
            v_is_done := false;
            begin
                if v_query is null then
                    v_query := realtime.policy_query(visible_changes.relation, v_role, c_path, v_is_function);
                end if;
                v_is_done := true;
            exception when others then
                problem := sqlstate || ': ' || sqlerrm;
            end;
            exit when not v_is_done;
            v_is_done := false;
            begin
                perform realtime.take_identity(v_role, v_asked.claims);
                execute v_query into visible using v_asked.rows, v_asked.numbers;
                -- Takes role and settings back.
                v_is_done := true;
                raise exception using errcode = 'RT000';
            exception when others then
                if not v_is_done then
                    -- Was it the policy, or do the rows not go with a table that was altered meanwhile?
                    if c_mark is distinct from (select mark from realtime.table_marks(array[visible_changes.relation])) then
                        raise;
                    end if;
                    visible := '{}';
                    problem := sqlstate || ': ' || sqlerrm;
                end if;
            end;
            exit when v_is_function or problem is null or problem not like '42501: %';
            v_is_function := true;
            v_query := null;
        end loop;
        return next;
    end loop;
    if pg_catalog.to_regprocedure('pg_temp.realtime_visible(text[], integer[])') is not null then
        drop function pg_temp.realtime_visible(text[], integer[]);
    end if;
end
$$;
comment on function realtime.visible_changes(oid, jsonb, text[], jsonb[], jsonb) is
    'Which of the images that it asks for each client may see by the policies for SELECT. wanted: for each client a list of images, counted from 0. problem: when a policy could not be evaluated; then nothing is visible. unknown: images that lack a column that policies read.';
revoke all on function realtime.visible_changes(oid, jsonb, text[], jsonb[], jsonb) from public;

create or replace function realtime.render_changes(relation oid, images jsonb)
returns setof text
language plpgsql
volatile
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
as $$
begin
    return query execute pg_catalog.format(
        $q$
            select pg_catalog.to_jsonb(row.*)::text
            from pg_catalog.jsonb_array_elements($1) with ordinality as i (image, n)
            cross join lateral %s
            order by i.n
        $q$,
        realtime.populated(render_changes.relation, 'i.image')
    ) using images;
end
$$;
comment on function realtime.render_changes(oid, jsonb) is 'Images as to_jsonb writes rows, in order, whatever the database sets for everybody. Columns that are absent become null.';
revoke all on function realtime.render_changes(oid, jsonb) from public;

create or replace function realtime.complete_changes(relation oid, images jsonb)
returns jsonb
language plpgsql
volatile
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
as $$
declare
    v_generated text;
    v_stored text;
    v_key text;
    v_is_read boolean;
    v_complete jsonb;
begin
    select
        pg_catalog.string_agg(
            pg_catalog.format(
                'case when known.image ?& %L::text[] then pg_catalog.jsonb_build_object(%L, realtime.written(%s)) else ''{}'' end',
                array(
                    select source.attname
                    from pg_catalog.pg_attribute as source
                    where source.attrelid = a.attrelid
                        and pg_catalog.strpos(d.adbin::text, pg_catalog.concat(' :varattno ', source.attnum, ' ')) > 0
                ),
                a.attname,
                pg_catalog.pg_get_expr(d.adbin, d.adrelid)
            ),
            ' || ' order by a.attnum
        ) filter (where a.attgenerated <> ''),
        pg_catalog.string_agg(
            pg_catalog.format('array[%1$L, realtime.written(stored.%1$I)]', a.attname), ', ' order by a.attnum
        ),
        pg_catalog.string_agg(
            pg_catalog.format('stored.%1$I = row.%1$I', a.attname), ' and '
        ) filter (where a.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1])),
        -- The table itself, which somebody may have locked, is read only for what cannot be computed.
        pg_catalog.bool_or(a.attgenerated = '' and exists (
            select from pg_catalog.jsonb_array_elements(images) as wanted (image) where not wanted.image ? a.attname
        ))
    into v_generated, v_stored, v_key, v_is_read
    from pg_catalog.pg_attribute as a
    left join pg_catalog.pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
    left join pg_catalog.pg_index as i on i.indrelid = a.attrelid and i.indisprimary
    where a.attrelid = complete_changes.relation and a.attnum > 0 and not a.attisdropped;
    execute pg_catalog.format(
        $q$
            select pg_catalog.jsonb_agg(known.image || coalesce(generated.image, '{}') order by i.n)
            from pg_catalog.jsonb_array_elements($1) with ordinality as i (image, n)
            left join lateral (%1$s) as stored on stored.image @> i.image
            cross join lateral (select coalesce(stored.image, '{}') || i.image as image) as known
            left join lateral (select %2$s as image from %3$s) as generated on true
        $q$,
        case
            when v_key is null or not v_is_read then 'select null::jsonb as image'
            else pg_catalog.format(
                'select pg_catalog.jsonb_object(array[%s]) as image from %s as stored cross join lateral %s'
                ' where %s',
                v_stored,
                realtime.table_name(complete_changes.relation),
                realtime.populated(complete_changes.relation, 'i.image'),
                v_key
            )
        end,
        coalesce(v_generated, 'null::jsonb'),
        realtime.populated(complete_changes.relation, 'known.image')
    ) into v_complete using images;
    return v_complete;
end
$$;
comment on function realtime.complete_changes(oid, jsonb) is
    'Images with their generated columns computed, and with columns that are not known from the row as it is stored now, if it is still the same otherwise.';
revoke all on function realtime.complete_changes(oid, jsonb) from public;

create or replace function realtime.filter_changes(relation oid, images jsonb)
returns setof integer
language plpgsql
volatile
as $$
declare
    v_filter text;
    v_name text;
begin
    select pg_catalog.to_jsonb(p) ->> 'rowfilter', p.tablename into v_filter, v_name
    from pg_catalog.pg_publication_tables as p
    join pg_catalog.pg_namespace as n on n.nspname = p.schemaname
    join pg_catalog.pg_class as c on c.relnamespace = n.oid and c.relname = p.tablename
    where p.pubname = 'supabase_realtime' and c.oid = filter_changes.relation;
    return query execute pg_catalog.format(
        $q$
            select i.n::integer - 1
            from pg_catalog.jsonb_array_elements_text($1) with ordinality as i (row, n)
            where (select %3$s from cast(i.row as %1$s) as %2$I)
        $q$,
        realtime.table_name(filter_changes.relation),
        v_name,
        coalesce(v_filter, 'true')
    ) using realtime.row_texts(filter_changes.relation, images);
end
$$;
comment on function realtime.filter_changes(oid, jsonb) is 'Which images, counted from 0, pass the row filter of the publication.';
revoke all on function realtime.filter_changes(oid, jsonb) from public;

create or replace function realtime.capture_change()
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
        -- The table may be altered before it is read.
        if current_setting('transaction_isolation') = 'read committed' then
            v_columns := array(
                select a.attname::text
                from pg_attribute as a
                where a.attrelid = tg_relid and a.attnum > 0 and not a.attisdropped
                order by a.attnum
            );
        else
            -- It may have been altered since the snapshot that tables are read by, those of the catalog too; types are known as they are.
            execute format('select array(select json_object_keys(row_to_json(row))) from (select (null::%s).*) as row', tg_relid::regclass)
            into v_columns;
        end if;
    exception when others then
        -- The writer is not to suffer for it: values may take up 256 MB.
        v_record := null;
        v_old_record := null;
    end;
    insert into realtime.changes (relation, action, record, old_record, columns)
    values (tg_argv[0]::oid, tg_op, v_record, v_old_record, v_columns);
    return null;
end
$$;
comment on function realtime.capture_change() is
    'Writes the row change to realtime.changes; without its rows, where these are too large. On tables of the publication; the argument is the oid of the table as the publication names it.';
revoke all on function realtime.capture_change() from public;

create or replace function realtime.captured_since("position" pg_snapshot)
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
as $$
    with current as materialized (
        select pg_catalog.pg_current_snapshot() as snapshot
    ),
    committed as materialized (
        select c.*
        from realtime.changes as c
        where c.xid >= pg_catalog.pg_snapshot_xmax("position")
            and c.xid < (select pg_catalog.pg_snapshot_xmax(current.snapshot) from current)
        union all
        select c.*
        from realtime.changes as c
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
        -- Without columns it was written in another form, by a trigger of before.
        case when c.columns is not null then c.record #>> '{}' end,
        case when c.columns is not null then c.old_record #>> '{}' end,
        c.xid::text::bigint,
        null
    from committed as c
    order by 1 asc nulls first
$$;
comment on function realtime.captured_since(pg_snapshot) is
    'Captured changes committed since a snapshot, in the order written, their rows as texts; the first row carries the snapshot to go on from.';
revoke all on function realtime.captured_since(pg_snapshot) from public;

create or replace function realtime.changes_since("position" pg_snapshot)
returns table (
    seq bigint,
    relation oid,
    action text,
    changed_at double precision,
    record text,
    old_record text,
    xid bigint,
    snapshot text
)
language sql
stable
as $$
    select c.seq, c.relation, c.action, c.changed_at, null, null, c.xid, c.snapshot
    from realtime.captured_since("position") as c
    order by c.seq asc nulls first
$$;
comment on function realtime.changes_since(pg_snapshot) is 'Captured changes committed since a snapshot, without their rows.';
revoke all on function realtime.changes_since(pg_snapshot) from public;

create or replace function realtime.capture_trigger(relation oid)
returns text
language sql
immutable
as $$
    select '!realtime_capture_' || relation::text
$$;
comment on function realtime.capture_trigger(oid) is 'Name of the capture trigger on this table.';
revoke all on function realtime.capture_trigger(oid) from public;

create or replace function realtime.capture_triggers()
returns table (relation oid, name text, events text[], is_sound boolean)
language sql
stable
as $$
    select
        t.tgrelid,
        t.tgname::text,
        -- Bits of pg_trigger.tgtype.
        pg_catalog.array_remove(array[
            case when t.tgtype & 4 > 0 then 'INSERT' end,
            case when t.tgtype & 16 > 0 then 'UPDATE' end,
            case when t.tgtype & 8 > 0 then 'DELETE' end
        ], null),
        -- Its clones on partitions have its name.
        t.tgname <> all (array(
            select disabled.tgname
            from pg_catalog.pg_trigger as disabled
            where disabled.tgfoid = 'realtime.capture_change()'::pg_catalog.regprocedure and disabled.tgenabled = 'D'
        ))
            and t.tgname = realtime.capture_trigger(t.tgrelid)
            and t.tgargs = pg_catalog.convert_to(t.tgrelid::text, 'UTF8') || '\x00'::bytea
    from pg_catalog.pg_trigger as t
    where t.tgfoid = 'realtime.capture_change()'::pg_catalog.regprocedure and not t.tgisinternal and t.tgparentid = 0
$$;
comment on function realtime.capture_triggers() is
    'The capture triggers, without the clones on partitions. Not sound: disabled, be it on one partition, or made for another table, as in a restored dump.';
revoke all on function realtime.capture_triggers() from public;

create or replace function realtime.capture_marks()
returns table (relation oid, mark text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select t.tgrelid, concat_ws('/', t.oid, t.xmin)
    from pg_trigger as t
    where t.tgfoid = to_regprocedure('realtime.capture_change()') and not t.tgisinternal and t.tgparentid = 0 and t.tgenabled <> 'D'
$$;
comment on function realtime.capture_marks() is
    'For each table that is captured a text that is another one if it was not for a moment: its trigger was dropped or disabled, and is there again.';
revoke all on function realtime.capture_marks() from public;

create or replace function realtime.doctor_changes(changes text, obstacle text)
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        'changes',
        case when changes = 'trigger' or obstacle is null then 'ok' when changes = 'auto' then 'note' else 'problem' end,
        case
            when changes = 'trigger' then 'row changes come from capture triggers, as the settings ask for it'
            when obstacle is null then 'row changes come from the log'
            when changes = 'auto' then format('row changes come from capture triggers: %s', obstacle)
            else format('there are no row changes, the log cannot be read: %s', obstacle)
        end,
        case
            when changes = 'trigger' or obstacle is null then null
            when changes = 'auto' then 'nothing, if writers can afford one more row for each; else make the log readable, and the server goes over to it within some minutes'
            else 'make the log readable, or set REALTIME_CHANGES to auto'
        end
    union all
    select
        'wal_level',
        case when is_enough then 'ok' when changes = 'auto' then 'note' else 'problem' end,
        case
            when is_enough then format('wal_level is %s', wal_level)
            else format('wal_level is %s: the log does not say which rows have changed', wal_level)
        end,
        case when not is_enough then 'an administrator runs "alter system set wal_level = logical" and restarts PostgreSQL' end
    from (
        select
            current_setting('wal_level') as wal_level,
            -- Since 19 the first logical slot raises the level.
            current_setting('wal_level') = 'logical'
                or current_setting('wal_level') = 'replica' and current_setting('server_version_num')::integer >= 190000 as is_enough
    ) as log
    where changes <> 'trigger'
    union all
    select
        'replication',
        case when may_replicate then 'ok' when changes = 'auto' then 'note' else 'problem' end,
        format(case when may_replicate then 'role %I may replicate' else 'role %I may not replicate' end, current_user),
        case when not may_replicate then format('an administrator runs "alter role %I replication"', current_user) end
    from (
        select exists (
            select
            from pg_roles as r
            where pg_has_role(current_user, r.oid, 'usage')
                and (r.rolname = current_user and (r.rolreplication or r.rolsuper) or r.rolname = 'rds_replication')
        ) as may_replicate
    ) as login
    where changes <> 'trigger'
$$;
comment on function realtime.doctor_changes(text, text) is
    'For realtime.doctor: where row changes come from, and why. changes: as REALTIME_CHANGES; obstacle: why the log cannot be read.';
revoke all on function realtime.doctor_changes(text, text) from public;

create or replace function realtime.doctor_writes()
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with tables as materialized (
        select
            t.relation,
            format('%I.%I', t.schema, t.name) as title,
            t.has_whole_old,
            c.relkind,
            c.relreplident,
            array(
                select c.item ->> 'name' from jsonb_array_elements(t.columns) as c (item) where (c.item ->> 'is_published')::boolean
            ) as columns
        from realtime.published_tables('{}') as t
        join pg_class as c on c.oid = t.relation
        where t.events && '{UPDATE,DELETE}'
    ),
    members as materialized (
        select
            t.*,
            -- Row filters and column lists came with PostgreSQL 15.
            to_jsonb(member) ->> 'prattrs' is not null as has_list,
            to_jsonb(member) ->> 'prqual' is not null as has_filter,
            array(
                select d.refobjsubid::int2
                from pg_depend as d
                where d.classid = 'pg_publication_rel'::regclass
                    and d.objid = member.oid
                    and d.refclassid = 'pg_class'::regclass
                    and d.refobjid = t.relation
                    and d.refobjsubid > 0
            ) as columns_used,
            identity.columns as identity,
            identity.names as identity_names
        from tables as t
        join pg_publication as p on p.pubname = 'supabase_realtime'
        join pg_publication_rel as member on member.prpubid = p.oid and member.prrelid = t.relation
        cross join lateral (
            select coalesce(array_agg(a.attnum), '{}') as columns, coalesce(array_agg(a.attname::text), '{}') as names
            from pg_index as i
            join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1])
            where i.indrelid = t.relation
                and case t.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident else false end
        ) as identity
        -- Of partitions PostgreSQL goes by their own columns and identities.
        where t.relkind = 'r'
    )
    select
        'replica_identity',
        'problem',
        format('UPDATE and DELETE of %s fail for the application: it is published and has no replica identity', realtime.table_name(leaf.oid)),
        format('add a primary key, or: alter table %s replica identity full', realtime.table_name(leaf.oid))
    from tables as t
    cross join lateral (
        select t.relation where t.relkind = 'r'
        union
        select p.relid from pg_partition_tree(t.relation) as p where p.isleaf
    ) as p (relid)
    join pg_class as leaf on leaf.oid = p.relid
    where leaf.relreplident <> 'f'
        and not exists (
            select
            from pg_index as i
            where i.indrelid = leaf.oid
                and i.indisvalid
                and i.indimmediate
                and case leaf.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident else false end
        )
    union all
    select
        'replica_identity',
        'problem',
        format('UPDATE and DELETE of %s fail for the application: the column list of the publication does not cover the replica identity', title),
        case
            when has_whole_old then format('publish it without a column list, or: alter table %s replica identity default', title)
            else format('put these columns into the list, too: %s', array_to_string(identity_names, ', '))
        end
    from members
    where has_list and (has_whole_old or not identity_names <@ columns)
    union all
    select
        'replica_identity',
        'problem',
        format('UPDATE and DELETE of %s fail for the application: the row filter of the publication reads columns outside the replica identity', title),
        format('alter table %s replica identity full', title)
    from members
    -- With a list it is not known which columns the filter reads.
    where has_filter and not has_list and not has_whole_old and not columns_used <@ identity
$$;
comment on function realtime.doctor_writes() is 'For realtime.doctor: published tables that applications cannot update.';
revoke all on function realtime.doctor_writes() from public;

create or replace function realtime.doctor_tables(source text, roles text[], strict_deletes boolean)
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with tables as materialized (
        select
            t.*,
            format('%I.%I', t.schema, t.name) as title,
            array(
                select c.item ->> 'name'
                from jsonb_array_elements(t.columns) as c (item)
                where (c.item ->> 'is_key')::boolean and (c.item ->> 'is_published')::boolean
            ) as key,
            array(
                select c.item ->> 'name' from jsonb_array_elements(t.columns) as c (item) where (c.item ->> 'is_published')::boolean
            ) as names,
            has_schema_privilege(c.relnamespace, 'usage') as may_use,
            has_table_privilege(c.oid, 'select') as may_read
        from realtime.published_tables(roles) as t
        join pg_class as c on c.oid = t.relation
    ),
    access as materialized (
        select
            t.relation,
            t.title,
            t.key,
            a.role,
            (a.rights ->> 'is_bound')::boolean as is_bound,
            array(select jsonb_array_elements_text(a.rights -> 'columns')) as columns
        from tables as t
        cross join jsonb_each(t.access) as a (role, rights)
    )
    -- what clients are not told
    select
        'primary_key',
        'problem',
        format(
            '%s has no primary key%s: clients get "Error 400: Bad Request, no primary key" instead of rows',
            t.title,
            case
                when exists (select from pg_index as i where i.indrelid = t.relation and i.indisprimary)
                    then ' in the column list of the publication'
            end
        ),
        'add it'
    from tables as t
    where cardinality(t.key) = 0
    union all
    select
        'privileges',
        'problem',
        format('none of the roles may select from %s: whoever subscribes gets "Error 401: Unauthorized" instead of rows', a.title),
        format('grant usage on its schema and select on %s to authenticated, for instance', a.title)
    from access as a
    group by a.relation, a.title
    having bool_and(cardinality(a.columns) = 0)
    union all
    select
        'privileges',
        'problem',
        format(
            'role %I may select columns of %s, but not of its primary key (%s): its clients get "Error 401: Unauthorized" instead of rows',
            a.role,
            a.title,
            array_to_string(a.key, ', ')
        ),
        format('grant select (%s) on %s to %I', (select string_agg(quote_ident(k), ', ') from unnest(a.key) as k), a.title, a.role)
    from access as a
    where cardinality(a.columns) > 0 and not a.key <@ a.columns
    union all
    select
        'policies',
        'note',
        format(
            'row-level security of %s has no policy for SELECT: clients of %s are told nothing',
            a.title,
            string_agg(a.role, ', ' order by a.role)
        ),
        format('create policy ... on %s for select using (...)', a.title)
    from access as a
    where a.is_bound
        and cardinality(a.columns) > 0
        and not exists (select from pg_policy as p where p.polrelid = a.relation and p.polpermissive and p.polcmd in ('r', '*'))
    group by a.relation, a.title
    union all
    select
        'unlogged',
        'problem',
        format('%s is unlogged: the log has none of its changes', realtime.table_name(leaf.oid)),
        format('alter table %s set logged', realtime.table_name(leaf.oid))
    from tables as t
    cross join lateral (
        select t.relation
        union
        select p.relid from pg_partition_tree(t.relation) as p
    ) as p (relid)
    join pg_class as leaf on leaf.oid = p.relid and leaf.relkind = 'r'
    where source = 'wal' and leaf.relpersistence = 'u'
    union all
    select 'row_filter', 'note', format('of %s only rows are told that fulfil %s', t.title, t.row_filter), null
    from tables as t
    where t.row_filter is not null
    union all
    select 'column_list', 'note', format('of %s only these columns are told: %s', t.title, array_to_string(t.names, ', ')), null
    from tables as t
    join pg_publication as p on p.pubname = 'supabase_realtime'
    join pg_publication_rel as member on member.prpubid = p.oid and member.prrelid = t.relation
    where to_jsonb(member) ->> 'prattrs' is not null
    -- what clients are told, perhaps more than was meant
    union all
    select
        'row_security',
        'note',
        format('row-level security of %s is off and anon may select from it: whoever has the public key is told every change', a.title),
        format('if that is not meant: alter table %s enable row level security, and write policies', a.title)
    from access as a
    join tables as t on t.relation = a.relation
    where a.role = 'anon' and cardinality(a.columns) > 0 and not t.has_row_security
    union all
    select
        'deletes',
        'note',
        format(
            case
                when strict_deletes
                    then 'a DELETE in %s is told to nobody whom policies bind, because the log has no more than the key of the row'
                else 'a DELETE in %s tells the key to everybody who subscribed, because the log has no more of the row that policies could judge'
            end,
            t.title
        ),
        concat(
            format('alter table %s replica identity full lets the server judge it', t.title),
            case when exists (select from pg_partitioned_table as p where p.partrelid = t.relation) then ', done for each partition, too' end,
            case when not strict_deletes then '; REALTIME_STRICT_DELETES=true tells it to nobody whom policies bind' end
        )
    from tables as t
    where source = 'wal'
        and t.has_row_security
        and not t.has_whole_old
        and 'DELETE' = any (t.events)
        and cardinality(t.key) > 0
    -- what the server may not do
    union all
    select
        'rights',
        'problem',
        format('role %I may not use schema %I, so changes of %s cannot be told', current_user, t.schema, t.title),
        format('grant usage on schema %I to %I', t.schema, current_user)
    from tables as t
    where not t.may_use
    union all
    select
        'rights',
        'problem',
        format('role %I may not select from %s: where the log does not have a whole row, its change is not told', current_user, t.title),
        format('grant select on %s to %I', t.title, current_user)
    from tables as t
    where source = 'wal' and t.may_use and not t.may_read
$$;
comment on function realtime.doctor_tables(text, text[], boolean) is
    'For realtime.doctor: what clients are told of the tables of the publication. source: wal or trigger; roles: of clients; strict_deletes: as REALTIME_STRICT_DELETES.';
revoke all on function realtime.doctor_tables(text, text[], boolean) from public;
