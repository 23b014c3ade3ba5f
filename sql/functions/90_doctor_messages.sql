-- Finds misconfigurations and risks of messages and row changes, each with its fix. Called in psql and by the command "realtime-server
-- doctor", which adds what only a client of the database sees. Each function checks one subject; none changes anything.
--
-- level: ok; note: worth knowing, and may be intended; problem: something does not work as expected.

create or replace function realtime_internal.doctor_servers()
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        'servers',
        case when count(*) > 0 then 'ok' else 'note' end,
        case
            when count(*) = 0 then 'no server runs on this database'
            else format('servers on this database in the last half minute: %s', count(*))
        end,
        case when count(*) = 0 then 'realtime-server run' end
    from realtime_internal.nodes
    where last_seen_at > now() - interval '30 seconds'
$$;
comment on function realtime_internal.doctor_servers() is 'For realtime.doctor: the number of servers.';
revoke all on function realtime_internal.doctor_servers() from public;

create or replace function realtime_internal.doctor_roles(roles text[])
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with asked as materialized (
        select
            w.name,
            w.number,
            r.oid is not null as is_there,
            case
                when r.oid is null then false
                when current_setting('server_version_num')::integer >= 160000 then pg_has_role(r.oid, 'set')
                else pg_has_role(r.oid, 'member')
            end as is_ours,
            r.rolsuper or r.rolbypassrls as is_free
        from unnest(roles) with ordinality as w (name, number)
        left join pg_roles as r on r.rolname = w.name
    )
    select 'roles', 'ok', format('the server may act as %s', string_agg(name, ', ' order by number)), null
    from asked
    where is_ours
    having count(*) > 0
    union all
    select
        'roles',
        'problem',
        case when is_there then format('role %I may not take on role %I', current_user, name) else format('there is no role %I', name) end,
        format(
            'an administrator runs "%sgrant %I to %I%s"',
            case when not is_there then format('create role %I nologin noinherit; ', name) end,
            name,
            current_user,
            case when current_setting('server_version_num')::integer >= 160000 then ' with inherit false, set true' end
        )
    from asked
    where not is_ours
    union all
    select
        'bypassrls',
        'problem',
        format('row-level security does not bind role %I: its clients see every row and join every channel', name),
        format('an administrator runs "alter role %I nosuperuser nobypassrls"', name)
    from asked
    where name in ('anon', 'authenticated') and is_free
    union all
    select
        'bypassrls',
        case when is_free then 'ok' else 'note' end,
        case
            when is_free then 'row-level security does not bind service_role'
            else 'row-level security binds service_role: who comes with the service key is told a row change only where a policy of the table says so'
        end,
        case when not is_free then 'an administrator runs "alter role service_role bypassrls", or write policies for service_role' end
    from asked
    where name = 'service_role' and is_there
$$;
comment on function realtime_internal.doctor_roles(text[]) is
    'For realtime.doctor: whether the roles that tokens name exist, may be set and are bound by row-level security.';
revoke all on function realtime_internal.doctor_roles(text[]) from public;

-- Functions in pg_temp evaluate users' code. The server's role creates them, and the client's role owns them.
create or replace function realtime_internal.doctor_temporary(roles text[])
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        'temporary',
        'problem',
        format(
            'role %I has no right TEMPORARY on database %I: %s',
            r.rolname,
            current_database(),
            case
                when r.rolname = current_user then 'the server cannot evaluate policies of tables, so row changes are withheld from all whom policies bind'
                else 'the server cannot evaluate policies of tables for it, so row changes are withheld from its clients'
            end
        ),
        format('grant temporary on database %I to %I', current_database(), r.rolname)
    from pg_roles as r
    where (r.rolname = current_user or r.rolname = any (doctor_temporary.roles))
        and not has_database_privilege(r.oid, current_database(), 'temporary')
$$;
comment on function realtime_internal.doctor_temporary(text[]) is
    'For realtime.doctor: whether policies of tables can be evaluated in pg_temp.';
revoke all on function realtime_internal.doctor_temporary(text[]) from public;

-- Policies that are evaluated for clients: those of private topics, of published tables, and of the tables that such policies read.
create or replace function realtime_internal.doctor_policies(roles text[])
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with recursive clients as materialized (
        select r.oid as role, r.rolname
        from pg_roles as r
        where r.rolname = any (roles) and not (r.rolsuper or r.rolbypassrls)
    ),
    policies as materialized (
        select p.oid as policy, p.polname, p.polrelid, p.polcmd, p.polpermissive, c.role, c.rolname
        from pg_policy as p
        join pg_class as guarded on guarded.oid = p.polrelid and guarded.relrowsecurity
        join clients as c
            on exists (select from unnest(p.polroles) as r (oid) where r.oid = 0 or pg_has_role(c.role, r.oid, 'usage'))
        where p.polcmd in ('r', '*') or p.polcmd = 'a' and p.polrelid = 'realtime.messages'::regclass
    ),
    needed as materialized (
        select p.policy, p.polname, p.polrelid, p.role, p.rolname, d.refclassid, d.refobjid, array_agg(d.refobjsubid) as columns
        from policies as p
        join pg_depend as d on d.classid = 'pg_policy'::regclass and d.objid = p.policy
        where d.refclassid in ('pg_class'::regclass, 'pg_proc'::regclass) and d.refobjid <> p.polrelid
        group by p.policy, p.polname, p.polrelid, p.role, p.rolname, d.refclassid, d.refobjid
    ),
    evaluated (role, relation) as (
        select c.role, asked.relation
        from clients as c
        cross join (
            select 'realtime.messages'::regclass::oid
            union
            select member.prrelid
            from pg_publication as publication
            join pg_publication_rel as member on member.prpubid = publication.oid
            where publication.pubname = 'supabase_realtime'
        ) as asked (relation)
        union
        select n.role, n.refobjid
        from evaluated as e
        join needed as n on n.role = e.role and n.polrelid = e.relation and n.refclassid = 'pg_class'::regclass
    )
    select
        'policies',
        -- The role of the public key often has no access on purpose.
        case when c.rolname = 'anon' and others.may_receive then 'ok' else 'note' end,
        format('no policy on realtime.messages lets role %I receive: its joins of private topics are all refused', c.rolname),
        case
            when not (c.rolname = 'anon' and others.may_receive)
                then format('for private topics: create policy ... on realtime.messages for select to %I using (...)', c.rolname)
        end
    from clients as c
    cross join lateral (
        select coalesce(bool_or(p.role <> c.role and p.rolname <> 'service_role'), false) as may_receive, coalesce(bool_or(p.role = c.role), false) as is_one
        from policies as p
        where p.polrelid = 'realtime.messages'::regclass and p.polpermissive and p.polcmd in ('r', '*')
    ) as others
    where not others.is_one
    union all
    select
        'policy_rights',
        'problem',
        format(
            'policy %I of %s needs %s, and role %I may not %s: permission denied, so what the policy guards is refused',
            n.polname,
            realtime_internal.table_name(n.polrelid),
            needs.title,
            n.rolname,
            case when needs.is_function then 'execute it' else 'select from it' end
        ),
        format(
            case when needs.is_function then 'grant execute on function %s to %I' else 'grant select on %s to %I' end,
            needs.title,
            n.rolname
        )
    from evaluated as e
    join needed as n on n.role = e.role and n.polrelid = e.relation
    cross join lateral (
        select
            n.refclassid = 'pg_proc'::regclass as is_function,
            case when n.refclassid = 'pg_proc'::regclass then n.refobjid::regprocedure::text else realtime_internal.table_name(n.refobjid) end as title
    ) as needs
    where case
        when needs.is_function then not has_function_privilege(n.role, n.refobjid, 'execute')
        else not has_table_privilege(n.role, n.refobjid, 'select')
            and (
                not has_any_column_privilege(n.role, n.refobjid, 'select')
                or exists (
                    select from unnest(n.columns) as c (number)
                    where c.number > 0 and not has_column_privilege(n.role, n.refobjid, c.number::smallint, 'select')
                )
            )
    end
$$;
comment on function realtime_internal.doctor_policies(text[]) is
    'For realtime.doctor: whether clients may join private topics at all, and may read what the policies that are evaluated for them read.';
revoke all on function realtime_internal.doctor_policies(text[]) from public;

create or replace function realtime_internal.doctor_partitions()
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with present as materialized (
        select to_date(right(child.relname, 10), 'YYYY_MM_DD') as day
        from pg_inherits
        join pg_class as child on child.oid = inhrelid
        where inhparent = 'realtime.messages'::regclass and child.relname ~ '^messages_[0-9]{4}_[0-9]{2}_[0-9]{2}$'
    ),
    lacking as materialized (
        select
            wanted.day,
            exists (
                select from realtime.messages_default as m where m.inserted_at >= wanted.day and m.inserted_at < wanted.day + 1
            ) as is_begun
        from (values ((now() at time zone 'utc')::date), ((now() at time zone 'utc')::date + 1)) as wanted (day)
        where wanted.day not in (select present.day from present)
    )
    select 'partitions', 'ok', format('realtime.messages has partitions until %s', max(present.day)), null
    from present
    where not exists (select from lacking)
    union all
    select
        'partitions',
        case when is_begun then 'note' else 'problem' end,
        case
            when is_begun then format('messages of %s are in realtime.messages_default, because they came before their partition', day)
            else format('realtime.messages has no partition for %s', day)
        end,
        case
            when is_begun then 'nothing is lost, and the next day has a partition again; see that a server runs, or call realtime.maintain() every day'
            else 'select * from realtime.maintain(), which a running server does every hour'
        end
    from lacking
$$;
comment on function realtime_internal.doctor_partitions() is 'For realtime.doctor: whether messages of today and tomorrow have a partition.';
revoke all on function realtime_internal.doctor_partitions() from public;

create or replace function realtime_internal.doctor_maintenance()
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        'maintenance',
        case
            when exists (select from realtime_internal.nodes where last_seen_at > now() - interval '30 seconds') then 'problem'
            else 'note'
        end,
        format(
            'the last maintenance that did all there was to do was at %s: old messages are kept, or days have no partition',
            to_char(realtime_internal.last_maintenance() at time zone 'utc', 'YYYY-MM-DD HH24:MI "UTC"')
        ),
        'select * from realtime.maintain(); where it says "waiting", end the transaction that has read messages, which has the oldest xact_start in pg_stat_activity'
    -- A server does it every hour.
    where realtime_internal.last_maintenance() < now() - interval '3 hours'
$$;
comment on function realtime_internal.doctor_maintenance() is 'For realtime.doctor: whether partitions are created and old messages dropped.';
revoke all on function realtime_internal.doctor_maintenance() from public;
