"""Rights on private topics as tokens claim them, so that a test can say who may do what in one line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.fix_database import TestDatabase
from tests.fix_server import Server, make_token

READ, WRITE = "broadcast:read", "broadcast:write"
READ_PRESENCE, WRITE_PRESENCE = "presence:read", "presence:write"


def grant_rights(database: TestDatabase) -> None:
    """Let row-level security allow what the claim `rights` lists; tokens without it keep no right at all."""
    database.execute(
        "create policy claimed_read on realtime.messages for select to authenticated"
        " using ((select auth.jwt()) -> 'rights' ? (extension || ':read'))"
    )
    database.execute(
        "create policy claimed_write on realtime.messages for insert to authenticated"
        " with check ((select auth.jwt()) -> 'rights' ? (extension || ':write'))"
    )


def token_with(*rights: str, expires_in: float = 3600, **claims: Any) -> str:
    return make_token(rights=rights, expires_in=expires_in, **claims)


def token_of_key(kid: str | None) -> str:
    """A token of an issuer that the servers of the tests know nothing of."""
    key = ec.generate_private_key(ec.SECP256R1())
    payload = {"role": "authenticated", "exp": time.time() + 3600}
    return jwt.encode(payload, key, "ES256", headers={} if kid is None else {"kid": kid})


@pytest.fixture
def rights(shared_server: Server) -> Iterator[None]:
    """Tokens of `token_with` have their rights on the shared server, while the test lasts."""
    grant_rights(shared_server.database)
    yield
    shared_server.database.execute("drop policy claimed_read on realtime.messages")
    shared_server.database.execute("drop policy claimed_write on realtime.messages")
