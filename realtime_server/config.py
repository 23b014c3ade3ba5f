"""Every setting: its environment variable (prefix `REALTIME_`), default, bound and unit. Nothing else reads the environment.

Sizes are bytes, durations are seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from realtime_server.errors import SettingsError

TokenList = Annotated[tuple[str, ...], NoDecode]


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
    anon_key: SecretStr | None = Field(None, description="API key of role anon; unset: made from the secret")
    service_key: SecretStr | None = Field(None, description="API key of role service_role; unset: made from the secret")
    roles: TokenList = Field(
        ("anon", "authenticated", "service_role"), description="database roles that tokens may name, by comma"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(4000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    data_dir: Path = Field(Path(".realtime"), description="folder of the embedded PostgreSQL and of the secret")
    allowed_origins: TokenList = Field(("*",), description="origins that browsers may connect from, by comma")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="least level that is logged")

    max_frame_bytes: int = Field(5_000_000, ge=1_000, description="larger frames of a client close its socket (1009)")
    max_body_bytes: int = Field(8_000_000, ge=1_000, description="larger REST bodies are refused (413)")
    max_payload_bytes: int = Field(3_000_500, ge=1_000, description="larger payloads of clients are refused")
    max_channels_per_socket: int = Field(100, ge=1, description="further joins are refused")
    max_buffered_bytes: int = Field(
        8_000_000, ge=100_000, description="unsent bytes of one socket; a slower reader is closed (1013)"
    )
    max_pending_messages: int = Field(
        1000, ge=1, description="messages of one channel that may wait for its join or its authorization"
    )
    max_depth: int = Field(64, ge=1, description="frames whose payload nests deeper are dropped")
    max_messages_per_second: float = Field(
        1000, ge=0, description="pushes of one socket, twice as many at once; more end the channel; 0: no limit"
    )
    max_events_per_second: float = Field(
        0,
        ge=0,
        description="messages and deliveries of the server on average; more end the receiving channels; 0: no limit",
    )
    max_joins_per_second: float = Field(1000, ge=0, description="joins of the server on average; 0: no limit")
    max_presence_events_per_second: float = Field(
        0, ge=0, description="presence messages of the server on average; 0: no limit"
    )
    max_presence_calls: int = Field(100, ge=0, description="presence pushes of one channel in a window; 0: no limit")
    presence_window_s: float = Field(30.0, gt=0, description="length of that window")
    max_users: int = Field(0, ge=0, description="sockets that have joined a channel; 0: no limit")
    no_channel_timeout_s: float = Field(
        600.0, gt=0, description="a socket without a channel for so long is closed (1000)"
    )
    private_only: bool = Field(False, description="refuse joins of public topics")
    idle_timeout_s: float = Field(60.0, gt=0, description="a socket that sends nothing for so long is closed (1000)")
    drain_timeout_s: float = Field(5.0, gt=0, description="time for sockets to close when the server stops")
    policy_timeout_s: float = Field(5.0, gt=0, description="longest evaluation of row-level security for a join")
    database_timeout_s: float = Field(5.0, gt=0, description="longest wait for a database connection")

    @field_validator("roles", "allowed_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("jwt_secret")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value().encode()) < 32:
            raise ValueError("the secret must have at least 32 bytes")
        return value


def load() -> Settings:
    """Settings from the environment and `.env`. Raises: SettingsError, one line a wrong setting, values not repeated."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"{_variable(item['loc'])}: {item['msg']}" for item in error.errors(include_input=False)]
        raise SettingsError("; ".join(lines)) from None


def _variable(location: tuple[int | str, ...]) -> str:
    name = str(location[0])
    return name if name.startswith(("REALTIME_", "DATABASE_")) else f"REALTIME_{name.upper()}"
