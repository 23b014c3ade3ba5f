"""Issues and opens tickets, which replace the token in the URL of an `EventSource`, because that sends no headers.

A ticket is the token, encrypted with a key that only servers with the same secret have. So no server stores it: the same ticket opens the
stream again after a lost connection, after a restart and on another server, and the token is verified each time. Anyone with a ticket can
receive its streams until it or its token expires, and do nothing else. A ticket that was issued for the parameters of a stream opens no
other stream.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Final

import msgspec
from cryptography.fernet import Fernet, InvalidToken
from msgspec import Meta
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from realtime_server.claims import Claims
from realtime_server.endpoints.caller import CodedRefusal, error_response, token_of
from realtime_server.endpoints.openapi import Operation, documented
from realtime_server.errors import InvalidTicket, RealtimeError
from realtime_server.services import Verify

# The parameters of a stream that a ticket may be bound to.
STREAM_PARAMETERS: Final = ("topic", "private", "event", "schema", "table", "filter", "select")


class Ticket(msgspec.Struct):
    ticket: str
    expires_in: Annotated[int, Meta(description="seconds")]


TICKET: Final = Operation(
    summary="Trade a token for a ticket, which opens event streams without headers",
    answers={200: ("the ticket", Ticket), 401: ("no valid token", CodedRefusal)},
    needs_token=True,
)


class _Ticket(msgspec.Struct, array_like=True):
    token: str
    # Digest of the stream's parameters; None where the ticket opens any stream.
    stream: bytes | None


class Tickets:
    """Issues and opens tickets, valid for `lifetime_s`. Without a `secret` they are valid in this process only."""

    def __init__(self, secret: str | None, lifetime_s: float, clock: Callable[[], float] = time.time) -> None:
        key = (
            secrets.token_bytes(32)
            if secret is None
            else hmac.digest(secret.encode(), b"event stream tickets", "sha256")
        )
        self._cipher = Fernet(base64.urlsafe_b64encode(key))
        self._lifetime_s = int(lifetime_s)
        self._clock = clock

    def issue(self, token: str, claims: Claims, query: QueryParams) -> tuple[str, int]:
        """Make a ticket for a verified token; returns it and how many seconds it is valid."""
        now = self._clock()
        ticket = msgspec.json.encode(_Ticket(token, _digest(query)))
        expires_in = min(self._lifetime_s, int(claims.expires_at - now))
        return self._cipher.encrypt_at_time(ticket, int(now)).decode(), expires_in

    def open(self, ticket: str, query: QueryParams) -> str:
        """Decrypt the token of a ticket; the caller has to verify it. Raises: InvalidTicket."""
        try:
            text = self._cipher.decrypt_at_time(
                ticket.encode(errors="surrogatepass"), self._lifetime_s, int(self._clock())
            )
        except InvalidToken:
            raise InvalidTicket from None
        opened = msgspec.json.decode(text, type=_Ticket)
        if opened.stream not in (None, _digest(query)):
            raise InvalidTicket
        return opened.token


def ticket_endpoint(verify: Verify, tickets: Tickets) -> Callable[[Request], Awaitable[Response]]:
    @documented(TICKET)
    async def endpoint(request: Request) -> Response:
        try:
            token = token_of(request)
            claims = await verify(token)
        except RealtimeError as error:
            return error_response(error)
        ticket, expires_in = tickets.issue(token, claims, request.query_params)
        return JSONResponse({"ticket": ticket, "expires_in": expires_in}, headers={"Cache-Control": "no-store"})

    return endpoint


def _digest(query: QueryParams) -> bytes | None:
    parameters = sorted((name, value) for name, value in query.multi_items() if name in STREAM_PARAMETERS)
    return hashlib.sha256(repr(parameters).encode(errors="surrogatepass")).digest() if parameters else None
