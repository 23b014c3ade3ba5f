-- Chat between two users: the tables.

create table public.chat_threads (
    thread_id text primary key,
    user_a_mongo_id text not null,
    user_b_mongo_id text not null,
    user_a_supabase_id uuid not null,
    user_b_supabase_id uuid not null,
    created_at timestamptz not null default now(),
    last_message_at timestamptz,
    constraint chat_threads_two_users check (user_a_mongo_id <> user_b_mongo_id)
);
comment on table public.chat_threads is 'A conversation of two users, created by the application''s backend.';
comment on column public.chat_threads.thread_id is 'The two application ids, sorted and joined by "__".';
comment on column public.chat_threads.user_a_mongo_id is 'First user''s id in the application.';
comment on column public.chat_threads.user_b_mongo_id is 'Second user''s id in the application.';
comment on column public.chat_threads.user_a_supabase_id is 'First user''s id in tokens (claim "sub").';
comment on column public.chat_threads.user_b_supabase_id is 'Second user''s id in tokens (claim "sub").';
comment on column public.chat_threads.created_at is 'When the thread was created.';
comment on column public.chat_threads.last_message_at is 'Time of the newest message; null while there is none.';

create table public.chat_messages (
    id uuid primary key default gen_random_uuid(),
    thread_id text not null references public.chat_threads (thread_id) on delete cascade,
    sender_supabase_id uuid not null,
    sender_mongo_id text not null,
    recipient_mongo_id text not null,
    body text not null,
    created_at timestamptz not null default now(),
    constraint chat_messages_body_length check (length(body) between 1 and 10000)
);
comment on table public.chat_messages is 'Messages of the threads; each is broadcast to its thread''s topic by a trigger.';
comment on column public.chat_messages.id is 'Identity of the message.';
comment on column public.chat_messages.thread_id is 'Thread that the message belongs to.';
comment on column public.chat_messages.sender_supabase_id is 'The sender, by claim "sub".';
comment on column public.chat_messages.sender_mongo_id is 'The sender, by id in the application.';
comment on column public.chat_messages.recipient_mongo_id is 'The other user of the thread.';
comment on column public.chat_messages.body is 'Text, 1 to 10,000 characters.';
comment on column public.chat_messages.created_at is 'When the message was written.';

create index chat_messages_thread_id_created_at_idx on public.chat_messages (thread_id, created_at);
create index chat_messages_thread_id_id_idx on public.chat_messages (thread_id, id);

alter table public.chat_threads enable row level security;
alter table public.chat_messages enable row level security;

grant select on public.chat_threads to authenticated;
-- Writers choose neither id nor time.
grant select on public.chat_messages to authenticated;
grant insert (thread_id, sender_supabase_id, sender_mongo_id, recipient_mongo_id, body) on public.chat_messages to authenticated;
grant select, insert, update, delete on public.chat_threads, public.chat_messages to service_role;
