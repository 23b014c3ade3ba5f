"""Row changes: the publication, capture triggers and their outbox, and what the servers ask."""

from alembic import op
from realtime_server.schema import run_sql_file

revision = "core_0002"
down_revision = "core_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run_sql_file(__file__)


def downgrade() -> None:
    # The publication stays: applications may have put tables in it, and it harms nobody. What is new among the functions stays until
    # the schema goes.
    op.execute(
        """
        select realtime.sync_capture(false);
        drop table realtime.changes cascade;
        alter table realtime.stream drop column dropped_change_xid, drop column dropped_change_in_life;
        """
    )
