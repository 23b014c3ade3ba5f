-- Row changes: the publication, and the outbox of the triggers that capture changes.

-- A table publishes changes if and only if it is in this publication; an existing publication stays with its owner.
do $$
begin
    if not exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime') then
        create publication supabase_realtime;
        comment on publication supabase_realtime is 'Tables whose row changes clients may subscribe to.';
    end if;
end
$$;

create sequence realtime_internal.changes_seq as bigint;
comment on sequence realtime_internal.changes_seq is 'Order of writing. Cache must stay 1, or order between sessions is lost.';

create table realtime_internal.changes (
    seq bigint not null default nextval('realtime_internal.changes_seq'),
    xid xid8 not null default pg_current_xact_id(),
    relation oid not null,
    action text not null,
    changed_at timestamptz not null default clock_timestamp(),
    record jsonb,
    old_record jsonb,
    columns text[]
);
alter sequence realtime_internal.changes_seq owned by realtime_internal.changes.seq;

comment on table realtime_internal.changes is 'Captured row changes, for the servers only. A server deletes what is older than an hour, every five minutes, and all of it when no table is captured and no server reads here.';
comment on column realtime_internal.changes.seq is 'Order of writing.';
comment on column realtime_internal.changes.xid is 'Transaction that wrote the row: the servers read by it.';
comment on column realtime_internal.changes.relation is 'Table, as the publication names it: of a partition maybe the root.';
comment on column realtime_internal.changes.action is 'INSERT, UPDATE or DELETE.';
comment on column realtime_internal.changes.changed_at is 'When the row was changed; a trigger does not know the time of the commit.';
comment on column realtime_internal.changes.record is 'The new row in its text form, in parentheses; null for DELETE. Both rows are null where they are too large.';
comment on column realtime_internal.changes.old_record is 'The old row; null for INSERT.';
comment on column realtime_internal.changes.columns is 'Names of the columns, in the order of the values in the rows.';

create index changes_xid_idx on realtime_internal.changes (xid);
alter table realtime_internal.changes enable row level security;  -- no policies: for its owner only
