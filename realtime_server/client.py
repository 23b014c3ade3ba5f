"""A client for workers that must miss nothing: after any failure it resumes after the last message that it returned.

    async with Client(url, key) as client:
        async for message in client.listen("orders", after=cursor):
            ...

Each `listen` has its own socket, read only as fast as the caller takes messages: with a slow caller the server waits or closes (1013), and
memory does not grow. Any error ends the socket; the next one joins after the last message. This is the only recovery path, so that it is
always exercised. Messages that were never stored (broadcasts of other clients, REST) have no cursor and are not resumed.

It logs through `logging`, not structlog, because in other people's programs structlog may print to standard output.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

import httpx2
import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from realtime_server.errors import MalformedFrame, RealtimeError
from realtime_server.protocol import binary, messages
from realtime_server.protocol.messages import Format, encode_text

Token = str | None | Callable[[], Awaitable[str]]

HEARTBEAT_S: Final = 25.0
# How long the reply to a heartbeat may take.
ANSWER_S: Final = 10.0
# Limits token, connection and the reply to the join together; policies may take several seconds.
JOIN_S: Final = 20.0
CLOSE_S: Final = 1.0
MIN_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 10.0
# A token is renewed this long before it expires, but not before half of its remaining lifetime.
RENEWAL_S: Final = 60.0
# After a resume the server may repeat the messages of a transaction; up to this many are deduplicated. About 100 bytes each.
MAX_SEEN_IDS: Final = 50_000

JOIN_REF: Final = "1"

# Permanent join errors, and those that are permanent without a new token. JwtSignerError is in neither: fetching the issuer's keys may
# succeed later.
FINAL: Final = frozenset({"Unauthorized", "TopicNameRequired", "unmatched topic", "PrivateOnly"})
FINAL_FOR_TOKEN: Final = frozenset({"MalformedJWT", "InvalidJWTToken", "JwtSignatureError"})

log = logging.getLogger(__name__)


class PermanentError(RealtimeError):
    """The server refuses, and would refuse again. `reason` is its own sentence."""

    code = "PermanentError"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)

    @property
    def reason(self) -> str:
        return str(self)


@dataclass(frozen=True, slots=True)
class Message:
    """A received message. `topic` is without `realtime:`; `payload` is the parsed JSON object, or bytes; `cursor` is the position after it.

    JSON that Python does not parse (numbers of thousands of digits, a thousand levels) is passed as the bytes of its text.

    Messages that were never stored have no cursor, and an id only if their sender gave one.
    """

    topic: str
    event: str
    payload: Any
    id: str | None
    cursor: str | None
    replayed: bool


@dataclass(frozen=True, slots=True)
class Gap:
    """Messages are missing before the next one. `cursor` is the position from which none are missing."""

    topic: str
    problem: str
    cursor: str


class Client:
    """Listens and sends with one API key, as the user of `token` where there is one.

    `url` is the server's: http, https, ws or wss. A `token` that is a function is called before each join and before the old token expires;
    an exception in it is logged and retried, except PermanentError. Leaving the context closes all listeners.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        token: Token = None,
        heartbeat_s: float = HEARTBEAT_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        base = url.rstrip("/").removesuffix("/websocket").removesuffix("/realtime/v1").rstrip("/")
        scheme, _, rest = base.partition("://")
        if scheme not in ("http", "https", "ws", "wss") or not urlsplit(base).hostname:
            raise ValueError(f"expected an address that starts with http://, https://, ws:// or wss://, got {url!r}")
        secure = scheme in ("https", "wss")
        self._websocket_url = f"{'wss' if secure else 'ws'}://{rest}/realtime/v1/websocket?vsn={Format.V2.value}"
        self._api_url = f"{'https' if secure else 'http'}://{rest}/realtime/v1/api/broadcast"
        self._key = key
        self._token = token
        self._heartbeat_s = heartbeat_s
        self._answer_s = answer_s
        self._listeners: set[Listener] = set()
        self._http: httpx2.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await asyncio.gather(*(listener.aclose() for listener in list(self._listeners)))
        finally:
            if self._http is not None:
                await self._http.aclose()

    def listen(
        self, topic: str, *, after: str | None = None, private: bool = True, events: Collection[str] | None = None
    ) -> Listener:
        """Return an endless iterator of messages, in order and each once: from the cursor `after` on, or without it from the first join on.

        It connects when first awaited. With `events`, it returns only those. Raises from the iterator: PermanentError.
        """
        listener = Listener(self, topic, after, private, None if events is None else frozenset(events))
        self._listeners.add(listener)
        return listener

    async def send(self, topic: str, event: str, payload: dict[str, Any] | bytes, *, private: bool = True) -> None:
        """Send to current subscribers. The message is not stored: use `realtime.send` in the database for those that must not be missed.

        Raises: PermanentError; ConnectionError when the server could not be reached, or did not answer.
        """
        body, media_type = (
            (payload, "application/octet-stream")
            if isinstance(payload, bytes)
            else (messages.dumps(payload), "application/json")
        )
        token = await self._current_token() or self._key
        if self._http is None:
            self._http = httpx2.AsyncClient(timeout=JOIN_S)
        try:
            answer = await self._http.post(
                f"{self._api_url}/{quote(topic, safe='')}/events/{quote(event, safe='')}",
                params={"private": "true"} if private else {},
                content=body,
                headers={"content-type": media_type, "apikey": self._key, "authorization": f"Bearer {token}"},
            )
        except httpx2.TransportError as error:
            raise ConnectionError(f"not sent, or not known whether: {error or type(error).__name__}") from error
        if answer.status_code != 202:
            raise PermanentError(_error_text(answer.status_code, answer.content))

    async def _current_token(self) -> str | None:
        return await self._token() if callable(self._token) else self._token


class Listener(AsyncIterator[Message | Gap]):
    """The iterator that `Client.listen` returns, for one task at a time. Cancelling a wait loses no message: the next wait returns it."""

    def __init__(
        self, client: Client, topic: str, after: str | None, private: bool, events: frozenset[str] | None
    ) -> None:
        self.topic = topic
        self._client = client
        self._cursor = after
        self._private = private
        self._events = events
        self._seen_ids: OrderedDict[str, None] = OrderedDict()
        self._socket: _Socket | None = None
        self._failures = 0
        self._error_message = ""
        self._closed = asyncio.Event()

    @property
    def cursor(self) -> str | None:
        """The position after the last message, or before any message, that of the first join; None before the join."""
        return self._cursor

    async def ready(self) -> None:
        """Wait until joined: messages from now on will be returned. Optional: the iterator joins by itself. Raises: PermanentError."""
        await self._joined()

    async def aclose(self) -> None:
        """Leave the channel and close; a wait in another task ends. It may be called again."""
        self._closed.set()
        self._client._listeners.discard(self)
        if self._socket is not None:
            await self._socket.close()

    def __aiter__(self) -> Listener:
        return self

    async def __anext__(self) -> Message | Gap:
        while (socket := await self._joined()) is not None:
            # Nothing is awaited between receiving a frame and returning it, so a cancelled wait has not consumed a message.
            try:
                item = self._take(socket, await socket.recv())
            except ConnectionLost as problem:
                self._abort_socket(socket, str(problem))
            else:
                if item is not None:
                    return item
        raise StopAsyncIteration

    async def _joined(self) -> _Socket | None:
        """Return the joined socket, and connect if there is none; None once closed. Raises: PermanentError."""
        while True:
            if self._socket is not None:
                if not self._socket.is_over:
                    return self._socket
                await self._socket.close()
                self._socket = None
            await self._pause()
            if self._closed.is_set():
                return None
            try:
                self._socket = await self._join()
            except ConnectionLost as problem:
                self._abort_socket(None, str(problem))
            else:
                if self._closed.is_set():
                    self._socket.abort()

    def _abort_socket(self, socket: _Socket | None, problem: str) -> None:
        """Abort a socket and count the failure. The pause comes before the next join."""
        if socket is not None:
            socket.abort()
            if socket.has_served or socket.is_old:
                self._failures = 0
        self._failures += 1
        if not self._closed.is_set():
            log.warning("%s: %s; connecting again", self.topic, problem)

    async def _pause(self) -> None:
        """Back off: twice as long after each failure in a row, with jitter."""
        if self._failures:
            backoff_s = min(MIN_BACKOFF_S * 2.0 ** min(self._failures - 1, 20), MAX_BACKOFF_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff_s * random.uniform(0.5, 1)):  # noqa: S311 -- spreads reconnects
                    await self._closed.wait()

    async def _join(self) -> _Socket:
        """Connect and join after the last message. Raises: PermanentError, ConnectionLost."""
        client = self._client
        try:
            async with asyncio.timeout(JOIN_S):
                token = await _fetch_token(client)
                web = await connect(
                    client._websocket_url,
                    additional_headers={"x-api-key": client._key},
                    compression=None,
                    # Heartbeats, which the server requires anyway, detect half-open connections; pings would time out while the caller is
                    # slow.
                    ping_interval=None,
                    close_timeout=CLOSE_S,
                    # With a limit, a client would fail again and again at a message beyond it.
                    max_size=None,
                )
                try:
                    return await self._send_join(web, token)
                except BaseException:
                    web.transport.abort()
                    raise
        except InvalidStatus as error:
            reason = _error_text(error.response.status_code, error.response.body)
            if error.response.status_code in (401, 403):
                raise PermanentError(reason) from error
            raise ConnectionLost(reason) from error
        except ConnectionClosed as error:
            raise ConnectionLost(_how_closed(error)) from error
        except TimeoutError as error:
            raise ConnectionLost(f"no answer within {JOIN_S:g} s") from error
        except (OSError, WebSocketException) as error:
            raise ConnectionLost(f"no connection: {error}") from error

    async def _send_join(self, web: ClientConnection, token: str | None) -> _Socket:
        broadcast: dict[str, object] = {"cursor": True}
        if self._cursor is not None:
            broadcast["replay"] = {"after": self._cursor}
        payload: dict[str, object] = {"config": {"private": self._private, "broadcast": broadcast}}
        if token is not None:
            payload["access_token"] = token
        wire_topic = messages.TOPIC_PREFIX + self.topic
        join = messages.Message(JOIN_REF, JOIN_REF, wire_topic, messages.JOIN, messages.dumps(payload))
        await _send(web, join)
        while True:
            # The reply is the channel's first message.
            reply = _decode(await web.recv())
            if isinstance(reply, messages.Message) and reply.event == messages.REPLY and reply.ref == JOIN_REF:
                break
        answer = messages.loads_object(reply.payload) or {}
        response = answer.get("response")
        if not isinstance(response, dict):
            raise ConnectionLost("the join was answered with something else than an object")
        if answer.get("status") != "ok":
            reason = str(response.get("reason"))
            code = reason.partition(":")[0]
            if code in FINAL or (code in FINAL_FOR_TOKEN and not callable(self._client._token)):
                raise PermanentError(reason)
            raise ConnectionLost(reason)
        is_resumed = response.get("resumed") is True
        cursor = self._cursor if is_resumed else _text(response.get("cursor"))
        if cursor is None or is_resumed != (self._cursor is not None):
            raise PermanentError("this server gives no cursors, so nothing could be resumed")
        self._cursor = cursor
        self._error_message = ""
        return _Socket(web, self._client, wire_topic, token)

    def _take(self, socket: _Socket, frame: str | bytes) -> Message | Gap | None:
        """Process a frame, and return the item for the caller, or None. Raises: ConnectionLost."""
        message = _decode(frame)
        if isinstance(message, binary.UserBroadcast):
            meta = messages.loads_object(message.metadata) or {}
            payload = _parse(message.payload) if message.is_json else message.payload
            return self._take_broadcast(socket, message.event, payload, meta)
        match message.event:
            case messages.BROADCAST:
                fields = {name: _parse(value) for name, value in (messages.loads_fields(message.payload) or {}).items()}
                event, named = fields.get("event"), fields.get("meta")
                return self._take_broadcast(
                    socket,
                    event if isinstance(event, str) else "",
                    fields.get("payload"),
                    named if isinstance(named, dict) else {},
                )
            case messages.SYSTEM:
                content = messages.loads_object(message.payload) or {}
                if content.get("status") == "gap" and content.get("extension") == messages.CLIENT_BROADCAST:
                    # No stored message is missing, so the cursor stays.
                    assert self._cursor is not None, "set by the join"
                    return Gap(self.topic, str(content.get("message")), self._cursor)
                if content.get("status") == "gap":
                    return self._take_gap(socket, str(content.get("message")), content.get("cursor"))
                if content.get("status") == "error":
                    self._error_message = str(content.get("message"))
            case messages.REPLY if message.topic == messages.PHOENIX:
                response = (messages.loads_object(message.payload) or {}).get("response")
                cursor = _text(response.get("cursor")) if isinstance(response, dict) else None
                if cursor is not None:
                    # All messages before this cursor have been returned. It advances also while this topic has no messages.
                    self._cursor = cursor
            case messages.CLOSE | messages.ERROR:
                raise ConnectionLost(f"the server ended the channel: {self._error_message or message.event}")
        return None

    def _take_broadcast(self, socket: _Socket, event: str, payload: Any, meta: dict[str, Any]) -> Message | None:
        id, cursor = _text(meta.get("id")), _text(meta.get("cursor"))
        socket.has_served = True
        if cursor is not None:
            # The cursor advances also for messages that are not returned, because all before them have been.
            self._cursor = cursor
            if id is not None and not self._is_new(id):
                return None
        if self._events is not None and event not in self._events:
            return None
        return Message(self.topic, event, payload, id, cursor, meta.get("replayed") is True)

    def _take_gap(self, socket: _Socket, problem: str, oldest: object) -> Gap:
        if not isinstance(oldest, str):
            raise ConnectionLost(f"the server names no cursor behind a gap: {problem}")
        # The server would continue with live messages; a new join also replays those that are still stored.
        self._cursor = oldest
        self._abort_socket(socket, problem)
        return Gap(self.topic, problem, oldest)

    def _is_new(self, id: str) -> bool:
        if id in self._seen_ids:
            return False
        self._seen_ids[id] = None
        if len(self._seen_ids) > MAX_SEEN_IDS:
            self._seen_ids.popitem(last=False)
        return True


class ConnectionLost(Exception):
    """This socket is no longer usable; the listener connects again."""


class _Socket:
    """A socket that has joined, and its heartbeat task."""

    def __init__(self, web: ClientConnection, client: Client, wire_topic: str, token: str | None) -> None:
        self.is_over = False
        # Whether messages have been received.
        self.has_served = False
        self._web = web
        self._client = client
        self._wire_topic = wire_topic
        self._token = token
        self._joined_at = time.monotonic()
        self._heartbeat = asyncio.create_task(self._heartbeat_loop())

    @property
    def is_old(self) -> bool:
        return time.monotonic() - self._joined_at > MAX_BACKOFF_S

    async def recv(self) -> str | bytes:
        """Receive the next frame. Raises: ConnectionLost, also when no frame comes for longer than the reply to a heartbeat may take."""
        # The time counts only during the wait, so that a slow caller does not mistake its own slowness for a dead peer.
        limit_s = self._client._heartbeat_s + self._client._answer_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._web.recv()
        except TimeoutError as error:
            raise ConnectionLost(f"nothing heard for {limit_s:g} s") from error
        except ConnectionClosed as error:
            raise ConnectionLost(_how_closed(error)) from error

    def abort(self) -> None:
        """Abort the connection at once, without a closing handshake, because the peer may be gone."""
        self.is_over = True
        self._heartbeat.cancel()
        self._web.transport.abort()

    async def close(self) -> None:
        """Close, with a closing handshake unless aborted before, and wait until the task and the connection have ended."""
        is_over, self.is_over = self.is_over, True
        self._heartbeat.cancel()
        try:
            await asyncio.wait([self._heartbeat])
            if not is_over:
                await self._web.close()
        finally:
            self._web.transport.abort()
        await self._web.wait_closed()
        if not self._heartbeat.cancelled() and (error := self._heartbeat.exception()) is not None:
            raise error

    async def _heartbeat_loop(self) -> None:
        """Send heartbeats, and a new token before the old one expires, also while the caller is busy."""
        last_beat_at = self._joined_at
        renew_at = _renewal(self._client, self._token)
        number = 1
        with contextlib.suppress(ConnectionClosed):
            while True:
                next_beat_at = last_beat_at + self._client._heartbeat_s
                await asyncio.sleep(max(0.0, min(next_beat_at, renew_at) - time.monotonic()))
                if time.monotonic() >= renew_at:
                    renew_at = await self._renew()
                if time.monotonic() >= next_beat_at:
                    last_beat_at, number = time.monotonic(), number + 1
                    beat = messages.Message(None, str(number), messages.PHOENIX, messages.HEARTBEAT, b'{"cursor":true}')
                    await _send(self._web, beat)

    async def _renew(self) -> float:
        """Send the channel a new token, and return when to renew it again."""
        try:
            async with asyncio.timeout(JOIN_S):
                token = await _fetch_token(self._client)
        except (ConnectionLost, PermanentError, TimeoutError):
            # The server ends the channel when the token expires; the next join fetches a token again, and raises if that fails.
            token = self._token
        if token is None or token == self._token:
            return time.monotonic() + self._client._heartbeat_s
        self._token = token
        payload = messages.dumps({"access_token": token})
        await _send(self._web, messages.Message(JOIN_REF, None, self._wire_topic, messages.ACCESS_TOKEN, payload))
        return _renewal(self._client, token)


async def _send(web: ClientConnection, message: messages.Message) -> None:
    await web.send(encode_text(message, Format.V2), text=True)


async def _fetch_token(client: Client) -> str | None:
    """Get the current token. Raises: PermanentError, ConnectionLost."""
    try:
        return await client._current_token()
    except PermanentError:
        raise
    except Exception as error:
        log.exception("token function failed")
        raise ConnectionLost(f"no token: {error}") from error


def _renewal(client: Client, token: str | None) -> float:
    """Return when to renew the token, by the monotonic clock; infinity if `token` is not a function."""
    expires_at = _expiry(token) if callable(client._token) and token is not None else None
    if expires_at is None:
        return float("inf")
    left_s = expires_at - time.time()
    return time.monotonic() + max(left_s - RENEWAL_S, left_s / 2, 0.0)


def _expiry(token: str) -> float | None:
    """Read the `exp` of a JWT without verifying it: it only schedules the renewal."""
    try:
        text = token.split(".")[1]
        claims = msgspec.json.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        return float(claims["exp"])
    except (LookupError, TypeError, ValueError):
        return None


def _decode(frame: str | bytes) -> messages.Message | binary.UserBroadcast:
    """Decode a frame. Raises: ConnectionLost, because skipping a malformed frame could lose a message silently."""
    try:
        return binary.decode_broadcast(frame) if isinstance(frame, bytes) else messages.decode_text(frame, Format.V2)
    except MalformedFrame as error:
        raise ConnectionLost(f"the server sent a malformed frame: {error}") from error


def _parse(text: bytes | msgspec.Raw) -> Any:
    """Parse JSON text. If that fails, return the text, so that the message is neither lost nor stops the listener for ever."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return bytes(text)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _how_closed(error: ConnectionClosed) -> str:
    if error.rcvd is None:
        return "connection lost"
    return f"closed by the server with {error.rcvd.code} {error.rcvd.reason}".rstrip()


def _error_text(status: int, body: bytes | bytearray) -> str:
    """Format an HTTP error response as status and sentence."""
    content = messages.loads_object(bytes(body)) or {}
    sentence = content.get("message") or content.get("error") or content.get("errors")
    return f"status {status}" + (f": {sentence}" if sentence else "")
