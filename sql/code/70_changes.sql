-- Row changes: which tables tell theirs, what of them is wanted, and who may see it. Called by the servers only.
--
-- An image is a row as a JSON object, column by column: strings of the text that PostgreSQL writes for the values, null for null. So what is
-- read from it is what was written: bounds of arrays, and null in json, which is not null. A column that is not known is absent.

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
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with recursive base as (
        select t.oid, t.typtype, t.typbasetype from pg_type as t where t.oid = base_type.type
        union all
        select t.oid, t.typtype, t.typbasetype from pg_type as t join base on t.oid = base.typbasetype and base.typtype = 'd'
    )
    select base.oid from base where base.typtype <> 'd'
$$;
comment on function realtime.base_type(oid) is 'What a domain is made of, at the bottom; other types themselves.';

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

-- A row of which only some columns are known is none of its table, where a domain among the others does not allow null.
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

-- Only by its text does a whole row become one of its table's type, which policies may ask for, with each value read as it was written.
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

-- Rights and row-level security are looked at before each piece of changes. To read all of them each time would cost more than the changes:
-- this tells that one of the rows they are kept in was written.
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

-- The caller's claims, as policies read them. Until the end of the transaction, or of the exception block around it.
create or replace function realtime.take_identity(role text, claims jsonb)
returns void
language plpgsql
volatile
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

-- -- filters

-- The comparison of one operator, between a column and "v", the value of the filter, which is of the column's type already.
create or replace function realtime.comparison(operator text, is_negated boolean, value text)
returns text
language plpgsql
immutable
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

-- As its role, because operators and types may be users' own. Each comparison is made once, of the column's type and collation and not with
-- null, because some can be written down but not made: those of arrays of points, patterns under nondeterministic collations.
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

-- All conditions of one column and operator are one statement, however many values there are.
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

-- -- row-level security

-- The condition that PostgreSQL itself puts behind a SELECT of this role: no restrictive policy may say otherwise, and one permissive policy
-- must say yes. In that order, so that what would raise for a row is not asked where PostgreSQL would not ask.
create or replace function realtime.policy_condition(relation oid, role text)
returns text
language sql
stable
as $$
    select case
        when pg_catalog.count(*) filter (where quals.polpermissive) = 0 then 'false'
        else pg_catalog.concat(
            pg_catalog.string_agg('(' || quals.qual || ') is true and ', '' order by quals.polname) filter (where not quals.polpermissive),
            '(',
            pg_catalog.string_agg('(' || quals.qual || ')', ' or ' order by quals.polname desc) filter (where quals.polpermissive),
            ')'
        )
    end
    from (
        select p.polname, p.polpermissive, pg_catalog.pg_get_expr(p.polqual, p.polrelid) as qual
        from pg_catalog.pg_policy as p
        where p.polrelid = policy_condition.relation
            and p.polcmd in ('r', '*')
            and p.polqual is not null
            and exists (
                select
                from pg_catalog.unnest(p.polroles) as member (oid)
                where member.oid = 0 or pg_catalog.pg_has_role(policy_condition.role, member.oid, 'usage')
            )
    ) as quals
$$;
comment on function realtime.policy_condition(oid, text) is
    'The policies for SELECT of a table, as they apply to a role, as one condition. Names are written out as far as the search path asks for it.';
revoke all on function realtime.policy_condition(oid, text) from public;

-- Who reads a whole row reads all of it. A policy that takes a function's word reads what the function is given. And no row can be made
-- without a value that its domain insists on.
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

-- A policy knows its tables and functions; written out, it has to find them again. All names are qualified but those of pg_catalog, because
-- the path is empty where they are written. Where these would be taken for something else on the caller's path, or where the role may not
-- use a schema that the policy reaches into (as is advised for definer functions), the condition becomes the body of a function, which is
-- read here and now, by us. It never outlives the transaction, so it keeps nobody from dropping what it mentions.
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

-- An image is judged, not the row as it is by now: what the row has become says nothing of who may see what it was. So the condition of the
-- policies is evaluated on the image itself, under the name of the table, by the role and with the claims of each client in turn. Each set
-- of claims stands alone: a policy that raises for one hides nothing from the others.
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

-- The log has no generated columns before PostgreSQL 18, no columns that are not published, and no large values that an UPDATE left as they
-- were. Those the table may still have: the row as it is now tells them if it is, in what is known, what it was at the change. Then clients
-- are told nothing that they could not select.
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
as $$
    select realtime.doorbell_key() + 2
$$;
comment on function realtime.change_doorbell_key() is 'Advisory lock that a reader of realtime.changes holds while it sleeps.';
revoke all on function realtime.change_doorbell_key() from public;

create or replace function realtime.ring_change_doorbell()
returns trigger
language plpgsql
volatile
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
as $$
begin
    if not realtime.has_change_reader() then
        return query select released.* from realtime.sync_capture(false) as released;
    end if;
end
$$;
comment on function realtime.release_capture() is 'Takes the capture triggers away, unless a server reads what they write.';
revoke all on function realtime.release_capture() from public;
