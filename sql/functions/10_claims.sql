-- What policies read: the caller's claims and the topic. Functions in SQL have bodies that PostgreSQL parses when they are created: a name
-- means the same on every search path, and PostgreSQL can still inline them.

create or replace function realtime.topic()
returns text
language sql
stable
return nullif(pg_catalog.current_setting('realtime.topic', true), '');
comment on function realtime.topic() is 'Topic being joined or sent to; null outside of realtime. For policies on realtime.messages. Example: create policy members_read on realtime.messages for select to authenticated using (realtime.topic() = ''room:1'');';

-- Functions of schema auth that exist belong to their creator; only missing ones are created.
do $$
begin
    if to_regnamespace('auth') is null then
        create schema auth;
        comment on schema auth is 'The identity of the caller, read from the claims of the current request.';
        grant usage on schema auth to anon, authenticated, service_role;
    end if;

    if to_regprocedure('auth.jwt()') is null then
        create function auth.jwt()
        returns jsonb
        language sql
        stable
        return nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb;
        comment on function auth.jwt() is 'All claims of the current request; null when there is none.';
    end if;

    if to_regprocedure('auth.uid()') is null then
        create function auth.uid()
        returns uuid
        language sql
        stable
        return coalesce(
            nullif(pg_catalog.current_setting('request.jwt.claim.sub', true), ''),
            nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
        )::uuid;
        comment on function auth.uid() is 'Claim "sub" of the current request; null when there is none.';
    end if;

    if to_regprocedure('auth.role()') is null then
        create function auth.role()
        returns text
        language sql
        stable
        return coalesce(
            nullif(pg_catalog.current_setting('request.jwt.claim.role', true), ''),
            nullif(pg_catalog.current_setting('request.jwt.claims', true), '')::jsonb ->> 'role'
        );
        comment on function auth.role() is 'Claim "role" of the current request; null when there is none.';
    end if;
end
$$;
