-- Who may join a private topic and send to it: PostgreSQL evaluates the policies under the client's role and claims.
-- Only the server calls this. SECURITY INVOKER, because a definer may not change its role.

-- A write is allowed when the row passes the INSERT policies. PostgreSQL checks these before NOT NULL, so an insert that breaks NOT NULL on
-- purpose tells "allowed" (23502) from "denied" (42501) and leaves nothing behind: no row, no dead tuple, no transaction id.
-- RETURNING adds the SELECT policies to the same check. Only where writing is denied, a check for reading needs a real row; it goes to an
-- unlogged partition and is rolled back.
-- Functions of policies find names on the search path that is usual for applications, as they were written for it; our own code does not.
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
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    c_path_of_policies constant text := 'public, extensions, pg_temp';
    c_probe_time constant timestamp := '1970-01-01';
    c_never_null constant text[] := '{updated_at,xid,seq}';
    v_id uuid := gen_random_uuid();
    v_passed boolean;
    v_is_done boolean;
    v_schema text;
    v_column text;
    v_constraint text;
    -- Row-level security and a missing GRANT both raise 42501: only the text differs, and is reliable only where it is not translated.
    v_is_english constant boolean := current_setting('lc_messages') ~* '^(c|posix|en)([._]|$)';
    c_denied_by_policy constant text := 'new row violates row-level security policy%';
begin
    foreach extension in array extensions loop
        can_read := null;
        can_write := false;
        problem := null;
        v_is_done := false;
        begin
            -- To set_config these mean "the session's own role", which row-level security does not bind.
            if coalesce(authorize.role, 'none') = 'none' then
                raise exception using errcode = 'invalid_parameter_value', message = 'a role must be named';
            end if;
            perform
                pg_catalog.set_config('realtime.topic', authorize.topic, true),
                pg_catalog.set_config('request.jwt.claims', claims::text, true),
                pg_catalog.set_config('request.jwt.claim.sub', coalesce(claims ->> 'sub', ''), true),
                pg_catalog.set_config('request.jwt.claim.role', authorize.role, true),
                pg_catalog.set_config('request.headers', headers::text, true),
                pg_catalog.set_config('search_path', c_path_of_policies, true),
                pg_catalog.set_config('role', authorize.role, true);
            -- From here to the end of the block, names and operators are qualified.

            -- RT000 rolls back a row that was written nevertheless: a BEFORE trigger may have filled the null. The variable tells our own
            -- RT000 from one that a policy raises; the column or constraint tells the error of our own row from one inside a policy.
            v_passed := false;
            begin
                insert into realtime.messages (topic, extension, updated_at)
                values (authorize.topic, authorize.extension, null);
                v_passed := true;
                raise exception using errcode = 'RT000';
            exception
                when not_null_violation or invalid_parameter_value then
                    get stacked diagnostics v_schema = schema_name, v_column = column_name, v_constraint = constraint_name;
                    if v_schema operator(pg_catalog.<>) 'realtime'
                        or v_column operator(pg_catalog.<>) all (c_never_null) and v_constraint operator(pg_catalog.<>) 'messages_sound'
                    then
                        raise;
                    end if;
                    can_write := true;
                when insufficient_privilege then
                    if v_is_english and sqlerrm operator(pg_catalog.!~~) c_denied_by_policy then
                        problem := pg_catalog.concat(sqlstate, ': ', sqlerrm);
                    end if;
                when sqlstate 'RT000' then
                    if not v_passed then
                        raise;
                    end if;
                    can_write := true;
            end;

            if can_write then
                v_passed := false;
                begin
                    insert into realtime.messages (topic, extension, updated_at)
                    values (authorize.topic, authorize.extension, null)
                    returning id is not null into can_read;
                    v_passed := true;
                    raise exception using errcode = 'RT000';
                exception
                    when not_null_violation or invalid_parameter_value then
                        get stacked diagnostics v_schema = schema_name, v_column = column_name, v_constraint = constraint_name;
                        if v_schema operator(pg_catalog.<>) 'realtime'
                            or v_column operator(pg_catalog.<>) all (c_never_null) and v_constraint operator(pg_catalog.<>) 'messages_sound'
                        then
                            raise;
                        end if;
                        can_read := true;
                    when insufficient_privilege then
                        if v_is_english and sqlerrm operator(pg_catalog.!~~) c_denied_by_policy then
                            problem := pg_catalog.concat(sqlstate, ': ', sqlerrm);
                        end if;
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
                    insert into realtime.messages (id, topic, extension, inserted_at, xid, seq)
                    values (v_id, authorize.topic, authorize.extension, c_probe_time, '0', 0);
                    perform pg_catalog.set_config('role', authorize.role, true);
                    can_read := exists (
                        select
                        from realtime.messages as m
                        where m.id operator(pg_catalog.=) v_id and m.inserted_at operator(pg_catalog.=) c_probe_time
                    );
                    v_passed := true;
                    raise exception using errcode = 'RT000';
                exception
                    when insufficient_privilege then
                        -- Row-level security hides rows and raises nothing.
                        problem := pg_catalog.concat(sqlstate, ': ', sqlerrm);
                        can_read := false;
                    when sqlstate 'RT000' then
                        if not v_passed then
                            raise;
                        end if;
                end;
            end if;

            -- Restores role and settings.
            v_is_done := true;
            raise exception using errcode = 'RT000';
        exception when others then
            -- A standby, or maintenance: no policy was evaluated, so there is no answer.
            if sqlstate = '25006' and pg_catalog.current_setting('transaction_read_only')::boolean then
                raise;
            end if;
            -- A policy that raises, or a role that does not exist, denies this check alone.
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
    'What a client with these claims may do on a private topic. Leaves nothing behind. problem: SQLSTATE and text when a policy could not be evaluated, or may not read what it needs; then the right is denied. '
    'Example: select * from realtime.authorize(''room:1'', ''authenticated'', ''{"sub": "5f1e8b1c-0d3f-4c0a-9a51-0c2f6f3f7a10", "role": "authenticated"}'');';
revoke all on function realtime.authorize(text, text, jsonb, jsonb, text[]) from public;

create or replace function realtime_internal.authorize_batch(topics text[], roles text[], claims jsonb[], headers jsonb[])
returns table (question bigint, extension text, can_read boolean, can_write boolean, problem text)
language sql
volatile
begin atomic
    select asked.question, answer.extension, answer.can_read, answer.can_write, answer.problem
    from unnest(topics, roles, claims, headers) with ordinality as asked (topic, role, claims, headers, question)
    cross join lateral realtime.authorize(asked.topic, asked.role, asked.claims, asked.headers) as answer;
end;
comment on function realtime_internal.authorize_batch(text[], text[], jsonb[], jsonb[]) is
    'Runs realtime.authorize for many clients in one round trip; question counts from 1 in the order of the arrays.';
revoke all on function realtime_internal.authorize_batch(text[], text[], jsonb[], jsonb[]) from public;
