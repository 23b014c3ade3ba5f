"""Fixtures by theme; this file only names them."""

pytest_plugins = [
    "tests.fix_postgres",
    "tests.fix_database",
    "tests.fix_server",
    "tests.fix_proxy",
    "tests.fix_wire",
    "tests.fix_events",
    "tests.fix_clients",
    "tests.fix_rights",
    "tests.fix_changes",
    "tests.fix_browser",
    "tests.fix_oracle",
    "tests.fix_row_oracle",
    "tests.fix_session",
]
