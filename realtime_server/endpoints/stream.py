"""Sends messages and row changes as Server-Sent Events: `GET /stream?topic=...`, `GET /stream?schema=&table=&filter=&event=`, for
browsers' `EventSource` and for curl.

A message is an unnamed event, so that `onmessage` gets it; its `id` is its cursor, so that a browser that reconnects resumes by itself
(`Last-Event-ID`). All other events are named: `ready` first, after which nothing is missed; `gap` where messages are missing; `error`
before the stream ends. Comments keep proxies from closing it. Source: WHATWG HTML, "Server-sent events".

Row changes are not stored, so a stream of them that is resumed begins with a `gap`.

The cursor advances without messages too: after a resume, and with every comment, an `id` is sent without an event.

`EventSource` never reconnects after a response other than 200. A client that accepts event streams only therefore gets transient errors
(the server restarts, the database is unavailable) in a stream that ends at once.

`EventSource` sends no headers. To keep tokens out of URLs, `POST /stream/ticket` exchanges one for a ticket: `tickets`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from realtime_server.authorization import PolicyHeaders
from realtime_server.broadcast_subscription import BroadcastSubscription, ByteBudget, CatchUpBuffer, Message
from realtime_server.changes.activation import PENDING_AFTER_S
from realtime_server.changes.subscriber import RowChangeSubscriber
from realtime_server.changes.subscriptions import RETRYABLE
from realtime_server.claims import Claims
from realtime_server.config import Settings
from realtime_server.connection import ABORT, BEHIND_BYTES, CLOSE_TIMEOUT_S
from realtime_server.endpoints.caller import (
    PRIVATE,
    REFUSALS,
    CodedRefusal,
    Topic,
    check_may_receive,
    error_response,
    policy_headers,
    room_of,
    token_of,
)
from realtime_server.endpoints.openapi import Operation, Parameter, documented
from realtime_server.endpoints.sockets import Sockets, check_limits
from realtime_server.endpoints.tickets import Tickets
from realtime_server.errors import (
    DatabaseUnavailable,
    Gap,
    InvalidBinding,
    MalformedCursor,
    QueryCanceled,
    RealtimeError,
    Restarting,
    TokenExpired,
    TooManyChannels,
    TooManyJoins,
    TooManyParameters,
    TooManyUsers,
    TopicNameRequired,
)
from realtime_server.history import Page
from realtime_server.hub import Room
from realtime_server.protocol import bindings
from realtime_server.protocol.bindings import Binding
from realtime_server.protocol.frames import Encoding, Frame, event_frame
from realtime_server.protocol.messages import TOPIC_PREFIX, Format, dumps
from realtime_server.services import Services

EVENT_STREAM: Final = "text/event-stream"
RETRY_MS: Final = 1000
KEEP_ALIVE_S: Final = 15.0
DRAIN_POLL_S: Final = 0.01
MAX_EVENTS: Final = 100
# Bytes of a slow reader's events that are passed to the ASGI server at once.
CHUNK_BYTES: Final = 65_536
# Event loops reject delays of decades.
MAX_TIMER_S: Final = 86_400.0
NOT_KEPT: Final = "gap: row changes are not kept for who is away, load the present state"
TRANSIENT: Final = (DatabaseUnavailable, QueryCanceled, Restarting, TooManyJoins, TooManyUsers)

log = structlog.get_logger()


STREAM: Final = Operation(
    summary="Receive messages and row changes as Server-Sent Events",
    parameters=(
        Parameter("topic", "query", list[Topic], "topics to receive; required without `schema` and `table`"),
        PRIVATE,
        Parameter("event", "query", list[str], "events to receive; none or *: all"),
        Parameter("schema", "query", str, "schema of the tables whose row changes to receive"),
        Parameter("table", "query", str, "table whose row changes to receive"),
        Parameter("filter", "query", list[str], "condition that rows must meet, as column=operator.value"),
        Parameter("select", "query", list[str], "columns of the rows to receive"),
        Parameter("after", "query", str, "cursor after which to begin"),
        Parameter("Last-Event-ID", "header", str, "the same, as browsers send it; has precedence"),
        Parameter("ticket", "query", str, "replaces the token"),
        Parameter("apikey", "query", str, "the token, for clients that send no headers"),
    ),
    answers={
        200: ("the stream; for EventSource also a stream that ends at once with a transient error",),
        **REFUSALS,
        429: ("too many topics, streams or joins", CodedRefusal),
    },
    texts={200: EVENT_STREAM},
    needs_token=True,
)


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """Holds the parsed parameters of a stream. Empty `events` means all."""

    rooms: tuple[Room, ...]
    bindings: tuple[Binding, ...]
    events: frozenset[str]
    after: str | None


def stream_endpoint(
    services: Services, sockets: Sockets, tickets: Tickets, settings: Settings
) -> Callable[[Request], Awaitable[Response]]:
    @documented(STREAM)
    async def endpoint(request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type=EVENT_STREAM)
        try:
            ticket = request.query_params.get("ticket")
            token = token_of(request) if ticket is None else tickets.open(ticket, request.query_params)
            claims = await services.verify(token)
            headers = policy_headers(request)
            stream_request = _parse_request(request, settings.max_channels_per_socket)
        except RealtimeError as error:
            return error_response(error)
        abort = request.scope.get("extensions", {}).get(ABORT)
        stream = EventStream(services, sockets, stream_request, claims, headers, settings.max_buffered_bytes, abort)
        return _StreamResponse(stream, is_event_source=request.headers.get("accept") == EVENT_STREAM)

    return endpoint


class EventStream:
    """Sends the events of one or more topics to one client: call `begin`, `run`, and in any case `end`."""

    def __init__(
        self,
        services: Services,
        sockets: Sockets,
        stream_request: StreamRequest,
        claims: Claims,
        headers: PolicyHeaders,
        max_buffered_bytes: int,
        abort: Callable[[], None] | None,
    ) -> None:
        self._services = services
        self._sockets = sockets
        self._request = stream_request
        self._claims = claims
        self._headers = headers
        self._max_buffered_bytes = max_buffered_bytes
        self._behind_bytes = min(max_buffered_bytes // 4, BEHIND_BYTES)
        self._abort = abort
        byte_budget = ByteBudget(max_buffered_bytes // 2)
        self._subscriptions = [
            _Topic(self, room, services, stream_request.events, byte_budget) for room in stream_request.rooms
        ]
        self._rows = RowReader(self) if stream_request.bindings else None
        self._buffer: CatchUpBuffer | None = None
        self._is_following = False
        self._needs_reauthorization = False
        self._is_over = False
        self._outlet = sockets.outlet
        self._waiting: deque[Frame] = deque()
        self._waiting_bytes = 0
        # How much of the first pending frame has been read.
        self._read_bytes = 0
        self._wake = asyncio.Event()
        self._expiry: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self) -> None:
        """Authorize and subscribe the stream.

        Raises: Restarting, TooManyUsers, TooManyJoins, PrivateOnly, Unauthorized, TokenExpired, InvalidBinding, DatabaseUnavailable,
        QueryCanceled.
        """
        if self._sockets.is_draining:
            raise Restarting
        check_limits(self._services, self._sockets)
        self._services.rates.joins.count(time.monotonic())
        # Added before authorization, so that `revalidate` reaches the stream.
        self._sockets.add(self)
        self._services.active_clients.add(self)
        await self._authorize()
        if self._rows is not None:
            await self._subscribe_to_changes(self._rows)
        position = await self._services.first_position()
        self._check_expiry()
        self._buffer = CatchUpBuffer(*self._subscriptions) if self._subscriptions else None
        self._is_following = True
        for subscription in self._subscriptions:
            self._services.broadcasts.subscribe(subscription.room, subscription)
        topics = [subscription.room.topic.removeprefix(TOPIC_PREFIX) for subscription in self._subscriptions]
        # A client that sent a cursor can reconnect with it.
        begin = None
        if self._request.after is None:
            # Row changes alone have no cursors; with this one, a client that reconnects gets a gap.
            begin = position.cursor if self._buffer is None else self._buffer.begin
        self._put(Frame(b"retry: %d\n\n" % RETRY_MS))
        self.send(event_frame(dumps({"topics": topics}), event="ready", id=begin))
        if self._rows is not None:
            if self._request.after is not None:
                self.send(event_frame(dumps({"message": NOT_KEPT, "cursor": None}), event="gap"))
            self._rows.flush()
        if self._buffer is not None:
            self._spawn(self._go_live(self._buffer, self._request.after))
        self._watch_expiry()

    async def run(self) -> AsyncIterator[bytes]:
        """Yield the stream's bytes until it ends."""
        while self._waiting or not self._is_over:
            if self._waiting:
                yield self._take(CHUNK_BYTES)
                # The ASGI server has written it, so the client reads.
                self._outlet.update(self, 0, has_progressed=True)
                continue
            self._wake.clear()
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    await self._wake.wait()
            except TimeoutError:
                position = self._services.position() if self._buffer is None else None
                self._put(Frame(b": keep-alive\n" + _id_frame(None if position is None else position.cursor).data))

    def end(self) -> None:
        """Leave all topics; pending frames may still be read. Does nothing when already ended."""
        self._is_over = True
        self._wake.set()
        self._sockets.discard(self)
        self._services.active_clients.discard(self)
        for subscription in self._subscriptions:
            self._services.broadcasts.unsubscribe(subscription.room, subscription)
        if self._rows is not None and self._rows.registration is not None:
            self._services.changes.leave(self._rows.registration)
        if self._expiry is not None:
            self._expiry.cancel()
        for task in self._tasks:
            task.cancel()

    def send(self, frame: Frame) -> None:
        if self._is_over:
            return
        # This frame is not counted: one that alone exceeds the limit would end every stream, and again whenever it is resumed.
        if self.unsent > self._max_buffered_bytes:
            self.drop()
            return
        self._put(frame)
        self._outlet.update(self, 0)
        self._wake.set()

    def drop(self) -> None:
        """End the stream of a reader that is too slow. It can resume from the id of the last event that it read."""
        log.info("stream ended, its reader is too slow")
        self.discard()
        self.end()
        if self._abort is not None:
            # The response to a client that reads nothing would never end.
            asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, self._abort)

    def flush(self) -> int:
        """Write nothing, because the ASGI server reads frames from `run`."""
        return 0

    def report(self) -> None:
        self._outlet.update(self, 0)

    def _put(self, frame: Frame) -> None:
        self._waiting.append(frame)
        self._waiting_bytes += len(frame.data)
        self._outlet.hold(frame)

    def _take(self, max_bytes: int) -> bytes:
        """Remove and return up to `max_bytes` of the pending bytes."""
        chunks, left = [], max_bytes
        while self._waiting and left > 0:
            frame = self._waiting[0]
            chunk = frame.data[self._read_bytes : self._read_bytes + left]
            chunks.append(chunk)
            left -= len(chunk)
            self._read_bytes += len(chunk)
            if self._read_bytes == len(frame.data):
                self._outlet.let_go(self._waiting.popleft())
                self._read_bytes = 0
        self._waiting_bytes -= max_bytes - left
        return b"".join(chunks)

    def discard(self) -> None:
        while self._waiting:
            self._outlet.let_go(self._waiting.popleft())
        self._waiting_bytes = self._read_bytes = 0
        self._outlet.forget(self)

    @property
    def unsent(self) -> int:
        """Bytes that wait for the client."""
        return self._waiting_bytes

    @property
    def is_filling(self) -> bool:
        """Whether the client has not received most of what was sent."""
        return self.unsent > self._behind_bytes // 2

    @property
    def backlog(self) -> int:
        """Bytes that wait for the client where they are enough for backpressure, else 0."""
        return self.unsent if not self._is_over and self.unsent > self._behind_bytes else 0

    def close(self, code: int, reason: str = "") -> None:
        """End the stream; code and reason apply to sockets only."""
        self.end()

    def revalidate(self, topic: str | None, subject: str | None) -> None:
        """Reauthorize the stream if it is affected; messages written from now on are not sent before that is done."""
        is_affected = subject in (None, self._claims.subject) and any(
            room.private and topic in (None, room.topic.removeprefix(TOPIC_PREFIX)) for room in self._request.rooms
        )
        if is_affected:
            self._needs_reauthorization = True
            if self._is_following and self._buffer is None and self._subscriptions:
                self._buffer = CatchUpBuffer(*self._subscriptions)
                self._spawn(self._go_live(self._buffer, None))

    def tell_gap(self, problem: str, oldest: str) -> None:
        """Send a gap: messages of the database are missing from this point on."""
        # A stream that has not begun misses nothing, or gets the gap when history is read from its cursor. Row changes are not affected.
        if self._is_following and self._subscriptions:
            if self._buffer is not None:
                self._buffer.reset()
            self._tell_gap(problem, oldest)

    def _tell_gap(self, problem: str, oldest: str | None) -> None:
        # The current position would be wrong, because buffered messages are before it.
        begin = self._buffer.begin if self._buffer is not None else None
        position = self._services.position()
        id = begin or (position.cursor if position is not None else None)
        self.send(event_frame(dumps({"message": problem, "cursor": oldest}), event="gap", id=id))

    async def _subscribe_to_changes(self, rows: RowReader) -> None:
        """Raises: InvalidBinding, DatabaseUnavailable."""
        self._spawn(rows.subscribe(self._services.changes, self._claims, enumerate(self._request.bindings, start=1)))
        try:
            async with asyncio.timeout(PENDING_AFTER_S):
                await rows.established
        except TimeoutError:
            raise DatabaseUnavailable from None

    async def _authorize(self) -> None:
        """Authorize until no `revalidate` came in the meantime.

        Raises: PrivateOnly, Unauthorized, DatabaseUnavailable, QueryCanceled.
        """
        self._needs_reauthorization = True
        while self._needs_reauthorization:
            self._needs_reauthorization = False
            await asyncio.gather(
                *(check_may_receive(self._services, room, self._claims, self._headers) for room in self._request.rooms)
            )

    async def _go_live(self, buffer: CatchUpBuffer, after: str | None) -> None:
        """Send the messages after the cursor, if there is one, then flush the buffer, both once the stream is authorized."""
        try:
            if after is not None:
                await self._catch_up(buffer, after)
            while await self._is_ready() and buffer.overflowed and buffer.begin is not None:
                await buffer.catch_up(buffer.begin, self._read, self._is_ready)
        except RealtimeError as error:
            self.fail(error)
        except Exception:
            log.exception("stream crashed")
            self.end()
        else:
            self._buffer = None
            if (problem := buffer.flush()) is not None:
                self.send(event_frame(dumps({"message": problem, "cursor": None}), event="gap"))

    async def _catch_up(self, buffer: CatchUpBuffer, after: str) -> None:
        try:
            end = await buffer.catch_up(after, self._read, self._is_ready)
        except (Gap, MalformedCursor) as error:
            self._tell_gap(str(error), error.oldest if isinstance(error, Gap) else None)
        else:
            if await self._is_ready():
                self.send(_id_frame(end))

    async def _read(self, room: Room, cursor: str) -> Page:
        page = await self._services.history.after(room, cursor)
        wanted = self._request.events
        messages = [stored for stored in page.messages if not wanted or stored.message.event in wanted]
        if len(self._subscriptions) > 1:
            # A cursor in one topic would skip messages of the topics that are read after it: no event has one until all are read.
            messages = [stored._replace(message=replace(stored.message, cursor=None)) for stored in messages]
        return page._replace(messages=messages)

    async def _is_ready(self) -> bool:
        """Wait until the client has received most of what was sent and the stream is authorized; False when it has ended."""
        while not self._is_over:
            if self._needs_reauthorization:
                await self._authorize()
            elif self.is_filling:
                await asyncio.sleep(DRAIN_POLL_S)
            else:
                return True
        return False

    def _check_expiry(self) -> float:
        """How many seconds the token is still valid. Raises: TokenExpired."""
        left_s = self._claims.expires_at - time.time()
        if left_s <= 0:
            raise TokenExpired(int(-left_s))
        return left_s

    def _watch_expiry(self) -> None:
        try:
            left_s = self._check_expiry()
        except TokenExpired as error:
            self.fail(error)
        else:
            self._expiry = asyncio.get_running_loop().call_later(min(left_s, MAX_TIMER_S), self._watch_expiry)

    def fail(self, error: RealtimeError) -> None:
        log.info("stream ended", code=error.code, reason=str(error))
        self.send(_error_frame(error))
        self.end()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Topic(BroadcastSubscription):
    """Subscribes a stream to one topic, filtered by its events."""

    def __init__(
        self, stream: EventStream, room: Room, services: Services, events: frozenset[str], byte_budget: ByteBudget
    ) -> None:
        super().__init__(
            room, Encoding(Format.SSE), stream.send, services.position, byte_budget, lambda: stream.backlog
        )
        self._events = events

    def deliver(self, message: Message, frame: Frame) -> None:
        if not self._events or message.event in self._events:
            super().deliver(message, frame)


class RowReader(RowChangeSubscriber):
    """Sends row changes to a stream. Changes before `release` are buffered until the `ready` event is sent."""

    def __init__(self, stream: EventStream) -> None:
        super().__init__("", Encoding(Format.SSE), is_buffered=True)
        self._stream = stream

    def send(self, frame: Frame) -> None:
        self._stream.send(frame)

    def send_status(self, text: str, *, ok: bool) -> None:
        if not ok:
            self._stream.fail(DatabaseUnavailable() if text in RETRYABLE else InvalidBinding(text))

    def send_gap(self, problem: str) -> None:
        self._stream.send(event_frame(dumps({"message": problem, "cursor": None}), event="gap"))


class _StreamResponse(StreamingResponse):
    """Begins the stream before the response, so that an error has its own status, and ends it however the request ends."""

    def __init__(self, stream: EventStream, *, is_event_source: bool) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(stream.run(), media_type=EVENT_STREAM, headers=headers)
        self._stream = stream
        self._is_event_source = is_event_source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            try:
                await self._stream.begin()
            except RealtimeError as error:
                answer: Response = error_response(error)
                if self._is_event_source and isinstance(error, TRANSIENT):
                    body = b"retry: %d\n\n%b" % (RETRY_MS, _error_frame(error).data)
                    answer = Response(body, media_type=EVENT_STREAM)
                await answer(scope, receive, send)
            else:
                await super().__call__(scope, receive, send)
        finally:
            self._stream.end()
            self._stream.discard()


def _parse_request(request: Request, max_topics: int) -> StreamRequest:
    """Parse the query and headers. Raises: TopicNameRequired, TooManyChannels, TooManyParameters, InvalidBinding."""
    query = request.query_params
    rooms = tuple(dict.fromkeys(room_of(topic, request) for topic in query.getlist("topic")))
    wanted: dict[str, Any] = {}
    for name in ("schema", "table"):
        if name in query:
            wanted[name], *more = query.getlist(name)
            if more:
                raise InvalidBinding(
                    f"`{name}` is given more than once. Open a stream for each, or ask for all of a schema"
                )
    if filters := query.getlist("filter"):
        wanted["filter"] = ",".join(filters)
    if select := ",".join(query.getlist("select")):
        wanted["select"] = [name.strip() for name in select.split(",")]
    events = frozenset(query.getlist("event")) - {"*"}
    if len(events) > MAX_EVENTS:
        raise TooManyParameters(MAX_EVENTS)
    rows: tuple[Binding, ...] = ()
    if wanted:
        binding = bindings.parse(wanted)
        # An event that is none of the three counts as all of them.
        rows = tuple(replace(binding, event=event) for event in {bindings.event_of(event) for event in events or {"*"}})
    if not rooms and not rows:
        raise TopicNameRequired
    if len(rooms) > max_topics:
        raise TooManyChannels
    return StreamRequest(
        rooms=rooms,
        bindings=rows,
        events=events,
        # The browser's last event id is later than the cursor in the URL of the page.
        after=request.headers.get("last-event-id") or query.get("after"),
    )


def _id_frame(cursor: str | None) -> Frame:
    """Encode an `id` without an event, which advances the cursor that a client reconnects with."""
    return Frame(b"\n" if cursor is None else b"id: %b\n\n" % cursor.encode())


def _error_frame(error: RealtimeError) -> Frame:
    return event_frame(dumps({"code": error.code, "message": str(error)}), event="error")
