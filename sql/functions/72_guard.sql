-- Runs users' code as a role that it cannot leave, and rolls back all it does.

-- The caller's claims, as policies read them, until the end of the transaction or of the enclosing exception block.
create or replace function realtime_internal.take_identity(role text, claims jsonb)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    -- To set_config this means "the session's own role", which row-level security does not bind.
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
comment on function realtime_internal.take_identity(text, jsonb) is 'Sets the role and the claims of a client, to the end of the transaction.';
revoke all on function realtime_internal.take_identity(text, jsonb) from public;

-- Policies, domains and generated columns call functions of users, which could reset a role that was only set. So they run inside a
-- SECURITY DEFINER function that the client's role owns, where PostgreSQL refuses to set a role. Its body is parsed when it is created, by
-- the server's role and on a path where nobody can plant an operator; functions without a path of their own then run on the usual one.
-- Their changes are rolled back together with the function, so nothing ever depends on it.
create or replace function realtime_internal.is_read_by_users(type oid)
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
comment on function realtime_internal.is_read_by_users(oid) is
    'Whether parsing a literal of a type may call functions of users: domains have them, and composite types may get a domain at any moment.';
revoke all on function realtime_internal.is_read_by_users(oid) from public;

-- The temporary schema of a session is created with the first object in it, and vanishes where that is rolled back. Each creation or
-- removal of a schema makes PostgreSQL plan all statements of the session again. So it is created once, and committed. And a transaction
-- that leaves nothing behind need not wait for the disk.
create or replace function realtime_internal.prepare_guarded()
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
comment on function realtime_internal.prepare_guarded() is 'To be called before realtime_internal.make_guarded, outside of what is rolled back.';
revoke all on function realtime_internal.prepare_guarded() from public;

create or replace function realtime_internal.make_guarded(
    name text, role text, arguments text, result text, query text, expressions text[] default '{}'
)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    -- Operators of USING, IN, CASE, NULLIF, DISTINCT and ORDER BY are not in the text of an expression.
    c_operators constant text := ':(?:opnos?|eqop|sortop) (\(o [0-9 ]+\)|[0-9]+)';
    v_operators text;
    v_expression text;
begin
    -- A literal is read when it is parsed, by the server's role.
    if exists (
        select
        from unnest(make_guarded.expressions) as tree
        cross join regexp_matches(tree, ':consttype ([0-9]+)', 'g') as found (type)
        where realtime_internal.is_read_by_users(found.type[1]::oid)
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
    -- Operators of pg_catalog are found again. Those of users may not be found, and have other oids.
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
comment on function realtime_internal.make_guarded(text, text, text, text, text, text[]) is
    'Creates a function in pg_temp that runs a query as a role which the code it calls cannot leave. To be rolled back. expressions: node trees whose text is part of the query; raises if parsing the text gives other trees.';
revoke all on function realtime_internal.make_guarded(text, text, text, text, text, text[]) from public;

create or replace function realtime_internal.ask_guarded(role text, query text, argument jsonb, expressions text[] default '{}')
returns jsonb
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    v_answer jsonb;
    v_is_done boolean := false;
begin
    perform realtime_internal.prepare_guarded();
    begin
        perform realtime_internal.make_guarded('realtime_question', ask_guarded.role, 'jsonb', 'jsonb', ask_guarded.query, expressions);
        perform realtime_internal.take_identity(ask_guarded.role, '{}');
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
comment on function realtime_internal.ask_guarded(text, text, jsonb, text[]) is
    'The answer of a query on $1, run as a role that the code it calls cannot leave; all its other effects are rolled back.';
revoke all on function realtime_internal.ask_guarded(text, text, jsonb, text[]) from public;
