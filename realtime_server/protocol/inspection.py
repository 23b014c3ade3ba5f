"""Formats values from clients like Elixir's `inspect`: Supabase Realtime's sentences contain them, and applications compare sentences.

Any result can be sent as JSON and logged: characters that cannot be printed are escaped, and the length is limited. Numbers are formatted
like in Python. Source: Elixir, protocol Inspect (BitString, List, Map, Tuple).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

MAX_CHARS: Final = 1000
_MAX_DEPTH: Final = 8
_MAX_INTEGER_BITS: Final = 1024

_SPECIAL: Final = re.compile(r'["\\]|#(?=\{)')
_NAMED: Final = {
    "\0": r"\0",
    "\a": r"\a",
    "\b": r"\b",
    "\t": r"\t",
    "\n": r"\n",
    "\v": r"\v",
    "\f": r"\f",
    "\r": r"\r",
    "\x1b": r"\e",
    "\x7f": r"\d",
}


def inspect(value: object) -> str:
    """Format `value` (None, boolean, number, string, list, tuple, mapping) in at most MAX_CHARS characters, and `...` if it is cut off."""
    text = ""
    for part in _parts(value, 0):
        text += part
        if len(text) > MAX_CHARS:
            return text[:MAX_CHARS] + "..."
    return text


def printable(text: str) -> str:
    """Return `text` without quotes around it, with unprintable characters escaped, and cut off if it is too long."""
    shown = _escaped(text[: MAX_CHARS + 1])
    return shown if len(shown) <= MAX_CHARS else shown[:MAX_CHARS] + "..."


def _parts(value: object, depth: int) -> Iterator[str]:
    match value:
        case None:
            yield "nil"
        case bool():
            yield "true" if value else "false"
        case str():
            # The limit of the whole text would cut off the rest anyway.
            yield '"' + _escaped(_SPECIAL.sub(r"\\\g<0>", value[: MAX_CHARS + 1])) + '"'
        case int() if value.bit_length() > _MAX_INTEGER_BITS:
            yield "..."
        case int() | float():
            yield str(value)
        case _ if depth == _MAX_DEPTH:
            yield "..."
        case list() | tuple():
            opening, closing = "[]" if isinstance(value, list) else "{}"
            yield opening
            for position, item in enumerate(value):
                yield ", " if position else ""
                yield from _parts(item, depth + 1)
            yield closing
        case dict():
            yield "%{"
            for position, key in enumerate(sorted(value)):
                yield ", " if position else ""
                yield from _parts(key, depth + 1)
                yield " => "
                yield from _parts(value[key], depth + 1)
            yield "}"
        case _:
            yield "..."


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _NAMED.get(char) or f"\\x{{{ord(char):X}}}" for char in text)
