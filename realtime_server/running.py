"""Keeps the record of the running server in its data folder, `server.json`, from which commands read its address and settings.

The record contains no secret: neither passwords of database URLs nor secrets that sign tokens. The server holds a lock on the file while it
runs. The kernel releases the lock however the server ends, so a record that is not locked is stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from psycopg import conninfo

from realtime_server.config import Settings
from realtime_server.embedded import make_data_dir

FILE: Final = "server.json"
# Fields that the record has under another name, or that may hold a secret.
NOT_RECORDED: Final = frozenset(
    {
        "host",
        "port",
        "data_dir",
        "database_url",
        "jwt_secret",
        "jwks_url",
        "publishable_keys",
        "secret_keys",
        "anon_key",
        "service_key",
        "metrics_jwt_secret",
    }
)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """`database`: the URL without its password, None for the embedded PostgreSQL. `anon_key`: the public key that the server's secret
    signs, by which another process checks that it has the same secret; None without a secret. `settings`: all others that were set."""

    pid: int
    host: str
    port: int
    database: str | None
    anon_key: str | None
    settings: dict[str, Any]


def record_of(settings: Settings, *, port: int, anon_key: str | None) -> Record:
    return Record(
        pid=os.getpid(),
        host=settings.host,
        port=port,
        database=None if settings.database_url is None else without_password(settings.database_url.get_secret_value()),
        anon_key=anon_key,
        settings=settings.model_dump(mode="json", include=settings.model_fields_set - NOT_RECORDED),
    )


@contextlib.contextmanager
def recorded(data_dir: Path, record: Record) -> Iterator[None]:
    """Keep the record in the data folder while the block runs. Of several servers with one data folder, `find` returns the last started.

    Raises: OSError, when the record cannot be written.
    """
    make_data_dir(data_dir)
    file = data_dir / FILE
    new = data_dir / f".{FILE}.{os.getpid()}"
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        # The file is locked and written before it gets its name, so that readers only see complete records of running servers.
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened.write(msgspec.json.format(msgspec.json.encode(record)))
        opened.flush()
        new.replace(file)
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_ino == os.fstat(opened.fileno()).st_ino:
                    file.unlink()


def find(data_dir: Path) -> Record | None:
    """Return the record of the running server; None when there is none, or none that this user may read."""
    try:
        opened = (data_dir / FILE).open("rb")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return msgspec.json.decode(opened.read(), type=Record)
    return None


def adopt(settings: Settings) -> tuple[Settings, Record | None]:
    """Complete these settings by those of the server that runs with this data folder, and return them with its record.

    The record is None when no server runs, or when it serves another database than the one given here.
    """
    record = find(settings.data_dir)
    if record is None:
        return settings, None
    given = settings.model_dump(include=set(settings.model_fields_set))
    database = given.pop("database_url", None)
    if database is not None and without_password(database.get_secret_value()) != record.database:
        return settings, None
    if given.get("port") == 0:
        # Nobody listens on port 0: the server took a free one.
        del given["port"]
    facts = {**record.settings, "host": record.host, "port": record.port, **given}
    return Settings(**facts, REALTIME_DATABASE_URL=database or record.database), record


def without_password(url: str) -> str:
    facts = conninfo.conninfo_to_dict(url)
    return conninfo.make_conninfo(
        "", **{name: facts[name] for name in facts if name not in ("password", "sslpassword")}
    )
