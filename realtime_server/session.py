"""One client's conversation: what it says, in order, and what it is answered.

Frames are handled as they come. What must ask the database (a join of a private topic, a new token there) makes its own topic wait, in
`_busy`, and nothing else: heartbeats and other channels of the same socket go on. A failure that nobody foresaw ends its channel with
`phx_error` and no other.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog

from realtime_server.authorization import EVERYTHING, Policy
from realtime_server.claims import Claims
from realtime_server.connection import Connection
from realtime_server.errors import (
    AuthError,
    MalformedFrame,
    PayloadTooLarge,
    RealtimeError,
    TokenExpired,
    TooManyChannels,
    Unauthorized,
    UnmatchedTopic,
)
from realtime_server.hub import Hub, Room
from realtime_server.protocol import join, messages
from realtime_server.protocol.frames import Broadcast, ForwardedBroadcast, Frame, decode
from realtime_server.protocol.messages import BroadcastPush, Message, Ref, Version

Work = Coroutine[Any, Any, None]
Authorize = Callable[[str, Claims, Mapping[str, str]], Awaitable[Policy]]

# The event loop's clock and the wall clock may disagree by a little: a timer that fires early must not find a valid token.
EXPIRY_MARGIN_S: Final = 0.05

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Limits:
    max_channels: int
    max_pending_messages: int
    max_payload_bytes: int


class Channel:
    """One joined topic of one connection; the hub's subscriber."""

    __slots__ = ("claims", "config", "connection", "join_ref", "literal_join_ref", "policy", "room", "token")

    def __init__(
        self, connection: Connection, push: Message, config: join.Join, claims: Claims, policy: Policy
    ) -> None:
        self.connection = connection
        self.room = Room(push.topic, config.private)
        self.config = config
        self.claims = claims
        self.policy = policy
        self.token = config.token
        self.literal_join_ref = push.join_ref
        self.join_ref: Ref = push.ref if push.join_ref is None else push.join_ref

    @property
    def version(self) -> Version:
        return self.connection.version

    def send(self, frame: Frame) -> None:
        self.connection.send(frame)


class Session:
    """Everything the conversation needs comes in here; `tasks` owns what waits for the database.

    `api_key` is the identity of channels that bring no token of their own; `headers` are the handshake's `x-` headers.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        hub: Hub,
        authorize: Authorize,
        verify: Callable[[str, float], Claims],
        api_key: Claims,
        headers: Mapping[str, str],
        limits: Limits,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._connection = connection
        self._hub = hub
        self._authorize = authorize
        self._verify = verify
        self._api_key = api_key
        self._headers = headers
        self._limits = limits
        self._tasks = tasks
        self._channels: dict[str, Channel] = {}
        self._busy: dict[str, deque[Message | BroadcastPush]] = {}
        self._expiry: asyncio.TimerHandle | None = None

    def receive(self, frame: str | bytes) -> None:
        """Handle one frame of the client. Never raises: a bad frame is dropped and logged, the socket lives on."""
        try:
            message = decode(frame, self._connection.version)
        except MalformedFrame as error:
            log.info("frame dropped", code=error.code, problem=str(error))
            return
        waiting = self._busy.get(message.topic)
        if waiting is None:
            work = self._guarded(message)
            if work is not None:
                self._busy[message.topic] = deque()
                self._tasks.create_task(self._finish(message, work))
        elif len(waiting) < self._limits.max_pending_messages:
            waiting.append(message)
        else:
            log.warning("message dropped, too many wait for the join", topic=message.topic)

    def close(self) -> None:
        """Leave all channels; the socket is gone."""
        if self._expiry is not None:
            self._expiry.cancel()
        for channel in list(self._channels.values()):
            self._forget(channel)

    async def _finish(self, message: Message | BroadcastPush, work: Work | None) -> None:
        """Do the work, then what came for the same topic meanwhile."""
        waiting = self._busy[message.topic]
        try:
            while True:
                if work is not None:
                    try:
                        await work
                    except Exception:
                        self._crash(message)
                if not waiting:
                    return
                message = waiting.popleft()
                work = self._guarded(message)
        finally:
            del self._busy[message.topic]

    def _guarded(self, message: Message | BroadcastPush) -> Work | None:
        try:
            return self._handle(message)
        except Exception:
            self._crash(message)
            return None

    def _crash(self, message: Message | BroadcastPush) -> None:
        log.exception("channel crashed", topic=message.topic)
        channel = self._channels.get(message.topic)
        if channel is not None:
            self._forget(channel)
        join_ref = message.join_ref if channel is None else channel.literal_join_ref
        self._connection.push(messages.crashed(message.topic, join_ref))

    def _handle(self, message: Message | BroadcastPush) -> Work | None:
        """Answer a message now, or return the work that will."""
        channel = self._channels.get(message.topic)
        match message:
            case Message(topic=messages.PHOENIX, event=messages.HEARTBEAT):
                self._reply(message, None, {})
            case Message(event=messages.JOIN):
                return self._join(message)
            case Message(event=messages.LEAVE):
                self._leave(message, channel)
            case _ if channel is None:
                self._refuse(message, None, UnmatchedTopic())
            case Message(event=messages.ACCESS_TOKEN):
                return self._refresh(message, channel)
            case BroadcastPush() | Message(event=messages.BROADCAST):
                self._broadcast(message, channel)
            case _:
                log.info("unknown event", event_name=message.event, topic=message.topic)
        return None

    # -- joining and leaving

    def _join(self, message: Message) -> Work | None:
        try:
            topic = messages.sub_topic(message.topic)
            config = join.parse(messages.loads_object(message.payload))
            for problem in config.problems:
                log.info("join field ignored", code="InvalidJoinPayload", topic=message.topic, problem=problem)
            if message.topic not in self._channels and len(self._channels) >= self._limits.max_channels:
                raise TooManyChannels
            claims = self._identify(config)
        except UnmatchedTopic as error:
            self._refuse(message, None, error)
            return None
        except RealtimeError as error:
            self._refuse(message, message.join_ref, error)
            return None
        if config.private:
            return self._join_private(message, topic, config, claims)
        self._enter(Channel(self._connection, message, config, claims, EVERYTHING), message)
        return None

    async def _join_private(self, message: Message, topic: str, config: join.Join, claims: Claims) -> None:
        try:
            policy = await self._authorize(topic, claims, self._headers)
            if not policy.can_read_broadcast and not (config.presence_enabled and policy.can_read_presence):
                raise Unauthorized(topic)
        except RealtimeError as error:
            self._refuse(message, message.join_ref, error)
            return
        # Another private join of this socket may have taken the last place meanwhile.
        if message.topic not in self._channels and len(self._channels) >= self._limits.max_channels:
            self._refuse(message, message.join_ref, TooManyChannels())
            return
        self._enter(Channel(self._connection, message, config, claims, policy), message)

    def _enter(self, channel: Channel, message: Message) -> None:
        old = self._channels.get(message.topic)
        if old is not None:
            # Before the reply: a client without join refs could not tell which of the two is closed.
            self._forget(old)
            self._connection.push(messages.closed(message.topic, old.literal_join_ref))
        self._channels[message.topic] = channel
        bindings = [{**binding, "id": number} for number, binding in enumerate(channel.config.bindings, start=1)]
        self._reply(message, message.join_ref, {"postgres_changes": bindings})
        if channel.policy.can_read_broadcast:
            self._hub.subscribe(channel.room, channel)
        if bindings:
            self._connection.push(
                messages.system(
                    message.topic,
                    channel.join_ref,
                    "Row changes are not available on this server, subscribe to broadcasts",
                    ok=False,
                    extension="postgres_changes",
                )
            )
        self._watch_expiry()

    def _leave(self, message: Message, channel: Channel | None) -> None:
        if channel is None:
            self._reply(message, message.join_ref, {})
            return
        self._forget(channel)
        self._reply(message, channel.join_ref, {})
        self._connection.push(messages.closed(message.topic, channel.literal_join_ref))

    def _shut_down(self, channel: Channel, reason: str) -> None:
        """End a channel from this side and say why. Clients do not join again by themselves."""
        topic = channel.room.topic
        self._forget(channel)
        log.info("channel shut down", code="ChannelShutdown", topic=topic, reason=reason)
        self._connection.push(messages.system(topic, channel.join_ref, reason, ok=False))
        self._connection.push(messages.closed(topic, channel.literal_join_ref))

    def _forget(self, channel: Channel) -> None:
        self._hub.unsubscribe(channel.room, channel)
        if self._channels.get(channel.room.topic) is channel:
            del self._channels[channel.room.topic]

    # -- tokens

    def _identify(self, config: join.Join) -> Claims:
        if config.token is not None:
            return self._verify(config.token, time.time())
        if self._api_key.expires_at <= time.time():
            raise TokenExpired(int(time.time() - self._api_key.expires_at))
        return self._api_key

    def _refresh(self, message: Message, channel: Channel) -> Work | None:
        """A new token for a channel: never replied to, whatever comes of it."""
        token = (messages.loads_object(message.payload) or {}).get("access_token")
        if not isinstance(token, str) or token.startswith("sb_") or token == channel.token:
            return None
        try:
            claims = self._verify(token, time.time())
        except AuthError as error:
            self._shut_down(channel, str(error))
            return None
        channel.token = token
        if channel.room.private:
            return self._authorize_again(channel, claims)
        channel.claims = claims
        self._watch_expiry()
        return None

    async def _authorize_again(self, channel: Channel, claims: Claims) -> None:
        topic = messages.sub_topic(channel.room.topic)
        try:
            policy = await self._authorize(topic, claims, self._headers)
        except RealtimeError as error:
            self._shut_down(channel, str(error))
            return
        if not policy.can_read_broadcast and not policy.can_read_presence:
            self._shut_down(channel, str(Unauthorized(topic)))
        elif channel.policy.can_read_broadcast and not policy.can_read_broadcast:
            self._shut_down(channel, f"You no longer have permission to read from this Channel topic: {topic}")
        else:
            channel.claims, channel.policy = claims, policy
            if policy.can_read_broadcast:
                self._hub.subscribe(channel.room, channel)
            self._watch_expiry()

    def _watch_expiry(self) -> None:
        """One timer per socket, set to the first token that expires."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if self._channels:
            first = min(channel.claims.expires_at for channel in self._channels.values())
            loop = asyncio.get_running_loop()
            # Not more than a day ahead: event loops refuse delays of decades.
            delay = min(first - time.time() + EXPIRY_MARGIN_S, 86_400.0)
            self._expiry = loop.call_later(max(0.0, delay), self._expire)

    def _expire(self) -> None:
        now = time.time()
        for channel in list(self._channels.values()):
            if channel.claims.expires_at <= now:
                self._shut_down(channel, str(TokenExpired(int(now - channel.claims.expires_at))))
        self._watch_expiry()

    # -- broadcast

    def _broadcast(self, message: Message | BroadcastPush, channel: Channel) -> None:
        if not channel.policy.can_write_broadcast:
            if channel.config.ack:
                self._reply(message, channel.join_ref, {"reason": "unauthorized"}, ok=False)
            return
        if len(message.payload) > self._limits.max_payload_bytes:
            if channel.config.ack:
                self._refuse(message, channel.join_ref, PayloadTooLarge())
            return
        exclude = None if channel.config.receive_own else channel
        if isinstance(message, BroadcastPush):
            broadcast = Broadcast(message.topic, message.user_event, message.payload, message.is_json)
            self._hub.publish(channel.room, broadcast, exclude=exclude)
        elif message.payload.startswith(b"{"):
            self._hub.publish(channel.room, ForwardedBroadcast(message.topic, message.payload), exclude=exclude)
        else:
            log.info("broadcast dropped, its payload is not an object", topic=message.topic)
            if channel.config.ack:
                self._reply(message, channel.join_ref, {"reason": "payload must be an object"}, ok=False)
            return
        if channel.config.ack:
            self._reply(message, channel.join_ref, {})

    # -- replies

    def _reply(self, push: Message | BroadcastPush, join_ref: Ref, response: object, *, ok: bool = True) -> None:
        self._connection.push(messages.reply(push, join_ref, response, ok=ok))

    def _refuse(self, push: Message | BroadcastPush, join_ref: Ref, error: RealtimeError) -> None:
        log.info("refused", code=error.code, topic=push.topic, reason=str(error))
        self._reply(push, join_ref, {"reason": error.reason}, ok=False)
