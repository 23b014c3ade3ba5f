"""Chat between two users: threads, messages, policies, trigger and insert_chat_message."""

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
        "drop policy chat_members_receive on realtime.messages",
        "drop policy chat_members_are_present on realtime.messages",
        "drop policy chat_members_type on realtime.messages",
        "drop function public.insert_chat_message(text, text, text, text)",
        "drop table public.chat_messages",
        "drop table public.chat_threads",
        "drop function public.broadcast_chat_message()",
        "drop function public.revalidate_chat_thread()",
    ):
        op.execute(statement)
