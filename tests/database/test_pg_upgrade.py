"""pg_upgrade takes messages along, not what their transaction ids meant to others: a cursor of before is of another life."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from realtime_server.embedded import EmbeddedPostgres, bundled_bin
from tests.fix_database import Cluster
from tests.fix_postgres import FAST, open_folder

LIMIT_S = 60
READ = "select (payload ->> 'n')::int from realtime.messages_after('topic', %s)"


def programs(folder: Path) -> tuple[Path, Path]:
    """Copies of those of 16 and of 18, where PostgreSQL's user may walk in."""
    package = bundled_bin().parent.parent
    for part in (package, package.with_name(package.name + ".libs")):
        if part.exists():
            shutil.copytree(part, folder / part.name, symlinks=True)
    old, new = (folder / bundled_bin(major).relative_to(package.parent) for major in (16, 18))
    return old, new


def upgrade(folder: Path, old_bin: Path, new_bin: Path, cluster: Path, password: str) -> None:
    """The cluster, which must have been stopped, becomes one of the new programs, in the same place."""
    owner = cluster.stat()
    work = folder / "work"
    work.mkdir(mode=0o700)
    password_file = work / "password"
    password_file.write_text(password)
    for path in (work, password_file):
        os.chown(path, owner.st_uid, owner.st_gid)

    def run(program: str, *arguments: str | Path) -> None:
        is_root = os.geteuid() == 0
        done = subprocess.run(
            [new_bin / program, *arguments],
            cwd=work,
            env={"PATH": os.defpath, "LC_ALL": "C", "PGPASSWORD": password},
            user=owner.st_uid if is_root else None,
            group=owner.st_gid if is_root else None,
            extra_groups=[] if is_root else None,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    login = ["--username=postgres", f"--pwfile={password_file}", "--auth=scram-sha-256"]
    run("initdb", f"--pgdata={work / 'new'}", "--encoding=UTF8", "--no-sync", "--no-data-checksums", *login)
    places = [f"--old-datadir={cluster}", f"--new-datadir={work / 'new'}", f"--socketdir={work}"]
    run("pg_upgrade", "--username=postgres", "--no-sync", f"--old-bindir={old_bin}", f"--new-bindir={new_bin}", *places)
    # Its port, and that it asks for passwords.
    for name in ("realtime.conf", "pg_hba.conf"):
        shutil.copy(cluster / name, work / "new" / name)
        os.chown(work / "new" / name, owner.st_uid, owner.st_gid)
    with (work / "new" / "postgresql.conf").open("a") as file:
        file.write("\ninclude_if_exists 'realtime.conf'\n")
    cluster.rename(work / "old")
    (work / "new").rename(cluster)


def test_cursor_of_before_an_upgrade_is_told_of_a_gap_and_messages_are_kept() -> None:
    with open_folder() as folder:
        old_bin, new_bin = programs(folder)
        old = EmbeddedPostgres(folder / "data", bin_dir=old_bin, settings=FAST)
        try:
            database = Cluster(old.start().administrator_url).create("core@head")
            database.execute("select realtime.send('{\"n\": 1}', 'e', 'topic', false)")
            ((cursor,),) = database.execute("select realtime.cursor()")
            database.execute("select realtime.send('{\"n\": 2}', 'e', 'topic', false)")
            assert database.execute(READ, cursor) == [(2,)]
        finally:
            old.stop()
        password = str(conninfo.conninfo_to_dict(old.administrator_url)["password"])
        upgrade(folder, old_bin, new_bin, old.location, password)
        new = EmbeddedPostgres(folder / "data", bin_dir=new_bin, settings=FAST)
        try:
            new.start()
            assert database.execute("select current_setting('server_version_num')::int / 10000") == [(18,)]
            with pytest.raises(psycopg.Error, match="gap: the cursor is of another life of this database") as told:
                database.execute(READ, cursor)
            assert told.value.sqlstate == "RT001"
            assert database.execute(READ, told.value.diag.message_detail) == [(1,), (2,)]
            ((place,),) = database.execute("select realtime.cursor()")
            database.execute("select realtime.send('{\"n\": 3}', 'e', 'topic', false)")
            assert database.execute(READ, place) == [(3,)]
        finally:
            new.stop("immediate")
