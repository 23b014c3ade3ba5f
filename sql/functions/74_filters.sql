-- Checks filters, and evaluates them on images of rows.

-- Each comparison is executed once, with the column's type and collation and without nulls, because some can be parsed but not executed:
-- those of arrays of points, patterns under nondeterministic collations.
create or replace function realtime_internal.check_filters(relation oid, role text, conditions jsonb, columns text[] default '{}')
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
            realtime_internal.base_type(a.atttypid),
            realtime_internal.is_inert(a.atttypid),
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
        -- Types whose values are equal exactly if their texts are, by leakproof operators.
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
        v_comparison := realtime_internal.type_comparison(v_base, v_operator, false, null);
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
                -- Of a domain, only the given value is known to be valid.
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
                -- PostgreSQL detects this only during execution, depending on the row.
                raise exception using
                    errcode = 'invalid_escape_sequence',
                    message = 'LIKE pattern must not end with escape character';
            end if;
            begin
                if v_is_inert then
                    execute v_query into v_answer using jsonb_build_object('value', '', 'pattern', v_value);
                else
                    v_answer := realtime_internal.ask_guarded(
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
                v_answer := realtime_internal.ask_guarded(check_filters.role, v_query, v_condition);
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
comment on function realtime_internal.check_filters(oid, text, jsonb, text[]) is
    'Checks that a role may filter by these conditions and select these columns; raises what is wrong. For each condition that compares texts for equality (is_exact) returns the texts that satisfy it.';
revoke all on function realtime_internal.check_filters(oid, text, jsonb, text[]) from public;

-- All conditions on one column with one operator are one statement, however many values there are.
create or replace function realtime_internal.match_changes(relation oid, role text, images jsonb, conditions jsonb)
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
            realtime_internal.base_type(a.atttypid) as base,
            realtime_internal.is_inert(a.atttypid) as is_inert,
            realtime_internal.declared_type(a.attrelid, a.attnum) as declared
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
            realtime_internal.type_comparison(v_group.base, v_group.operator, v_group.is_negated, v_group.keyword),
            v_group.type
        );
        v_argument := jsonb_build_object(
            'images', images, 'vals', v_group.vals, 'numbers', v_group.numbers, 'wanted', v_group.images
        );
        if v_group.is_inert then
            execute v_query into v_answer using v_argument;
        else
            v_answer := realtime_internal.ask_guarded(match_changes.role, v_query, v_argument);
        end if;
        return query
            select (pair ->> 0)::integer, (pair ->> 1)::integer from jsonb_array_elements(v_answer) as pair;
    end loop;
end
$$;
comment on function realtime_internal.match_changes(oid, text, jsonb, jsonb) is
    'Returns which images satisfy which conditions, both counted from 0, by PostgreSQL''s own comparison. A condition is evaluated only on its "images", if it lists any. An absent column satisfies none.';
revoke all on function realtime_internal.match_changes(oid, text, jsonb, jsonb) from public;

-- A row filter contains only built-in types and functions, so only columns of these are read for it.
create or replace function realtime_internal.filter_changes(relation oid, images jsonb)
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
        string_agg(format('%I %s', a.attname, realtime_internal.declared_type(a.attrelid, a.attnum)), ', ')
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
comment on function realtime_internal.filter_changes(oid, jsonb) is 'The images, counted from 0, that pass the row filter of the publication.';
revoke all on function realtime_internal.filter_changes(oid, jsonb) from public;
