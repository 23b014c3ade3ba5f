-- All checks.

create or replace function realtime.doctor(
    login name default null,
    changes text default 'auto',
    obstacle text default null,
    roles text[] default '{anon,authenticated,service_role}',
    strict_deletes boolean default false
)
returns table ("check" text, level text, finding text, advice text)
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_role text := current_setting('role');
    v_login name := doctor.login;
    v_obstacle text;
    v_source text;
begin
    if pg_is_in_recovery() then
        return query values (
            'primary',
            'problem',
            'this is a standby: servers need the primary',
            'connect to the primary, or promote this one'
        );
        return;
    end if;
    if v_login is null then
        -- A superuser who calls it means the server's role.
        select case when me.rolsuper then owner.rolname else me.rolname end into v_login
        from pg_roles as me
        cross join pg_namespace as n
        join pg_roles as owner on owner.oid = n.nspowner
        where me.rolname = current_user and n.nspname = 'realtime';
    end if;
    if v_login <> current_user then
        perform set_config('role', v_login, true);
    end if;
    return query select * from realtime_internal.doctor_servers();
    return query select * from realtime_internal.doctor_roles(doctor.roles);
    return query select * from realtime_internal.doctor_temporary(doctor.roles);
    return query select * from realtime_internal.doctor_policies(doctor.roles);
    return query select * from realtime_internal.doctor_partitions();
    return query select * from realtime_internal.doctor_maintenance();
    if doctor.changes <> 'trigger' then
        v_obstacle := realtime_internal.doctor_obstacle(doctor.obstacle);
    end if;
    v_source := case
        when doctor.changes <> 'trigger' and v_obstacle is null then 'wal'
        when doctor.changes <> 'wal' then 'trigger'
    end;
    return query select * from realtime_internal.doctor_changes(doctor.changes, v_obstacle);
    return query select * from realtime_internal.doctor_slots();
    return query select * from realtime_internal.doctor_publication();
    return query select * from realtime_internal.doctor_writes();
    return query select * from realtime_internal.doctor_tables(v_source, doctor.roles, doctor.strict_deletes);
    return query select * from realtime_internal.doctor_capture(v_source);
    perform set_config('role', v_role, true);
end
$$;
comment on function realtime.doctor(name, text, text, text[], boolean) is
    'Misconfigurations and risks of messages and row changes, each with its fix: level (ok, note, problem), finding and advice. login: role of the server, by default the caller, for a superuser the owner of schema realtime; changes, roles, strict_deletes: as REALTIME_CHANGES and so on; obstacle: what else keeps the server from reading the log. Changes nothing. '
    'Example: select * from realtime.doctor() where level <> ''ok'';';
revoke all on function realtime.doctor(name, text, text, text[], boolean) from public;
