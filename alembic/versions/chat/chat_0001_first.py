"""Chat between two users: threads and messages."""

from alembic import op
from realtime_server.schema import run_sql_file

revision = "chat_0001"
down_revision = None
branch_labels = ("chat",)
depends_on = "core_0001"


def upgrade() -> None:
    run_sql_file(__file__)


def downgrade() -> None:
    for statement in (
        "drop policy if exists chat_members_receive on realtime.messages",
        "drop policy if exists chat_members_are_present on realtime.messages",
        "drop policy if exists chat_members_type on realtime.messages",
        "drop function if exists public.insert_chat_message(text, text, text, text)",
        "drop table public.chat_messages",
        "drop table public.chat_threads",
        "drop function if exists public.broadcast_chat_message()",
        "drop function if exists public.revalidate_chat_thread()",
        "delete from realtime_internal.applied_functions where branch = 'chat'",
    ):
        op.execute(statement)
