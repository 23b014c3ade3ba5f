-- The tables of the publication, with what servers need to know of them.

create or replace function realtime_internal.published_tables(roles text[])
returns table (
    relation oid,
    schema text,
    name text,
    has_row_security boolean,
    has_whole_old boolean,
    row_filter text,
    is_captured boolean,
    events text[],
    columns jsonb,
    access jsonb,
    policy_columns text[]
)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    with published as (
        select
            c.oid,
            n.nspname,
            n.oid as namespace,
            c.relname,
            c.relowner,
            c.relrowsecurity,
            c.relforcerowsecurity,
            -- Each partition decides what is written to the log, whatever the root's settings are.
            case when c.relreplident <> 'f' or not exists (
                with recursive part as (
                    select i.inhrelid as oid from pg_inherits as i where i.inhparent = c.oid and c.relkind = 'p'
                    union all
                    select i.inhrelid from pg_inherits as i join part on i.inhparent = part.oid
                )
                select from part join pg_class as p on p.oid = part.oid where p.relkind = 'r' and p.relreplident <> 'f'
            ) then c.relreplident else 'd' end as relreplident,
            -- Row filters and column lists exist since PostgreSQL 15.
            to_jsonb(p) ->> 'rowfilter' as rowfilter,
            to_jsonb(p) -> 'attnames' as attnames
        from pg_publication_tables as p
        join pg_namespace as n on n.nspname = p.schemaname
        join pg_class as c on c.relnamespace = n.oid and c.relname = p.tablename
        -- A publication for all tables includes our own.
        where p.pubname = 'supabase_realtime' and n.nspname not in ('realtime', 'realtime_internal')
    ),
    attribute as (
        select
            a.attrelid,
            a.attname,
            a.attnum,
            a.attgenerated <> '' as is_generated,
            a.atttypid,
            t.typname,
            realtime_internal.base_type(a.atttypid) as base,
            -- Without the columns that an index only includes.
            coalesce(a.attnum = any ((primary_key.indkey::int2[])[0:primary_key.indnkeyatts - 1]), false) as is_key,
            -- Without a column list, generated columns are not published; before PostgreSQL 18 never.
            published.attnames is null
                or published.attnames ? a.attname
                or (a.attgenerated <> '' and not exists (
                    select
                    from pg_attribute as plain
                    where plain.attrelid = published.oid
                        and plain.attnum > 0
                        and not plain.attisdropped
                        and plain.attgenerated = ''
                        and not published.attnames ? plain.attname
                )) as is_published
        from published
        join pg_attribute as a on a.attrelid = published.oid and a.attnum > 0 and not a.attisdropped
        join pg_type as t on t.oid = a.atttypid
        left join pg_index as primary_key on primary_key.indrelid = published.oid and primary_key.indisprimary
    ),
    identity as (
        select published.oid, array_agg(a.attname::text) as columns
        from published
        join pg_index as i on i.indrelid = published.oid
            and case published.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident end
        join pg_attribute as a on a.attrelid = published.oid and a.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1])
        group by published.oid
    )
    select
        published.oid,
        published.nspname::text,
        published.relname::text,
        published.relrowsecurity,
        published.relreplident = 'f',
        published.rowfilter,
        exists (
            select
            from pg_trigger as t
            where t.tgrelid = published.oid
                and t.tgfoid = to_regprocedure('realtime_internal.capture_change()')
                and not t.tgisinternal
                -- The clone of a root's trigger writes changes under the root's name.
                and t.tgparentid = 0
                and t.tgenabled <> 'D'
        ),
        array_remove(array[
            case when publication.pubinsert then 'INSERT' end,
            case when publication.pubupdate then 'UPDATE' end,
            case when publication.pubdelete then 'DELETE' end
        ], null),
        (
            select coalesce(
                jsonb_agg(
                    jsonb_build_object(
                        'name', a.attname,
                        'type', a.typname,
                        -- These two are for servers of older releases.
                        'type_oid', a.atttypid::bigint,
                        'is_json', a.base in (114, 3802),
                        'is_bytea', a.base = 17,
                        'is_bool', a.base = 16,
                        'is_key', a.is_key,
                        'is_identity', published.relreplident = 'f' or coalesce(a.attname = any (identity.columns), false),
                        'is_generated', a.is_generated,
                        'is_published', a.is_published
                    )
                    order by a.attnum
                ),
                '[]'
            )
            from attribute as a
            where a.attrelid = published.oid
        ),
        (
            select coalesce(
                jsonb_object_agg(
                    r.rolname,
                    jsonb_build_object(
                        'columns', (
                            select coalesce(jsonb_agg(a.attname order by a.attnum), '[]')
                            from attribute as a
                            where a.attrelid = published.oid
                                and a.is_published
                                and has_schema_privilege(r.oid, published.namespace, 'usage')
                                and has_column_privilege(r.oid, published.oid, a.attnum, 'select')
                        ),
                        'is_bound', published.relrowsecurity
                            and not (r.rolsuper or r.rolbypassrls)
                            and (published.relforcerowsecurity or not pg_has_role(r.oid, published.relowner, 'usage'))
                    )
                ),
                '{}'
            )
            from pg_roles as r
            where r.rolname = any (roles)
        ),
        realtime_internal.policy_columns(published.oid) || realtime_internal.checked_columns(published.oid)
    from published
    cross join pg_publication as publication
    left join identity on identity.oid = published.oid
    where publication.pubname = 'supabase_realtime'
    order by published.oid
$$;
comment on function realtime_internal.published_tables(text[]) is
    'The tables of the publication: columns in order, and for each role which of the published ones it may read and whether row-level security binds it.';
revoke all on function realtime_internal.published_tables(text[]) from public;

-- Servers check rights and row-level security before each batch of changes. Reading all of them each time would cost more than the changes:
-- this function detects that one of the catalog rows was written.
create or replace function realtime_internal.table_marks(relations oid[])
returns table (relation oid, mark text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
begin
    return query
        select
            c.oid,
            concat_ws(
                '/',
                c.xmin,
                n.xmin,
                (select string_agg(a.xmin::text, ',' order by a.attnum) from pg_attribute as a where a.attrelid = c.oid and a.attnum > 0),
                (select string_agg(m.xmin::text, ',' order by m.roleid, m.member) from pg_auth_members as m),
                p.xmin,
                (select string_agg(concat_ws(':', q.oid, q.xmin), ',' order by q.oid) from pg_policy as q where q.polrelid = c.oid),
                (select string_agg(r.oid::text, ',' order by r.oid) from pg_roles as r where r.rolsuper or r.rolbypassrls),
                -- What is put into the publication, or anew with another row filter, has the highest oid.
                (
                    select concat_ws(',', count(*), max(d.objid))
                    from pg_depend as d
                    where d.refclassid = 'pg_publication'::regclass and d.refobjid = p.oid
                )
            )
        from pg_class as c
        join pg_namespace as n on n.oid = c.relnamespace
        left join pg_publication as p on p.pubname = 'supabase_realtime'
        where c.oid = any (table_marks.relations);
end
$$;
comment on function realtime_internal.table_marks(oid[]) is 'For each table a fingerprint that changes with its columns, its row-level security and policies, rights on it, roles that bypass row-level security, and the content of the publication.';
revoke all on function realtime_internal.table_marks(oid[]) from public;
