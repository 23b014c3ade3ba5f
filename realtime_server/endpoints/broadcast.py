"""Sends broadcasts by REST: a batch of messages, or one message with topic and event in the path. They are never stored.

* `POST /api/broadcast`: an invalid message rejects the whole batch; messages of a valid batch are sent one by one. A private message that
  the caller may not send is dropped and logged, and the response is still 202, which clients of this interface expect.
* `POST /api/broadcast/{topic}/events/{event}`: the body is the unchanged payload: any JSON value, or bytes.

Checks run in this order: body, `Accept`, content type, rate, token, contents, `Idempotency-Key`, rate with these messages, permission.
Source: Supabase Realtime `RealtimeWeb.BroadcastController`, `Realtime.Tenants.BatchBroadcast`. Not adopted from there: a `private` key in
the payload of a single message, payloads wrapped as `_json`, bodies without a content type that count as `{}`.

A request with an `Idempotency-Key` is sent once: a repetition gets the 202 of the first one, or 409 while the first one is still running,
and another request with the same key gets 422. Source: draft-ietf-httpapi-idempotency-key-header.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from enum import Enum, auto
from typing import Annotated, Any, Final, Literal

import msgspec
import structlog
from msgspec import Meta
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from realtime_server.authorization import Policy, PolicyHeaders
from realtime_server.claims import Claims
from realtime_server.config import Settings
from realtime_server.endpoints.caller import error_response, policy_headers, token_of
from realtime_server.endpoints.openapi import BYTES, JSON, Operation, Parameter, documented
from realtime_server.endpoints.sockets import Pace
from realtime_server.errors import AuthError, DatabaseUnavailable, QueryCanceled, TooManyHeaders
from realtime_server.hub import Room
from realtime_server.limits import Rate
from realtime_server.protocol.frames import Broadcast
from realtime_server.protocol.messages import TOPIC_PREFIX, is_deeper_than
from realtime_server.services import Authorize, Verify

log = structlog.get_logger()

MAX_NAME_BYTES: Final = 255
MAX_UNAUTHENTICATED_BYTES: Final = 65_536
BLANK: Final = "can't be blank"
INVALID: Final = "is invalid"
TOO_LARGE: Final = "Payload size exceeds tenant limit"
# How many invalid messages of a batch are described.
MAX_REPORTED: Final = 20
# Work that a batch does before it yields to the event loop: bytes, and messages or deliveries.
SLICE_BYTES: Final = 262_144
SLICE_STEPS: Final = 200
# The approximate size of a frame without names and payload.
FRAME_BYTES: Final = 100

# Not blank, under the definitions of white space of regular expression dialects and of Python.
Name = Annotated[
    str, Meta(pattern=r"[^\s\x1c-\x1f\x85\ufeff]", max_length=MAX_NAME_BYTES, description="at most 255 bytes")
]
Key = Annotated[str, Meta(pattern=r"^[!-~]{1,255}$")]
_KEY_PATTERN: Final = re.compile(r"[!-~]{1,255}")
Binary = Annotated[str, Meta(extra_json_schema={"format": "binary"})]
_NULL: Final = msgspec.Raw(b"null")
_ABSENT: Final = msgspec.Raw()


class _RawBatch(msgspec.Struct):
    """Decodes the body of a batch; unknown keys are skipped."""

    messages: msgspec.Raw = _NULL


class _RawMessage(msgspec.Struct):
    topic: msgspec.Raw = _NULL
    event: msgspec.Raw = _NULL
    id: msgspec.Raw = _NULL
    payload: msgspec.Raw = _NULL
    private: msgspec.Raw = _NULL


class BatchMessage(msgspec.Struct):
    topic: Annotated[Name, Meta(description="without realtime:")]
    event: Name
    payload: dict[str, Any]
    private: bool | Literal["true", "false", "1", "0"] | None = False
    id: Annotated[str, Meta(max_length=MAX_NAME_BYTES, description="arrives as meta.id")] | None = None


class Batch(msgspec.Struct):
    messages: Annotated[list[BatchMessage], Meta(min_length=1, description="at most REALTIME_MAX_BATCH_MESSAGES")]


class Refusal(msgspec.Struct):
    message: str


class UnsupportedType(msgspec.Struct):
    error: str


class BatchErrors(msgspec.Struct):
    """One sentence about the whole batch, or the errors of each field for each message. After 20 invalid messages, one sentence says how
    many more there are."""

    messages: list[str | dict[str, list[str]]]


class InvalidBatch(msgspec.Struct):
    errors: BatchErrors


class InvalidMessage(msgspec.Struct):
    errors: dict[str, list[str]]


_IDEMPOTENCY_KEY: Final = Parameter("Idempotency-Key", "header", Key, "sends a repeated request once; kept for minutes")
_ANSWERS: Final[dict[int, tuple[Any, ...]]] = {
    202: ("accepted",),
    400: ("the body or Idempotency-Key cannot be read", Refusal),
    401: ("no valid token", Refusal),
    406: ("the answer would be JSON, which Accept excludes", Refusal),
    409: ("a request with this Idempotency-Key is running", Refusal),
    413: ("the body is too large", Refusal),
    429: ("too many messages", Refusal),
    431: ("too many headers", Refusal),
}
BATCH: Final = Operation(
    summary="Send messages to subscribers",
    body={JSON: Batch},
    parameters=(_IDEMPOTENCY_KEY,),
    answers={
        **_ANSWERS,
        422: ("the batch is invalid, or Idempotency-Key was used for another request", InvalidBatch, Refusal),
    },
    needs_token=True,
)
SINGLE: Final = Operation(
    summary="Send one message to subscribers; the body is its payload",
    body={JSON: Any, BYTES: Binary},
    parameters=(
        Parameter("topic", "path", Name, "without realtime:"),
        Parameter("event", "path", Name, "what subscribers listen for"),
        Parameter("private", "query", str, "true: to the private topic; anything else: to the public one"),
        _IDEMPOTENCY_KEY,
    ),
    answers={
        **_ANSWERS,
        403: ("the caller may not write to the private topic", Refusal),
        415: ("neither JSON nor bytes", UnsupportedType),
        422: (
            "the message is invalid, permission could not be determined, or Idempotency-Key was used for another request",
            InvalidMessage,
            Refusal,
        ),
        500: ("permission could not be determined", Refusal),
    },
    needs_token=True,
)


class _Slice:
    """Counts work until it is time to yield to the event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = self._steps = 0

    def is_full_with(self, *, bytes_: int, steps: int = 1) -> bool:
        """Count more work; returns whether the slice is full, and then begins the next one."""
        self._bytes += bytes_
        self._steps += steps
        if self._bytes < self._max_bytes and self._steps < SLICE_STEPS:
            return False
        self._bytes = self._steps = 0
        return True


class Seen(Enum):
    """The status of an idempotency key. A request that gets NEW owns the key until `finish` or `forget`."""

    NEW = auto()
    RUNNING = auto()
    ANSWERED = auto()
    REUSED = auto()


class SeenKeys:
    """Keeps digests of the idempotency keys of this process's accepted requests: the last `capacity` ones, for `keep_s`."""

    def __init__(self, *, capacity: int, keep_s: float) -> None:
        self._capacity = capacity
        self._keep_s = keep_s
        # Maps a key to the digest of its request, its expiry, and whether the request was answered.
        self._entries: OrderedDict[bytes, tuple[bytes, float, bool]] = OrderedDict()

    def begin(self, key: bytes, request: bytes, now: float) -> Seen:
        entry = self._entries.get(key)
        if entry is not None and entry[1] > now:
            self._entries.move_to_end(key)
            if entry[0] != request:
                return Seen.REUSED
            return Seen.ANSWERED if entry[2] else Seen.RUNNING
        self._put(key, (request, now + self._keep_s, False))
        return Seen.NEW

    def finish(self, key: bytes, request: bytes, now: float) -> None:
        self._put(key, (request, now + self._keep_s, True))

    def forget(self, key: bytes) -> None:
        self._entries.pop(key, None)

    def __len__(self) -> int:
        return len(self._entries)

    def _put(self, key: bytes, entry: tuple[bytes, float, bool]) -> None:
        self._entries[key] = entry
        self._entries.move_to_end(key)
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)


class HttpError(Exception):
    """Ends a request with an error response."""

    def __init__(self, status: int, message: str | None = None, **body: Any) -> None:
        self.response = JSONResponse(body if message is None else {"message": message}, status)


class BroadcastEndpoints:
    """Implements both endpoints.

    `publish` delivers a message to the subscribers of its room, counts it among the `events`, and returns how many received it. `pace`
    makes a `Pace` for a batch that is too large to be sent without waiting for sockets.
    """

    def __init__(
        self,
        *,
        publish: Callable[[Room, Broadcast], int],
        pace: Callable[[], Pace],
        authorize: Authorize,
        verify: Verify,
        settings: Settings,
        events: Rate,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._publish = publish
        self._pace = pace
        self._authorize = authorize
        self._verify = verify
        self._settings = settings
        self._events = events
        self._clock = clock
        self._array = _array_decoder(settings.max_batch_messages)
        self._keys = SeenKeys(capacity=settings.max_idempotency_keys, keep_s=settings.idempotency_s)

    @documented(BATCH)
    async def send_batch(self, request: Request) -> Response:
        return await _answer(self._batch(request))

    @documented(SINGLE)
    async def send_single(self, request: Request) -> Response:
        return await _answer(self._single(request))

    async def _batch(self, request: Request) -> None:
        body = await self._body(request)
        raw = _decode(body, _RawBatch, "Request body must be a JSON object")
        _check_accept(request)
        claims = await self._caller(request)
        headers = policy_headers(request)
        batch = await self._read(raw.messages)
        with self._once(request, claims, b"batch", body) as is_new:
            if is_new:
                self._check_rate(len(batch))
                await self._send(batch, claims, headers)

    async def _read(self, raw: msgspec.Raw) -> list[tuple[Room, Broadcast]]:
        """Parse the messages of a batch, and sort them: public ones first, then private ones by topic."""
        batch: list[tuple[Room, Broadcast]] = []
        errors: list[str | dict[str, list[str]]] = []
        invalid = 0
        part = _Slice(SLICE_BYTES)
        for item in self._items(raw):
            result = _read_message(item, self._settings)
            if isinstance(result, tuple):
                batch.append(result)
            invalid += isinstance(result, dict)
            if invalid <= MAX_REPORTED:
                errors.append(result if isinstance(result, dict) else {})
            if part.is_full_with(bytes_=len(bytes(item))):
                await asyncio.sleep(0)
        if invalid > MAX_REPORTED:
            errors.append(f"{invalid - MAX_REPORTED} more messages are invalid")
        if invalid:
            raise _invalid_batch(*errors)
        return sorted(batch, key=lambda entry: (entry[0].private, entry[0].topic if entry[0].private else ""))

    def _items(self, raw: msgspec.Raw) -> list[msgspec.Raw]:
        """Split the array into undecoded elements; parsing stops at the first element over the limit."""
        text = bytes(raw)
        if text == b"null":
            raise _invalid_batch(BLANK)
        if not text.startswith(b"["):
            raise _invalid_batch(INVALID)
        try:
            elements = msgspec.structs.astuple(self._array.decode(raw))
        except msgspec.ValidationError:
            raise _invalid_batch(f"should have at most {self._settings.max_batch_messages} item(s)") from None
        items = [element for element in elements if element is not _ABSENT]
        if not items:
            raise _invalid_batch(BLANK)
        return items

    async def _send(self, batch: list[tuple[Room, Broadcast]], claims: Claims, headers: PolicyHeaders) -> None:
        policies: dict[str, Policy | None] = {}
        # A slice is a quarter of the limit of a socket's buffer, so a socket that reads each slice never exceeds it.
        slice_bytes = self._settings.max_buffered_bytes // 4
        part = _Slice(slice_bytes)
        pace = self._pace() if sum(_size(broadcast) for _, broadcast in batch) > slice_bytes else None
        for room, broadcast in batch:
            if room.private:
                topic = room.topic.removeprefix(TOPIC_PREFIX)
                if topic not in policies:
                    policies[topic] = await self._policy_or_none(topic, claims, headers)
                policy = policies[topic]
                if policy is None or not policy.can_write_broadcast:
                    log.warning("private broadcast dropped", topic=topic, role=claims.role)
                    continue
            delivered = self._publish(room, broadcast)
            if part.is_full_with(bytes_=_size(broadcast), steps=1 + delivered):
                await (asyncio.sleep(0) if pace is None else pace.wait())

    async def _policy_or_none(self, topic: str, claims: Claims, headers: PolicyHeaders) -> Policy | None:
        try:
            return await self._authorize(topic, claims, headers)
        except (DatabaseUnavailable, QueryCanceled) as error:
            log.warning("private broadcast could not be authorized", topic=topic, code=error.code)
            return None

    async def _single(self, request: Request) -> None:
        topic, event = request.path_params["topic"], request.path_params["event"]
        private = request.query_params.get("private") == "true"
        media_type = _media_type(request)
        payload = body = await self._body(request)
        if media_type == JSON:
            payload = bytes(_decode(body, msgspec.Raw, "Request body must be JSON"))
        _check_accept(request)
        if media_type not in (JSON, BYTES):
            raise HttpError(415, error=f"Unsupported Media Type. Use {JSON} or {BYTES}")
        claims = await self._caller(request)
        headers = policy_headers(request)
        is_json = media_type == JSON
        # Bytes need binary frames, which have one byte for the length of the topic with its prefix.
        errors = _name_errors("topic", topic, MAX_NAME_BYTES - (0 if is_json else len(TOPIC_PREFIX)))
        errors |= _name_errors("event", event, MAX_NAME_BYTES)
        if len(payload) > self._settings.max_payload_bytes:
            errors["payload"] = [TOO_LARGE]
        elif is_json and is_deeper_than(payload, self._settings.max_depth):
            errors["payload"] = [INVALID]
        if errors:
            raise HttpError(422, errors=errors)
        with self._once(request, claims, repr((topic, event, private, is_json)).encode(), body) as is_new:
            if is_new:
                self._check_rate()
                if private and not (await self._policy(topic, claims, headers)).can_write_broadcast:
                    raise HttpError(403, "Unauthorized")
                room = Room(TOPIC_PREFIX + topic, private)
                self._publish(room, Broadcast(room.topic, event, payload, is_json=is_json))

    async def _policy(self, topic: str, claims: Claims, headers: PolicyHeaders) -> Policy:
        try:
            return await self._authorize(topic, claims, headers)
        except DatabaseUnavailable:
            raise HttpError(422, "Tenant database unavailable") from None
        except QueryCanceled:
            raise HttpError(422, "Query canceled") from None
        except Exception:
            log.exception("private broadcast could not be authorized", topic=topic)
            raise HttpError(500, "Unable to authorize broadcast") from None

    async def _body(self, request: Request) -> bytes:
        """Read the body, up to the limit. Reading more than `MAX_UNAUTHENTICATED_BYTES` requires a valid token."""
        too_large = HttpError(413, "Request body is too large")
        body, is_known = bytearray(), False
        try:
            # The HTTP parser has checked that this is a number.
            if int(request.headers.get("content-length", 0)) > self._settings.max_body_bytes:
                raise too_large
            async for chunk in request.stream():
                body += chunk
                if len(body) > self._settings.max_body_bytes:
                    raise too_large
                if len(body) > MAX_UNAUTHENTICATED_BYTES and not is_known:
                    await self._identify(request)
                    is_known = True
        except ClientDisconnect:
            raise HttpError(400, "Request body is incomplete") from None
        return bytes(body)

    async def _caller(self, request: Request) -> Claims:
        if self._events.is_over(self._clock()):
            raise HttpError(429, "Too many requests")
        return await self._identify(request)

    async def _identify(self, request: Request) -> Claims:
        try:
            return await self._verify(token_of(request))
        except AuthError as error:
            log.info("broadcast refused", code=error.code, reason=str(error))
            raise HttpError(401, "Unauthorized") from None

    def _check_rate(self, messages: int = 0) -> None:
        """Check the rate again, because it may have risen meanwhile. A batch has to fit as a whole; a single message need not."""
        limit, rolling = self._events.limit_per_s, self._events.rolling(self._clock())
        if limit and rolling > limit:
            raise HttpError(429, "You have exceeded your rate limit")
        if limit and messages and rolling + messages > limit:
            raise HttpError(429, "Too many messages to broadcast, please reduce the batch size")

    @contextlib.contextmanager
    def _once(self, request: Request, claims: Claims, *parts: bytes) -> Iterator[bool]:
        """Yield whether to execute the request: not if it was executed before. If it fails, its key is forgotten."""
        client_key = request.headers.get("idempotency-key")
        if client_key is None:
            yield True
            return
        if not _KEY_PATTERN.fullmatch(client_key):
            raise HttpError(400, "Idempotency-Key must be 1 to 255 visible ASCII characters")
        # A caller without subject is identified by all claims, so that others of the same role do not share its keys.
        caller = claims.json if claims.subject is None else claims.subject
        key = _digest(repr((claims.role, claims.subject is None, caller, client_key)).encode())
        contents = _digest(*parts)
        seen = self._keys.begin(key, contents, self._clock())
        if seen is Seen.REUSED:
            raise HttpError(422, "Idempotency-Key was already used for another request")
        if seen is Seen.RUNNING:
            raise HttpError(409, "A request with this Idempotency-Key is being processed")
        try:
            yield seen is Seen.NEW
        except BaseException:
            self._keys.forget(key)
            raise
        if seen is Seen.NEW:
            self._keys.finish(key, contents, self._clock())


async def _answer(work: Awaitable[None]) -> Response:
    try:
        await work
    except HttpError as refused:
        return refused.response
    except TooManyHeaders as error:
        return error_response(error)
    return Response(status_code=202)


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


def _decode(body: bytes, type_: Any, problem: str) -> Any:
    """Decode JSON; parts may stay raw. UTF-8 is checked first, because msgspec does not check it in raw parts."""
    try:
        body.decode()
        return msgspec.json.decode(body, type=type_)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise HttpError(400, problem) from None


def _media_type(request: Request) -> str:
    """The content type without its parameters; JSON when it is absent."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() or JSON


def _check_accept(request: Request) -> None:
    """Check that JSON is acceptable. The most specific range that covers it decides. Source: RFC 9110, 12.5.1."""
    accept = ",".join(request.headers.getlist("accept"))
    if not accept.strip():
        return
    ranges = {}
    for item in accept.lower().split(","):
        media_range, *parameters = (part.strip() for part in item.split(";"))
        ranges[media_range] = not any(_is_zero_weight(parameter) for parameter in parameters)
    for covering in (JSON, "application/*", "*/*"):
        if covering in ranges:
            if ranges[covering]:
                return
            break
    raise HttpError(406, "Not Acceptable")


def _is_zero_weight(parameter: str) -> bool:
    name, _, value = parameter.partition("=")
    return name.strip() == "q" and value.strip() != "" and value.strip().strip("0.") == ""


def _array_decoder(max_items: int) -> msgspec.json.Decoder[msgspec.Struct]:
    """Make a decoder of arrays that stops at the first element over the limit; a list's length is checked only after building it."""
    fields = [(f"item_{number}", msgspec.Raw, _ABSENT) for number in range(max_items)]
    return msgspec.json.Decoder(msgspec.defstruct("Items", fields, array_like=True, forbid_unknown_fields=True))


def _invalid_batch(*errors: str | dict[str, list[str]]) -> HttpError:
    return HttpError(422, errors={"messages": errors})


def _read_message(item: msgspec.Raw, settings: Settings) -> tuple[Room, Broadcast] | dict[str, list[str]]:
    try:
        fields = msgspec.json.decode(item, type=_RawMessage)
    except msgspec.DecodeError:
        raise _invalid_batch(INVALID) from None
    errors: dict[str, list[str]] = {}

    def text(name: str) -> str:
        raw = bytes(getattr(fields, name))
        value = msgspec.json.decode(raw) if raw.startswith(b'"') else "" if raw == b"null" else None
        found = _name_errors(name, value, MAX_NAME_BYTES)
        if name == "id" and found.get(name) == [BLANK]:
            return ""
        errors.update(found)
        return "" if found else str(value)

    topic, event, message_id = text("topic"), text("event"), text("id")
    payload = bytes(fields.payload)
    if payload == b"null":
        errors["payload"] = [BLANK]
    elif not payload.startswith(b"{"):
        errors["payload"] = [INVALID]
    elif len(payload) > settings.max_payload_bytes:
        errors["payload"] = [TOO_LARGE]
    elif is_deeper_than(payload, settings.max_depth):
        errors["payload"] = [INVALID]
    private = _PRIVATE.get(bytes(fields.private))
    if private is None:
        errors["private"] = [INVALID]
        private = False
    if errors:
        return errors
    room = Room(TOPIC_PREFIX + topic, private)
    return room, Broadcast(room.topic, event, payload, id=message_id or None)


def _size(broadcast: Broadcast) -> int:
    """The approximate size of the frame in bytes."""
    return len(broadcast.payload) + len(broadcast.topic) + len(broadcast.event) + FRAME_BYTES


def _name_errors(name: str, value: object, max_bytes: int) -> dict[str, list[str]]:
    if not isinstance(value, str):
        return {name: [INVALID]}
    if not value.strip():
        return {name: [BLANK]}
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return {name: [INVALID]}
    return {name: [f"should be at most {max_bytes} byte(s)"]} if size > max_bytes else {}


_PRIVATE = {
    b"true": True,
    b"false": False,
    b"null": False,
    b'"true"': True,
    b'"false"': False,
    b'"1"': True,
    b'"0"': False,
}
