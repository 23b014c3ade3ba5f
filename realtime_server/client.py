"""A client for workers that must miss nothing: it resumes behind the last message that it handed out, whatever happens in between.

    async with Client(url, key) as client:
        async for message in client.listen("orders", after=cursor):
            ...

One socket for each `listen`, read only as fast as the caller takes messages: a slow caller makes the server wait or close (1013), never
memory grow. Whatever goes wrong with a socket ends it; the next one joins behind the last message. There is no other way to recover, so
there is no other way to be wrong. Messages that were never stored (broadcasts of other clients, REST) have no cursor and are not resumed.

Logs through `logging`, not structlog: it runs in other people's programs, where structlog may be set up to print to standard output.
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
# How long an answer to a heartbeat may take.
ANSWER_S: Final = 10.0
# For token, connection and the reply to the join together; policies may take several seconds.
JOIN_S: Final = 20.0
CLOSE_S: Final = 1.0
SHORTEST_BACKOFF_S: Final = 0.1
LONGEST_BACKOFF_S: Final = 10.0
# A token is renewed so long before it ends; one that lives shorter, after half of its life.
RENEWAL_S: Final = 60.0
# After a resume the server may repeat what one transaction wrote, so this bounds a transaction; about 100 bytes each.
MOST_SEEN: Final = 50_000

JOIN_REF: Final = "1"

# Join errors that stay as they are, and those that stay unless there is another token. JwtSignerError is in neither: an issuer whose keys
# cannot be fetched comes back.
FINAL: Final = frozenset({"Unauthorized", "TopicNameRequired", "unmatched topic", "PrivateOnly"})
FINAL_FOR_TOKEN: Final = frozenset({"MalformedJWT", "InvalidJWTToken", "JwtSignatureError"})

log = logging.getLogger(__name__)


class PermanentError(RealtimeError):
    """The server says no, and will say so again. `reason` is its own sentence."""

    code = "PermanentError"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)

    @property
    def reason(self) -> str:
        return str(self)


@dataclass(frozen=True, slots=True)
class Message:
    """`topic` without `realtime:`; `payload` is the parsed JSON object, or bytes; `cursor` is the place right behind this message.

    JSON that Python does not parse (numbers of thousands of digits, a thousand levels) comes as the bytes of its text.

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
    """Messages are missing before what follows. `cursor` is where that begins."""

    topic: str
    problem: str
    cursor: str


class Client:
    """Listens and sends with one API key, as the user of `token` where there is one.

    `url` is the server's: http, https, ws or wss. A `token` that is a function is called before each join and before the old token ends;
    what it raises is logged and tried again, except PermanentError. Leaving the context closes all that is open.
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
        """Messages behind the cursor `after`, in order and each once, then live ones, for ever; without `after`, from the first join on.

        Connects when first waited for. With `events`, only those. Raises from the iterator: PermanentError.
        """
        listener = Listener(self, topic, after, private, None if events is None else frozenset(events))
        self._listeners.add(listener)
        return listener

    async def send(self, topic: str, event: str, payload: dict[str, Any] | bytes, *, private: bool = True) -> None:
        """Send to those who listen now. It is not stored: what must not be missed is written in the database, with `realtime.send`.

        Raises: PermanentError; ConnectionError when the server could not be asked, or its answer is not known.
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
    """What `Client.listen` returns; for one task at a time. A wait that is cancelled loses nothing: the next one goes on."""

    def __init__(
        self, client: Client, topic: str, after: str | None, private: bool, events: frozenset[str] | None
    ) -> None:
        self.topic = topic
        self._client = client
        self._cursor = after
        self._private = private
        self._events = events
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._socket: _Socket | None = None
        self._failures = 0
        self._complaint = ""
        self._closed = asyncio.Event()

    @property
    def cursor(self) -> str | None:
        """The place behind the last message, or that of the first join before there was any; None before that."""
        return self._cursor

    async def ready(self) -> None:
        """Wait until joined: what is written from now on will come. Not needed in front of the first message. Raises: PermanentError."""
        await self._joined()

    async def aclose(self) -> None:
        """Leave and close; a wait in another task ends. Harmless when closed already."""
        self._closed.set()
        self._client._listeners.discard(self)
        if self._socket is not None:
            await self._socket.close()

    def __aiter__(self) -> Listener:
        return self

    async def __anext__(self) -> Message | Gap:
        while (socket := await self._joined()) is not None:
            # Between the arrival of a frame and the return nothing is awaited: a cancelled wait has not taken a message.
            try:
                item = self._take(socket, await socket.recv())
            except ConnectionLost as problem:
                self._lose(socket, str(problem))
            else:
                if item is not None:
                    return item
        raise StopAsyncIteration

    async def _joined(self) -> _Socket | None:
        """The socket, a new one where there is none; None once closed. Raises: PermanentError."""
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
                self._lose(None, str(problem))
            else:
                if self._closed.is_set():
                    self._socket.drop()

    def _lose(self, socket: _Socket | None, problem: str) -> None:
        """Give a socket up. It does not wait: the next socket does."""
        if socket is not None:
            socket.drop()
            if socket.has_served or socket.is_old:
                self._failures = 0
        self._failures += 1
        if not self._closed.is_set():
            log.warning("%s: %s; connecting again", self.topic, problem)

    async def _pause(self) -> None:
        """Back off: twice as long after each failure in a row, and never the same for two clients."""
        if self._failures:
            longest_s = min(SHORTEST_BACKOFF_S * 2.0 ** min(self._failures - 1, 20), LONGEST_BACKOFF_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(longest_s * random.uniform(0.5, 1)):  # noqa: S311 -- spreads reconnects
                    await self._closed.wait()

    async def _join(self) -> _Socket:
        """Connect and join behind the last message. Raises: PermanentError, ConnectionLost."""
        client = self._client
        try:
            async with asyncio.timeout(JOIN_S):
                token = await _ask_for_token(client)
                web = await connect(
                    client._websocket_url,
                    additional_headers={"x-api-key": client._key},
                    compression=None,
                    # Half-open connections are found by heartbeats, which the server asks for anyway; pings would be left unanswered
                    # while the caller is slow.
                    ping_interval=None,
                    close_timeout=CLOSE_S,
                    # With a bound, a client would stumble for ever at the one message beyond it.
                    max_size=None,
                )
                try:
                    return await self._ask_to_join(web, token)
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

    async def _ask_to_join(self, web: ClientConnection, token: str | None) -> _Socket:
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
            # Nothing of the channel comes before its reply.
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
        self._complaint = ""
        return _Socket(web, self._client, wire_topic, token)

    def _take(self, socket: _Socket, frame: str | bytes) -> Message | Gap | None:
        """What the caller is given for a frame, None for nothing. Raises: ConnectionLost."""
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
                    # Nothing that is stored is missing, so the cursor stays.
                    assert self._cursor is not None, "set by the join"
                    return Gap(self.topic, str(content.get("message")), self._cursor)
                if content.get("status") == "gap":
                    return self._take_gap(socket, str(content.get("message")), content.get("cursor"))
                if content.get("status") == "error":
                    self._complaint = str(content.get("message"))
            case messages.REPLY if message.topic == messages.PHOENIX:
                response = (messages.loads_object(message.payload) or {}).get("response")
                cursor = _text(response.get("cursor")) if isinstance(response, dict) else None
                if cursor is not None:
                    # All before it has been handed out, also while nothing comes for this topic.
                    self._cursor = cursor
            case messages.CLOSE | messages.ERROR:
                raise ConnectionLost(f"the server ended the channel: {self._complaint or message.event}")
        return None

    def _take_broadcast(self, socket: _Socket, event: str, payload: Any, meta: dict[str, Any]) -> Message | None:
        id, cursor = _text(meta.get("id")), _text(meta.get("cursor"))
        socket.has_served = True
        if cursor is not None:
            # Also behind what is not handed out: everything before it has been.
            self._cursor = cursor
            if id is not None and not self._is_new(id):
                return None
        if self._events is not None and event not in self._events:
            return None
        return Message(self.topic, event, payload, id, cursor, meta.get("replayed") is True)

    def _take_gap(self, socket: _Socket, problem: str, oldest: object) -> Gap:
        if not isinstance(oldest, str):
            raise ConnectionLost(f"the server names no cursor behind a gap: {problem}")
        # The server goes on live; a new join also brings what is still stored.
        self._cursor = oldest
        self._lose(socket, problem)
        return Gap(self.topic, problem, oldest)

    def _is_new(self, id: str) -> bool:
        if id in self._seen:
            return False
        self._seen[id] = None
        if len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        return True


class ConnectionLost(Exception):
    """This socket is of no use any more; the next one may be."""


class _Socket:
    """One that has joined, and the task that keeps it alive."""

    def __init__(self, web: ClientConnection, client: Client, wire_topic: str, token: str | None) -> None:
        self.is_over = False
        # Has brought messages.
        self.has_served = False
        self._web = web
        self._client = client
        self._wire_topic = wire_topic
        self._token = token
        self._joined_at = time.monotonic()
        self._keeper = asyncio.create_task(self._heartbeat_loop())

    @property
    def is_old(self) -> bool:
        return time.monotonic() - self._joined_at > LONGEST_BACKOFF_S

    async def recv(self) -> str | bytes:
        """The next frame. Raises: ConnectionLost, also when nothing comes for longer than an answered heartbeat may take."""
        # Counted only while somebody waits: a slow caller must not take its own slowness for a dead peer.
        limit_s = self._client._heartbeat_s + self._client._answer_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._web.recv()
        except TimeoutError as error:
            raise ConnectionLost(f"nothing heard for {limit_s:g} s") from error
        except ConnectionClosed as error:
            raise ConnectionLost(_how_closed(error)) from error

    def drop(self) -> None:
        """End it at once, without a word to a peer that may not be there."""
        self.is_over = True
        self._keeper.cancel()
        self._web.transport.abort()

    async def close(self) -> None:
        """End it, politely where that is still possible, and wait until nothing is left of it."""
        is_over, self.is_over = self.is_over, True
        self._keeper.cancel()
        try:
            await asyncio.wait([self._keeper])
            if not is_over:
                await self._web.close()
        finally:
            self._web.transport.abort()
        await self._web.wait_closed()
        if not self._keeper.cancelled() and (error := self._keeper.exception()) is not None:
            raise error

    async def _heartbeat_loop(self) -> None:
        """Send heartbeats, and a new token before the old one ends, also while the caller is busy."""
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
        """Give the channel a new token; when to do so again."""
        try:
            async with asyncio.timeout(JOIN_S):
                token = await _ask_for_token(self._client)
        except (ConnectionLost, PermanentError, TimeoutError):
            # The server ends the channel when the token does; the join after that asks again, and tells the caller.
            token = self._token
        if token is None or token == self._token:
            return time.monotonic() + self._client._heartbeat_s
        self._token = token
        payload = messages.dumps({"access_token": token})
        await _send(self._web, messages.Message(JOIN_REF, None, self._wire_topic, messages.ACCESS_TOKEN, payload))
        return _renewal(self._client, token)


async def _send(web: ClientConnection, message: messages.Message) -> None:
    await web.send(encode_text(message, Format.V2), text=True)


async def _ask_for_token(client: Client) -> str | None:
    """Raises: PermanentError, ConnectionLost."""
    try:
        return await client._current_token()
    except PermanentError:
        raise
    except Exception as error:
        log.exception("no token")
        raise ConnectionLost(f"no token: {error}") from error


def _renewal(client: Client, token: str | None) -> float:
    """When to ask for the next token, by the monotonic clock; never without somebody to ask."""
    expires_at = _expiry(token) if callable(client._token) and token is not None else None
    if expires_at is None:
        return float("inf")
    left_s = expires_at - time.time()
    return time.monotonic() + max(left_s - RENEWAL_S, left_s / 2, 0.0)


def _expiry(token: str) -> float | None:
    """The `exp` of a JWT, unverified: only to know when to ask for the next one."""
    try:
        text = token.split(".")[1]
        claims = msgspec.json.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        return float(claims["exp"])
    except (LookupError, TypeError, ValueError):
        return None


def _decode(frame: str | bytes) -> messages.Message | binary.UserBroadcast:
    """Raises: ConnectionLost; to skip what cannot be read would be to lose it in silence."""
    try:
        return binary.decode_broadcast(frame) if isinstance(frame, bytes) else messages.decode_text(frame, Format.V2)
    except MalformedFrame as error:
        raise ConnectionLost(f"the server sent a malformed frame: {error}") from error


def _parse(text: bytes | msgspec.Raw) -> Any:
    """The value of JSON text; where it cannot be parsed, the text itself: to lose it would be worse, or never to get past it."""
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
    """The sentence in a refusing answer."""
    content = messages.loads_object(bytes(body)) or {}
    sentence = content.get("message") or content.get("error") or content.get("errors")
    return f"status {status}" + (f": {sentence}" if sentence else "")
