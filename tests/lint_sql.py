"""Look for holes in the SQL of sql/ with pgspot: above all, definer functions whose names a caller could redirect.

Run by `make lint`; the exit code is 1 when there is a finding that is not in IGNORED.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Every entry holds for all of sql/, so it must stay true: definer functions are still looked at, by PS003 and PS004.
_CALLERS_PATH = (
    "functions without a search_path of their own run with their caller's rights; migrations run with an empty one"
)
IGNORED = {
    "PS001": f"operator without schema: {_CALLERS_PATH}",
    "PS016": f"function without schema: {_CALLERS_PATH}",
    "PS017": f"type without schema: {_CALLERS_PATH}",
    "PS005": "invoker functions have no SET clause, because the caller's policies and triggers would see it",
    "PS002": "create or replace: schema realtime is ours; in public only the owner may create (PostgreSQL 15 and later)",
    "PS010": "create schema if not exists: only the owner of the database may create schemas",
}


def findings(file: Path) -> list[str]:
    done = subprocess.run(
        [Path(sys.executable).with_name("pgspot"), *(f"--ignore={code}" for code in IGNORED), file],
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    # Its last line counts; without that one it did not get through the file.
    if not lines or not re.fullmatch(r"\s*Errors: \d+ Warnings: \d+ Unknown: \d+\s*", lines[-1]):
        return [f"pgspot failed: {done.stderr.strip() or done.stdout.strip()}"]
    return lines[:-1] or ([] if done.returncode == 0 else [lines[-1].strip()])


def main() -> int:
    files = sorted((ROOT / "sql").rglob("*.sql"))
    found = [f"{file.relative_to(ROOT)}: {finding}" for file in files for finding in findings(file)]
    print("\n".join(found) or f"pgspot: {len(files)} files, nothing found")
    return 1 if found or not files else 0


if __name__ == "__main__":
    sys.exit(main())
