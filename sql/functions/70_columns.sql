-- Row changes: columns and rows of published tables. Only servers call these functions.
--
-- An image is a row as a JSON object, column by column: strings of the text that PostgreSQL writes for the values, null for null. So
-- reading it gives exactly what was written: bounds of arrays, and null in json, which is not null. An unknown column is absent.
--
-- Most queries concern a few rows, and planning a statement on the catalog takes longer than executing it. So functions that are called for
-- each query are in PL/pgSQL, which keeps plans for the session, with force_generic_plan, which keeps one plan for all arguments.

create or replace function realtime_internal.table_name(relation oid)
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
comment on function realtime_internal.table_name(oid) is 'The qualified name of a table, whatever the search path: objects that users'' functions leave in a session must not be found instead.';
revoke all on function realtime_internal.table_name(oid) from public;

create or replace function realtime_internal.base_type(type oid)
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
comment on function realtime_internal.base_type(oid) is 'The base type of a domain, through all domains; other types themselves.';

-- Other types, even enums, are not inert: their owner may create casts from and to them at any moment, and PostgreSQL prefers these to the
-- input and output functions.
create or replace function realtime_internal.is_inert(type oid)
returns boolean
language sql
immutable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
    select is_inert.type < 16384
$$;
comment on function realtime_internal.is_inert(oid) is
    'Whether PostgreSQL alone reads, compares and writes values of a type: true for built-in types. For other types functions of users may be called.';
revoke all on function realtime_internal.is_inert(oid) from public;

create or replace function realtime_internal.declared_type(relation oid, attnum smallint)
returns text
language plpgsql
stable
set search_path = ''
set plan_cache_mode = force_generic_plan
as $$
begin
    return (
        select case when realtime_internal.base_type(a.atttypid) in (114, 3802) then 'text' else pg_catalog.format_type(a.atttypid, a.atttypmod) end
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
comment on function realtime_internal.declared_type(oid, smallint) is
    'The type of a column for a list of column definitions that reads an image; text instead of json and jsonb, for which a string would be a JSON string.';
revoke all on function realtime_internal.declared_type(oid, smallint) from public;

-- A row of which only some columns are known is not built as a row of its table, because a domain among the others may not allow null.
create or replace function realtime_internal.populated(relation oid, image text, only_key boolean default false)
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
                    case when t.typtype = 'd' and known.base not in (114, 3802) then known.type else realtime_internal.declared_type(a.attrelid, a.attnum) end
                ),
                ', ' order by a.attnum
            )
        )
        from pg_catalog.pg_attribute as a
        join pg_catalog.pg_type as t on t.oid = a.atttypid
        cross join lateral (
            select base, pg_catalog.format_type(base, -1) as type from realtime_internal.base_type(t.oid) as base
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
comment on function realtime_internal.populated(oid, text, boolean) is 'A lateral item for FROM: "row", with a table''s columns or those of its primary key, from an expression that is an image. Absent columns become null.';
revoke all on function realtime_internal.populated(oid, text, boolean) from public;

-- Only from its text can a whole row be made a row of its table's type, which policies may need, with each value read as it was written.
create or replace function realtime_internal.row_texts(relation oid, images jsonb)
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
comment on function realtime_internal.row_texts(oid, jsonb) is 'Images as the texts of rows of a table''s type, in order. Absent columns become null.';
revoke all on function realtime_internal.row_texts(oid, jsonb) from public;

create or replace function realtime_internal.written(value anyelement)
returns text
language sql
stable
strict
set search_path = pg_catalog, pg_temp
as $$
    select pg_catalog.format('%s', value)
$$;
comment on function realtime_internal.written(anyelement) is 'The text that the output function of a type writes for a value; a cast to text may write another one.';
revoke all on function realtime_internal.written(anyelement) from public;

-- A reference to the whole row reads all columns. A policy that calls a function reads its arguments. And a row cannot be made without a
-- value for each column whose domain refuses null.
create or replace function realtime_internal.policy_columns(relation oid)
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
comment on function realtime_internal.policy_columns(oid) is
    'The columns of a table that its policies for SELECT read, and those that are never null because of their domain: without them, no policy can be evaluated on a row.';
revoke all on function realtime_internal.policy_columns(oid) from public;

create or replace function realtime_internal.checked_columns(relation oid)
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
comment on function realtime_internal.checked_columns(oid) is 'The columns of a table whose domain has a constraint, which may or may not allow null.';
revoke all on function realtime_internal.checked_columns(oid) from public;
