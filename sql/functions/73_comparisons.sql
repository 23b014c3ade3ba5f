-- Comparisons of a filter's value with a column.

-- Only operators of the type's owner, or of its operator class, which only a superuser can create. Others may be anybody's.
create or replace function realtime_internal.filter_operator(type oid, symbol text)
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
comment on function realtime_internal.filter_operator(oid, text) is 'An operator on two values of a type, qualified so that no other one is found.';
revoke all on function realtime_internal.filter_operator(oid, text) from public;

-- The comparison by one operator, between a column and "v", the value of the filter, which has the column's type already.
create or replace function realtime_internal.comparison(operator text, is_negated boolean, value text)
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
comment on function realtime_internal.comparison(text, boolean, text) is 'An operator of filters as SQL on x, the column, and v, the value; for "is" the value itself.';

create or replace function realtime_internal.type_comparison(type oid, operator text, is_negated boolean, value text)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    v_operator text;
    v_text text;
begin
    if operator = 'is' or realtime_internal.is_inert(type_comparison.type) then
        return realtime_internal.comparison(operator, is_negated, value);
    end if;
    v_operator := realtime_internal.filter_operator(
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
comment on function realtime_internal.type_comparison(oid, text, boolean, text) is
    'The same for values of a type that is no domain, with the operators that belong to the type.';
revoke all on function realtime_internal.type_comparison(oid, text, boolean, text) from public;
