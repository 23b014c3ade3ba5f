-- Row changes: which tables tell theirs, what of them is wanted, and who may see it. Called by the servers only.
--
-- An image is a row as a JSON object, column by column: strings of the text that PostgreSQL writes for the values, null for null. So what is
-- read from it is what was written: bounds of arrays, and null in json, which is not null. A column that is not known is absent.
--
-- Most questions are about a few rows, and to plan a statement on the catalog takes longer than to execute it. So functions that are called
-- for each question are in PL/pgSQL, which keeps plans for the session, and with force_generic_plan, which keeps them for all arguments.

create or replace function realtime.table_name(relation oid)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select format('%I.%I', n.nspname, c.relname)
    from pg_class as c
    join pg_namespace as n on n.oid = c.relnamespace
    where c.oid = table_name.relation
$$;
comment on function realtime.table_name(oid) is 'A table with its schema, whatever the path: what users'' functions leave in a session must not be found instead.';
revoke all on function realtime.table_name(oid) from public;

create or replace function realtime.base_type(type oid)
returns oid
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
begin
    return (
        with recursive base as (
            select t.oid, t.typtype, t.typbasetype from pg_type as t where t.oid = base_type.type
            union all
            select t.oid, t.typtype, t.typbasetype from pg_type as t join base on t.oid = base.typbasetype and base.typtype = 'd'
        )
        select base.oid from base where base.typtype <> 'd'
    );
end
$$;
comment on function realtime.base_type(oid) is 'What a domain is made of, at the bottom; other types themselves.';

-- No others, not even enums: their owner may create casts from and to them, at any moment, and PostgreSQL prefers these to reading and writing
-- texts.
create or replace function realtime.is_inert(type oid)
returns boolean
language sql
immutable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
    select is_inert.type < 16384
$$;
comment on function realtime.is_inert(oid) is
    'Whether values of a type are read, compared and written by PostgreSQL alone: built-in types. For other types functions of users may be called.';
revoke all on function realtime.is_inert(oid) from public;

create or replace function realtime.declared_type(relation oid, attnum smallint)
returns text
language plpgsql
stable
set search_path = ''
set plan_cache_mode = force_generic_plan
as $$
begin
    return (
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
    );
end
$$;
comment on function realtime.declared_type(oid, smallint) is
    'The type of a column, as in a list of column definitions for an image; text instead of json and jsonb, for which a string would be one of JSON.';
revoke all on function realtime.declared_type(oid, smallint) from public;

-- A row of which only some columns are known is none of its table, where a domain among the others does not allow null.
create or replace function realtime.populated(relation oid, image text, only_key boolean default false)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
begin
    return (
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
        where a.attrelid = populated.relation
            and a.attnum > 0
            and not a.attisdropped
            and (
                not only_key
                or exists (select from pg_catalog.pg_index as i where i.indrelid = a.attrelid and i.indisprimary and a.attnum = any (i.indkey::int2[]))
            )
    );
end
$$;
comment on function realtime.populated(oid, text, boolean) is 'A lateral item for FROM: "row", of a table''s columns or those of its primary key, from an expression that is an image. Columns that are absent become null.';
revoke all on function realtime.populated(oid, text, boolean) from public;

-- Only by its text does a whole row become one of its table's type, which policies may ask for, with each value read as it was written.
create or replace function realtime.row_texts(relation oid, images jsonb)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
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
set search_path = pg_catalog, pg_temp
as $$
    select pg_catalog.format('%s', value)
$$;
comment on function realtime.written(anyelement) is 'The text that the type of a value writes for it, which a cast to text is not always.';
revoke all on function realtime.written(anyelement) from public;

-- Who reads a whole row reads all of it. A policy that takes a function's word reads what the function is given. And no row can be made
-- without a value that its domain insists on.
create or replace function realtime.policy_columns(relation oid)
returns text[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
begin
    return (
        select array(
            select a.attname::text
            from pg_attribute as a
            join pg_type as type on type.oid = a.atttypid
            where a.attrelid = policy_columns.relation
                and a.attnum > 0
                and not a.attisdropped
                and (
                    exists (
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
                    or type.typtype = 'd' and exists (
                        with recursive domain as (
                            select t.typnotnull, t.typbasetype from pg_type as t where t.oid = a.atttypid and t.typtype = 'd'
                            union all
                            select t.typnotnull, t.typbasetype from pg_type as t join domain on t.oid = domain.typbasetype and t.typtype = 'd'
                        )
                        select from domain where domain.typnotnull
                    )
                )
        )
    );
end
$$;
comment on function realtime.policy_columns(oid) is
    'The columns of a table that its policies for SELECT read, and those that are never null because of their domain: without them, a row cannot be judged.';
revoke all on function realtime.policy_columns(oid) from public;

create or replace function realtime.checked_columns(relation oid)
returns text[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
begin
    return (
        select array(
            select a.attname::text
            from pg_attribute as a
            join pg_type as type on type.oid = a.atttypid
            where a.attrelid = checked_columns.relation
                and a.attnum > 0
                and not a.attisdropped
                and type.typtype = 'd'
                and exists (
                    with recursive domain as (
                        select t.oid, t.typbasetype from pg_type as t where t.oid = a.atttypid and t.typtype = 'd'
                        union all
                        select t.oid, t.typbasetype from pg_type as t join domain on t.oid = domain.typbasetype and t.typtype = 'd'
                    )
                    select from domain join pg_constraint as c on c.contypid = domain.oid
                )
        )
    );
end
$$;
comment on function realtime.checked_columns(oid) is 'The columns of a table whose domain has a constraint, which may or may not allow null.';
revoke all on function realtime.checked_columns(oid) from public;

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
    access jsonb,
    policy_columns text[]
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
        ),
        realtime.policy_columns(published.oid) || realtime.checked_columns(published.oid)
    from published
    cross join pg_publication as publication
    left join identity on identity.oid = published.oid
    where publication.pubname = 'supabase_realtime'
    order by published.oid
$$;
comment on function realtime.published_tables(text[]) is
    'The tables of the publication: columns in order, and for each role which of the published ones it may read and whether row-level security binds it.';
revoke all on function realtime.published_tables(text[]) from public;

-- Rights and row-level security are looked at before each piece of changes. To read all of them each time would cost more than the changes:
-- this tells that one of the rows they are kept in was written.
create or replace function realtime.table_marks(relations oid[])
returns table (relation oid, mark text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
begin
    return query
        select
            c.oid,
            concat_ws(
                '/',
                c.xmin,
                n.xmin,
                (select string_agg(a.xmin::text, ',' order by a.attnum) from pg_attribute as a where a.attrelid = c.oid and a.attnum > 0),
                (select string_agg(m.xmin::text, ',' order by m.roleid, m.member) from pg_auth_members as m),
                p.xmin,
                (select string_agg(concat_ws(':', q.oid, q.xmin), ',' order by q.oid) from pg_policy as q where q.polrelid = c.oid),
                (select string_agg(r.oid::text, ',' order by r.oid) from pg_roles as r where r.rolsuper or r.rolbypassrls),
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
        where c.oid = any (table_marks.relations);
end
$$;
comment on function realtime.table_marks(oid[]) is 'For each table a text that is another one as soon as its columns, its row-level security and policies, rights on it, who bypasses row-level security or what is in the publication have changed.';
revoke all on function realtime.table_marks(oid[]) from public;

-- The caller's claims, as policies read them. Until the end of the transaction, or of the exception block around it.
create or replace function realtime.take_identity(role text, claims jsonb)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    -- To set_config this means "as the session's own role", which row-level security does not bind.
    if coalesce(role, 'none') = 'none' then
        raise exception using errcode = 'invalid_parameter_value', message = 'a role must be named';
    end if;
    perform
        pg_catalog.set_config('request.jwt.claims', claims::text, true),
        pg_catalog.set_config('request.jwt.claim.sub', coalesce(claims ->> 'sub', ''), true),
        pg_catalog.set_config('request.jwt.claim.role', role, true),
        pg_catalog.set_config('role', role, true);
end
$$;
comment on function realtime.take_identity(text, jsonb) is 'Go on as a client with this role and these claims, to the end of the transaction.';
revoke all on function realtime.take_identity(text, jsonb) from public;

-- -- code of users

-- Policies, domains and generated columns call functions of users. A role that was only set could be reset by them, so they run inside a
-- SECURITY DEFINER function that the client's role owns, where PostgreSQL refuses to set a role. Its body is parsed when it is made, by the
-- server's role and under a path on which nobody can plant an operator; functions without a path of their own then run under the usual one.
-- What they change is rolled back together with the function, which therefore never depends on anything.
create or replace function realtime.is_read_by_users(type oid)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with recursive part as (
        select t.oid, t.typtype, t.typelem from pg_type as t where t.oid = is_read_by_users.type
        union all
        select t.oid, t.typtype, t.typelem
        from part
        left join pg_range as r on part.oid in (r.rngtypid, r.rngmultitypid)
        join pg_type as t on t.oid in (part.typelem, r.rngsubtype)
        where part.oid >= 16384
    )
    select bool_or(part.oid >= 16384 and part.typtype in ('c', 'd')) from part
$$;
comment on function realtime.is_read_by_users(oid) is
    'Whether functions of users may be called when a literal of a type is parsed: domains have them, and composite types may get a domain at any moment.';
revoke all on function realtime.is_read_by_users(oid) from public;

-- The temporary schema of a session comes with the first object in it, and is gone where that is rolled back. A schema that comes or goes
-- makes PostgreSQL plan all statements of the session anew. So it is made once, and committed. And a transaction that leaves nothing behind
-- need not wait for the disk.
create or replace function realtime.prepare_guarded()
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    perform set_config('synchronous_commit', 'off', true);
    if pg_my_temp_schema() = 0 then
        create temporary table realtime_nothing () on commit drop;
    end if;
end
$$;
comment on function realtime.prepare_guarded() is 'To be called before realtime.make_guarded, outside of what is rolled back.';
revoke all on function realtime.prepare_guarded() from public;

create or replace function realtime.make_guarded(
    name text, role text, arguments text, result text, query text, expressions text[] default '{}'
)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    -- Those of USING, IN, CASE, NULLIF, DISTINCT and ORDER BY are not named in the text of an expression.
    c_operators constant text := ':(?:opnos?|eqop|sortop) (\(o [0-9 ]+\)|[0-9]+)';
    v_operators text;
    v_expression text;
begin
    -- A literal is read when it is parsed, which is done by the server's role.
    if exists (
        select
        from unnest(make_guarded.expressions) as tree
        cross join regexp_matches(tree, ':consttype ([0-9]+)', 'g') as found (type)
        where realtime.is_read_by_users(found.type[1]::oid)
    ) then
        raise exception using
            errcode = 'feature_not_supported',
            message = 'an expression has a constant of a composite type, or of arrays or ranges of domains or composite types',
            hint = 'Write it as row(...) or array[...].';
    end if;
    execute format(
        'create function pg_temp.%I(%s) returns %s language sql security definer set search_path = public, extensions, pg_temp'
        ' begin atomic %s; end',
        make_guarded.name, make_guarded.arguments, make_guarded.result, make_guarded.query
    );
    -- Operators of pg_catalog are found again. Those of users may not be, and have other oids.
    if exists (
        select
        from unnest(make_guarded.expressions) as e (expression)
        cross join regexp_matches(e.expression, c_operators, 'g') as found (operator)
        cross join regexp_matches(found.operator[1], '[0-9]+', 'g') as named (oid)
        where named.oid[1]::oid >= 16384
    ) then
        select string_agg(found.operator[1], ' ')
        into v_operators
        from pg_proc as p
        cross join regexp_matches(p.prosqlbody::text, c_operators, 'g') as found (operator)
        where p.oid = format('pg_temp.%I(%s)', make_guarded.name, make_guarded.arguments)::regprocedure;
        foreach v_expression in array make_guarded.expressions loop
            if strpos(
                concat(' ', v_operators, ' '),
                (
                    select concat(' ', string_agg(found.operator[1] || ' ', ''))
                    from regexp_matches(v_expression, c_operators, 'g') as found (operator)
                )
            ) = 0 then
                raise exception using
                    errcode = 'feature_not_supported',
                    message = 'an expression has an operator outside of pg_catalog that its text does not name';
            end if;
        end loop;
    end if;
    execute format('alter function pg_temp.%I(%s) owner to %I', make_guarded.name, make_guarded.arguments, make_guarded.role);
end
$$;
comment on function realtime.make_guarded(text, text, text, text, text, text[]) is
    'Makes a function in pg_temp that runs a query as a role which the code it calls cannot leave. To be rolled back. expressions: node trees whose text is part of the query; raises if they are not parsed as they were.';
revoke all on function realtime.make_guarded(text, text, text, text, text, text[]) from public;

create or replace function realtime.ask_guarded(role text, query text, argument jsonb, expressions text[] default '{}')
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_answer jsonb;
    v_is_done boolean := false;
begin
    perform realtime.prepare_guarded();
    begin
        perform realtime.make_guarded('realtime_question', ask_guarded.role, 'jsonb', 'jsonb', ask_guarded.query, expressions);
        perform realtime.take_identity(ask_guarded.role, '{}');
        execute 'select pg_temp.realtime_question($1)' into v_answer using ask_guarded.argument;
        v_is_done := true;
        raise exception using errcode = 'RT000';
    exception when others then
        if not v_is_done then
            raise;
        end if;
    end;
    return v_answer;
end
$$;
comment on function realtime.ask_guarded(text, text, jsonb, text[]) is
    'The answer of a query on $1, run as a role that the code it calls cannot leave; nothing else of it remains.';
revoke all on function realtime.ask_guarded(text, text, jsonb, text[]) from public;

-- -- filters

-- An operator of whoever made the type, or that of its operator class, which only a superuser can make. Others may be anybody's.
create or replace function realtime.filter_operator(type oid, symbol text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(
        (
            select format('operator(%I.%s)', n.nspname, o.oprname)
            from pg_type as t
            join pg_operator as o on o.oprowner = t.typowner and o.oprleft = t.oid
            join pg_namespace as n on n.oid = o.oprnamespace
            where t.oid = filter_operator.type and o.oprname = symbol and o.oprright in (t.oid, 25)
            order by o.oprright = t.oid desc, o.oprnamespace = t.typnamespace desc, o.oid
            limit 1
        ),
        (
            select format('operator(%I.%s)', n.nspname, case when symbol = '<>' then negator.oprname else o.oprname end)
            from pg_type as t
            join pg_opclass as c
                on c.opcintype = case
                    when t.typtype = 'c' then 'record'::regtype
                    when t.typtype = 'r' then 'anyrange'::regtype
                    when t.typtype = 'm' then 'anymultirange'::regtype
                    when t.typelem <> 0 then 'anyarray'::regtype
                    else t.oid
                end
            join pg_am as a on a.oid = c.opcmethod and a.amname = 'btree'
            join pg_amop as m on m.amopfamily = c.opcfamily and m.amoplefttype = c.opcintype and m.amoprighttype = c.opcintype
            join pg_operator as o on o.oid = m.amopopr
            join pg_namespace as n on n.oid = o.oprnamespace
            left join pg_operator as negator on negator.oid = o.oprnegate
            where t.oid = filter_operator.type
                and c.opcdefault
                and m.amopstrategy = array_position(array['<', '<=', '=', '>=', '>'], case symbol when '<>' then '=' else symbol end)
        ),
        format('operator(pg_catalog.%s)', symbol)
    )
$$;
comment on function realtime.filter_operator(oid, text) is 'An operator on two values of a type, written so that no other one is found.';
revoke all on function realtime.filter_operator(oid, text) from public;

-- The comparison of one operator, between a column and "v", the value of the filter, which is of the column's type already.
create or replace function realtime.comparison(operator text, is_negated boolean, value text)
returns text
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    v_text text;
begin
    if operator = 'is' then
        return 'x is ' || case when is_negated then 'not ' else '' end || value;
    end if;
    v_text := '{
        "eq": "x = v",
        "neq": "x <> v",
        "lt": "x < v",
        "lte": "x <= v",
        "gt": "x > v",
        "gte": "x >= v",
        "in": "x = any (v)",
        "like": "x like v",
        "ilike": "x ilike v",
        "match": "x ~ v",
        "imatch": "x ~* v",
        "isdistinct": "x is distinct from v"
    }'::jsonb ->> operator;
    return case when is_negated then 'not (' || v_text || ')' else v_text end;
end
$$;
comment on function realtime.comparison(text, boolean, text) is 'An operator of filters as SQL on x, the column, and v, the value; for "is" the value itself.';

create or replace function realtime.type_comparison(type oid, operator text, is_negated boolean, value text)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    v_operator text;
    v_text text;
begin
    if operator = 'is' or realtime.is_inert(type_comparison.type) then
        return realtime.comparison(operator, is_negated, value);
    end if;
    v_operator := realtime.filter_operator(
        type_comparison.type,
        '{
            "eq": "=",
            "neq": "<>",
            "lt": "<",
            "lte": "<=",
            "gt": ">",
            "gte": ">=",
            "in": "=",
            "like": "~~",
            "ilike": "~~*",
            "match": "~",
            "imatch": "~*",
            "isdistinct": "="
        }'::jsonb ->> operator
    );
    v_text := case operator
        when 'in' then format('x %s any (v)', v_operator)
        when 'isdistinct' then format(
            'case when x is not distinct from null or v is not distinct from null'
            ' then x is distinct from null or v is distinct from null else not (x %s v) end',
            v_operator
        )
        else format('x %s v', v_operator)
    end;
    return case when is_negated then 'not (' || v_text || ')' else v_text end;
end
$$;
comment on function realtime.type_comparison(oid, text, boolean, text) is
    'The same for values of a type that is no domain, with the operators that belong to the type.';
revoke all on function realtime.type_comparison(oid, text, boolean, text) from public;

-- Each comparison is made once, of the column's type and collation and not with null, because some can be written down but not made: those of
-- arrays of points, patterns under nondeterministic collations.
create or replace function realtime.check_filters(relation oid, role text, conditions jsonb, columns text[] default '{}')
returns table (n integer, is_exact boolean, vals text[])
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
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
    v_comparison text;
    v_query text;
    v_answer jsonb;
    v_is_inert boolean;
    v_is_plain boolean;
    v_is_enum boolean;
begin
    foreach v_column in array check_filters.columns loop
        if not exists (
            select
            from pg_attribute as a
            where a.attrelid = check_filters.relation
                and a.attname = v_column
                and a.attnum > 0
                and has_column_privilege(check_filters.role, a.attrelid, a.attnum, 'select')
        ) then
            raise exception 'invalid column for select %', v_column;
        end if;
    end loop;
    for v_condition, n in
        select c.condition, c.number::integer - 1 from jsonb_array_elements(conditions) with ordinality as c (condition, number)
    loop
        v_column := v_condition ->> 'column';
        v_operator := v_condition ->> 'operator';
        v_value := v_condition ->> 'value';
        v_type := null;
        select
            format_type(a.atttypid, -1),
            realtime.base_type(a.atttypid),
            realtime.is_inert(a.atttypid),
            t.typtype = 'e',
            coalesce(c.collisdeterministic, true),
            case when c.oid is null then '' else format(' collate %I.%I', n.nspname, c.collname) end
        into v_type, v_base, v_is_inert, v_is_enum, v_is_plain, v_collation
        from pg_attribute as a
        join pg_type as t on t.oid = a.atttypid
        left join pg_collation as c on c.oid = a.attcollation
        left join pg_namespace as n on n.oid = c.collnamespace
        where a.attrelid = check_filters.relation
            and a.attname = v_column
            and a.attnum > 0
            and has_column_privilege(check_filters.role, a.attrelid, a.attnum, 'select');
        if v_type is null then
            raise exception 'invalid column for filter %', v_column;
        end if;
        -- Types of which two values are equal exactly if their texts are, by operators that are leakproof.
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
            return next;
            continue;
        end if;
        v_comparison := realtime.type_comparison(v_base, v_operator, false, null);
        v_query := case
            when v_operator = 'in' then format(
                $q$
                    select jsonb_build_object('count', items.count, 'vals', items.vals, 'is', (
                        select %s from (select ($1 ->> 'value')::%s[] as v, (items.vals ->> 0)::%s%s as x) as pair
                    ))
                    from (
                        select count(*) as count, coalesce(jsonb_agg(format('%%s', item)) filter (where item is not null), '[]') as vals
                        from unnest(($1 ->> 'value')::%s[]) as item
                    ) as items
                $q$,
                v_comparison, v_type, v_type, v_collation, v_type
            )
            when v_operator in ('like', 'ilike', 'match', 'imatch') then format(
                -- Of a domain only the value that was given is known to be one.
                $q$
                    select jsonb_build_object('is', %s) from (select ($1 ->> 'value')::%s%s as x, ($1 ->> 'pattern')::%s as v) as pair
                $q$,
                v_comparison, format_type(v_base, -1), v_collation, v_type
            )
            else format(
                $q$
                    select jsonb_build_object('vals', jsonb_build_array(format('%%s', v)), 'is', %s)
                    from (select ($1 ->> 'value')::%s%s as x, ($1 ->> 'value')::%s as v) as pair
                $q$,
                v_comparison, v_type, v_collation, v_type
            )
        end;
        if v_operator in ('like', 'ilike', 'match', 'imatch') then
            if v_operator in ('like', 'ilike') and (length(v_value) - length(rtrim(v_value, '\'))) % 2 = 1 then
                -- PostgreSQL finds this out when it gets so far, which depends on the row.
                raise exception using
                    errcode = 'invalid_escape_sequence',
                    message = 'LIKE pattern must not end with escape character';
            end if;
            begin
                if v_is_inert then
                    execute v_query into v_answer using jsonb_build_object('value', '', 'pattern', v_value);
                else
                    v_answer := realtime.ask_guarded(
                        check_filters.role, v_query, jsonb_build_object('value', '', 'pattern', v_value)
                    );
                end if;
            exception
                when undefined_function or ambiguous_function then
                    raise exception 'operator % requires a text-compatible column type, got %', v_operator, v_type;
                when invalid_regular_expression then
                    raise exception 'invalid regular expression for % filter: %', v_operator, sqlerrm;
            end;
        else
            if v_is_inert then
                execute v_query into v_answer using v_condition;
            else
                v_answer := realtime.ask_guarded(check_filters.role, v_query, v_condition);
            end if;
            if (v_answer ->> 'count')::bigint > 100 then
                raise exception 'too many values for `in` filter. Maximum 100';
            end if;
            vals := array(select jsonb_array_elements_text(v_answer -> 'vals'));
        end if;
        return next;
    end loop;
end
$$;
comment on function realtime.check_filters(oid, text, jsonb, text[]) is
    'Whether a role may filter by these conditions and select these columns; raises what is wrong. For each condition that compares for equality of text (is_exact) the texts that fit.';
revoke all on function realtime.check_filters(oid, text, jsonb, text[]) from public;

-- All conditions of one column and operator are one statement, however many values there are.
create or replace function realtime.match_changes(relation oid, role text, images jsonb, conditions jsonb)
returns table (image integer, condition integer)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_group record;
    v_query text;
    v_argument jsonb;
    v_answer jsonb;
begin
    for v_group in
        select
            c.condition ->> 'column' as column_name,
            c.condition ->> 'operator' as operator,
            (c.condition ->> 'is_negated')::boolean as is_negated,
            case when c.condition ->> 'operator' = 'is' then c.condition ->> 'value' end as keyword,
            jsonb_agg(c.condition ->> 'value') as vals,
            jsonb_agg(c.number - 1) as numbers,
            jsonb_agg(c.condition -> 'images') as images,
            format_type(a.atttypid, -1) as type,
            realtime.base_type(a.atttypid) as base,
            realtime.is_inert(a.atttypid) as is_inert,
            realtime.declared_type(a.attrelid, a.attnum) as declared
        from jsonb_array_elements(conditions) with ordinality as c (condition, number)
        join pg_attribute as a
            on a.attrelid = match_changes.relation and a.attname = c.condition ->> 'column' and a.attnum > 0 and not a.attisdropped
        group by 1, 2, 3, 4, a.attrelid, a.attnum, a.atttypid
    loop
        v_query := format(
            $q$
                with wanted as materialized (
                    select
                        ($1 -> 'numbers' -> (w.n::integer - 1))::integer as number,
                        $1 -> 'wanted' -> (w.n::integer - 1) as images,
                        w.value::%1$s%2$s as v
                    from jsonb_array_elements_text($1 -> 'vals') with ordinality as w (value, n)
                ),
                found as materialized (
                    select i.n::integer - 1 as n, row.x::%6$s as x
                    from jsonb_array_elements($1 -> 'images') with ordinality as i (image, n)
                    cross join lateral jsonb_to_record(jsonb_build_object('x', i.image -> %3$L)) as row (x %4$s)
                    where i.image ? %3$L
                )
                select coalesce(jsonb_agg(jsonb_build_array(asked.n, asked.number)), '[]')
                from (
                    select found.n, wanted.number, found.x, wanted.v
                    from wanted
                    cross join lateral jsonb_array_elements_text(case jsonb_typeof(wanted.images) when 'array' then wanted.images end) as image
                    join found on found.n = image::integer
                    where jsonb_typeof(wanted.images) = 'array'
                    union all
                    select found.n, wanted.number, found.x, wanted.v
                    from wanted
                    cross join found
                    where jsonb_typeof(wanted.images) is distinct from 'array'
                    offset 0
                ) as asked
                where %5$s
            $q$,
            case when v_group.operator = 'is' then 'text' else v_group.type end,
            case when v_group.operator = 'in' then '[]' else '' end,
            v_group.column_name,
            v_group.declared,
            realtime.type_comparison(v_group.base, v_group.operator, v_group.is_negated, v_group.keyword),
            v_group.type
        );
        v_argument := jsonb_build_object(
            'images', images, 'vals', v_group.vals, 'numbers', v_group.numbers, 'wanted', v_group.images
        );
        if v_group.is_inert then
            execute v_query into v_answer using v_argument;
        else
            v_answer := realtime.ask_guarded(match_changes.role, v_query, v_argument);
        end if;
        return query
            select (pair ->> 0)::integer, (pair ->> 1)::integer from jsonb_array_elements(v_answer) as pair;
    end loop;
end
$$;
comment on function realtime.match_changes(oid, text, jsonb, jsonb) is
    'Which images satisfy which conditions, both counted from 0, by PostgreSQL''s own comparison. A condition is evaluated on its own "images" only, if it has any listed. A column that is absent satisfies none.';
revoke all on function realtime.match_changes(oid, text, jsonb, jsonb) from public;

-- -- row-level security

-- The condition that PostgreSQL itself puts behind a SELECT of this role: no restrictive policy may say otherwise, and one permissive policy
-- must say yes. In that order, so that what would raise for a row is not asked where PostgreSQL would not ask.
create or replace function realtime.policy_condition(relation oid, role text, out condition text, out trees text[])
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
begin
    select
        case
            when count(*) filter (where p.is_permissive) = 0 then 'false'
            else concat(
                string_agg('(' || p.condition || ') is true and ', '' order by p.name) filter (where not p.is_permissive),
                '(',
                string_agg('(' || p.condition || ')', ' or ' order by p.name desc) filter (where p.is_permissive),
                ')'
            )
        end,
        case when count(*) filter (where p.is_permissive) = 0 then '{}' else array_agg(p.tree) end
    into policy_condition.condition, policy_condition.trees
    from (
        select p.polname as name, p.polpermissive as is_permissive, pg_get_expr(p.polqual, p.polrelid) as condition, p.polqual::text as tree
        from pg_policy as p
        where p.polrelid = policy_condition.relation
            and p.polcmd in ('r', '*')
            and p.polqual is not null
            and exists (
                select
                from unnest(p.polroles) as member (oid)
                where member.oid = 0 or pg_has_role(policy_condition.role, member.oid, 'usage')
            )
    ) as p;
end
$$;
comment on function realtime.policy_condition(oid, text) is
    'The policies for SELECT of a table, as they apply to a role: as one condition in which all names outside of pg_catalog are qualified, and the node trees that its parts are the texts of.';
revoke all on function realtime.policy_condition(oid, text) from public;

-- A policy knows its tables and functions; written out, it has to find them again. All names are qualified but those of pg_catalog. It is read
-- by the server's role, because the client's may not use a schema that the policy reaches into, as is advised for definer functions. Text and
-- tree come from one statement, or a policy that is altered at this moment could have its text compared with the tree of another one.
create or replace function realtime.make_visible(name text, relation oid, role text)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    perform realtime.make_guarded(
        make_visible.name,
        make_visible.role,
        'text[], integer[]',
        'integer[]',
        format(
            $q$
                select coalesce(array_agg(asked.n), '{}')
                from rows from (unnest($1), unnest($2)) as asked (row, n)
                where (select %s from cast(asked.row as %s) as %I)
            $q$,
            policies.condition,
            realtime.table_name(c.oid),
            c.relname
        ),
        policies.trees
    )
    from pg_class as c
    cross join realtime.policy_condition(make_visible.relation, make_visible.role) as policies
    where c.oid = make_visible.relation;
end
$$;
comment on function realtime.make_visible(text, oid, text) is
    'Makes a function in pg_temp that tells which of the rows $1, as texts, whose numbers are $2, a role may see by the policies for SELECT. To be rolled back.';
revoke all on function realtime.make_visible(text, oid, text) from public;

-- An image is judged, not the row as it is by now: what the row has become says nothing of who may see what it was. So the condition of the
-- policies is evaluated on the image itself, under the name of the table, by the role and with the claims of each client in turn. Each set
-- of claims stands alone: a policy that raises for one hides nothing from the others. Nothing that policies do remains.
create or replace function realtime.visible_changes(relation oid, images jsonb, roles text[], claims jsonb[], wanted jsonb)
returns table (question integer, visible integer[], problem text, unknown integer[])
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    c_mark constant text := (select mark from realtime.table_marks(array[visible_changes.relation]));
    c_rows constant jsonb := realtime.row_texts(visible_changes.relation, visible_changes.images);
    v_columns text[] := realtime.policy_columns(visible_changes.relation);
    v_unknown integer[];
    v_asked record;
    v_column text;
    v_role text;
    v_name text;
    v_number integer := 0;
    v_role_problem text;
    v_is_done boolean;
begin
    foreach v_column in array realtime.checked_columns(visible_changes.relation) loop
        if v_column <> all (v_columns)
            and exists (select from jsonb_array_elements(visible_changes.images) as i (image) where not i.image ? v_column)
        then
            begin
                perform realtime.ask_guarded(
                    'anon',
                    format('select to_jsonb(null::%s is null)', format_type(a.atttypid, -1)),
                    null
                )
                from pg_attribute as a
                where a.attrelid = visible_changes.relation and a.attname = v_column;
            exception when others then
                v_columns := v_columns || v_column;
            end;
        end if;
    end loop;
    v_unknown := array(
        select i.n - 1
        from jsonb_array_elements(visible_changes.images) with ordinality as i (image, n)
        where not i.image ?& v_columns
    );
    perform realtime.prepare_guarded();
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
                unnest(roles), unnest(visible_changes.claims), jsonb_array_elements(wanted)
            ) with ordinality as c (role, claims, wanted, number)
            -- Not all rows: EXECUTE copies its arguments.
            cross join lateral (
                select
                    array_agg(n::integer) filter (where is_known) as numbers,
                    array_agg(c_rows ->> n::integer) filter (where is_known) as rows,
                    coalesce(array_agg(n::integer) filter (where not is_known), '{}') as unknown
                from jsonb_array_elements_text(c.wanted) as n
                cross join lateral (select n::integer <> all (v_unknown) as is_known) as known
            ) as w
            order by c.role
        loop
            if v_role is distinct from v_asked.role then
                v_role := v_asked.role;
                v_number := v_number + 1;
                v_name := format('realtime_visible_%s', v_number);
                v_role_problem := null;
                begin
                    perform realtime.make_visible(v_name, visible_changes.relation, v_role);
                exception when others then
                    v_role_problem := sqlstate || ': ' || sqlerrm;
                end;
            end if;
            question := v_asked.number;
            unknown := v_asked.unknown;
            visible := '{}';
            problem := v_role_problem;
            if problem is null and cardinality(v_asked.numbers) > 0 then
                v_is_done := false;
                begin
                    perform realtime.take_identity(v_role, v_asked.claims);
                    execute format('select pg_temp.%I($1, $2)', v_name) into visible using v_asked.rows, v_asked.numbers;
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
            end if;
            return next;
        end loop;
        v_is_done := null;
        raise exception using errcode = 'RT000';
    exception when others then
        if v_is_done is not null then
            raise;
        end if;
    end;
end
$$;
comment on function realtime.visible_changes(oid, jsonb, text[], jsonb[], jsonb) is
    'Which of the images that it asks for each client may see by the policies for SELECT. wanted: for each client a list of images, counted from 0. problem: when a policy could not be evaluated; then nothing is visible. unknown: images that lack a column that policies read.';
revoke all on function realtime.visible_changes(oid, jsonb, text[], jsonb[], jsonb) from public;

create or replace function realtime.render_changes(relation oid, images jsonb)
returns setof text
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
as $$
declare
    v_query text := format(
        'select jsonb_agg(to_jsonb(row.*)::text order by i.n)'
        ' from jsonb_array_elements($1) with ordinality as i (image, n) cross join lateral %s',
        realtime.populated(render_changes.relation, 'i.image')
    );
    v_answer jsonb;
begin
    if (
        select coalesce(bool_and(realtime.is_inert(realtime.base_type(a.atttypid))), true)
        from pg_attribute as a
        where a.attrelid = render_changes.relation and a.attnum > 0 and not a.attisdropped
    ) then
        execute v_query into v_answer using images;
    else
        v_answer := realtime.ask_guarded('anon', v_query, images);
    end if;
    return query select jsonb_array_elements_text(v_answer);
end
$$;
comment on function realtime.render_changes(oid, jsonb) is 'Images as to_jsonb writes rows, in order, whatever the database sets for everybody. Columns that are absent become null.';
revoke all on function realtime.render_changes(oid, jsonb) from public;

-- Who plans a query evaluates calls on constants in the indexes, statistics and partition keys of its tables, with its own rights.
create or replace function realtime.is_planned_by_postgres(relation oid)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with recursive part as (
        select is_planned_by_postgres.relation as oid
        union all
        select i.inhrelid from pg_inherits as i join part on i.inhparent = part.oid
    ),
    evaluated (classid, objid) as (
        select 'pg_class'::regclass, part.oid from part
        union all
        select 'pg_class'::regclass, i.indexrelid from part join pg_index as i on i.indrelid = part.oid
        union all
        select 'pg_statistic_ext'::regclass, s.oid from part join pg_statistic_ext as s on s.stxrelid = part.oid
    )
    select not exists (
        select
        from evaluated as e
        join pg_depend as d on d.classid = e.classid and d.objid = e.objid
        left join pg_operator as o on d.refclassid = 'pg_operator'::regclass and o.oid = d.refobjid
        join pg_proc as p on p.oid = case d.refclassid when 'pg_proc'::regclass then d.refobjid else o.oprcode end
        join pg_language as l on l.oid = p.prolang
        where p.oid >= 16384 and l.lanname not in ('internal', 'c')
    )
$$;
comment on function realtime.is_planned_by_postgres(oid) is
    'Whether a query on a table is planned without calls of functions that users may have made.';
revoke all on function realtime.is_planned_by_postgres(oid) from public;

-- By the operators of its index, which belong to the types. Null where code of users would be called to read the table or a value of its key.
create or replace function realtime.key_condition(relation oid)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when bool_and(realtime.is_inert(known.base) or t.typtype = 'b' and t.typelem = 0 or t.typtype = 'e')
            and realtime.is_planned_by_postgres(key_condition.relation)
        then string_agg(format('stored.%1$I operator(%2$I.%3$s) row.%1$I', a.attname, n.nspname, o.oprname), ' and ')
    end
    from pg_index as i
    cross join lateral unnest(i.indkey::int2[], i.indclass::oid[]) with ordinality as k (attnum, opclass, number)
    join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = k.attnum
    cross join lateral (select realtime.base_type(a.atttypid) as base) as known
    join pg_type as t on t.oid = known.base
    join pg_opclass as c on c.oid = k.opclass
    join pg_amop as m on m.amopfamily = c.opcfamily and m.amoplefttype = c.opcintype and m.amoprighttype = c.opcintype and m.amopstrategy = 3
    join pg_operator as o on o.oid = m.amopopr
    join pg_namespace as n on n.oid = o.oprnamespace
    where i.indrelid = key_condition.relation and i.indisprimary and k.number <= i.indnkeyatts
$$;
comment on function realtime.key_condition(oid) is 'That a row "stored" of a table has the primary key of "row".';
revoke all on function realtime.key_condition(oid) from public;

-- The log has no generated columns before PostgreSQL 18, no columns that are not published, and no large values that an UPDATE left as they
-- were. Those the table may still have: the row as it is now tells them if it is, in what is known, what it was at the change. Then clients
-- are told nothing that they could not select. Policies of the table are not asked: where they bind the server, it knows nothing.
create or replace function realtime.complete_changes(relation oid, images jsonb)
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set row_security = off
set constraint_exclusion = off
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
as $$
declare
    c_key constant text := realtime.key_condition(complete_changes.relation);
    v_generated text;
    v_expressions text[];
    v_stored text;
    v_is_read boolean;
    v_complete jsonb := images;
begin
    select
        string_agg(
            format(
                'case when i.image ?& %L::text[] then jsonb_build_object(%L, format(''%%s'', %s)) else ''{}'' end',
                array(
                    select source.attname
                    from pg_attribute as source
                    where source.attrelid = a.attrelid and strpos(d.adbin::text, concat(' :varattno ', source.attnum, ' ')) > 0
                ),
                a.attname,
                pg_get_expr(d.adbin, d.adrelid)
            ),
            ' || ' order by a.attnum
        ) filter (where a.attgenerated <> ''),
        array_agg(d.adbin::text) filter (where a.attgenerated <> ''),
        string_agg(format('array[%1$L, realtime.written(stored.%1$I)]', a.attname), ', ' order by a.attnum) filter (where a.attgenerated = ''),
        -- The table itself, which somebody may have locked, is read only for what cannot be computed.
        bool_or(a.attgenerated = '' and exists (
            select from jsonb_array_elements(images) as wanted (image) where not wanted.image ? a.attname
        ))
    into v_generated, v_expressions, v_stored, v_is_read
    from pg_attribute as a
    left join pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
    where a.attrelid = complete_changes.relation and a.attnum > 0 and not a.attisdropped;
    if v_is_read and c_key is not null then
        begin
            execute format(
                $q$
                    select jsonb_agg(coalesce(stored.image, '{}') || i.image order by i.n)
                    from jsonb_array_elements($1) with ordinality as i (image, n)
                    left join lateral (
                        select jsonb_object(array[%1$s]) as image from %2$s as stored cross join lateral %3$s where %4$s
                    ) as stored on stored.image @> (i.image - $2)
                $q$,
                v_stored,
                realtime.table_name(complete_changes.relation),
                realtime.populated(complete_changes.relation, 'i.image', true),
                c_key
            ) into v_complete using images, array(
                select a.attname::text
                from pg_attribute as a
                where a.attrelid = complete_changes.relation and a.attgenerated <> ''
            );
        exception when insufficient_privilege then
            v_complete := images;
        end;
    end if;
    if v_generated is not null then
        v_complete := realtime.ask_guarded(
            'anon',
            format(
                'select jsonb_agg(i.image || coalesce(generated.image, ''{}'') order by i.n)'
                ' from jsonb_array_elements($1) with ordinality as i (image, n)'
                ' left join lateral (select %s as image from %s) as generated on true',
                v_generated,
                realtime.populated(complete_changes.relation, 'i.image')
            ),
            v_complete,
            v_expressions
        );
    end if;
    return v_complete;
end
$$;
comment on function realtime.complete_changes(oid, jsonb) is
    'Images with their generated columns computed, and with columns that are not known from the row as it is stored now, if it is still the same otherwise.';
revoke all on function realtime.complete_changes(oid, jsonb) from public;

-- A row filter has only built-in types and functions in it, so no others are read for it.
create or replace function realtime.filter_changes(relation oid, images jsonb)
returns setof integer
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_filter text;
    v_name text;
    v_columns text;
    v_declared text;
begin
    select to_jsonb(p) ->> 'rowfilter', p.tablename into v_filter, v_name
    from pg_publication_tables as p
    join pg_namespace as n on n.nspname = p.schemaname
    join pg_class as c on c.relnamespace = n.oid and c.relname = p.tablename
    where p.pubname = 'supabase_realtime' and c.oid = filter_changes.relation;
    select
        string_agg(format('image.%1$I::%2$s as %1$I', a.attname, format_type(a.atttypid, a.atttypmod)), ', '),
        string_agg(format('%I %s', a.attname, realtime.declared_type(a.attrelid, a.attnum)), ', ')
    into v_columns, v_declared
    from pg_attribute as a
    where a.attrelid = filter_changes.relation and a.attnum > 0 and not a.attisdropped and a.atttypid < 16384;
    return query execute format(
        $q$
            select i.n::integer - 1
            from jsonb_array_elements($1) with ordinality as i (image, n)
            where (select %s from (select %s from jsonb_to_record(i.image) as image (%s)) as %I)
        $q$,
        coalesce(v_filter, 'true'),
        v_columns,
        v_declared,
        v_name
    ) using images;
end
$$;
comment on function realtime.filter_changes(oid, jsonb) is 'Which images, counted from 0, pass the row filter of the publication.';
revoke all on function realtime.filter_changes(oid, jsonb) from public;

-- -- capture by triggers

-- Whose row it is depends on nothing of the writer's: definer rights, and settings that make equal values equal texts.
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

create or replace function realtime.change_doorbell_key()
returns bigint
language sql
immutable
begin atomic
    select realtime.doorbell_key() + 2;
end;
comment on function realtime.change_doorbell_key() is 'Advisory lock that a reader of realtime.changes holds while it sleeps.';
revoke all on function realtime.change_doorbell_key() from public;

create or replace function realtime.ring_change_doorbell()
returns trigger
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    if pg_catalog.current_setting('realtime.doorbell', true) = 'off' then
        return null;
    elsif pg_catalog.pg_try_advisory_lock_shared(realtime.change_doorbell_key()) then
        perform pg_catalog.pg_advisory_unlock_shared(realtime.change_doorbell_key());
    else
        perform pg_catalog.pg_notify('realtime_changes', '');
    end if;
    return null;
end
$$;
comment on function realtime.ring_change_doorbell() is 'Wakes the readers of realtime.changes at commit if one sleeps.';
revoke all on function realtime.ring_change_doorbell() from public;

create or replace trigger ring_doorbell
    after insert on realtime.changes
    for each statement
    execute function realtime.ring_change_doorbell();
comment on trigger ring_doorbell on realtime.changes is 'Wakes the readers at commit if one sleeps.';

-- Exactly the rows that were not visible in "position" and are visible now, as realtime.messages_since reads messages.
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
set search_path = pg_catalog, pg_temp
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

-- For servers of before, to which it tells only that there were changes that they cannot read.
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
set search_path = pg_catalog, pg_temp
as $$
    select c.seq, c.relation, c.action, c.changed_at, null, null, c.xid, c.snapshot
    from realtime.captured_since("position") as c
    order by c.seq asc nulls first
$$;
comment on function realtime.changes_since(pg_snapshot) is 'Captured changes committed since a snapshot, without their rows.';
revoke all on function realtime.changes_since(pg_snapshot) from public;

create or replace function realtime.dropped_change_xid()
returns xid8
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select case when stream.dropped_change_in_life = realtime.life() then stream.dropped_change_xid else '0' end
    from realtime.stream
$$;
comment on function realtime.dropped_change_xid() is 'Highest transaction id among captured changes that were dropped in this life of the database.';
revoke all on function realtime.dropped_change_xid() from public;

create or replace function realtime.note_dropped_change(xid xid8)
returns void
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    update realtime.stream
    set
        dropped_change_xid = note_dropped_change.xid,
        dropped_change_in_life = realtime.life()
    where note_dropped_change.xid > realtime.dropped_change_xid()
$$;
comment on function realtime.note_dropped_change(xid8) is 'Remembers that captured changes of transactions up to this one were dropped.';
revoke all on function realtime.note_dropped_change(xid8) from public;

-- Block by block: an index on the time would cost every writer, and without one a table that has grown large is too much for one statement.
create or replace function realtime.drop_old_changes(retention interval default '1 hour', from_block bigint default 0, blocks bigint default 4294967295)
returns table (dropped bigint, next_block bigint)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_end bigint := least(drop_old_changes.from_block + drop_old_changes.blocks, 4294967295);
    v_xid xid8;
begin
    -- A lock on a row that only the owner can reach; an advisory lock is for any role to take.
    perform from realtime.maintenance as m where m.task = 'changes' for update skip locked;
    if not found then
        return;
    end if;
    with gone as (
        delete from realtime.changes as c
        where c.ctid >= format('(%s,0)', drop_old_changes.from_block)::tid
            and c.ctid < format('(%s,0)', v_end)::tid
            and c.changed_at < now() - drop_old_changes.retention
        returning c.xid
    )
    select
        count(*),
        -- Not those of another cluster, as in a restored dump: nobody reads by them.
        max(gone.xid::text::numeric) filter (where gone.xid < pg_snapshot_xmax(pg_current_snapshot()))
    into dropped, v_xid
    from gone;
    perform realtime.note_dropped_change(v_xid);
    next_block := v_end;
    if v_end * current_setting('block_size')::bigint >= pg_relation_size('realtime.changes') then
        next_block := null;
        update realtime.maintenance as m set succeeded_at = now() where m.task = 'changes';
    end if;
    return next;
end
$$;
comment on function realtime.drop_old_changes(interval, bigint, bigint) is
    'Deletes captured changes older than the retention from so many blocks of the table; how many, and the block to go on from, null at the end. No row: another server is at it. A server that has not read them by then reports a gap.';
revoke all on function realtime.drop_old_changes(interval, bigint, bigint) from public;

create or replace function realtime.has_change_reader()
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select exists (
        select from pg_stat_activity where application_name = 'realtime-server changes' and datname = current_database()
    )
$$;
comment on function realtime.has_change_reader() is 'Whether a server reads captured changes now.';
revoke all on function realtime.has_change_reader() from public;

-- The oid in it keeps it apart from what users name, and from the clone that a partition gets of the trigger of its root. Triggers fire in
-- the order of their names: what others write because of a change is to come behind it.
create or replace function realtime.capture_trigger(relation oid)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select '!realtime_capture_' || relation::text
$$;
comment on function realtime.capture_trigger(oid) is 'Name of the capture trigger on this table.';
revoke all on function realtime.capture_trigger(oid) from public;

create or replace function realtime.capture_triggers()
returns table (relation oid, name text, events text[], is_sound boolean)
language sql
stable
set search_path = pg_catalog, pg_temp
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

create or replace function realtime.capture_plan(is_wanted boolean default true)
returns table (relation oid, name text, events text[])
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with wanted as materialized (
        select
            c.oid,
            array_remove(array[
                case when p.pubinsert then 'INSERT' end,
                case when p.pubupdate then 'UPDATE' end,
                case when p.pubdelete then 'DELETE' end
            ], null) as events
        from pg_publication as p
        join pg_publication_tables as pt on pt.pubname = p.pubname
        join pg_namespace as n on n.nspname = pt.schemaname
        join pg_class as c on c.relnamespace = n.oid and c.relname = pt.tablename
        where p.pubname = 'supabase_realtime'
            and n.nspname <> 'realtime'
            and is_wanted
            and (p.pubinsert or p.pubupdate or p.pubdelete)
    ),
    present as materialized (
        select
            t.relation as oid,
            min(t.events) as events,
            count(*) = 1 and bool_and(t.is_sound) as is_sound
        from realtime.capture_triggers() as t
        group by t.relation
    )
    select coalesce(wanted.oid, present.oid), realtime.table_name(coalesce(wanted.oid, present.oid)), coalesce(wanted.events, '{}')
    from wanted
    full join present on present.oid = wanted.oid
    where present.is_sound is not true or wanted.events is distinct from present.events
    order by wanted.oid is not null, 1
$$;
comment on function realtime.capture_plan(boolean) is
    'Tables whose capture trigger is to be taken away (no events), made or made anew, in this order. capture_plan(false): all are to be taken away.';
revoke all on function realtime.capture_plan(boolean) from public;

-- While a lock is waited for, whoever comes later waits behind. So it is not waited for long, and with other tables' locks best not at all.
create or replace function realtime.capture_table(relation oid, events text[], patience interval default '0.1 s')
returns table (action text, problem text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '1s'
as $$
#variable_conflict use_column
declare
    v_table text := realtime.table_name(capture_table.relation);
    v_trigger text := realtime.capture_trigger(capture_table.relation);
    v_present text;
begin
    if v_table is null then
        -- It was dropped.
        return;
    end if;
    begin
        -- Servers that look at the same time do it once. A row that only the owner can lock; an advisory lock is for any role to take.
        perform from realtime.maintenance as m where m.task = 'capture' for update;
        perform set_config('lock_timeout', greatest(1, extract(epoch from patience) * 1000)::integer::text, true);
        for v_present in
            select t.name
            from realtime.capture_triggers() as t
            where t.relation = capture_table.relation and not (t.is_sound and t.events = capture_table.events)
        loop
            execute format('drop trigger %I on %s', v_present, v_table);
            action := 'released';
        end loop;
        if cardinality(capture_table.events) > 0
            and not exists (select from realtime.capture_triggers() as t where t.relation = capture_table.relation)
        then
            execute format(
                'create trigger %I after %s on %s for each row execute function realtime.capture_change(%L)',
                v_trigger,
                concat_ws(
                    ' or ',
                    case when 'INSERT' = any (capture_table.events) then 'insert' end,
                    case when 'UPDATE' = any (capture_table.events) then 'update' end,
                    case when 'DELETE' = any (capture_table.events) then 'delete' end
                ),
                v_table,
                capture_table.relation
            );
            -- As the log would: also what arrives by replication. Only its owner may say so.
            if pg_has_role((select c.relowner from pg_class as c where c.oid = capture_table.relation), 'usage') then
                execute format('alter table %s enable always trigger %I', v_table, v_trigger);
            end if;
            action := 'captured';
        end if;
    exception
        when lock_not_available then
            action := 'waiting';
            problem := 'the table is in use';
        -- Whatever it is (rights, an event trigger, a table that is gone by now), it is this table's alone.
        when others then
            action := 'refused';
            problem := sqlerrm;
    end;
    if action is not null then
        return next;
    end if;
end
$$;
comment on function realtime.capture_table(oid, text[], interval) is
    'Gives a table the capture trigger for these events, or takes it away if there are none; what was done (captured, released), or why nothing was (waiting, refused). No row: nothing was to do. Locks are waited for up to patience each.';
revoke all on function realtime.capture_table(oid, text[], interval) from public;

create or replace function realtime.empty_changes()
returns boolean
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '0.1s'
as $$
declare
    v_xid xid8;
begin
    if pg_relation_size('realtime.changes') = 0
        or realtime.has_change_reader()
        or exists (select from realtime.capture_triggers())
    then
        return false;
    end if;
    -- Whoever begins to write or to read meanwhile is seen behind the lock.
    lock table realtime.changes in access exclusive mode;
    perform pg_stat_clear_snapshot();
    if realtime.has_change_reader() or exists (select from realtime.capture_triggers()) then
        return false;
    end if;
    select c.xid into v_xid
    from realtime.changes as c
    where c.xid < pg_snapshot_xmax(pg_current_snapshot())
    order by c.xid desc
    limit 1;
    perform realtime.note_dropped_change(v_xid);
    truncate realtime.changes;
    return true;
exception when lock_not_available then
    return false;
end
$$;
comment on function realtime.empty_changes() is
    'Drops all captured changes and gives their space back, if no table is captured and no server reads; whether that was so.';
revoke all on function realtime.empty_changes() from public;

create or replace function realtime.sync_capture(is_wanted boolean default true)
returns table (relation oid, name text, action text, problem text)
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    select plan.relation, plan.name, done.action, done.problem
    from realtime.capture_plan(is_wanted) as plan
    cross join lateral realtime.capture_table(plan.relation, plan.events, '0.01 s') as done
$$;
comment on function realtime.sync_capture(boolean) is
    'Puts capture triggers on the tables of the publication and takes them from all others; what was done, and why something was not. sync_capture(false) takes them all away. By hand: servers take one table at a time, so that no lock is kept while another one is waited for.';
revoke all on function realtime.sync_capture(boolean) from public;

create or replace function realtime.release_capture()
returns table (relation oid, name text, action text, problem text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    if not realtime.has_change_reader() then
        return query select released.* from realtime.sync_capture(false) as released;
    end if;
end
$$;
comment on function realtime.release_capture() is 'Takes the capture triggers away, unless a server reads what they write.';
revoke all on function realtime.release_capture() from public;
