-- Schemas and roles. Runs once, as the role that will own all objects: an ordinary role that owns the database.

create schema if not exists realtime;
comment on schema realtime is 'Realtime messages: what applications and people call.';
create schema if not exists realtime_internal;
comment on schema realtime_internal is 'Tables and functions of the servers; clients'' roles have no right to use it.';

create table realtime_internal.applied_functions (
    branch text primary key,
    digest text not null,
    applied_at timestamptz not null default now()
);
comment on table realtime_internal.applied_functions is
    'Version of the functions, triggers, policies and views in this database: a migration applies the files of a branch again when they have changed.';
comment on column realtime_internal.applied_functions.branch is 'core, or a sample.';
comment on column realtime_internal.applied_functions.digest is 'SHA-256 of the files, in hexadecimal.';
comment on column realtime_internal.applied_functions.applied_at is 'When they were applied.';

-- Tokens act as one of these roles; the owner must be allowed to set each of them.
do $$
declare
    v_role text;
begin
    foreach v_role in array array['anon', 'authenticated', 'service_role'] loop
        if not exists (select from pg_catalog.pg_roles where rolname = v_role) then
            begin
                execute format(
                    'create role %I nologin noinherit%s',
                    v_role,
                    case when v_role = 'service_role' then ' bypassrls' end
                );
            exception when insufficient_privilege then
                -- Only a superuser, or a role that has BYPASSRLS, may grant it; for our own tables the policies below replace it.
                execute format('create role %I nologin noinherit', v_role);
            end;
        end if;
        if current_setting('server_version_num')::int < 160000 then
            if not pg_has_role(current_user, v_role, 'member') then
                execute format('grant %I to current_user', v_role);
            end if;
        elsif not pg_has_role(current_user, v_role, 'set') then
            execute format('grant %I to current_user with inherit false, set true', v_role);
        end if;
    end loop;
exception when insufficient_privilege then
    raise exception using
        errcode = 'insufficient_privilege',
        message = format('role %I may not create or use the roles anon, authenticated and service_role', current_user),
        hint = 'An administrator runs the statements that "realtime-server migrate" prints; then migrate again.';
end
$$;

grant usage on schema realtime to anon, authenticated, service_role;
