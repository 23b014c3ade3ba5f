-- What is in the way of messages and row changes, or may be one day, and what to do about it. Called by people in psql and by the command
-- "realtime-server doctor", which adds what only a client of the database sees. Each function looks at one theme; none changes anything.
--
-- level: ok; note, which is worth knowing and may be meant so; problem, of which somebody gets less than expected.

create or replace function realtime.doctor_servers()
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
    from realtime.nodes
    where last_seen_at > now() - interval '30 seconds'
$$;
comment on function realtime.doctor_servers() is 'For realtime.doctor: how many servers there are.';
revoke all on function realtime.doctor_servers() from public;

create or replace function realtime.doctor_roles(roles text[])
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
comment on function realtime.doctor_roles(text[]) is
    'For realtime.doctor: whether the roles that tokens name are there, may be taken on and are bound by row-level security.';
revoke all on function realtime.doctor_roles(text[]) from public;

-- Functions in pg_temp evaluate what is of users. They are made by the server's role and belong to the client's.
create or replace function realtime.doctor_temporary(roles text[])
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
comment on function realtime.doctor_temporary(text[]) is
    'For realtime.doctor: whether policies of tables can be evaluated in pg_temp.';
revoke all on function realtime.doctor_temporary(text[]) from public;

-- Policies that are asked for clients: those of private topics, of published tables, and of the tables that such policies read.
create or replace function realtime.doctor_policies(roles text[])
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
        -- The role of the public key is often meant to stay outside.
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
            realtime.table_name(n.polrelid),
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
            case when n.refclassid = 'pg_proc'::regclass then n.refobjid::regprocedure::text else realtime.table_name(n.refobjid) end as title
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
comment on function realtime.doctor_policies(text[]) is
    'For realtime.doctor: whether clients may join private topics at all, and may read what the policies read that are asked for them.';
revoke all on function realtime.doctor_policies(text[]) from public;

create or replace function realtime.doctor_partitions()
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
comment on function realtime.doctor_partitions() is 'For realtime.doctor: whether messages of today and tomorrow have a partition.';
revoke all on function realtime.doctor_partitions() from public;

create or replace function realtime.doctor_maintenance()
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        'maintenance',
        case
            when exists (select from realtime.nodes where last_seen_at > now() - interval '30 seconds') then 'problem'
            else 'note'
        end,
        format(
            'the last maintenance that did all there was to do was at %s: old messages are kept, or days have no partition',
            to_char(realtime.last_maintenance() at time zone 'utc', 'YYYY-MM-DD HH24:MI "UTC"')
        ),
        'select * from realtime.maintain(); where it says "waiting", end the transaction that has read messages, which has the oldest xact_start in pg_stat_activity'
    -- A server does it every hour.
    where realtime.last_maintenance() < now() - interval '3 hours'
$$;
comment on function realtime.doctor_maintenance() is 'For realtime.doctor: whether partitions are made and old messages dropped.';
revoke all on function realtime.doctor_maintenance() from public;

-- As the server chooses. To another server a slot that is read is an obstacle; here it is a sign of health.
create or replace function realtime.doctor_obstacle(obstacle text)
returns text
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(
        nullif(
            realtime.wal_obstacle('supabase_realtime', realtime.slot_name()),
            format('replication slot %I is in use by another server', realtime.slot_name())
        ),
        doctor_obstacle.obstacle
    )
$$;
comment on function realtime.doctor_obstacle(text) is
    'For realtime.doctor: why no server can read the log of this database; the argument is what else stands in the way.';
revoke all on function realtime.doctor_obstacle(text) from public;

create or replace function realtime.doctor_changes(changes text, obstacle text)
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select
        'changes',
        case when changes = 'trigger' or obstacle is null then 'ok' when changes = 'auto' then 'note' else 'problem' end,
        case
            when changes = 'trigger' then 'row changes come from capture triggers, as the settings ask for it'
            when obstacle is null then 'row changes come from the log'
            when changes = 'auto' then format('row changes come from capture triggers: %s', obstacle)
            else format('there are no row changes, the log cannot be read: %s', obstacle)
        end,
        case
            when changes = 'trigger' or obstacle is null then null
            when changes = 'auto' then 'nothing, if writers can afford one more row for each; else make the log readable, and the server goes over to it within some minutes'
            else 'make the log readable, or set REALTIME_CHANGES to auto'
        end
    union all
    select
        'wal_level',
        case when is_enough then 'ok' when changes = 'auto' then 'note' else 'problem' end,
        case
            when is_enough then format('wal_level is %s', wal_level)
            else format('wal_level is %s: the log does not say which rows have changed', wal_level)
        end,
        case when not is_enough then 'an administrator runs "alter system set wal_level = logical" and restarts PostgreSQL' end
    from (
        select
            current_setting('wal_level') as wal_level,
            -- Since 19 the first logical slot raises the level.
            current_setting('wal_level') = 'logical'
                or current_setting('wal_level') = 'replica' and current_setting('server_version_num')::integer >= 190000 as is_enough
    ) as log
    where changes <> 'trigger'
    union all
    select
        'replication',
        case when may_replicate then 'ok' when changes = 'auto' then 'note' else 'problem' end,
        format(case when may_replicate then 'role %I may replicate' else 'role %I may not replicate' end, current_user),
        case when not may_replicate then format('an administrator runs "alter role %I replication"', current_user) end
    from (
        select exists (
            select
            from pg_roles as r
            where pg_has_role(current_user, r.oid, 'usage')
                and (r.rolname = current_user and (r.rolreplication or r.rolsuper) or r.rolname = 'rds_replication')
        ) as may_replicate
    ) as login
    where changes <> 'trigger'
$$;
comment on function realtime.doctor_changes(text, text) is
    'For realtime.doctor: where row changes come from, and why. changes: as REALTIME_CHANGES; obstacle: why the log cannot be read.';
revoke all on function realtime.doctor_changes(text, text) from public;

create or replace function realtime.doctor_slots()
returns table ("check" text, level text, finding text, advice text)
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
    with ours as materialized (
        select * from realtime.slot_status()
    )
    select
        'slot',
        case
            when wal_status = 'lost' or wal_status = 'unreserved' and active then 'problem'
            when active then 'ok'
            else 'note'
        end,
        format(
            'replication slot %I: %s; PostgreSQL keeps %s of log for it, of which %s are to be read',
            slot,
            case when active then 'a server reads' else 'nobody reads' end,
            pg_size_pretty(coalesce(retained_bytes, 0)),
            pg_size_pretty(coalesce(unconfirmed_bytes, 0))
        ),
        case when not active or wal_status in ('lost', 'unreserved') then problem end
    from ours
    union all
    select
        'slot',
        'problem',
        format(
            'the replication slot is being created and waits for a transaction: there are no row changes until then (pid %s, role %s, application %L)',
            pid,
            role,
            application
        ),
        case
            when pid = 0 then 'commit it or roll it back: see pg_prepared_xacts'
            else format('wait for it, or select pg_terminate_backend(%s)', pid)
        end
    from realtime.slot_waits()
    union all
    select
        'max_slot_wal_keep_size',
        case when active then 'note' else 'problem' end,
        'max_slot_wal_keep_size is not set: while nobody reads the slot, the log grows until the disk is full',
        'an administrator runs "alter system set max_slot_wal_keep_size = ''10GB''" (what the disk can spare) and "select pg_reload_conf()"'
    from ours
    where current_setting('max_slot_wal_keep_size') = '-1'
    union all
    select
        'other_slots',
        'note',
        format(
            'replication slot %I, which is not ours%s, keeps %s of log',
            s.slot_name,
            case when not s.active then ' and which nobody reads' end,
            pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn))
        ),
        format('if nobody comes for it any more: select pg_drop_replication_slot(%L)', s.slot_name)
    from pg_replication_slots as s
    where s.slot_name <> realtime.slot_name()
        and not s.temporary
        and s.restart_lsn is not null
        and (not s.active or pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn) > 1073741824)
$$;
comment on function realtime.doctor_slots() is 'For realtime.doctor: who keeps how much of the log.';
revoke all on function realtime.doctor_slots() from public;

create or replace function realtime.doctor_publication()
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with publication as materialized (
        select * from pg_publication where pubname = 'supabase_realtime'
    ),
    published as materialized (
        select format('%I.%I', schemaname, tablename) as title, row_number() over (order by schemaname, tablename) as number
        from pg_publication_tables
        where pubname = 'supabase_realtime' and schemaname <> 'realtime'
    )
    select
        'publication',
        'problem',
        'there is no publication supabase_realtime: no table tells its changes',
        'create publication supabase_realtime'
    where not exists (select from publication)
    union all
    select
        'publication',
        case when count(title) > 0 then 'ok' else 'note' end,
        case count(title)
            when 0 then 'the publication supabase_realtime has no tables: none tells its changes'
            else format(
                'tables of the publication supabase_realtime: %s%s',
                string_agg(title, ', ' order by number) filter (where number <= 10),
                case when count(title) > 10 then format(', ... (%s in all)', count(title)) end
            )
        end,
        case when count(title) = 0 then 'alter publication supabase_realtime add table ...' end
    from publication
    left join published on true
    having count(publication.oid) > 0
    union all
    select
        'publication',
        'note',
        'the publication has the server''s own tables in it: clients are told nothing of them, but their changes pass through the log in vain',
        'publish the tables of the application only'
    where exists (select from pg_publication_tables where pubname = 'supabase_realtime' and schemaname = 'realtime')
    union all
    select
        'publication',
        'note',
        format(
            'the publication tells nothing of %s',
            concat_ws(
                ', ',
                case when not pubinsert then 'INSERT' end,
                case when not pubupdate then 'UPDATE' end,
                case when not pubdelete then 'DELETE' end
            )
        ),
        'alter publication supabase_realtime set (publish = ''insert, update, delete'')'
    from publication
    where not (pubinsert and pubupdate and pubdelete)
    union all
    select
        'partitioned',
        'note',
        format('changes of %s are told under the names of its partitions', realtime.table_name(c.oid)),
        'to have them under its own name: alter publication supabase_realtime set (publish_via_partition_root = true)'
    from publication
    join pg_publication_rel as member on member.prpubid = publication.oid
    join pg_class as c on c.oid = member.prrelid and c.relkind = 'p'
    where not publication.pubviaroot
$$;
comment on function realtime.doctor_publication() is 'For realtime.doctor: which tables tell their changes.';
revoke all on function realtime.doctor_publication() from public;

-- PostgreSQL refuses UPDATE and DELETE of a published table where it could not write to the log what was there before, whatever wal_level is.
create or replace function realtime.doctor_writes()
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with tables as materialized (
        select
            t.relation,
            format('%I.%I', t.schema, t.name) as title,
            t.has_whole_old,
            c.relkind,
            c.relreplident,
            array(
                select c.item ->> 'name' from jsonb_array_elements(t.columns) as c (item) where (c.item ->> 'is_published')::boolean
            ) as columns
        from realtime.published_tables('{}') as t
        join pg_class as c on c.oid = t.relation
        where t.events && '{UPDATE,DELETE}'
    ),
    members as materialized (
        select
            t.*,
            -- Row filters and column lists came with PostgreSQL 15.
            to_jsonb(member) ->> 'prattrs' is not null as has_list,
            to_jsonb(member) ->> 'prqual' is not null as has_filter,
            array(
                select d.refobjsubid::int2
                from pg_depend as d
                where d.classid = 'pg_publication_rel'::regclass
                    and d.objid = member.oid
                    and d.refclassid = 'pg_class'::regclass
                    and d.refobjid = t.relation
                    and d.refobjsubid > 0
            ) as columns_used,
            identity.columns as identity,
            identity.names as identity_names
        from tables as t
        join pg_publication as p on p.pubname = 'supabase_realtime'
        join pg_publication_rel as member on member.prpubid = p.oid and member.prrelid = t.relation
        cross join lateral (
            select coalesce(array_agg(a.attnum), '{}') as columns, coalesce(array_agg(a.attname::text), '{}') as names
            from pg_index as i
            join pg_attribute as a on a.attrelid = i.indrelid and a.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1])
            where i.indrelid = t.relation
                and case t.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident else false end
        ) as identity
        -- Of partitions PostgreSQL goes by their own columns and identities.
        where t.relkind = 'r'
    )
    select
        'replica_identity',
        'problem',
        format('UPDATE and DELETE of %s fail for the application: it is published and has no replica identity', realtime.table_name(leaf.oid)),
        format('add a primary key, or: alter table %s replica identity full', realtime.table_name(leaf.oid))
    from tables as t
    cross join lateral (
        select t.relation where t.relkind = 'r'
        union
        select p.relid from pg_partition_tree(t.relation) as p where p.isleaf
    ) as p (relid)
    join pg_class as leaf on leaf.oid = p.relid
    where leaf.relreplident <> 'f'
        and not exists (
            select
            from pg_index as i
            where i.indrelid = leaf.oid
                and i.indisvalid
                and i.indimmediate
                and case leaf.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident else false end
        )
    union all
    select
        'replica_identity',
        'problem',
        format('UPDATE and DELETE of %s fail for the application: the column list of the publication does not cover the replica identity', title),
        case
            when has_whole_old then format('publish it without a column list, or: alter table %s replica identity default', title)
            else format('put these columns into the list, too: %s', array_to_string(identity_names, ', '))
        end
    from members
    where has_list and (has_whole_old or not identity_names <@ columns)
    union all
    select
        'replica_identity',
        'problem',
        format('UPDATE and DELETE of %s fail for the application: the row filter of the publication reads columns outside the replica identity', title),
        format('alter table %s replica identity full', title)
    from members
    -- With a list it is not known which columns the filter reads.
    where has_filter and not has_list and not has_whole_old and not columns_used <@ identity
$$;
comment on function realtime.doctor_writes() is 'For realtime.doctor: published tables that applications cannot update.';
revoke all on function realtime.doctor_writes() from public;

create or replace function realtime.doctor_tables(source text, roles text[], strict_deletes boolean)
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with tables as materialized (
        select
            t.*,
            format('%I.%I', t.schema, t.name) as title,
            array(
                select c.item ->> 'name'
                from jsonb_array_elements(t.columns) as c (item)
                where (c.item ->> 'is_key')::boolean and (c.item ->> 'is_published')::boolean
            ) as key,
            array(
                select c.item ->> 'name' from jsonb_array_elements(t.columns) as c (item) where (c.item ->> 'is_published')::boolean
            ) as names,
            has_schema_privilege(c.relnamespace, 'usage') as may_use,
            has_table_privilege(c.oid, 'select') as may_read
        from realtime.published_tables(roles) as t
        join pg_class as c on c.oid = t.relation
    ),
    access as materialized (
        select
            t.relation,
            t.title,
            t.key,
            a.role,
            (a.rights ->> 'is_bound')::boolean as is_bound,
            array(select jsonb_array_elements_text(a.rights -> 'columns')) as columns
        from tables as t
        cross join jsonb_each(t.access) as a (role, rights)
    )
    -- what clients are not told
    select
        'primary_key',
        'problem',
        format(
            '%s has no primary key%s: clients get "Error 400: Bad Request, no primary key" instead of rows',
            t.title,
            case
                when exists (select from pg_index as i where i.indrelid = t.relation and i.indisprimary)
                    then ' in the column list of the publication'
            end
        ),
        'add it'
    from tables as t
    where cardinality(t.key) = 0
    union all
    select
        'privileges',
        'problem',
        format('none of the roles may select from %s: whoever subscribes gets "Error 401: Unauthorized" instead of rows', a.title),
        format('grant usage on its schema and select on %s to authenticated, for instance', a.title)
    from access as a
    group by a.relation, a.title
    having bool_and(cardinality(a.columns) = 0)
    union all
    select
        'privileges',
        'problem',
        format(
            'role %I may select columns of %s, but not of its primary key (%s): its clients get "Error 401: Unauthorized" instead of rows',
            a.role,
            a.title,
            array_to_string(a.key, ', ')
        ),
        format('grant select (%s) on %s to %I', (select string_agg(quote_ident(k), ', ') from unnest(a.key) as k), a.title, a.role)
    from access as a
    where cardinality(a.columns) > 0 and not a.key <@ a.columns
    union all
    select
        'policies',
        'note',
        format(
            'row-level security of %s has no policy for SELECT: clients of %s are told nothing',
            a.title,
            string_agg(a.role, ', ' order by a.role)
        ),
        format('create policy ... on %s for select using (...)', a.title)
    from access as a
    where a.is_bound
        and cardinality(a.columns) > 0
        and not exists (select from pg_policy as p where p.polrelid = a.relation and p.polpermissive and p.polcmd in ('r', '*'))
    group by a.relation, a.title
    union all
    select
        'unlogged',
        'problem',
        format('%s is unlogged: the log has none of its changes', realtime.table_name(leaf.oid)),
        format('alter table %s set logged', realtime.table_name(leaf.oid))
    from tables as t
    cross join lateral (
        select t.relation
        union
        select p.relid from pg_partition_tree(t.relation) as p
    ) as p (relid)
    join pg_class as leaf on leaf.oid = p.relid and leaf.relkind = 'r'
    where source = 'wal' and leaf.relpersistence = 'u'
    union all
    select 'row_filter', 'note', format('of %s only rows are told that fulfil %s', t.title, t.row_filter), null
    from tables as t
    where t.row_filter is not null
    union all
    select 'column_list', 'note', format('of %s only these columns are told: %s', t.title, array_to_string(t.names, ', ')), null
    from tables as t
    join pg_publication as p on p.pubname = 'supabase_realtime'
    join pg_publication_rel as member on member.prpubid = p.oid and member.prrelid = t.relation
    where to_jsonb(member) ->> 'prattrs' is not null
    -- what clients are told, perhaps more than was meant
    union all
    select
        'row_security',
        'note',
        format('row-level security of %s is off and anon may select from it: whoever has the public key is told every change', a.title),
        format('if that is not meant: alter table %s enable row level security, and write policies', a.title)
    from access as a
    join tables as t on t.relation = a.relation
    where a.role = 'anon' and cardinality(a.columns) > 0 and not t.has_row_security
    union all
    select
        'deletes',
        'note',
        format(
            case
                when strict_deletes
                    then 'a DELETE in %s is told to nobody whom policies bind, because the log has no more than the key of the row'
                else 'a DELETE in %s tells the key to everybody who subscribed, because the log has no more of the row that policies could judge'
            end,
            t.title
        ),
        concat(
            format('alter table %s replica identity full lets the server judge it', t.title),
            case when exists (select from pg_partitioned_table as p where p.partrelid = t.relation) then ', done for each partition, too' end,
            case when not strict_deletes then '; REALTIME_STRICT_DELETES=true tells it to nobody whom policies bind' end
        )
    from tables as t
    where source = 'wal'
        and t.has_row_security
        and not t.has_whole_old
        and 'DELETE' = any (t.events)
        and cardinality(t.key) > 0
    -- what the server may not do
    union all
    select
        'rights',
        'problem',
        format('role %I may not use schema %I, so changes of %s cannot be told', current_user, t.schema, t.title),
        format('grant usage on schema %I to %I', t.schema, current_user)
    from tables as t
    where not t.may_use
    union all
    select
        'rights',
        'problem',
        format('role %I may not select from %s: where the log does not have a whole row, its change is not told', current_user, t.title),
        format('grant select on %s to %I', t.title, current_user)
    from tables as t
    where source = 'wal' and t.may_use and not t.may_read
$$;
comment on function realtime.doctor_tables(text, text[], boolean) is
    'For realtime.doctor: what clients are told of the tables of the publication. source: wal or trigger; roles: of clients; strict_deletes: as REALTIME_STRICT_DELETES.';
revoke all on function realtime.doctor_tables(text, text[], boolean) from public;

create or replace function realtime.doctor_capture(source text)
returns table ("check" text, level text, finding text, advice text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with present as materialized (
        select t.tgrelid as oid, t.tgenabled <> 'D' as is_enabled, realtime.table_name(t.tgrelid) as title
        from pg_trigger as t
        where t.tgfoid = 'realtime.capture_change()'::regprocedure and not t.tgisinternal and t.tgparentid = 0
    ),
    tables as materialized (
        select
            t.relation,
            format('%I.%I', t.schema, t.name) as title,
            present.is_enabled,
            pg_has_role(c.relowner, 'usage') as is_ours,
            has_schema_privilege(c.relnamespace, 'usage') and has_table_privilege(c.oid, 'trigger') as may_capture
        from realtime.published_tables('{}') as t
        join pg_class as c on c.oid = t.relation
        left join present on present.oid = t.relation
    ),
    world as materialized (
        select
            exists (select from realtime.nodes where last_seen_at > now() - interval '30 seconds') as has_server,
            realtime.has_change_reader() as has_reader
    )
    select
        'capture',
        case when not t.may_capture or world.has_server or t.is_enabled is not null then 'problem' else 'note' end,
        format(
            case when t.is_enabled is null then '%s has no capture trigger: its changes are not told' else 'the capture trigger of %s is disabled: its changes are not told' end,
            t.title
        ),
        case
            when not t.may_capture and t.is_enabled is null
                then format('role %I may not put one on it: "grant trigger on %s to %1$I", or let the log be read', current_user, t.title)
            when t.is_enabled is not null and not t.is_ours
                then format('its owner runs "alter table %s enable always trigger %I"', t.title, realtime.capture_trigger(t.relation))
            else 'a server that reads triggers puts it right within a second, where the table is in use or it was refused within ten; at once: select * from realtime.sync_capture()'
        end
    from tables as t
    cross join world
    where source = 'trigger' and t.is_enabled is not true
    union all
    select
        'capture',
        'note',
        format('%s is not owned by role %I: what arrives there by replication is not captured, and only its owner can drop the capture trigger', t.title, current_user),
        format('its owner runs "alter table %s enable always trigger %I"', t.title, realtime.capture_trigger(t.relation))
    from tables as t
    where source = 'trigger' and t.is_enabled and not t.is_ours
    union all
    select
        'outbox',
        'note',
        format(
            'capture triggers write to realtime.changes (%s), and no server runs that reads and empties it',
            pg_size_pretty(pg_total_relation_size('realtime.changes'))
        ),
        'start a server; if none is to come: select * from realtime.sync_capture(false)'
    from world
    where source = 'trigger' and not world.has_server and exists (select from present)
    union all
    select
        'capture_left',
        case when world.has_reader then 'note' else 'problem' end,
        format(
            case
                when source = 'trigger' then '%s has a capture trigger and is not in the publication'
                when world.has_reader then '%s has a capture trigger for a server, while another one reads the log'
                else '%s has a capture trigger, and nobody reads what it writes at each change'
            end,
            present.title
        ),
        case
            when source = 'trigger' then 'select * from realtime.sync_capture()'
            when world.has_reader then 'let all servers read from one source: see REALTIME_CHANGES'
            else 'select * from realtime.release_capture()'
        end
    from present
    cross join world
    where source is distinct from 'trigger' or present.oid not in (select t.relation from tables as t)
$$;
comment on function realtime.doctor_capture(text) is
    'For realtime.doctor: capture triggers that are missing, and those that nobody needs. source: wal or trigger.';
revoke all on function realtime.doctor_capture(text) from public;

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
        -- An administrator who asks means the server.
        select case when me.rolsuper then owner.rolname else me.rolname end into v_login
        from pg_roles as me
        cross join pg_namespace as n
        join pg_roles as owner on owner.oid = n.nspowner
        where me.rolname = current_user and n.nspname = 'realtime';
    end if;
    if v_login <> current_user then
        perform set_config('role', v_login, true);
    end if;
    return query select * from realtime.doctor_servers();
    return query select * from realtime.doctor_roles(doctor.roles);
    return query select * from realtime.doctor_temporary(doctor.roles);
    return query select * from realtime.doctor_policies(doctor.roles);
    return query select * from realtime.doctor_partitions();
    return query select * from realtime.doctor_maintenance();
    if doctor.changes <> 'trigger' then
        v_obstacle := realtime.doctor_obstacle(doctor.obstacle);
    end if;
    v_source := case
        when doctor.changes <> 'trigger' and v_obstacle is null then 'wal'
        when doctor.changes <> 'wal' then 'trigger'
    end;
    return query select * from realtime.doctor_changes(doctor.changes, v_obstacle);
    return query select * from realtime.doctor_slots();
    return query select * from realtime.doctor_publication();
    return query select * from realtime.doctor_writes();
    return query select * from realtime.doctor_tables(v_source, doctor.roles, doctor.strict_deletes);
    return query select * from realtime.doctor_capture(v_source);
    perform set_config('role', v_role, true);
end
$$;
comment on function realtime.doctor(name, text, text, text[], boolean) is
    'What is in the way of messages and row changes, or may be one day: level (ok, note, problem), what was found and what to do. login: role of the server, by default who asks, for a superuser the owner of schema realtime; changes, roles, strict_deletes: as REALTIME_CHANGES and so on; obstacle: what else keeps the server from reading the log. Changes nothing.';
revoke all on function realtime.doctor(name, text, text, text[], boolean) from public;
