-- Rendering: the values that clients get.

create or replace function realtime_internal.render_changes(relation oid, images jsonb)
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
        realtime_internal.populated(render_changes.relation, 'i.image')
    );
    v_answer jsonb;
begin
    if (
        select coalesce(bool_and(realtime_internal.is_inert(realtime_internal.base_type(a.atttypid))), true)
        from pg_attribute as a
        where a.attrelid = render_changes.relation and a.attnum > 0 and not a.attisdropped
    ) then
        execute v_query into v_answer using images;
    else
        v_answer := realtime_internal.ask_guarded('anon', v_query, images);
    end if;
    return query select jsonb_array_elements_text(v_answer);
end
$$;
comment on function realtime_internal.render_changes(oid, jsonb) is 'Images as to_jsonb writes rows, in order, independent of settings of the database. Absent columns become null.';
revoke all on function realtime_internal.render_changes(oid, jsonb) from public;

-- The planner evaluates calls on constants in indexes, statistics and partition keys of the tables, with the rights of the calling role.
create or replace function realtime_internal.is_planned_by_postgres(relation oid)
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
comment on function realtime_internal.is_planned_by_postgres(oid) is
    'Whether a query on a table is planned without calls of functions that users may have created.';
revoke all on function realtime_internal.is_planned_by_postgres(oid) from public;

-- By the operators of its index, which belong to the types. Null where reading the table or a value of its key would call users' code.
create or replace function realtime_internal.key_condition(relation oid)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select case
        when bool_and(realtime_internal.is_inert(known.base) or t.typtype = 'b' and t.typelem = 0 or t.typtype = 'e')
            and realtime_internal.is_planned_by_postgres(key_condition.relation)
        then string_agg(format('stored.%1$I operator(%2$I.%3$s) row.%1$I', a.attname, n.nspname, o.oprname), ' and ')
    end
    from pg_index as i
    cross join lateral unnest(i.indkey::int2[], i.indclass::oid[]) with ordinality as k (attnum, opclass, number)
    join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = k.attnum
    cross join lateral (select realtime_internal.base_type(a.atttypid) as base) as known
    join pg_type as t on t.oid = known.base
    join pg_opclass as c on c.oid = k.opclass
    join pg_amop as m on m.amopfamily = c.opcfamily and m.amoplefttype = c.opcintype and m.amoprighttype = c.opcintype and m.amopstrategy = 3
    join pg_operator as o on o.oid = m.amopopr
    join pg_namespace as n on n.oid = o.oprnamespace
    where i.indrelid = key_condition.relation and i.indisprimary and k.number <= i.indnkeyatts
$$;
comment on function realtime_internal.key_condition(oid) is 'The condition that a row "stored" of a table has the primary key of "row".';
revoke all on function realtime_internal.key_condition(oid) from public;

-- The log has no generated columns before PostgreSQL 18, no unpublished columns, and no large values that an UPDATE left unchanged. The
-- current row may still have them: its values are used if all known values still match. Then clients get nothing that they could not
-- select. Policies of the table are not evaluated: where they bind the server, the values stay unknown.
create or replace function realtime_internal.complete_changes(relation oid, images jsonb)
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
    c_key constant text := realtime_internal.key_condition(complete_changes.relation);
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
        string_agg(format('array[%1$L, realtime_internal.written(stored.%1$I)]', a.attname), ', ' order by a.attnum) filter (where a.attgenerated = ''),
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
                realtime_internal.table_name(complete_changes.relation),
                realtime_internal.populated(complete_changes.relation, 'i.image', true),
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
        v_complete := realtime_internal.ask_guarded(
            'anon',
            format(
                'select jsonb_agg(i.image || coalesce(generated.image, ''{}'') order by i.n)'
                ' from jsonb_array_elements($1) with ordinality as i (image, n)'
                ' left join lateral (select %s as image from %s) as generated on true',
                v_generated,
                realtime_internal.populated(complete_changes.relation, 'i.image')
            ),
            v_complete,
            v_expressions
        );
    end if;
    return v_complete;
end
$$;
comment on function realtime_internal.complete_changes(oid, jsonb) is
    'Images with computed generated columns, and with unknown columns taken from the current row, if all known values still match.';
revoke all on function realtime_internal.complete_changes(oid, jsonb) from public;
