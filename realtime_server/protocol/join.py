"""Parses the payload of `phx_join`, as tolerantly as clients rely on.

A field of the wrong type never fails a join: it gets its default and is named in `problems`, for the log; its siblings still apply.
Fields that are too large do fail it: `loads` checks sizes and counts before it parses.

Source: Supabase Realtime `Realtime.Channels.Join` (schema and casts).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import msgspec

from realtime_server.errors import InvalidBinding, PayloadTooLarge
from realtime_server.protocol.messages import Format, dumps

DEFAULT_WAIT_MS: Final = 15_000
MAX_WAIT_MS: Final = 20_000

MAX_BINDINGS: Final = 100
# For each field that is not a string.
MAX_FIELD_BYTES: Final = 65_536
MAX_KEY_BYTES: Final = 255
# The JavaScript client throws at these: it takes an object with the key `ids` for a row change, and every object has the others.
_UNUSABLE_KEYS: Final = frozenset(
    {
        "ids",
        "__defineGetter__",
        "__defineSetter__",
        "__lookupGetter__",
        "__lookupSetter__",
        "__proto__",
        "constructor",
        "hasOwnProperty",
        "isPrototypeOf",
        "propertyIsEnumerable",
        "toLocaleString",
        "toString",
        "valueOf",
    }
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Join:
    """The options of a join. `presence_key` is None where the server generates one. `replay` is the client's object, not parsed further.

    `bindings` are the elements of `postgres_changes`, each as encoded JSON.

    `wait_ms`: how long the reply may wait for the subscription to row changes; None where it does not wait.
    """

    private: bool = False
    ack: bool = False
    receive_own: bool = False
    with_cursor: bool = False
    replication_ready: bool = False
    has_replay: bool = False
    replay: dict[str, Any] = field(default_factory=dict)
    presence_enabled: bool = False
    presence_key: str | None = None
    bindings: tuple[bytes, ...] = ()
    wait_ms: int | None = None
    access_token: str | None = None
    user_token: str | None = None
    problems: tuple[str, ...] = field(default=(), compare=False)

    @property
    def token(self) -> str | None:
        """The token that identifies the channel; None if the connection's API key does."""
        if (self.access_token or self.user_token or "").startswith("sb_"):
            return None
        return self.user_token if self.user_token is not None else self.access_token

    def settled(self) -> Join:
        """Return a copy with only the fields that are needed after the join."""
        return replace(self, replay={}, bindings=(), access_token=None, user_token=None, problems=())


_NULL: Final = msgspec.Raw(b"null")


class _Payload(msgspec.Struct):
    config: msgspec.Raw = _NULL
    access_token: msgspec.Raw = _NULL
    user_token: msgspec.Raw = _NULL


class _Config(msgspec.Struct):
    private: msgspec.Raw = _NULL
    broadcast: msgspec.Raw = _NULL
    presence: msgspec.Raw = _NULL
    postgres_changes: msgspec.Raw = _NULL
    postgres_changes_options: msgspec.Raw = _NULL


def loads(text: bytes) -> dict[str, Any] | None:
    """Decode the fields of a join payload that `parse` needs; None if it is not JSON. Raises: InvalidBinding, PayloadTooLarge."""
    try:
        payload = msgspec.json.decode(text, type=_Payload)
        fields = _values(payload)
        if bytes(payload.config).startswith(b"{"):
            fields["config"] = _values(msgspec.json.decode(payload.config, type=_Config))
    except (msgspec.DecodeError, RecursionError):
        return None
    return fields


def _values(fields: _Payload | _Config) -> dict[str, Any]:
    """Decode each field, except an object `config`, after checking its size."""
    values: dict[str, Any] = {}
    for name in fields.__struct_fields__:
        text = bytes(getattr(fields, name))
        if name == "config" and text.startswith(b"{"):
            continue
        if name == "postgres_changes" and text.startswith(b"["):
            _check_bindings(text)
        elif len(text) > MAX_FIELD_BYTES and not text.startswith(b'"'):
            raise PayloadTooLarge
        values[name] = msgspec.json.decode(text)
    return values


def _check_bindings(text: bytes) -> None:
    if len(text) > MAX_FIELD_BYTES:
        raise InvalidBinding(f"The bindings of postgres_changes of a channel have at most {MAX_FIELD_BYTES} bytes")
    if len(msgspec.json.decode(text, type=list[msgspec.Raw])) > MAX_BINDINGS:
        raise InvalidBinding(f"A channel has at most {MAX_BINDINGS} bindings of postgres_changes")


def parse(payload: dict[str, Any] | None, format: Format) -> Join:
    """Parse a join payload; None (not an object) counts as empty."""
    reader = _Reader()
    payload = payload or {}
    config = reader.mapping(payload, "config")
    broadcast = reader.mapping(config, "broadcast")
    presence = reader.mapping(config, "presence")
    changes = reader.mapping(config, "postgres_changes_options")
    wait_ms = min(reader.positive(changes, "timeout", DEFAULT_WAIT_MS), MAX_WAIT_MS)
    return Join(
        private=reader.flag(config, "private"),
        ack=reader.flag(broadcast, "ack"),
        receive_own=reader.flag(broadcast, "self"),
        with_cursor=reader.flag(broadcast, "cursor"),
        replication_ready=reader.flag(broadcast, "replication_ready"),
        has_replay=broadcast.get("replay") is not None,
        replay=reader.mapping(broadcast, "replay"),
        # Clients of version 1.0.0 that do not know `enabled` always want presence; they send the object with only a key.
        presence_enabled=reader.flag(presence, "enabled")
        or (format is Format.V1 and "key" in presence and "enabled" not in presence),
        presence_key=reader.key(presence),
        bindings=reader.bindings(config),
        wait_ms=wait_ms if reader.flag(changes, "wait") else None,
        access_token=reader.text(payload, "access_token"),
        user_token=reader.text(payload, "user_token"),
        problems=tuple(reader.problems),
    )


_DIGITS: Final = re.compile(r"[0-9]{1,18}")


class _Reader:
    """Reads fields of client objects, and records those of the wrong type."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def mapping(self, parent: dict[str, Any], key: str) -> dict[str, Any]:
        value = parent.get(key)
        return value if isinstance(value, dict) else self._default(key, value, "an object", {})

    def flag(self, parent: dict[str, Any], key: str) -> bool:
        match parent.get(key):
            case bool(value):
                return value
            case str(text) if text.lower() in ("true", "false"):
                return text.lower() == "true"
            case other:
                return self._default(key, other, "true or false", False)

    def text(self, parent: dict[str, Any], key: str) -> str | None:
        value = parent.get(key)
        return value if isinstance(value, str) else self._default(key, value, "a string", None)

    def positive(self, parent: dict[str, Any], key: str, default: int) -> int:
        value = parent.get(key)
        if isinstance(value, str) and _DIGITS.fullmatch(value):
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        return self._default(key, value, "a whole number above 0", default)

    def key(self, presence: dict[str, Any]) -> str | None:
        name: str
        match presence.get("key"):
            case None | "":
                return None
            case str(text):
                name = text
            case bool(value):
                name = "true" if value else "false"
            case int(number) | float(number):
                name = str(number)
            case other:
                return self._default("key", other, "a string or a number", None)
        if name in _UNUSABLE_KEYS or len(name.encode()) > MAX_KEY_BYTES:
            expected = f"at most {MAX_KEY_BYTES} bytes, and no name that objects of JavaScript have"
            return self._default("key", name, expected, None)
        return name

    def bindings(self, config: dict[str, Any]) -> tuple[bytes, ...]:
        value = config.get("postgres_changes")
        if not isinstance(value, list):
            return self._default("postgres_changes", value, "a list", ())
        return tuple(dumps(binding) for binding in value if isinstance(binding, dict))

    def _default(self, key: str, value: object, expected: str, default: T) -> T:
        if value is not None:
            self.problems.append(f"{key}: expected {expected}, got {type(value).__name__}")
        return default
