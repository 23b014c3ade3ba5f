"""The embedded PostgreSQL, with real clusters: what start() promises, however the last run ended."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from realtime_server import embedded as embedded_module
from realtime_server.embedded import EmbeddedPostgres, bundled_bin, lock_data_dir
from realtime_server.errors import EmbeddedError
from tests.fix_postgres import FAST, open_folder

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 60

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as somebody else")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs prctl and /proc")

Embedded = Callable[..., EmbeddedPostgres]


@pytest.fixture
def system_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where clusters and copies of the programs go that PostgreSQL's user can't reach elsewhere, instead of /var/lib."""
    with open_folder() as parent:
        monkeypatch.setattr(embedded_module, "SYSTEM_PARENTS", (str(parent),))
        yield parent / "realtime-server"


@pytest.fixture
def data_dir(folder: Path, system_folder: Path) -> Iterator[Path]:
    """Whatever runs there in the end is stopped, whoever started it."""
    path = folder / "data"
    yield path
    EmbeddedPostgres(path).stop("immediate")


@pytest.fixture
def embedded(data_dir: Path) -> Embedded:
    def make(bin_dir: Path | None = None, settings: dict[str, str] | None = None) -> EmbeddedPostgres:
        return EmbeddedPostgres(data_dir, bin_dir=bin_dir, settings={**FAST, **(settings or {})})

    return make


def value(url: str, query: str) -> object:
    with psycopg.connect(url, autocommit=True) as db:
        row = db.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def run_sql(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as db:
        for statement in statements:
            db.execute(statement.encode())


def postmaster_pid(postgres: EmbeddedPostgres) -> int:
    return int((postgres.location / "postmaster.pid").read_text().split()[0])


def python(data_dir: Path, code: str, *, python_path: Path | None = None) -> subprocess.Popen[str]:
    """Another process with `postgres` (not started) and `data_dir` at hand."""
    prelude = f"""
        import os, signal, sys, time
        from pathlib import Path
        from realtime_server import embedded
        from realtime_server.embedded import EmbeddedPostgres, lock_data_dir
        embedded.SYSTEM_PARENTS = {embedded_module.SYSTEM_PARENTS!r}
        data_dir = Path({str(data_dir)!r})
        postgres = EmbeddedPostgres(data_dir, settings={FAST!r})
        def pid(): return int((postgres.location / "postmaster.pid").read_text().split()[0])
    """
    path = [str(python_path)] if python_path else []
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(REPOSITORY)])},
    )


def said(process: subprocess.Popen[str]) -> list[str]:
    """The words of a process that ends by itself."""
    with process:
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
    assert process.returncode == 0
    return output.split()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture(params=["newest", "oldest"])
def any_version(request: pytest.FixtureRequest, embedded: Embedded) -> EmbeddedPostgres:
    bin_dir = None if request.param == "newest" else request.getfixturevalue("old_programs")
    return embedded(bin_dir, {"log_line_prefix": "it's \\ %m "}).start()


def test_the_ordinary_role_owns_the_database_and_may_replicate_and_nothing_else(any_version: EmbeddedPostgres) -> None:
    url = any_version.url
    assert value(url, "select current_user::text") == "realtime"
    assert value(url, "select datdba::regrole::text from pg_database where datname = current_database()") == "realtime"
    attributes = "rolcanlogin, rolreplication, rolsuper, rolcreaterole, rolcreatedb, rolbypassrls"
    allowed = value(url, f"select array[{attributes}] from pg_roles where rolname = current_user")
    assert allowed == [True, True, False, False, False, False]
    run_sql(url, "create table note (body text)", "select pg_create_logical_replication_slot('bell', 'pgoutput')")
    roles = "array['anon', 'authenticated', 'service_role']"
    assert value(url, f"select bool_and(pg_has_role(name, 'member')) from unnest({roles}) as name") is True
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        run_sql(url, "create role intruder")


def test_the_administrator_is_superuser_of_the_same_database(any_version: EmbeddedPostgres) -> None:
    assert value(any_version.administrator_url, "select current_database()::text") == "realtime"
    assert value(any_version.administrator_url, "select rolsuper from pg_roles where rolname = current_user") is True


def test_tables_of_the_administrator_are_the_servers_to_tell(any_version: EmbeddedPostgres) -> None:
    run_sql(any_version.administrator_url, "create schema shop", "create table shop.orders (id int primary key)")
    run_sql(
        any_version.url,
        "select from shop.orders",
        "create function noticed() returns trigger language plpgsql as 'begin return null; end'",
        "create trigger noticed after insert on shop.orders for each row execute function noticed()",
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        run_sql(any_version.url, "insert into shop.orders values (1)")


def test_settings_are_ours_and_the_callers(any_version: EmbeddedPostgres) -> None:
    url = any_version.administrator_url
    assert value(url, "show wal_level") == "logical"
    assert value(url, "show listen_addresses") == "127.0.0.1"
    assert value(url, "show max_slot_wal_keep_size") == "1GB"
    assert value(url, "show timezone") == "UTC"
    assert value(url, "show fsync") == "off"
    assert value(url, "show log_line_prefix") == "it's \\ %m "


def test_text_is_unicode(any_version: EmbeddedPostgres) -> None:
    assert value(any_version.url, "show server_encoding") == "UTF8"
    assert value(any_version.url, "select upper('é') || chr(128512)") == "É😀"


def test_nobody_gets_in_without_the_password(any_version: EmbeddedPostgres) -> None:
    methods = value(any_version.administrator_url, "select array_agg(distinct auth_method) from pg_hba_file_rules")
    assert methods == ["scram-sha-256"]
    assert value(any_version.administrator_url, "show unix_socket_directories") == ""
    for url in (any_version.url, any_version.administrator_url):
        guess = re.sub(r":[^:@]+@", ":guess@", url)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            value(guess, "select 1")


def test_secrets_are_private_files_and_stay_out_of_the_log(embedded: Embedded, data_dir: Path) -> None:
    postgres = embedded(settings={"log_statement": "all", "log_connections": "on"}).start()
    files = {file.name: file for file in data_dir.glob("*.password")}
    assert set(files) == {"postgres.password", "realtime.password"}
    log = (postgres.location / "server.log").read_text()
    assert "create database" in log
    for file in files.values():
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.read_text() in postgres.url + postgres.administrator_url
        assert file.read_text() not in log


def test_data_and_urls_survive_a_restart(embedded: Embedded) -> None:
    with embedded() as first:
        run_sql(first.url, "create table note (body text)", "insert into note values ('kept')")
        urls = first.url, first.administrator_url
    with pytest.raises(psycopg.OperationalError, match="refused"):
        value(urls[0], "select 1")
    with embedded() as second:
        assert (second.url, second.administrator_url) == urls
        assert value(second.url, "select body from note") == "kept"


def test_start_may_be_called_again(embedded: Embedded) -> None:
    postgres = embedded().start()
    before = postgres.url, postmaster_pid(postgres)
    postgres.start()
    assert (postgres.url, postmaster_pid(postgres)) == before


def test_stop_without_a_running_cluster_does_nothing(embedded: Embedded) -> None:
    embedded().stop()
    postgres = embedded().start()
    postgres.stop()
    postgres.stop()


def test_a_port_taken_meanwhile_is_given_up(embedded: Embedded) -> None:
    with embedded() as first:
        port = psycopg.conninfo.conninfo_to_dict(first.url)["port"]
    with socket.create_server(("127.0.0.1", int(str(port)))):
        second = embedded().start()
        assert f":{port}/" not in second.url
        assert value(second.url, "select 1") == 1


def test_committed_rows_survive_a_killed_postmaster(embedded: Embedded) -> None:
    first = embedded().start()
    run_sql(first.url, "create table note (body text)", "insert into note values ('committed')")
    os.kill(postmaster_pid(first), signal.SIGKILL)
    second = embedded().start()
    assert second.url == first.url
    assert value(second.url, "select body from note") == "committed"


@on_linux
def test_a_killed_postmaster_that_nobody_reaps_does_not_hold_up_the_start(data_dir: Path) -> None:
    """In containers whose process 1 reaps nothing it stays a zombie, which to kill(pid, 0) and pg_ctl is alive."""
    words = said(
        python(
            data_dir,
            """
            import ctypes
            PR_SET_CHILD_SUBREAPER = 36
            assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
            postgres.start()
            killed = pid()
            os.kill(killed, signal.SIGKILL)
            postgres.start()
            print(Path(f"/proc/{killed}/stat").read_text().rpartition(")")[2].split()[0], killed != pid())
            """,
        )
    )
    assert words == ["Z", "True"]


def test_a_process_id_given_out_again_does_not_hold_up_the_start(embedded: Embedded) -> None:
    first = embedded().start()
    pid_file = first.location / "postmaster.pid"
    stale, owner = pid_file.read_text(), pid_file.stat()
    first.stop()
    user = owner.st_uid if os.geteuid() == 0 else None
    with subprocess.Popen(["sleep", str(LIMIT_S)], cwd="/", user=user) as stranger:
        try:
            pid_file.write_text(re.sub(r"^\d+", str(stranger.pid), stale))
            pid_file.chmod(0o600)
            os.chown(pid_file, owner.st_uid, owner.st_gid)
            assert value(embedded().start().url, "select 1") == 1
            embedded().stop()
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_the_cluster_of_a_killed_server_is_taken_over_and_stopped(data_dir: Path, embedded: Embedded) -> None:
    with python(data_dir, "print(postgres.start().url, pid(), flush=True); time.sleep(60)") as server:
        try:
            url, pid = first_line(server).split()
        finally:
            server.kill()
    postgres = embedded().start()
    assert (postgres.url, postmaster_pid(postgres)) == (url, int(pid))
    assert value(url, "select 1") == 1
    postgres.stop()
    assert not (postgres.location / "postmaster.pid").exists()
    with pytest.raises(psycopg.OperationalError, match="refused"):
        value(url, "select 1")


def test_processes_that_start_at_once_share_one_postmaster(data_dir: Path) -> None:
    processes = [python(data_dir, "print(postgres.start().url, pid())") for _ in range(3)]
    results = {tuple(said(process)) for process in processes}
    assert len(results) == 1


def test_a_half_made_cluster_is_made_anew(data_dir: Path, embedded: Embedded) -> None:
    half_made = data_dir / "postgres.new"
    data_dir.mkdir(mode=0o711)
    (half_made / "base").mkdir(parents=True)
    (half_made / "PG_VERSION").write_text("18\n")
    (data_dir / "postgres.new.password").write_text("old")
    assert value(embedded().start().url, "select 1") == 1
    assert not half_made.exists()
    assert not (data_dir / "postgres.new.password").exists()


def test_data_of_another_major_version_is_refused_with_the_way_out(embedded: Embedded, old_programs: Path) -> None:
    embedded(old_programs).start().stop()
    with pytest.raises(EmbeddedError, match=r"made by PostgreSQL 14, but this is PostgreSQL 18.*pg_upgrade") as refused:
        embedded().start()
    assert "REALTIME_DATA_DIR" in str(refused.value)


def test_a_lost_administrator_password_is_named(data_dir: Path, embedded: Embedded) -> None:
    embedded().start().stop()
    (data_dir / "postgres.password").unlink()
    with pytest.raises(EmbeddedError, match=r"data/postgres\.password is missing"):
        embedded().start()


def test_a_lost_role_password_is_drawn_anew(data_dir: Path, embedded: Embedded) -> None:
    before = embedded().start().url
    (data_dir / "realtime.password").unlink()
    after = embedded().start().url
    assert after != before
    assert value(after, "select 1") == 1


def test_a_failed_start_shows_what_postgresql_said(embedded: Embedded) -> None:
    with pytest.raises(EmbeddedError, match='invalid value for parameter "max_connections"'):
        embedded(settings={"max_connections": "plenty"}).start()


def test_a_failed_initdb_shows_what_it_said(folder: Path, embedded: Embedded) -> None:
    programs = folder / "bin"
    programs.mkdir()
    (programs / "postgres").symlink_to(bundled_bin() / "postgres")
    (programs / "initdb").write_text("#!/bin/sh\necho 'initdb: error: no space' >&2\nexit 1\n")
    for file in (programs, programs / "initdb"):
        file.chmod(0o755)
    with pytest.raises(EmbeddedError, match="initdb: error: no space"):
        embedded(programs).start()


def test_missing_programs_are_named(folder: Path, embedded: Embedded) -> None:
    with pytest.raises(EmbeddedError, match=str(folder / "nowhere" / "postgres")):
        embedded(folder / "nowhere").start()
    with pytest.raises(EmbeddedError, match="no PostgreSQL 9"):
        bundled_bin(9)


def test_there_is_no_url_before_the_first_start(embedded: Embedded) -> None:
    with pytest.raises(EmbeddedError, match=r'there is no PostgreSQL in .* yet: "realtime-server run" makes it'):
        _ = embedded().url


def test_url_of_the_last_run_is_known_without_a_start(embedded: Embedded) -> None:
    first = embedded()
    with first:
        url = first.url
    assert embedded().url == url


def test_a_second_server_is_told_who_uses_the_folder_until_that_one_is_gone(data_dir: Path) -> None:
    with python(data_dir, "with lock_data_dir(data_dir): print('locked', flush=True); time.sleep(60)") as server:
        try:
            assert first_line(server) == "locked"
            with pytest.raises(EmbeddedError) as refused, lock_data_dir(data_dir):
                pass
        finally:
            server.kill()
    assert str(refused.value) == (
        f"another realtime-server (pid {server.pid}) is using {data_dir}; "
        "stop it, or set REALTIME_DATA_DIR to another folder"
    )
    with lock_data_dir(data_dir), pytest.raises(EmbeddedError, match=f"pid {os.getpid()}"), lock_data_dir(data_dir):
        pass


def test_a_folder_that_is_a_file_is_no_data_folder(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(EmbeddedError, match="can't be used as the data folder"), lock_data_dir(folder / "file"):
        pass


@as_root
def test_below_a_private_folder_the_cluster_goes_elsewhere_and_the_folder_stays_private(
    folder: Path, data_dir: Path, embedded: Embedded
) -> None:
    folder.chmod(0o700)
    with embedded() as first:
        assert not first.location.is_relative_to(folder)
        assert (data_dir / "postgres").readlink() == first.location
        run_sql(first.url, "create table note (body text)", "insert into note values ('kept')")
    assert folder.stat().st_mode & 0o777 == 0o700
    with embedded() as second:
        assert second.location == first.location
        assert value(second.url, "select body from note") == "kept"


@as_root
def test_a_cluster_that_became_private_is_not_left_behind_for_a_new_one(folder: Path, embedded: Embedded) -> None:
    embedded().start().stop()
    folder.chmod(0o700)
    with pytest.raises(EmbeddedError, match="may not enter"):
        embedded().start()


@pytest.fixture
def private_install(folder: Path) -> Path:
    """The bundled programs in a folder that PostgreSQL's user may not enter, as with a checkout in root's home. The links do not help:
    below such a folder they are as unreachable as the files would be."""
    private = folder / "private"
    private.mkdir(mode=0o700)
    package = bundled_bin().parent.parent
    for name in (package.name, f"{package.name}.libs"):
        (private / name).symlink_to(package.with_name(name))
    return private


@as_root
def test_processes_that_start_at_once_copy_the_programs_once(
    folder: Path, system_folder: Path, private_install: Path
) -> None:
    data_dirs = [folder / f"data {number}" for number in range(2)]
    left_behind_by_a_killed_process = system_folder / "copy-killed"
    system_folder.mkdir()
    system_folder.chmod(0o711)
    left_behind_by_a_killed_process.mkdir()
    code = "print(Path(f'/proc/{postgres.start() and pid()}/exe').readlink())"
    try:
        processes = [python(data_dir, code, python_path=private_install) for data_dir in data_dirs]
        (program,) = {word for process in processes for word in said(process)}
        assert {path.name for path in system_folder.iterdir()} == {
            "lock",
            Path(program).relative_to(system_folder).parts[0],
        }
        assert private_install.stat().st_mode & 0o777 == 0o700
        # Its install goes away, but there are servers that run from the copy.
        shutil.rmtree(private_install)
        EmbeddedPostgres(data_dirs[0]).start()
        assert Path(program).exists()
    finally:
        for data_dir in data_dirs:
            EmbeddedPostgres(data_dir).stop("immediate")
    with EmbeddedPostgres(data_dirs[0], settings=FAST):
        assert {path.name for path in system_folder.iterdir()} == {"lock"}


@as_root
def test_cluster_is_removed_when_its_data_folder_is_gone_and_not_before(
    folder: Path, data_dir: Path, system_folder: Path
) -> None:
    folder.chmod(0o700)
    with EmbeddedPostgres(data_dir, settings=FAST) as first:
        cluster = first.location
    assert cluster.parent == system_folder
    half_made = cluster.with_name(f"{cluster.name}.new")
    half_made.mkdir()
    with EmbeddedPostgres(folder / "other", settings=FAST) as other:
        # Moved: it is still there, under a name that nobody has heard of.
        moved = data_dir.rename(folder / "moved")
        other.start()
        assert cluster.exists()
        # Removed, while its PostgreSQL runs.
        running = EmbeddedPostgres(moved, settings=FAST).start()
        pid = postmaster_pid(running)
        try:
            shutil.rmtree(moved)
            other.start()
            assert value(other.url, "select 1") == 1
            assert cluster.exists()
        finally:
            os.kill(pid, signal.SIGQUIT)
        deadline = time.monotonic() + LIMIT_S
        while cluster.exists():
            assert time.monotonic() < deadline
            other.start()
            time.sleep(0.05)
        names = {path.name for path in system_folder.iterdir()}
        assert names == {"lock", other.location.name, f"{other.location.name}.owner"}


@as_root
def test_an_ordinary_user_runs_it_as_himself(folder: Path, data_dir: Path) -> None:
    nobody = 65534
    os.chown(folder, nobody, nobody)
    become_nobody = f"os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})\n"
    words = said(python(data_dir, become_nobody + "print(postgres.start().url); postgres.stop()"))
    assert words[0].startswith("postgresql://realtime:")
    assert {file.stat().st_uid for file in (data_dir, data_dir / "postgres", data_dir / "realtime.password")} == {
        nobody
    }
    assert data_dir.stat().st_mode & 0o777 == 0o700
