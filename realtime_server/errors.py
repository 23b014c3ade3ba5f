"""Defines the errors that clients, operators or the database cause, in one tree.

    RealtimeError
    ├── ProtocolError       MalformedFrame  TopicNameRequired  UnmatchedTopic  PrivateOnly  InvalidBinding  InvalidBroadcast
    │                       UnknownPresenceEvent  InvalidTrack  TooManyParameters
    ├── AuthError           MissingKey  InvalidTicket  MalformedToken  MissingClaims  TokenExpired  TokenNotYetValid  InvalidSignature
    │                       NoSigningKey  InvalidClaims  Unauthorized  SendDenied  TrackDenied  CrossOrigin
    ├── LimitError          TooManyChannels  TooManyUsers  TooManyJoins  PayloadTooLarge  TooManyHeaders  PresenceTooLarge
    ├── Restarting
    ├── DatabaseUnavailable  QueryCanceled  ChangesTimeout
    ├── MalformedCursor  Gap  UnableToReplay  InvalidLimit
    ├── SchemaMismatch
    ├── FunctionsMismatch
    ├── SettingsError
    └── EmbeddedError

`code` is the stable name that clients see in replies (`<code>: <sentence>`, or the code alone); the sentence may change. `status` is the
HTTP status of the same error on REST and at the handshake. Codes and sentences of Supabase Realtime are kept verbatim, because clients
compare them.
"""

from __future__ import annotations

from typing import ClassVar


class RealtimeError(Exception):
    code: ClassVar[str] = "UnknownErrorOnChannel"
    status: ClassVar[int] = 500

    @property
    def reason(self) -> str:
        """The error as replies contain it."""
        return f"{self.code}: {self}" if str(self) else self.code

    @property
    def response(self) -> dict[str, str]:
        """The `response` of a reply with this error."""
        return {"reason": self.reason}


class ProtocolError(RealtimeError):
    status = 400


class MalformedFrame(ProtocolError):
    """A frame is not a message of the protocol version. It is dropped and logged; the socket stays open."""

    code = "MalformedWebSocketMessage"


class TopicNameRequired(ProtocolError):
    """The topic of a join or a request is empty."""

    code = "TopicNameRequired"

    def __str__(self) -> str:
        return "You must provide a topic name"


class UnmatchedTopic(ProtocolError):
    """A message names a topic that this socket has not joined, or that does not start with `realtime:`."""

    code = "unmatched topic"


class PrivateOnly(ProtocolError):
    """A client joined a public topic, and the server allows only private ones (REALTIME_PRIVATE_ONLY)."""

    code = "PrivateOnly"

    def __str__(self) -> str:
        return "This project only allows private channels"


class InvalidBinding(ProtocolError):
    """A subscription to row changes is invalid. A `system` message has the sentence, and the channel stays joined; a join that waits for
    the subscription is refused."""

    code = "RealtimeDisabledForConfiguration"

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)


class InvalidBroadcast(ProtocolError):
    """A broadcast in a text frame is not an object. It is dropped; clients that asked for `ack` get an error reply."""

    code = "payload must be an object"


class UnknownPresenceEvent(ProtocolError):
    """A presence push is not an object, or its event is neither `track` nor `untrack`. The response is `{}`, without the code."""

    code = "UnknownPresenceEvent"

    @property
    def response(self) -> dict[str, str]:
        return {}


class InvalidTrack(ProtocolError):
    """The payload of a `track` is not an object."""

    code = "Presence track payload must be a map"


class TooManyParameters(ProtocolError):
    """The query string has more parameters than REALTIME_MAX_QUERY_PARAMETERS, or an event stream asks for more events than 100."""

    code = "TooManyParameters"

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return f"the request has too many parameters, at most {self.limit} are allowed"


class AuthError(RealtimeError):
    status = 401


class MissingKey(AuthError):
    """The request or the handshake has neither key nor token."""

    code = "MissingAPIKey"

    def __str__(self) -> str:
        return "API key is missing"


class InvalidTicket(AuthError):
    """The ticket of an event stream is older than REALTIME_TICKET_S, or was made for another stream, or by a server with another secret.
    Request a new one."""

    code = "InvalidTicket"

    def __str__(self) -> str:
        return "the ticket is unknown, too old or for another stream"


class MalformedToken(AuthError):
    """The token is not a JWT. Check whether it is truncated or pasted twice."""

    code = "MalformedJWT"

    def __str__(self) -> str:
        return "The token provided is not a valid JWT"


class MissingClaims(AuthError):
    """The token has no `role` or no `exp`."""

    code = "InvalidJWTToken"

    def __str__(self) -> str:
        return "Fields `role` and `exp` are required in JWT"


class TokenExpired(AuthError):
    """The token has expired. Get a new one, and send it to joined channels before the old one expires."""

    code = "InvalidJWTToken"

    def __init__(self, seconds_ago: int) -> None:
        super().__init__(seconds_ago)
        self.seconds_ago = seconds_ago

    def __str__(self) -> str:
        return f"Token has expired {self.seconds_ago} seconds ago"


class TokenNotYetValid(AuthError):
    """The token's `nbf` lies more than a minute in the future. Check the clocks of the issuer and of this server."""

    code = "InvalidJWTToken"

    def __init__(self, seconds_left: int) -> None:
        super().__init__(seconds_left)
        self.seconds_left = seconds_left

    def __str__(self) -> str:
        return f"Token is not valid for another {self.seconds_left} seconds"


class InvalidSignature(AuthError):
    """The token was not signed with a secret or key of this server, or was changed afterwards."""

    code = "JwtSignatureError"

    def __str__(self) -> str:
        return "Failed to validate JWT signature"


class NoSigningKey(AuthError):
    """The server has no key for the token's algorithm (such as `none`) or key id."""

    code = "JwtSignerError"

    def __init__(self, kid: str | None = None) -> None:
        super().__init__(kid)
        self.kid = kid

    def __str__(self) -> str:
        of_key = "" if self.kid is None else f' for key ID (kid) "{self.kid}"'
        return f"Failed to generate JWT signer{of_key}, check your JWT secret or JWKS configuration"


class InvalidClaims(AuthError):
    """A claim has the wrong type or value, or the role is not in REALTIME_ROLES."""

    code = "InvalidJWTToken"

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


class Unauthorized(AuthError):
    """No policy on realtime.messages lets this role and these claims receive on this private topic, or a policy raised an error, which the
    server logs."""

    code = "Unauthorized"
    status = 403

    def __init__(self, topic: str) -> None:
        super().__init__(topic)
        self.topic = topic

    def __str__(self) -> str:
        return f"You do not have permissions to read from this Channel topic: {self.topic}"


class SendDenied(AuthError):
    """No policy on realtime.messages lets this role and these claims send on this private topic. Clients that asked for `ack` get this
    reply."""

    code = "unauthorized"
    status = 403


class TrackDenied(AuthError):
    """No policy on realtime.messages lets this role and these claims track on this private topic. The response is `{}`, without the
    code."""

    code = "UnableToTrackPresence"
    status = 403

    @property
    def response(self) -> dict[str, str]:
        return {}


class CrossOrigin(AuthError):
    """A page of another origin, or under a host name that is not this machine's, requested data that only the server's own pages get."""

    code = "CrossOrigin"
    status = 403

    def __str__(self) -> str:
        return "this is only for pages of the server itself"


class LimitError(RealtimeError):
    status = 429


class TooManyChannels(LimitError):
    """The socket has joined the maximum number of topics. Leave some, or raise REALTIME_MAX_CHANNELS_PER_SOCKET."""

    code = "ChannelRateLimitReached"

    def __str__(self) -> str:
        return "Too many channels"


class TooManyUsers(LimitError):
    """The server has its maximum of sockets, or of those that have joined topics. Retry later."""

    code = "ConnectionRateLimitReached"

    def __str__(self) -> str:
        return "Too many connected users"


class TooManyJoins(LimitError):
    """There are more joins a second than the server allows. Retry with increasing pauses."""

    code = "ClientJoinRateLimitReached"

    def __str__(self) -> str:
        return "Too many joins per second"


class PayloadTooLarge(LimitError):
    """The payload is larger than REALTIME_MAX_PAYLOAD_BYTES, or that of a join than 256,000 bytes."""

    code = "payload_size_exceeded"
    status = 413


class TooManyHeaders(LimitError):
    """The request has more than 100 headers, or the `x-` headers that policies may read are more than 50 or longer than 8 KB."""

    code = "TooManyHeaders"
    status = 431

    def __str__(self) -> str:
        return "the request has too many headers, or its x- headers are too long"


class PresenceTooLarge(LimitError):
    """The entry is larger than REALTIME_MAX_PRESENCE_ENTRY_BYTES, or all entries of the socket or of the topic would be larger than
    REALTIME_MAX_PRESENCE_BYTES_PER_SOCKET or REALTIME_MAX_PRESENCE_BYTES_PER_TOPIC. The channel keeps its previous entry."""

    code = "PresenceSizeExceeded"
    status = 413

    def __init__(self, subject: str, limit: int) -> None:
        super().__init__(subject, limit)
        self.subject = subject
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.subject} at most {self.limit} bytes"


class Restarting(RealtimeError):
    """The server is stopping. Connect again, to another server or to this one after its restart."""

    code = "RealtimeRestarting"
    status = 503

    def __str__(self) -> str:
        return "Realtime is restarting, please standby"


class DatabaseUnavailable(RealtimeError):
    """The request needs the database, which is unreachable at the moment. Public topics and broadcasts between clients still work."""

    code = "UnableToConnectToProject"
    status = 503

    def __str__(self) -> str:
        return "Realtime was unable to connect to the project database"


class QueryCanceled(RealtimeError):
    """A policy took longer than REALTIME_POLICY_TIMEOUT_S, or reading missed messages longer than 30 s."""

    code = "QueryCanceled"
    status = 422

    def __str__(self) -> str:
        return "Query was cancelled, please try again"


class ChangesTimeout(RealtimeError):
    """The subscription to row changes that a join waits for (`postgres_changes_options`) was not established in time. Join again."""

    code = "PostgresChangesSubscribeTimeout"
    status = 503

    def __init__(self, limit_ms: int) -> None:
        super().__init__(limit_ms)
        self.limit_ms = limit_ms

    def __str__(self) -> str:
        return f"Timed out after {self.limit_ms}ms waiting for the postgres_changes subscription"


class MalformedCursor(RealtimeError):
    """The text is not a cursor."""

    code = "MalformedCursor"
    status = 400

    def __str__(self) -> str:
        return "the cursor is malformed, hand it back as it came"


class InvalidLimit(RealtimeError):
    """The requested number of messages is not a number, or out of range."""

    code = "InvalidLimit"
    status = 400

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return f"limit must be a number from 1 to {self.limit}"


class Gap(RealtimeError):
    """Messages after a cursor are no longer kept. The response has the oldest cursor that can be read from, as `cursor`."""

    code = "Gap"
    status = 410

    def __init__(self, problem: str, oldest: str) -> None:
        super().__init__(problem)
        self.oldest = oldest


class UnableToReplay(RealtimeError):
    """The replay that a join requests is not allowed, malformed, or could not be read."""

    code = "UnableToReplayMessages"
    status = 422


class SchemaMismatch(RealtimeError):
    """The database is not at the revision this server was made for."""

    code = "SchemaMismatch"

    def __init__(self, found: str | None, expected: str) -> None:
        super().__init__(found, expected)
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        found = f"is at revision {self.found}" if self.found else "has no realtime schema"
        return f'the database {found}, this server needs {self.expected}: run "realtime-server migrate"'


class FunctionsMismatch(RealtimeError):
    """The database has the tables of this server, but other functions."""

    code = "FunctionsMismatch"

    def __init__(self, branches: list[str]) -> None:
        super().__init__(branches)
        self.branches = branches

    def __str__(self) -> str:
        return (
            f"the database has other SQL functions of {' and '.join(self.branches)} than this server:"
            ' run "realtime-server migrate"'
        )


class SettingsError(RealtimeError):
    """A setting is missing or wrong; the sentence says which and what to do."""

    code = "SettingsError"


class EmbeddedError(RealtimeError):
    """The embedded PostgreSQL does not start or stop; the sentence ends with PostgreSQL's own message if there is one."""

    code = "EmbeddedError"
