-- Chat between two users: policies, and the trigger that broadcasts new rows.

drop policy if exists chat_threads_of_members on public.chat_threads;
create policy chat_threads_of_members on public.chat_threads
    for select
    to authenticated
    using ((select auth.uid()) in (user_a_supabase_id, user_b_supabase_id));

drop policy if exists chat_threads_of_service on public.chat_threads;
create policy chat_threads_of_service on public.chat_threads
    for all
    to service_role
    using (true)
    with check (true);

drop policy if exists chat_messages_of_members on public.chat_messages;
create policy chat_messages_of_members on public.chat_messages
    for select
    to authenticated
    using (exists (select from public.chat_threads as t where t.thread_id = chat_messages.thread_id));

drop policy if exists chat_messages_by_members on public.chat_messages;
create policy chat_messages_by_members on public.chat_messages
    for insert
    to authenticated
    with check (
        sender_supabase_id = (select auth.uid())
        and exists (
            select
            from public.chat_threads as t
            where t.thread_id = chat_messages.thread_id
                and (
                    (
                        t.user_a_supabase_id = sender_supabase_id
                        and t.user_a_mongo_id = sender_mongo_id
                        and t.user_b_mongo_id = recipient_mongo_id
                    )
                    or (
                        t.user_b_supabase_id = sender_supabase_id
                        and t.user_b_mongo_id = sender_mongo_id
                        and t.user_a_mongo_id = recipient_mongo_id
                    )
                )
        )
    );

drop policy if exists chat_messages_of_service on public.chat_messages;
create policy chat_messages_of_service on public.chat_messages
    for all
    to service_role
    using (true)
    with check (true);

-- Topic chat:<thread_id>. The column topic is compared, not realtime.topic(), because a session may set the latter to any value.
-- Threads are themselves under row-level security, so "exists" means "is a member of".
drop policy if exists chat_members_receive on realtime.messages;
create policy chat_members_receive on realtime.messages
    for select
    to authenticated
    using (
        starts_with(topic, 'chat:')
        and exists (select from public.chat_threads as t where t.thread_id = substr(messages.topic, 6))
    );

-- Clients may not send to the topic of a thread, because an event INSERT of their own would look like a message of the table, from anybody.
-- Members may be present there, and may send to typing:<thread_id>.
drop policy if exists chat_members_send on realtime.messages;
drop policy if exists chat_members_are_present on realtime.messages;
create policy chat_members_are_present on realtime.messages
    for insert
    to authenticated
    with check (
        extension = 'presence'
        and starts_with(topic, 'chat:')
        and exists (select from public.chat_threads as t where t.thread_id = substr(messages.topic, 6))
    );

drop policy if exists chat_members_type on realtime.messages;
create policy chat_members_type on realtime.messages
    for all
    to authenticated
    using (
        starts_with(topic, 'typing:')
        and exists (select from public.chat_threads as t where t.thread_id = substr(messages.topic, 8))
    )
    with check (
        starts_with(topic, 'typing:')
        and exists (select from public.chat_threads as t where t.thread_id = substr(messages.topic, 8))
    );

-- Definer, because the broadcast must not depend on the writer's right to send.
create or replace function public.broadcast_chat_message()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform realtime.broadcast_changes(
        'chat:' || new.thread_id, tg_op, tg_op, tg_table_name, tg_table_schema, new, old
    );
    return null;
end
$$;
comment on function public.broadcast_chat_message() is 'Broadcasts a new message to the topic of its thread.';
revoke all on function public.broadcast_chat_message() from public;

create or replace trigger broadcast_chat_message
    after insert on public.chat_messages
    for each row
    execute function public.broadcast_chat_message();
comment on trigger broadcast_chat_message on public.chat_messages is 'Broadcasts a new message to the topic of its thread.';

-- Definer: only the owner and service_role may call realtime.revalidate.
create or replace function public.revalidate_chat_thread()
returns trigger
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform realtime.revalidate(topic => 'chat:' || old.thread_id);
    perform realtime.revalidate(topic => 'typing:' || old.thread_id);
    return null;
end
$$;
comment on function public.revalidate_chat_thread() is 'Reauthorizes the channels of the thread.';
revoke all on function public.revalidate_chat_thread() from public;

create or replace trigger revalidate_chat_thread
    after delete or update of thread_id, user_a_supabase_id, user_b_supabase_id on public.chat_threads
    for each row
    execute function public.revalidate_chat_thread();
comment on trigger revalidate_chat_thread on public.chat_threads is
    'Former members of the thread lose its topic.';

-- Definer, so that callers need no right to the tables; it checks itself that the caller is the sender.
create or replace function public.insert_chat_message(
    _thread_id text,
    _sender_mongo_id text,
    _recipient_mongo_id text,
    _body text
)
returns public.chat_messages
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    v_caller uuid := auth.uid();
    v_row public.chat_messages;
begin
    if v_caller is null then
        raise exception using
            errcode = 'insufficient_privilege',
            message = 'no caller: claim "sub" is missing',
            hint = 'Call with a user''s token; in psql: set request.jwt.claims = ''{"sub": "..."}''.';
    end if;

    update public.chat_threads as t
    set last_message_at = now()
    where t.thread_id = _thread_id
        and (
            (
                t.user_a_supabase_id = v_caller
                and t.user_a_mongo_id = _sender_mongo_id
                and t.user_b_mongo_id = _recipient_mongo_id
            )
            or (
                t.user_b_supabase_id = v_caller
                and t.user_b_mongo_id = _sender_mongo_id
                and t.user_a_mongo_id = _recipient_mongo_id
            )
        );
    if not found then
        raise exception using
            errcode = 'insufficient_privilege',
            message = 'you are not that sender in that thread',
            hint = 'The thread must exist, with you as the sender and the other user as the recipient.';
    end if;

    insert into public.chat_messages (thread_id, sender_supabase_id, sender_mongo_id, recipient_mongo_id, body)
    values (_thread_id, v_caller, _sender_mongo_id, _recipient_mongo_id, _body)
    returning * into v_row;
    return v_row;
end
$$;
comment on function public.insert_chat_message(text, text, text, text) is
    'Writes a chat message as the caller, who must be the named sender in the thread. Returns the row.';
revoke all on function public.insert_chat_message(text, text, text, text) from public;
grant execute on function public.insert_chat_message(text, text, text, text) to authenticated;
