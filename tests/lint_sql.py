"""Look for holes in the SQL of sql/ with pgspot: above all, definer functions whose names a caller could redirect.

Run by `make lint`; the exit code is 1 when there is a finding that is not in IGNORED.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Every entry holds for all of sql/, so it must stay true: definer functions are still looked at, by PS003 and PS004.
_CALLERS_PATH = (
    "functions without a search_path of their own are parsed when they are created or qualify what counts, which"
    " tests/attacks/test_sql_names.py looks at in the database; migrations run with an empty path"
)
IGNORED = {
    "PS001": f"operator without schema: {_CALLERS_PATH}",
    "PS016": f"function without schema: {_CALLERS_PATH}",
    "PS017": f"type without schema: {_CALLERS_PATH}",
    "PS005": "invoker functions have no SET clause, because the caller's policies and triggers would see it",
    "PS002": "create or replace: schema realtime is ours; in public only the owner may create (PostgreSQL 15 and later)",
    "PS015": "create or replace view: as PS002",
    "PS010": "create schema if not exists: only the owner of the database may create schemas",
}


def pgspot(file: Path, *options: str) -> tuple[list[str], str]:
    """The findings, and what kept it from reading the whole file; empty when nothing did."""
    done = subprocess.run(
        [Path(sys.executable).with_name("pgspot"), *(f"--ignore={code}" for code in IGNORED), *options, file],
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    read_all = not done.stderr.strip() and lines and re.fullmatch(r"\s*Errors: \d+ .*", lines[-1])
    return lines[:-1], "" if read_all else done.stderr.strip() or done.stdout.strip() or "no output"


def findings(file: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        # pgspot knows no bodies that are not strings.
        text = re.sub(r"(?m)^( *)begin atomic$(.*?)^ *end;$", r"\1as $_$\2$_$;", file.read_text(), flags=re.DOTALL)
        text = re.sub(r"(?m)^( *)return (nullif|coalesce)(.*?);$", r"\1as $_$ select \2\3 $_$;", text, flags=re.DOTALL)
        copy = Path(folder) / file.name
        copy.write_text(text)
        found, problem = pgspot(copy)
        if problem:
            # Its parser of PL/pgSQL does not know variables of composite types and records. Without it, the bodies are not looked at,
            # but the functions' headers are, and these are what counts.
            found, problem = pgspot(copy, "--no-plpgsql")
    return [*found, f"pgspot failed: {problem}"] if problem else found


def main() -> int:
    files = sorted((ROOT / "sql").rglob("*.sql"))
    found = [f"{file.relative_to(ROOT)}: {finding}" for file in files for finding in findings(file)]
    print("\n".join(found) or f"pgspot: {len(files)} files, nothing found")
    return 1 if found or not files else 0


if __name__ == "__main__":
    sys.exit(main())
