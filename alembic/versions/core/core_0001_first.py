"""Schema, roles, messages, authorization and the doorbell."""

from alembic import op
from realtime_server.schema import run_sql_file

revision = "core_0001"
down_revision = None
branch_labels = ("core",)
depends_on = None


def upgrade() -> None:
    run_sql_file(__file__)


def downgrade() -> None:
    # Messages are kept for days only, so dropping them is a downgrade and not a loss. Roles and auth may be in use elsewhere. The
    # schema stays, because the version table lives in it.
    op.execute("drop table realtime.messages, realtime.stream cascade")
    op.execute("drop domain realtime.cursor cascade")
    op.execute(
        """
        do $$
        declare
            v_function regprocedure;
        begin
            for v_function in select oid from pg_catalog.pg_proc where pronamespace = 'realtime'::regnamespace loop
                execute 'drop function ' || v_function || ' cascade';
            end loop;
        end
        $$
        """
    )
