"""Messages as Server-Sent Events: `GET /stream?topic=...`, for browsers' `EventSource` and for curl.

A message is an unnamed event, so that `onmessage` sees it; its `id` is its cursor, so that a browser that reconnects resumes by itself
(`Last-Event-ID`). Everything else is a named event: `ready` first, from which on nothing is missed; `gap` where messages are missing;
`error` before the stream ends. Comments keep proxies from closing it. Source: WHATWG HTML, "Server-sent events".

`EventSource` sends no headers. So that tokens need not stand in URLs, `POST /stream/ticket` trades one for a ticket that is good once.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from realtime_server.authorization import EVERYTHING
from realtime_server.claims import Claims
from realtime_server.config import Settings
from realtime_server.endpoints.caller import policy_headers, token_of
from realtime_server.endpoints.websocket import Sockets
from realtime_server.errors import (
    DatabaseUnavailable,
    Gap,
    InvalidTicket,
    MalformedCursor,
    RealtimeError,
    Restarting,
    TokenExpired,
    TooManyChannels,
    TooManyUsers,
    TopicNameRequired,
    Unauthorized,
)
from realtime_server.follower import Follower, Hold
from realtime_server.history import Page
from realtime_server.hub import Room
from realtime_server.protocol.frames import Broadcast, Encoding, ForwardedBroadcast, Frame, event_frame
from realtime_server.protocol.messages import TOPIC_PREFIX, Format, dumps
from realtime_server.services import Services

RETRY_MS: Final = 1000
KEEP_ALIVE_S: Final = 15.0
TICKET_S: Final = 30.0
MOST_TICKETS: Final = 10_000
DRAIN_LOOK_S: Final = 0.01

log = structlog.get_logger()


class Tickets:
    """What tickets stand for. Each is taken once, within half a minute."""

    def __init__(self) -> None:
        self._claims: OrderedDict[str, tuple[Claims, float]] = OrderedDict()

    def give(self, claims: Claims, now: float) -> str:
        ticket = secrets.token_urlsafe(24)
        self._claims[ticket] = (claims, now + TICKET_S)
        if len(self._claims) > MOST_TICKETS:
            self._claims.popitem(last=False)
        return ticket

    def take(self, ticket: str, now: float) -> Claims:
        """Raises: InvalidTicket."""
        claims, expires_at = self._claims.pop(ticket, (None, 0.0))
        if claims is None or expires_at <= now:
            raise InvalidTicket
        return claims


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks for. `events` empty: all."""

    topics: tuple[str, ...]
    private: bool
    events: frozenset[str]
    after: str | None


def stream_endpoint(
    services: Services, sockets: Sockets, tickets: Tickets, settings: Settings
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            if sockets.is_draining:
                raise Restarting
            wish = _read_wish(request, settings.max_channels_per_socket)
            ticket = request.query_params.get("ticket")
            claims = (
                await services.verify(token_of(request)) if ticket is None else tickets.take(ticket, time.monotonic())
            )
            if services.rates.max_users and len(services.users) >= services.rates.max_users:
                raise TooManyUsers
            stream = EventStream(services, wish, claims, policy_headers(request), settings.max_buffered_bytes)
            await stream.authorize()
        except RealtimeError as error:
            log.info("stream refused", code=error.code, reason=str(error))
            return JSONResponse({"code": error.code, "message": str(error)}, error.status)
        sockets.add(stream)
        services.users.add(stream)

        async def body() -> AsyncIterator[bytes]:
            try:
                async for chunk in stream.run():
                    yield chunk
            finally:
                sockets.discard(stream)
                services.users.discard(stream)

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(body(), media_type="text/event-stream", headers=headers)

    return endpoint


def ticket_endpoint(services: Services, tickets: Tickets) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            claims = await services.verify(token_of(request))
        except RealtimeError as error:
            return JSONResponse({"code": error.code, "message": str(error)}, error.status)
        return JSONResponse({"ticket": tickets.give(claims, time.monotonic()), "expires_in": int(TICKET_S)})

    return endpoint


class EventStream:
    """One client's stream of events, of one topic or several."""

    def __init__(
        self, services: Services, wish: Wish, claims: Claims, headers: dict[str, str], max_buffered_bytes: int
    ) -> None:
        self._services = services
        self._wish = wish
        self._claims = claims
        self._headers = headers
        self._max_buffered_bytes = max_buffered_bytes
        self._waiting = bytearray()
        self._wake = asyncio.Event()
        self._is_over = False
        self._hold = Hold()
        encoding = Encoding(Format.SSE)
        self._followers = [
            _Filtered(
                wish.events, Room(TOPIC_PREFIX + topic, wish.private), encoding, self.send, services.place, self._hold
            )
            for topic in wish.topics
        ]
        self._tasks: set[asyncio.Task[None]] = set()

    async def authorize(self) -> None:
        """Raises: Unauthorized, DatabaseUnavailable, QueryCanceled."""
        if self._services.place() is None:
            raise DatabaseUnavailable
        for topic in self._wish.topics:
            policy = EVERYTHING
            if self._wish.private:
                policy = await self._services.authorize(topic, self._claims, self._headers)
            if not policy.can_read_broadcast:
                raise Unauthorized(topic)

    async def run(self) -> AsyncIterator[bytes]:
        """The stream's bytes, until it ends."""
        loop = asyncio.get_running_loop()
        for follower in self._followers:
            self._services.broadcasts.subscribe(follower.room, follower)
        place = self._services.place()
        begin = self._wish.after or (place.cursor if place else None)
        ready = event_frame(dumps({"topics": self._wish.topics}), event="ready", id=_one_line(begin))
        self._waiting += b"retry: %d\n\n" % RETRY_MS + ready.data
        self._spawn(self._catch_up())
        lifetime_s = min(self._claims.expires_at - time.time(), 86_400.0 * 365)
        expiry = loop.call_later(max(0.0, lifetime_s), self._expire)
        try:
            while self._waiting or not self._is_over:
                if not self._waiting:
                    self._wake.clear()
                    try:
                        await asyncio.wait_for(self._wake.wait(), KEEP_ALIVE_S)
                    except TimeoutError:
                        self._waiting += b": keep-alive\n\n"
                    continue
                chunk, self._waiting = bytes(self._waiting), bytearray()
                yield chunk
        finally:
            self._is_over = True
            expiry.cancel()
            for follower in self._followers:
                self._services.broadcasts.unsubscribe(follower.room, follower)
            for task in self._tasks:
                task.cancel()

    def send(self, frame: Frame) -> None:
        if self._is_over:
            return
        self._waiting += frame.data
        self._wake.set()
        if len(self._waiting) > self._max_buffered_bytes:
            # The reader is too slow; what it has not got it resumes from the id of the last event it read.
            self._waiting.clear()
            self._end()

    def close(self, code: int, reason: str = "") -> None:
        """End the stream; `code` is for sockets."""
        self._end()

    def revalidate(self, topic: str | None, subject: str | None) -> None:
        if (
            self._wish.private
            and subject in (None, self._claims.subject)
            and (topic is None or topic in self._wish.topics)
        ):
            self._spawn(self._authorize_again())

    def tell_gap(self, problem: str, oldest: str | None) -> None:
        place = self._services.place()
        data = dumps({"message": problem, "cursor": oldest})
        self.send(event_frame(data, event="gap", id=place.cursor if place else None))

    async def _catch_up(self) -> None:
        if self._wish.after is not None:
            try:
                for follower in self._followers:
                    await follower.catch_up(self._wish.after, self._read, self._is_ready)
            except (Gap, MalformedCursor) as error:
                self.tell_gap(str(error), error.oldest if isinstance(error, Gap) else None)
            except RealtimeError as error:
                self._fail(error)
                return
        self._hold.release()
        for follower in self._followers:
            follower.hold = None

    async def _read(self, room: Room, cursor: str) -> Page:
        page = await self._services.history.after(room, cursor)
        messages = [stored for stored in page.messages if self._is_wanted(stored.message)]
        if len(self._followers) > 1:
            # A place in one topic is none in the others, which are read after it: until all are read, no event moves the place.
            messages = [stored._replace(message=replace(stored.message, cursor=None)) for stored in messages]
        return page._replace(messages=messages)

    def _is_wanted(self, message: Broadcast) -> bool:
        return not self._wish.events or message.event in self._wish.events

    async def _is_ready(self) -> bool:
        while not self._is_over and len(self._waiting) > self._max_buffered_bytes // 4:
            await asyncio.sleep(DRAIN_LOOK_S)
        return not self._is_over

    async def _authorize_again(self) -> None:
        try:
            await self.authorize()
        except RealtimeError as error:
            self._fail(error)

    def _expire(self) -> None:
        self._fail(TokenExpired(max(0, int(time.time() - self._claims.expires_at))))

    def _fail(self, error: RealtimeError) -> None:
        self.send(event_frame(dumps({"code": error.code, "message": str(error)}), event="error"))
        self._end()

    def _end(self) -> None:
        self._is_over = True
        self._wake.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Filtered(Follower):
    """A follower that wants some events only."""

    def __init__(self, events: frozenset[str], *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._events = events

    def deliver(self, message: Broadcast | ForwardedBroadcast, frame: Frame) -> None:
        if not self._events or message.event in self._events:
            super().deliver(message, frame)


def _read_wish(request: Request, max_topics: int) -> Wish:
    """Raises: TopicNameRequired, TooManyChannels."""
    query = request.query_params
    topics = tuple(dict.fromkeys(topic.removeprefix(TOPIC_PREFIX) for topic in query.getlist("topic")))
    if not topics or not all(topics):
        raise TopicNameRequired
    if len(topics) > max_topics:
        raise TooManyChannels
    return Wish(
        topics=topics,
        private=query.get("private", "").lower() in ("true", "1"),
        events=frozenset(query.getlist("event")),
        # What the browser remembers is later than what the page asked for when it was loaded.
        after=request.headers.get("last-event-id") or query.get("after"),
    )


def _one_line(cursor: str | None) -> str | None:
    return None if cursor is None or not cursor.isascii() or not cursor.isprintable() else cursor
