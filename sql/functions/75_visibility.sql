-- Visibility: the policies for SELECT, evaluated on the image of a row.

-- The condition that PostgreSQL itself adds to a SELECT of this role: all restrictive policies must pass, and one permissive policy. In
-- that order, so that a policy that would raise for a row is evaluated only where PostgreSQL would evaluate it.
create or replace function realtime_internal.policy_condition(relation oid, role text, out condition text, out trees text[])
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
comment on function realtime_internal.policy_condition(oid, text) is
    'The policies for SELECT of a table that apply to a role: as one condition in which all names outside of pg_catalog are qualified, and the node trees that its parts are the texts of.';
revoke all on function realtime_internal.policy_condition(oid, text) from public;

-- A policy refers to tables and functions by oid; its text has to find them again. All names but those of pg_catalog are qualified. The
-- server's role parses it, because the client's may not use a schema that the policy reads, as is advised for definer functions. Text and
-- tree come from one statement, or a policy that is altered at this moment could have its text compared with the tree of another version.
create or replace function realtime_internal.make_visible(name text, relation oid, role text)
returns void
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
    perform realtime_internal.make_guarded(
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
            realtime_internal.table_name(c.oid),
            c.relname
        ),
        policies.trees
    )
    from pg_class as c
    cross join realtime_internal.policy_condition(make_visible.relation, make_visible.role) as policies
    where c.oid = make_visible.relation;
end
$$;
comment on function realtime_internal.make_visible(text, oid, text) is
    'Creates a function in pg_temp that returns which of the rows $1, as texts, whose numbers are $2, a role may see by the policies for SELECT. To be rolled back.';
revoke all on function realtime_internal.make_visible(text, oid, text) from public;

-- Policies are evaluated on the image, not on the current row, which does not say who may see the row as it was. So the policies' condition
-- is evaluated on the image itself, under the name of the table, by the role and with the claims of each client in turn. Each set of claims
-- is independent: a policy that raises for one hides nothing from the others. All effects of policies are rolled back.
create or replace function realtime_internal.visible_changes(relation oid, images jsonb, roles text[], claims jsonb[], wanted jsonb)
returns table (question integer, visible integer[], problem text, unknown integer[])
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    c_mark constant text := (select mark from realtime_internal.table_marks(array[visible_changes.relation]));
    c_rows constant jsonb := realtime_internal.row_texts(visible_changes.relation, visible_changes.images);
    v_columns text[] := realtime_internal.policy_columns(visible_changes.relation);
    v_unknown integer[];
    v_asked record;
    v_column text;
    v_role text;
    v_name text;
    v_number integer := 0;
    v_role_problem text;
    v_is_done boolean;
begin
    foreach v_column in array realtime_internal.checked_columns(visible_changes.relation) loop
        if v_column <> all (v_columns)
            and exists (select from jsonb_array_elements(visible_changes.images) as i (image) where not i.image ? v_column)
        then
            begin
                perform realtime_internal.ask_guarded(
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
    perform realtime_internal.prepare_guarded();
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
            -- Only the rows that are needed, because EXECUTE copies its arguments.
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
                    perform realtime_internal.make_visible(v_name, visible_changes.relation, v_role);
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
                    perform realtime_internal.take_identity(v_role, v_asked.claims);
                    execute format('select pg_temp.%I($1, $2)', v_name) into visible using v_asked.rows, v_asked.numbers;
                    v_is_done := true;
                    raise exception using errcode = 'RT000';
                exception when others then
                    if not v_is_done then
                        -- Tell a failing policy from rows that do not fit a table that was altered meanwhile.
                        if c_mark is distinct from (select mark from realtime_internal.table_marks(array[visible_changes.relation])) then
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
comment on function realtime_internal.visible_changes(oid, jsonb, text[], jsonb[], jsonb) is
    'Returns, for each client, which of its wanted images it may see by the policies for SELECT. wanted: for each client a list of images, counted from 0. problem: a policy could not be evaluated, and nothing is visible. unknown: images that lack a column that policies read.';
revoke all on function realtime_internal.visible_changes(oid, jsonb, text[], jsonb[], jsonb) from public;
