"""Larger pieces and stricter images: what the functions of row changes and of the relay have learnt since."""

from realtime_server.schema import run_sql_file

revision = "core_0003"
down_revision = "core_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    run_sql_file(__file__)


def downgrade() -> None:
    # The functions stay, and the column that they write. They serve older servers as well, but what triggers write these cannot read:
    # they tell of a gap for each change, unless they read the log.
    pass
