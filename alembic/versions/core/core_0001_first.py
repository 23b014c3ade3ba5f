"""The tables of the core: `sql/structure`, as `make squash` joins it until the first release."""

from alembic import op
from realtime_server.schema import run_sql_file

revision = "core_0001"
down_revision = None
branch_labels = ("core",)
depends_on = None


def upgrade() -> None:
    run_sql_file(__file__)


def downgrade() -> None:
    # Messages are kept for days only, so dropping them is a downgrade and not a loss. Roles, auth and the publication may be in use
    # elsewhere. Schema realtime stays, because the version table lives in it.
    op.execute(
        """
        do $$
        declare
            v_name text;
        begin
            -- With the triggers on tables of the publication.
            drop schema realtime_internal cascade;
            for v_name in
                select oid::regclass from pg_catalog.pg_class
                where relnamespace = 'realtime'::regnamespace and relkind in ('r', 'p')
                    and not relispartition and relname <> 'alembic_version'
            loop
                execute 'drop table ' || v_name || ' cascade';
            end loop;
            for v_name in
                select oid::regtype from pg_catalog.pg_type where typnamespace = 'realtime'::regnamespace and typtype = 'd'
            loop
                execute 'drop domain ' || v_name || ' cascade';
            end loop;
            -- All names first: a function goes with another one that it calls.
            foreach v_name in array array(
                select oid::regprocedure::text from pg_catalog.pg_proc where pronamespace = 'realtime'::regnamespace
            ) loop
                execute 'drop function if exists ' || v_name || ' cascade';
            end loop;
        end
        $$
        """
    )
