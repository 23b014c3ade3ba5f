"""Writes the parts of the documentation that the code says best: `errors.md` and `settings.md`. Run by `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from realtime_server import errors
from realtime_server.config import Settings
from realtime_server.errors import EmbeddedError, FunctionsMismatch, RealtimeError, SchemaMismatch, SettingsError

FOLDER = Path(__file__).parent
# Said by commands to who runs them, never to clients.
NOT_ON_THE_WIRE = (SettingsError, SchemaMismatch, FunctionsMismatch, EmbeddedError)


def errors_page() -> str:
    rows = [
        f"| `{error.code}` | {error.status} | {' '.join((error.__doc__ or '').split())} |"
        for error in _leaves(RealtimeError)
        if not issubclass(error, NOT_ON_THE_WIRE)
    ]
    return "\n".join(
        [
            "# Errors that clients see",
            "",
            "The reply to a refused join carries `<code>: <sentence>` as its `reason`, and so does that to any other push, where there is",
            "more to say than the code. REST and refused handshakes carry the sentence and the HTTP status; REST endpoints of this",
            "server's own (`/stream`, `/messages`) carry the code as well. The code is stable, the sentence may change. Several errors",
            "share a code where Supabase Realtime has but one.",
            "",
            "| code | HTTP | when, and what to do |",
            "| --- | --- | --- |",
            *sorted(rows, key=str.lower),
            "",
            "Sockets are closed with: 1000 after silence or without channels for long, 1001 after too many joins, 1008 after too many",
            "frames a second for too long, too many fragments in one message or a message that is not completed in time, 1009 for a",
            "frame that is too large, 1012 when the server restarts (come again), 1013 when the client reads too slowly (come again and",
            "resume by cursor) or when the server holds too many unfinished messages (come again later).",
            "",
        ]
    )


def settings_page() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        variable = f"`REALTIME_{name.upper()}`"
        default = _shown(field.get_default(call_default_factory=False))
        rows.append(f"| {variable} | {default} | {field.description} |")
    return "\n".join(
        [
            "# Settings",
            "",
            "Environment variables, also read from `.env` in the working directory. Sizes are bytes, durations seconds, lists are",
            "separated by commas. `DATABASE_URL` is honoured where `REALTIME_DATABASE_URL` is not set.",
            "",
            "| variable | default | meaning |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _leaves(error: type[RealtimeError]) -> Iterator[type[RealtimeError]]:
    below = [child for child in error.__subclasses__() if child.__module__ == errors.__name__]
    if not below:
        yield error
    for child in below:
        yield from _leaves(child)


def _shown(value: object) -> str:
    match value:
        case None | () | "":
            return ""
        case tuple():
            return f"`{','.join(map(str, value))}`"
        case timedelta():
            return f"`{int(value.total_seconds())}`"
        case float() if value.is_integer():
            return f"`{int(value)}`"
        case _:
            return f"`{value}`" if str(value) not in ("{}",) else ""


PAGES = {"errors.md": errors_page, "settings.md": settings_page}

if __name__ == "__main__":
    for file, page in PAGES.items():
        (FOLDER / file).write_text(page(), encoding="utf-8")
