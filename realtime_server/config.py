"""Defines every setting: environment variable (prefix `REALTIME_`), default, bounds and unit. The server reads no other variables.

Sizes are in bytes, durations in seconds.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, DotEnvSettingsSource, NoDecode, SettingsConfigDict

from realtime_server.errors import SettingsError

TokenList = Annotated[tuple[str, ...], NoDecode]
SecretList = Annotated[tuple[SecretStr, ...], NoDecode]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="REALTIME_", env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True
    )

    database_url: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("REALTIME_DATABASE_URL", "DATABASE_URL"),
        description="PostgreSQL to serve; unset: the embedded one",
    )
    jwt_secret: SecretStr | None = Field(
        None, description="shared secret of HS256, HS384 and HS512 tokens, at least 32 bytes"
    )
    jwks_url: str | None = Field(
        None, description="JWK set of RS*, ES* and EdDSA tokens, http or https: the issuer's /.well-known/jwks.json"
    )
    jwt_claims: Annotated[Mapping[str, Any], NoDecode] = Field(
        {}, description='claims that every token must carry with exactly these values, as JSON: {"iss": "..."}'
    )
    publishable_keys: SecretList = Field((), description="opaque API keys (sb_publishable_...) of role anon, by comma")
    secret_keys: SecretList = Field(
        (), description="opaque API keys (sb_secret_...) of role service_role, by comma, each at least 32 bytes"
    )
    anon_key: SecretStr | None = Field(None, description="API key of role anon; unset: made from the secret")
    service_key: SecretStr | None = Field(None, description="API key of role service_role; unset: made from the secret")
    metrics_jwt_secret: SecretStr | None = Field(
        None, description="secret of the tokens that may read /metrics; unset: keys and tokens of role service_role may"
    )
    roles: TokenList = Field(
        ("anon", "authenticated", "service_role"), description="database roles that tokens may name, by comma"
    )
    wakeup: Literal["auto", "notify", "poll"] = Field(
        "auto",
        description="how the relay learns of messages: NOTIFY, or polling, which works through a transaction pooler",
    )
    changes: Literal["auto", "wal", "trigger"] = Field(
        "auto",
        description="where row changes come from: the log (wal), capture triggers, or the log where it can be read",
    )
    strict_deletes: bool = Field(
        False,
        description="withhold a DELETE from roles that row-level security binds if the deleted row is not known (replica identity default,"
        " from the log); otherwise they get its key",
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(4000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    data_dir: Path = Field(
        Path(".realtime"),
        description="folder of the embedded PostgreSQL, of the secret and of `server.json`, by which commands find the running server",
    )
    demo: bool = Field(
        False,
        description="give the anon key to everybody who opens the start page, as with the embedded database; else users enter it",
    )
    allowed_origins: TokenList = Field(("*",), description="origins that browsers may connect from, by comma")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="lowest level that is logged")
    max_client_log_lines_per_second: float = Field(
        50,
        ge=0,
        description="log lines below level error that clients cause, ten times as many at once; more are only counted; 0: no limit",
    )

    max_frame_bytes: int = Field(5_000_000, ge=1_000, description="larger frames of a client close its socket (1009)")
    max_body_bytes: int = Field(8_000_000, ge=1_000, description="larger REST bodies are refused (413)")
    max_query_parameters: int = Field(
        300, ge=10, description="parameters in the query string of a request; more are refused (400)"
    )
    max_batch_messages: int = Field(
        1000, ge=1, le=10_000, description="messages in one REST batch; larger batches are refused (422)"
    )
    max_payload_bytes: int = Field(3_000_500, ge=1_000, description="larger payloads of clients are refused")
    max_channels_per_socket: int = Field(100, ge=1, description="further joins are refused")
    max_buffered_bytes: int = Field(
        8_000_000, ge=100_000, description="unsent bytes of one socket; a slower reader is closed (1013)"
    )
    max_unsent_bytes: int = Field(
        256_000_000,
        ge=1_000_000,
        description="unsent bytes of all sockets and event streams, each frame once; beyond, the reader with most unsent bytes for longest"
        " is closed (1013)",
    )
    max_pending_messages: int = Field(
        1000, ge=1, description="messages of one channel that may wait for its join or its authorization"
    )
    max_depth: int = Field(64, ge=1, description="frames whose payload nests deeper are dropped, on REST refused (422)")
    max_fragments: int = Field(2000, ge=1, description="fragments of one message; more close the socket (1008)")
    message_timeout_s: float = Field(
        60.0,
        gt=0,
        description="a socket that begins a message and does not complete it within this time is closed (1008)",
    )
    max_partial_bytes: int = Field(
        64_000_000,
        ge=1_000_000,
        description="incomplete messages of all sockets; beyond, the socket with most such bytes for longest is closed (1013)",
    )
    max_messages_per_second: float = Field(
        1000,
        ge=0,
        description="frames of one socket, twice as many at once; more end the channel, and ten seconds' worth too many close the"
        " socket (1008); 0: no limit",
    )
    max_token_refreshes_per_second: float = Field(
        10,
        ge=0,
        description="tokens that one socket may give its channels; more wait, the newest of each channel; 0: no limit",
    )
    max_events_per_second: float = Field(
        0,
        ge=0,
        description="messages and deliveries of the server on average; more end the receiving channels, REST answers 429; 0: no limit",
    )
    max_joins_per_second: float = Field(5000, ge=0, description="joins of the server on average; 0: no limit")
    max_presence_events_per_second: float = Field(
        0, ge=0, description="presence messages of the server on average; 0: no limit"
    )
    max_presence_calls: int = Field(100, ge=0, description="presence pushes of one channel in a window; 0: no limit")
    presence_window_s: float = Field(30.0, gt=0, description="length of that window")
    max_presence_entry_bytes: int = Field(
        16_384, ge=100, description="larger entries of presence are refused, as JSON and without the key"
    )
    max_presence_bytes_per_socket: int = Field(
        262_144, ge=100, description="entries and keys of all channels of one socket; a larger track is refused"
    )
    max_presence_bytes_per_topic: int = Field(
        4_000_000, ge=100, description="entries and keys of one topic, at one server; a larger track is refused"
    )
    max_sockets: int = Field(0, ge=0, description="sockets and event streams, more are refused (429); 0: no limit")
    max_users: int = Field(0, ge=0, description="sockets that have joined a channel, and event streams; 0: no limit")
    no_channel_timeout_s: float = Field(
        600.0, gt=0, description="a socket without a channel for this long is closed (1000)"
    )
    max_idempotency_keys: int = Field(
        50_000, ge=1, description="REST requests with an Idempotency-Key that are remembered, about 300 bytes each"
    )
    idempotency_s: float = Field(
        600.0, gt=0, description="a request with a repeated Idempotency-Key is not sent again for this long"
    )
    ticket_s: float = Field(
        3600.0, ge=1, description="a ticket of an event stream is valid for this long, or until its token expires"
    )
    private_only: bool = Field(False, description="refuse joins of public topics")
    retention: timedelta = Field(timedelta(hours=72), description="how long messages are kept, in seconds or ISO 8601")
    idle_timeout_s: float = Field(60.0, gt=0, description="a socket that sends nothing for this long is closed (1000)")
    drain_timeout_s: float = Field(5.0, gt=0, description="time for sockets to close when the server stops")
    policy_timeout_s: float = Field(
        5.0,
        gt=0,
        description="limit for evaluating row-level security: for one topic of one client, or for row changes",
    )
    filter_budget_s: float = Field(
        1.0,
        ge=0,
        description="time that slow patterns in filters of one client may take in a minute; three times as much for all clients with its"
        " claims; then further ones are refused; 0: no limit",
    )
    database_timeout_s: float = Field(
        5.0,
        gt=0,
        description="limit for getting a database connection, also for joins during the start; the relay's queries have twice as long",
    )

    @property
    def opaque_keys(self) -> dict[str, str]:
        """Map each opaque API key to its role. A key in both lists gets the lesser role."""
        return {
            **{key.get_secret_value(): "service_role" for key in self.secret_keys},
            **{key.get_secret_value(): "anon" for key in self.publishable_keys},
        }

    @field_validator("roles", "allowed_origins", "publishable_keys", "secret_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("jwt_claims", mode="before")
    @classmethod
    def _object(cls, value: object) -> object:
        if isinstance(value, str):
            try:
                value = msgspec.json.decode(value)
            except (ValueError, RecursionError):
                value = None
        if not isinstance(value, Mapping):
            raise ValueError('must be a JSON object, such as {"iss": "https://issuer.example"}')
        return value

    @field_validator("jwks_url")
    @classmethod
    def _web_address(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("must be an address that starts with http:// or https://")
        return value

    @field_validator("publishable_keys", "secret_keys")
    @classmethod
    def _opaque(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not all(key.get_secret_value().startswith("sb_") for key in value):
            raise ValueError("each key must start with sb_")
        return value

    @field_validator("secret_keys")
    @classmethod
    def _hard_to_guess(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(key.get_secret_value().encode()) < 32 for key in value):
            raise ValueError("each key must have at least 32 bytes")
        return value

    @field_validator("jwt_secret", "metrics_jwt_secret")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value().encode()) < 32:
            raise ValueError("the secret must have at least 32 bytes")
        return value


def load() -> Settings:
    """Read the settings from the environment and `.env`. Raises: SettingsError that names each wrong setting, without its value."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"{_variable(item['loc'])}: {item['msg']}" for item in error.errors(include_input=False)]
        raise SettingsError("; ".join(lines)) from None


def unknown_variables() -> dict[str, str | None]:
    """Return variables of the environment and `.env` that begin like settings but are none, each with the most similar setting."""
    given = {name.lower() for name in (*os.environ, *DotEnvSettingsSource(Settings).env_vars)}
    names = {name.removeprefix("realtime_") for name in given if name.startswith("realtime_")}
    known = list(Settings.model_fields)
    unknown = {name: difflib.get_close_matches(name, known, n=1) for name in sorted(names.difference(known))}
    return {_variable((name,)): _variable((found[0],)) if found else None for name, found in unknown.items()}


def _variable(location: tuple[int | str, ...]) -> str:
    name = str(location[0])
    return name if name.startswith(("REALTIME_", "DATABASE_")) else f"REALTIME_{name.upper()}"
