-- Checks of published tables.

-- PostgreSQL refuses UPDATE and DELETE of a published table that has no replica identity to write to the log, whatever wal_level is.
create or replace function realtime_internal.doctor_writes()
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
        from realtime_internal.published_tables('{}') as t
        join pg_class as c on c.oid = t.relation
        where t.events && '{UPDATE,DELETE}'
    ),
    members as materialized (
        select
            t.*,
            -- Row filters and column lists exist since PostgreSQL 15.
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
        -- For partitions PostgreSQL checks their own columns and identities.
        where t.relkind = 'r'
    )
    select
        'replica_identity',
        'problem',
        format('UPDATE and DELETE of %s fail for the application: it is published and has no replica identity', realtime_internal.table_name(leaf.oid)),
        format('add a primary key, or: alter table %s replica identity full', realtime_internal.table_name(leaf.oid))
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
    -- With a column list it is unknown which columns the filter reads.
    where has_filter and not has_list and not has_whole_old and not columns_used <@ identity
$$;
comment on function realtime_internal.doctor_writes() is 'For realtime.doctor: published tables that applications cannot update.';
revoke all on function realtime_internal.doctor_writes() from public;

create or replace function realtime_internal.doctor_tables(source text, roles text[], strict_deletes boolean)
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
        from realtime_internal.published_tables(roles) as t
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
    -- what clients do not get
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
        format('%s is unlogged: the log has none of its changes', realtime_internal.table_name(leaf.oid)),
        format('alter table %s set logged', realtime_internal.table_name(leaf.oid))
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
    -- what clients get, perhaps more than intended
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
    -- what the server has no right to
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
comment on function realtime_internal.doctor_tables(text, text[], boolean) is
    'For realtime.doctor: what clients get of the tables of the publication. source: wal or trigger; roles: of clients; strict_deletes: as REALTIME_STRICT_DELETES.';
revoke all on function realtime_internal.doctor_tables(text, text[], boolean) from public;
