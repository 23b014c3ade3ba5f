"""What the benchmarks have in common: a database of its own with fsync on, a server process, and how results are printed."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from realtime_server.embedded import EmbeddedPostgres
from tests.fix_database import Cluster, TestDatabase
from tests.fix_server import Server


@contextmanager
def fresh_database(**settings: str) -> Iterator[TestDatabase]:
    """The embedded PostgreSQL as it comes (fsync on), with the core installed."""
    root = Path(tempfile.mkdtemp(prefix="realtime-bench-"))
    root.chmod(0o711)
    postgres = EmbeddedPostgres(root / "data", settings=settings)
    try:
        yield Cluster(postgres.start().administrator_url).create("core@head")
    finally:
        postgres.stop("immediate")
        shutil.rmtree(root)


@asynccontextmanager
async def serving(database: TestDatabase, **settings: str) -> AsyncIterator[Server]:
    async with aclosing(Server(database, **settings)) as server:
        yield await server.start()


def show(title: str, header: list[str], rows: list[list[object]]) -> None:
    """A table in Markdown, as it goes into the docs."""
    print(f"\n### {title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
