"""One client's conversation: what it says, in order, and what it is answered.

Frames are handled as they come. What must wait (a join, a new token: keys may have to be fetched, policies are asked of the database) makes
its own topic wait, in `_busy`, and nothing else: heartbeats and other channels of the same socket go on. A failure that nobody foresaw ends
its channel with `phx_error` and no other.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple, TypeGuard

import msgspec
import structlog

from realtime_server import presence
from realtime_server.authorization import EVERYTHING, Policy, PolicyHeaders
from realtime_server.broadcast_subscription import BroadcastSubscription, ByteBudget, CatchUpBuffer
from realtime_server.changes.reader import RowChangeSubscriber
from realtime_server.changes.subscriptions import Registration
from realtime_server.claims import Claims
from realtime_server.connection import Connection
from realtime_server.cursor import StreamPosition
from realtime_server.errors import (
    AuthError,
    ChangesTimeout,
    DatabaseUnavailable,
    Gap,
    InvalidBinding,
    InvalidTrack,
    MalformedCursor,
    MalformedFrame,
    PayloadTooLarge,
    PresenceTooLarge,
    PrivateOnly,
    RealtimeError,
    SendDenied,
    TokenExpired,
    TooManyChannels,
    TooManyJoins,
    TooManyUsers,
    TrackDenied,
    UnableToReplay,
    Unauthorized,
    UnknownPresenceEvent,
    UnmatchedTopic,
)
from realtime_server.history import Stored
from realtime_server.hub import Room
from realtime_server.limits import Bucket
from realtime_server.protocol import bindings, join, messages
from realtime_server.protocol.frames import Broadcast, Encoding, ForwardedBroadcast, Frame, PresenceDiff, decode
from realtime_server.protocol.messages import BroadcastPush, Message, Ref
from realtime_server.services import Limits, Services

Work = Coroutine[Any, Any, None]
# Does something for a topic at once, or returns the work that remains.
Action = Callable[[], Work | None]

# The event loop's clock and the wall clock may disagree by a little: a timer that fires early must not find a valid token.
EXPIRY_MARGIN_S: Final = 0.05
WARNING_S: Final = 60.0
# Event loops refuse delays of decades.
LONGEST_TIMER_S: Final = 86_400.0

# Of the replay by time; by cursor there is no bound.
MAX_REPLAYED: Final = 25
LATEST_TIME_MS: Final = 8_000_000_000_000_000
DRAIN_LOOK_S: Final = 0.01

LONGEST_TOPIC: Final = 1000
# The channel keeps its join ref, and the answer repeats the other.
LONGEST_REF: Final = 255
LARGEST_JOIN_BYTES: Final = 256_000

# The kind of the steps that ask policies again.
REAUTHORIZE: Final = "reauthorize"
# For so long, the answer of policies is taken for a new token of the same identity, too.
POLICY_REUSE_S: Final = 60.0

TOO_MANY_MESSAGES: Final = "Too many messages per second"

log = structlog.get_logger()


class _Step(NamedTuple):
    """What is to be done for a topic, once it is not busy. `size`: bytes that it holds until then. `ends_wait`: it makes no sense to wait
    any longer for the row changes of what was joined before. `kind`: a later step of the same kind replaces one that is pending."""

    action: Action
    size: int = 0
    ends_wait: bool = False
    kind: str | None = None


class Channel(BroadcastSubscription):
    """One joined topic of one connection; the subscriber to its broadcasts."""

    def __init__(self, session: Session, push: Message, config: join.Join, claims: Claims, policy: Policy) -> None:
        connection = session.connection
        super().__init__(
            Room(push.topic, config.private),
            Encoding(connection.format, config.with_cursor),
            connection.send,
            session.services.position,
            session.byte_budget,
            lambda: connection.backlog,
        )
        self.session = session
        self.presence_subscriber = PresenceSubscriber(self)
        self.rows: RowReader | None = None
        self.config = config
        self.claims = claims
        self.policy = policy
        self.authorized_at = time.monotonic()
        self.token = config.token
        self.literal_join_ref = push.join_ref
        self.join_ref: Ref = push.ref if push.join_ref is None else push.join_ref
        self.presence_key = config.presence_key or str(uuid.uuid1())
        self.presence_calls = 0
        self.presence_window_ends_at = 0.0
        self.watches = False
        self.warned = _is_brief(claims)
        # How often policies were to be asked again, and which of these times was answered last.
        self.auth_epoch = 0
        self.authorized_epoch = 0
        # Read at the join, to be sent after its reply.
        self.replayed: list[Stored] = []
        self.position_at_join: StreamPosition | None = None
        self.is_resuming = False

    @property
    def registration(self) -> Registration | None:
        return None if self.rows is None else self.rows.registration

    @property
    def needs_reauthorization(self) -> bool:
        """Whether policies are to be asked again, or are being asked."""
        return self.auth_epoch > self.authorized_epoch

    def require_reauthorization(self) -> bool:
        """Send nothing until policies have been asked again; whether that was to be done already."""
        was_pending = self.needs_reauthorization
        self.auth_epoch += 1
        if self.buffer is None:
            CatchUpBuffer(self)
        return was_pending

    def deliver(self, message: Broadcast | ForwardedBroadcast, frame: Frame) -> None:
        # What is held is looked at when it is released, and the first of it may end the channel.
        if self.buffer is None and self.session.services.rates.events.is_over(time.monotonic()):
            self.session.shut_down(self, TOO_MANY_MESSAGES)
        else:
            super().deliver(message, frame)


class PresenceSubscriber:
    """The subscriber to the changes of presence of one channel. `has_missed`: some were not sent, because its rights were in doubt."""

    def __init__(self, channel: Channel) -> None:
        self.encoding = Encoding(channel.encoding.format)
        self.has_missed = False
        self._channel = channel

    @property
    def backlog(self) -> int:
        return self._channel.session.connection.backlog

    def deliver(self, message: PresenceDiff, frame: Frame) -> None:
        if self._channel.needs_reauthorization:
            self.has_missed = True
        else:
            self._channel.session.connection.send(frame)


class RowReader(RowChangeSubscriber):
    """The subscriber to the row changes of one channel."""

    def __init__(self, session: Session, channel: Channel, *, is_held: bool) -> None:
        super().__init__(channel.room.topic, channel.encoding, is_held=is_held, client=session)
        self._session = session
        self._channel = channel

    def send(self, frame: Frame) -> None:
        rates, now = self._session.services.rates, time.monotonic()
        rates.events.count(now)
        if rates.events.is_over(now):
            self._session.shut_down(self._channel, TOO_MANY_MESSAGES)
        else:
            self._session.connection.send(frame)

    def say(self, text: str, *, ok: bool) -> None:
        self._session.tell(self._channel, text, ok=ok, extension=messages.POSTGRES_CHANGES)

    def say_missing(self, problem: str) -> None:
        extension = messages.POSTGRES_CHANGES
        self._session.connection.push(messages.gap(self.topic, self._channel.join_ref, problem, None, extension))


class Session:
    """`api_key` is the identity of channels that bring no token of their own; `headers` are the handshake's `x-` headers, which policies
    may read; `tasks` owns what waits."""

    def __init__(
        self,
        connection: Connection,
        services: Services,
        *,
        api_key: Claims,
        headers: PolicyHeaders,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.connection = connection
        self.services = services
        self._api_key = api_key
        self._headers = headers
        self._limits = services.limits
        # Half, so that a client is not too slow only because what was held for it is released.
        self.byte_budget = ByteBudget(services.limits.max_pending_bytes // 2)
        self._tasks = tasks
        self._channels: dict[str, Channel] = {}
        self._busy: dict[str, deque[_Step]] = {}
        # Of joins whose reply waits for row changes.
        self._held: dict[str, RowReader] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self._pending_bytes = 0
        refresh_rate = self._limits.max_token_refreshes_per_second
        # A client gives a new token to all of its channels at once.
        refresh_burst = 2 * self._limits.max_channels
        self._refreshes = Bucket(refresh_rate, refresh_burst, time.monotonic()) if refresh_rate else None

    @property
    def has_channels(self) -> bool:
        return bool(self._channels or self._busy)

    def receive(self, frame: str | bytes, *, too_many: bool = False) -> None:
        """Handle one frame of the client, `too_many` when it is over the socket's rate. Never raises: a bad frame is dropped and logged,
        the socket lives on."""
        try:
            message = decode(frame, self.connection.format)
            carries_json = isinstance(message, Message) or message.is_json
            if carries_json and messages.is_deeper_than(message.payload, self._limits.max_depth):
                raise MalformedFrame(f"payload nests deeper than {self._limits.max_depth} levels")
            if len(message.topic) > LONGEST_TOPIC:
                raise MalformedFrame(f"topic is longer than {LONGEST_TOPIC} characters")
            if any(isinstance(ref, str) and len(ref) > LONGEST_REF for ref in (message.join_ref, message.ref)):
                raise MalformedFrame(f"ref is longer than {LONGEST_REF} characters")
        except MalformedFrame as error:
            if not too_many:
                log.info("frame dropped", code=error.code, problem=str(error))
            return
        ends_wait = isinstance(message, Message) and message.event in (messages.JOIN, messages.LEAVE)
        kind = (
            messages.ACCESS_TOKEN if isinstance(message, Message) and message.event == messages.ACCESS_TOKEN else None
        )
        step = _Step(lambda: self._handle(message, too_many), len(message.payload), ends_wait, kind)
        self._do(message.topic, step)

    def revalidate(self, topic: str | None, subject: str | None) -> None:
        """Ask again for the rights of private channels: of one topic (without `realtime:`), of one user, or of all where None."""
        # A channel that is joining has asked already, and may have been answered by what was true before.
        for wire_topic in {*self._channels, *self._busy}:
            if topic not in (None, wire_topic.removeprefix(messages.TOPIC_PREFIX)):
                continue
            channel = self._channels.get(wire_topic)
            if channel is not None and _is_meant(channel, subject) and channel.require_reauthorization():
                continue
            pending = self._busy.get(wire_topic)
            if pending is None:
                self._do(wire_topic, _Step(partial(self._revalidate, wire_topic, subject), kind=REAUTHORIZE))
            elif (position := _position(pending, REAUTHORIZE)) is None:
                pending.appendleft(_Step(partial(self._revalidate, wire_topic, subject), kind=REAUTHORIZE))
            else:
                # Both may mean the channel, or neither: it asks in any case.
                pending[position] = _Step(partial(self._revalidate, wire_topic, None), kind=REAUTHORIZE)

    def tell_gap(self, problem: str, oldest: str) -> None:
        """Messages of the database are missing from here on, on every channel that receives any."""
        for channel in self._channels.values():
            if channel.policy.can_read_broadcast:
                if channel.buffer is not None:
                    channel.buffer.restart()
                self._tell_gap(channel, problem, oldest)

    def close(self) -> None:
        """Leave all channels; the socket is gone."""
        if self._expiry is not None:
            self._expiry.cancel()
        for channel in list(self._channels.values()):
            self._forget(channel)
        self.services.users.discard(self)

    def shut_down(self, channel: Channel, reason: str) -> None:
        """End a channel from this side and say why, unless it has ended. Clients do not join again by themselves."""
        if not self._is_open(channel):
            return
        topic = channel.room.topic
        self._forget(channel)
        log.info("channel shut down", code="ChannelShutdown", topic=topic, reason=reason)
        self.connection.push(messages.system(topic, channel.join_ref, reason, ok=False))
        self.connection.push(messages.closed(topic, channel.literal_join_ref))

    def _do(self, topic: str, step: _Step) -> None:
        """Do it now, or after what the topic waits for."""
        waiting = self._busy.get(topic)
        if waiting is None:
            work = self._guarded(topic, step.action)
            if work is not None:
                self._busy[topic] = deque()
                self._spawn(self._finish(topic, work), work)
            return
        position = _replaceable(waiting, step)
        count, size = len(waiting) + 1, step.size
        if position is not None:
            count, size = count - 1, size - waiting[position].size
        if count <= self._limits.max_pending_messages and self._pending_bytes + size <= self._limits.max_pending_bytes:
            self._pending_bytes += size
            if position is None:
                waiting.append(step)
            else:
                waiting[position] = step
            if step.ends_wait and topic in self._held:
                self._held[topic].abandon_wait()
        else:
            log.warning("message dropped, too many wait for the join", topic=topic)

    async def _finish(self, topic: str, work: Work | None) -> None:
        """Do the work, then what came for the same topic meanwhile."""
        waiting = self._busy[topic]
        try:
            while True:
                if work is not None:
                    try:
                        await work
                    except Exception:
                        self._crash(topic)
                if not waiting:
                    return
                step = waiting.popleft()
                self._pending_bytes -= step.size
                work = self._guarded(topic, step.action)
        finally:
            del self._busy[topic]
            if not self.has_channels:
                self.services.users.discard(self)

    def _spawn(self, task: Work, work: Work) -> None:
        """Start a task that is to wait for some work, which it may not live to begin: the socket may go away first."""
        self._tasks.create_task(task).add_done_callback(lambda _: work.close())

    def _guarded(self, topic: str, action: Action) -> Work | None:
        try:
            return action()
        except Exception:
            self._crash(topic)
            return None

    def _crash(self, topic: str) -> None:
        log.exception("channel crashed", topic=topic)
        channel = self._channels.get(topic)
        if channel is not None:
            self._forget(channel)
        # Without a channel: a null ref, which clients take for whatever they have on that topic.
        self.connection.push(messages.crashed(topic, None if channel is None else channel.literal_join_ref))

    def _handle(self, message: Message | BroadcastPush, too_many: bool) -> Work | None:
        """Answer a message now, or return the work that will. `too_many`: the socket says more than it may."""
        channel = self._channels.get(message.topic)
        match message:
            case Message(topic=messages.PHOENIX, event=messages.HEARTBEAT):
                self._reply(message, None, self._position(message))
                return None
            case Message(event=messages.JOIN):
                # Joins that still wait for an answer count as well: each holds a task.
                others = (self._channels.keys() | self._busy.keys()) - {message.topic}
                refusal = _refusal(message, len(others), self._limits, too_many)
                if refusal is not None:
                    self._refuse(message, message.join_ref, refusal)
                    return None
                return self._join(message)
            case Message(event=messages.LEAVE):
                self._leave(message, channel)
                return None
        if channel is None:
            if not too_many:
                self._refuse(message, None, UnmatchedTopic())
        elif too_many:
            self.shut_down(channel, TOO_MANY_MESSAGES)
        else:
            match message:
                case Message(event=messages.ACCESS_TOKEN):
                    return self._refresh(message, channel)
                case BroadcastPush() | Message(event=messages.BROADCAST):
                    self._broadcast(message, channel)
                case Message(event=messages.PRESENCE):
                    self._presence(message, channel)
                case _:
                    self.services.rates.events.count(time.monotonic())
                    log.info("unknown event", event_name=message.event, topic=message.topic)
        return None

    def _position(self, heartbeat: Message) -> dict[str, str]:
        """For a heartbeat that asks for it, the cursor behind all that was sent so far, if it is the same on every channel."""
        is_asked = heartbeat.payload != b"{}" and (messages.loads_object(heartbeat.payload) or {}).get("cursor") is True
        is_live = not self._busy and all(channel.buffer is None for channel in self._channels.values())
        position = self.services.position()
        return {"cursor": position.cursor} if is_asked and is_live and position is not None else {}

    # -- joining and leaving

    async def _join(self, message: Message) -> None:
        try:
            topic = messages.sub_topic(message.topic)
            old = self._channels.get(message.topic)
            if old is not None:
                # Whatever comes of the new one. Before its reply: a client without join refs could not tell which of the two is closed.
                self._forget(old)
                self.connection.push(messages.closed(message.topic, old.literal_join_ref))
            self._admit()
            # Already now, so that a word of lost rights finds the join.
            self.services.users.add(self)
            config = join.parse(join.loads(message.payload), self.connection.format)
            for problem in config.problems:
                log.info("join field ignored", code="InvalidJoinPayload", topic=message.topic, problem=problem)
            if self._limits.private_only and not config.private:
                raise PrivateOnly
            claims = await self._identify(config)
            policy = EVERYTHING
            if config.private:
                policy = await self.services.authorize(topic, claims, self._headers)
                if not policy.can_read_broadcast and not (config.presence_enabled and policy.can_read_presence):
                    raise Unauthorized(topic)
            channel = Channel(self, message, config, claims, policy)
            await self._begin(channel, topic)
        except UnmatchedTopic as error:
            self._refuse(message, None, error)
        except RealtimeError as error:
            self._refuse(message, message.join_ref, error)
            if isinstance(error, TooManyJoins):
                self.connection.close(1001, "too many joins")
        else:
            self._enter(channel, message)

    def _admit(self) -> None:
        """Raises: TooManyUsers, TooManyJoins."""
        rates, now = self.services.rates, time.monotonic()
        if rates.max_users and self not in self.services.users and len(self.services.users) >= rates.max_users:
            raise TooManyUsers
        if rates.joins.is_over(now):
            raise TooManyJoins
        rates.joins.count(now)

    async def _begin(self, channel: Channel, topic: str) -> None:
        """Subscribe, and read what the client asks to have replayed by time.

        Raises: Unauthorized, UnableToReplay, DatabaseUnavailable, InvalidBinding, ChangesTimeout, TokenExpired.
        """
        config, replay = channel.config, channel.config.replay
        if config.has_replay and not channel.policy.can_read_broadcast:
            raise Unauthorized(topic)
        try:
            # The reply says that from now on nothing is missed, so it does not come before the relay reads.
            await self.services.first_position()
        except DatabaseUnavailable:
            # Without the database clients still send each other messages.
            if config.with_cursor or "after" in replay:
                raise
        if config.has_replay:
            CatchUpBuffer(channel)
        if config.has_replay and "after" not in replay:
            channel.replayed = await self._read_by_time(channel)
        if config.wait_ms is not None and config.bindings:
            await self._await_changes(channel, config.wait_ms)
        if channel.claims.expires_at <= time.time():
            # While policies, the past or row changes were waited for.
            self._forget(channel)
            raise TokenExpired(int(time.time() - channel.claims.expires_at))
        if channel.policy.can_read_broadcast:
            self.services.broadcasts.subscribe(channel.room, channel)

    async def _read_by_time(self, channel: Channel) -> list[Stored]:
        """The newest messages since a time. Raises: UnableToReplay."""
        since, limit = channel.config.replay.get("since"), channel.config.replay.get("limit", MAX_REPLAYED)
        if not channel.room.private:
            raise UnableToReplay("Replay is not allowed for public channels")
        if not (_is_integer(since) and _is_integer(limit) and 0 <= since < LATEST_TIME_MS):
            raise UnableToReplay("Replay params are not valid")
        self.services.broadcasts.subscribe(channel.room, channel)
        channel.position_at_join = self.services.position()
        try:
            return await self.services.history.newest(channel.room, since, max(1, min(limit, MAX_REPLAYED)))
        except BaseException as error:
            # The client may be gone by now, and its session knows nothing of this channel yet.
            self._forget(channel)
            if isinstance(error, RealtimeError):
                raise UnableToReplay("Realtime was unable to replay messages") from error
            raise

    def _enter(self, channel: Channel, message: Message) -> None:
        self._channels[message.topic] = channel
        self.services.metrics.joins.inc()
        config, position = channel.config, self.services.position()
        echoes = [{**msgspec.json.decode(binding), "id": id} for id, binding in enumerate(config.bindings, start=1)]
        response: dict[str, object] = {"postgres_changes": echoes}
        if config.with_cursor and config.replay.get("after") is not None:
            # No cursor: it would lie behind messages that are yet to be replayed, and a client that adopts it and loses the connection
            # would never get them.
            response["resumed"] = True
        elif config.with_cursor and position is not None:
            response["cursor"] = position.cursor
        self._reply(message, message.join_ref, response)
        if config.private and _position(self._busy[message.topic], REAUTHORIZE) is not None:
            # The word came after policies had answered: what was read and held since may have been written behind it.
            channel.require_reauthorization()
        after = config.replay.get("after")
        if after is not None:
            self._go_live(channel, after)
        elif config.has_replay and not channel.needs_reauthorization:
            self._replay(channel)
        if not self._is_open(channel):
            # What was held has ended it.
            return
        if channel.rows is not None:
            channel.rows.release()
        elif echoes:
            self._try_to_subscribe(channel)
        channel.config = config.settled()
        if not self._is_open(channel):
            return
        if config.replication_ready:
            self.tell(channel, "Replication connection established", ok=True)
        if config.presence_enabled:
            self._watch_presence(channel)
        self._watch_expiry()

    def _replay(self, channel: Channel) -> None:
        """Send what was read at the join, if anything was, and what is held."""
        for stored in channel.replayed:
            channel.send_replayed(stored, channel.position_at_join)
        channel.replayed.clear()
        self._go_live(channel, None)

    def _try_to_subscribe(self, channel: Channel) -> None:
        """Row changes, too; the channel lives on whatever comes of it."""
        rows = RowReader(self, channel, is_held=False)
        try:
            self._subscribe_to_changes(channel, rows)
        except InvalidBinding as error:
            self.services.metrics.count_error(error.code)
            rows.tell_changes(str(error), ok=False)

    def _subscribe_to_changes(self, channel: Channel, rows: RowReader) -> None:
        """Raises: InvalidBinding."""
        wanted = bindings.parse_all(channel.config.bindings)
        channel.rows = rows
        entry = rows.subscribe(self.services.changes, channel.claims, wanted)
        self._spawn(self._watched(channel, entry), entry)

    async def _await_changes(self, channel: Channel, wait_ms: int) -> None:
        """Hold the reply until the subscription to row changes stands, or the client leaves or joins anew.

        Source: Supabase Realtime, `postgres_changes_options`. Raises: InvalidBinding, ChangesTimeout.
        """
        topic, rows = channel.room.topic, RowReader(self, channel, is_held=True)
        try:
            self._subscribe_to_changes(channel, rows)
            self._held[topic] = rows
            if any(step.ends_wait for step in self._busy[topic]):
                rows.abandon_wait()
            async with asyncio.timeout(wait_ms / 1000):
                await rows.established
        except BaseException as error:
            # The client may be gone by now, and its session knows nothing of this channel yet.
            self._forget(channel)
            if isinstance(error, TimeoutError):
                raise ChangesTimeout(wait_ms) from None
            raise
        finally:
            self._held.pop(topic, None)

    async def _watched(self, channel: Channel, work: Work) -> None:
        try:
            await work
        except Exception:
            self._crash(channel.room.topic)

    def _go_live(self, channel: Channel, cursor: object) -> None:
        """Release what is held for a channel, after what lies behind the cursor; None when there is nothing to be read."""
        buffer = channel.buffer
        if buffer is not None and cursor is None and not buffer.overflowed:
            self._release(channel, buffer)
        elif buffer is not None:
            channel.is_resuming = True
            self._tasks.create_task(self._resume(channel, buffer, buffer.begin if cursor is None else cursor))

    async def _catch_up(self, channel: Channel, buffer: CatchUpBuffer, cursor: object) -> None:
        """Send what lies behind the cursor; where messages are missing, say so."""
        try:
            if not isinstance(cursor, str):
                raise MalformedCursor
            await buffer.catch_up(cursor, self.services.history.after, lambda: self._is_ready(channel))
        except Gap as error:
            self._tell_gap(channel, str(error), error.oldest)
        except MalformedCursor as error:
            # What follows is what has come since the join.
            self._tell_gap(channel, str(error), buffer.begin)

    async def _resume(self, channel: Channel, buffer: CatchUpBuffer, cursor: object) -> None:
        """Send what lies behind the cursor, then flip to live."""
        try:
            await self._catch_up(channel, buffer, cursor)
            while await self._is_ready(channel) and buffer.overflowed and buffer.begin is not None:
                await buffer.catch_up(buffer.begin, self.services.history.after, lambda: self._is_ready(channel))
        except RealtimeError as error:
            # Not caught up and not to be taken for it: the client joins again, with the same cursor.
            self._close_retryable(channel, error)
            return
        except Exception:
            self._crash(channel.room.topic)
            return
        if self._is_open(channel):
            channel.is_resuming = False
            self._release(channel, buffer)

    def _release(self, channel: Channel, buffer: CatchUpBuffer) -> None:
        problem = buffer.release()
        if problem is not None and self._is_open(channel):
            extension = messages.CLIENT_BROADCAST
            self.connection.push(messages.gap(channel.room.topic, channel.join_ref, problem, None, extension))

    async def _is_ready(self, channel: Channel) -> bool:
        """Wait until the client has taken most of what was sent and keeps its rights; False when the channel is gone."""
        pause_s = 0.0
        while self._is_open(channel) and (self.connection.is_filling or channel.needs_reauthorization):
            # First only for what this turn of the loop has sent to leave.
            await asyncio.sleep(pause_s)
            pause_s = DRAIN_LOOK_S
        return self._is_open(channel)

    def _is_open(self, channel: Channel) -> bool:
        return self._channels.get(channel.room.topic) is channel and not self.connection.is_closed

    def _leave(self, message: Message, channel: Channel | None) -> None:
        if channel is None:
            self._reply(message, message.join_ref, {})
            return
        self._forget(channel)
        self._reply(message, channel.join_ref, {})
        self.connection.push(messages.closed(message.topic, channel.literal_join_ref))

    def _forget(self, channel: Channel) -> None:
        self.services.broadcasts.unsubscribe(channel.room, channel)
        self.services.watchers.unsubscribe(channel.room, channel.presence_subscriber)
        if channel.registration is not None:
            self.services.changes.leave(channel.registration)
        self.services.announce(channel.room, self.services.presence.untrack(channel.room, channel))
        if channel.buffer is not None:
            channel.buffer.drop()
        if self._channels.get(channel.room.topic) is channel:
            del self._channels[channel.room.topic]
        if not self.has_channels:
            self.services.users.discard(self)

    # -- tokens

    async def _identify(self, config: join.Join) -> Claims:
        if config.token is not None:
            return await self.services.verify(config.token)
        if self._api_key.expires_at <= time.time():
            raise TokenExpired(int(time.time() - self._api_key.expires_at))
        return self._api_key

    def _refresh(self, message: Message, channel: Channel) -> Work | None:
        """A new token for a channel: never replied to, whatever comes of it."""
        token = (messages.loads_object(message.payload) or {}).get("access_token")
        if not isinstance(token, str) or token.startswith("sb_") or token == channel.token:
            return None
        return self._take_token(channel, token)

    async def _take_token(self, channel: Channel, token: str) -> None:
        while self._refreshes is not None and (delay_s := self._refreshes.take(time.monotonic())) > 0:
            await asyncio.sleep(delay_s)
            if _position(self._busy[channel.room.topic], messages.ACCESS_TOKEN) is not None:
                # There is a newer one by now.
                return
        if not self._is_open(channel):
            return
        try:
            claims = await self.services.verify(token)
        except AuthError as error:
            self.shut_down(channel, str(error))
            return
        is_same = claims.is_same_identity(channel.claims)
        reuses_policy = is_same and time.monotonic() < channel.authorized_at + POLICY_REUSE_S
        if channel.room.private and not reuses_policy and not await self._authorize_again(channel, claims):
            return
        if not self._is_open(channel):
            return
        channel.token, channel.claims, channel.warned = token, claims, _is_brief(claims)
        self._watch_expiry()
        if channel.registration is not None and not is_same:
            change = self.services.changes.change_claims(channel.registration, claims)
            self._spawn(self._watched(channel, change), change)

    async def _authorize_again(self, channel: Channel, claims: Claims) -> bool:
        """Put the rights of `claims` in place of the channel's; False when the channel had to be shut down."""
        topic = messages.sub_topic(channel.room.topic)
        old = channel.policy
        try:
            new = await self.services.authorize(topic, claims, self._headers)
        except RealtimeError as error:
            # No answer is no refusal.
            self._close_retryable(channel, error)
            return False
        lost_broadcast = old.can_read_broadcast and not new.can_read_broadcast
        lost_presence = channel.watches and old.can_read_presence and not new.can_read_presence
        if not new.can_read_broadcast and not (channel.watches and new.can_read_presence):
            self.shut_down(channel, str(Unauthorized(topic)))
            return False
        if lost_broadcast or lost_presence:
            self.shut_down(channel, f"You no longer have permission to read from this Channel topic: {topic}")
            return False
        if not self._is_open(channel):
            return False
        channel.policy, channel.authorized_at = new, time.monotonic()
        if new.can_read_broadcast:
            self.services.broadcasts.subscribe(channel.room, channel)
        if channel.config.presence_enabled and not channel.watches:
            self._watch_presence(channel)
        return True

    def _close_retryable(self, channel: Channel, error: RealtimeError) -> None:
        """End a channel for what may be over soon: clients join again by themselves."""
        log.warning("channel broken off", topic=channel.room.topic, code=error.code)
        if self._is_open(channel):
            self._forget(channel)
            self.connection.push(messages.crashed(channel.room.topic, channel.literal_join_ref))

    def _revalidate(self, topic: str, subject: str | None) -> Work | None:
        channel = self._channels.get(topic)
        if channel is None or not (channel.needs_reauthorization or _is_meant(channel, subject)):
            return None
        if not channel.needs_reauthorization:
            channel.require_reauthorization()
        return self._reauthorize(channel)

    async def _reauthorize(self, channel: Channel) -> None:
        while channel.needs_reauthorization:
            auth_epoch = channel.auth_epoch
            if not await self._authorize_again(channel, channel.claims):
                return
            channel.authorized_epoch = auth_epoch
        if channel.buffer is not None and not channel.is_resuming:
            self._replay(channel)
        if channel.presence_subscriber.has_missed and self._is_open(channel):
            # The state anew is all that was missed: clients take what differs.
            self._watch_presence(channel)

    def _watch_expiry(self) -> None:
        """One timer per socket, set to the first token that expires or is to be warned of."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if self._channels:
            first = min(map(_next_look, self._channels.values()))
            delay = min(max(0.0, first - time.time() + EXPIRY_MARGIN_S), LONGEST_TIMER_S)
            self._expiry = asyncio.get_running_loop().call_later(delay, self._expire)

    def _expire(self) -> None:
        now = time.time()
        for channel in list(self._channels.values()):
            left_s = channel.claims.expires_at - now
            if left_s <= 0:
                self.shut_down(channel, str(TokenExpired(int(-left_s))))
            elif left_s <= WARNING_S and not channel.warned:
                channel.warned = True
                self.tell(channel, f"Token expires in {round(left_s)} seconds", ok=True)
        self._watch_expiry()

    # -- broadcast

    def _broadcast(self, message: Message | BroadcastPush, channel: Channel) -> None:
        try:
            broadcast = self._parse_broadcast(message, channel)
        except RealtimeError as error:
            if channel.config.ack:
                self._refuse(message, channel.join_ref, error)
            return
        self.services.publish(channel.room, broadcast, exclude=None if channel.config.receive_own else channel)
        if channel.config.ack:
            self._reply(message, channel.join_ref, {})

    def _parse_broadcast(self, message: Message | BroadcastPush, channel: Channel) -> Broadcast | ForwardedBroadcast:
        """Raises: SendDenied, PayloadTooLarge, InvalidBroadcast."""
        if not channel.policy.can_write_broadcast:
            raise SendDenied
        if len(message.payload) > self._limits.max_payload_bytes:
            raise PayloadTooLarge
        if isinstance(message, BroadcastPush):
            return Broadcast(message.topic, message.user_event, message.payload, message.is_json)
        return ForwardedBroadcast.parse(message.topic, message.payload)

    # -- presence

    def _watch_presence(self, channel: Channel) -> None:
        """Send the state of the room, and from now on its changes, to who may see them; where that is in doubt, as soon as it is not."""
        if not channel.policy.can_read_presence:
            return
        channel.watches = True
        self.services.watchers.subscribe(channel.room, channel.presence_subscriber)
        channel.presence_subscriber.has_missed = channel.needs_reauthorization
        if channel.needs_reauthorization:
            return
        state = self.services.presence.state(channel.room)
        self.connection.push(Message(channel.join_ref, None, channel.room.topic, messages.PRESENCE_STATE, state))
        self.services.rates.presence.count(time.monotonic())

    def _presence(self, message: Message, channel: Channel) -> None:
        reason = self._presence_limit(message, channel)
        if reason is not None:
            self.shut_down(channel, reason)
            return
        push = messages.loads_presence(message.payload)
        match None if push is None else (push.event or "").lower():
            case "":
                self._reply(message, channel.join_ref, {})
            case "track" if push is not None:
                self._track(message, channel, push.payload)
            case "untrack":
                self.services.announce(channel.room, self.services.presence.untrack(channel.room, channel))
                self._reply(message, channel.join_ref, {})
            case _:
                self._refuse(message, channel.join_ref, UnknownPresenceEvent())

    def _track(self, message: Message, channel: Channel, payload: msgspec.Raw) -> None:
        try:
            entry = self._presence_entry(channel, bytes(payload))
        except RealtimeError as error:
            self._refuse(message, channel.join_ref, error)
            return
        self._reply(message, channel.join_ref, {})
        if not channel.watches:
            # Who tracks wants to see; the JavaScript client applies no change before it has the state.
            self._watch_presence(channel)
        ref = secrets.token_urlsafe(12)
        diff = self.services.presence.track(channel.room, channel, channel.presence_key, entry, ref)
        self.services.announce(channel.room, diff)

    def _presence_entry(self, channel: Channel, payload: bytes) -> bytes:
        """What is to be tracked, encoded. Raises: PresenceTooLarge, InvalidTrack, TrackDenied."""
        limits, tracked = self._limits, self.services.presence
        too_large = PresenceTooLarge("An entry of presence has", limits.max_presence_entry_bytes)
        # Checked before it is parsed, too.
        if len(payload) > limits.max_presence_entry_bytes:
            raise too_large
        content = {} if payload == b"null" else messages.loads_object(payload)
        if content is None:
            raise InvalidTrack
        if not channel.policy.can_write_presence:
            raise TrackDenied
        entry = presence.encode(content)
        if len(entry) > limits.max_presence_entry_bytes:
            raise too_large
        growth = presence.size_of(channel.presence_key, entry) - tracked.size(channel.room, channel)
        if growth <= 0:
            return entry
        socket_bytes = sum(tracked.size(one.room, one) for one in self._channels.values())
        if socket_bytes + growth > limits.max_presence_socket_bytes:
            raise PresenceTooLarge("The entries of presence of one socket have", limits.max_presence_socket_bytes)
        if tracked.room_size(channel.room) + growth > limits.max_presence_room_bytes:
            raise PresenceTooLarge("The entries of presence of one topic have", limits.max_presence_room_bytes)
        return entry

    def _presence_limit(self, message: Message, channel: Channel) -> str | None:
        now = time.monotonic()
        if now >= channel.presence_window_ends_at:
            channel.presence_window_ends_at, channel.presence_calls = now + self._limits.presence_window_s, 0
        channel.presence_calls += 1
        if self._limits.max_presence_calls and channel.presence_calls > self._limits.max_presence_calls:
            return "Client presence rate limit exceeded"
        if self.services.rates.presence.is_over(now):
            return "Too many presence messages per second"
        if len(message.payload) > self._limits.max_payload_bytes:
            return "Track message size exceeded"
        return None

    # -- answers

    def _tell_gap(self, channel: Channel, problem: str, oldest: str | None) -> None:
        self.connection.push(messages.gap(channel.room.topic, channel.join_ref, problem, oldest))

    def tell(self, channel: Channel, text: str, *, ok: bool, extension: str = "system") -> None:
        self.connection.push(messages.system(channel.room.topic, channel.join_ref, text, ok=ok, extension=extension))

    def _reply(self, push: Message | BroadcastPush, join_ref: Ref, response: object, *, ok: bool = True) -> None:
        self.connection.push(messages.reply(push, join_ref, response, ok=ok))

    def _refuse(self, push: Message | BroadcastPush, join_ref: Ref, error: RealtimeError) -> None:
        self.services.metrics.count_error(error.code)
        if not isinstance(error, TooManyJoins):
            # Over a rate, answers are all that a client may cause.
            log.info("refused", code=error.code, topic=push.topic, reason=str(error))
        self._reply(push, join_ref, error.response, ok=False)


def _position(pending: Sequence[_Step], kind: str) -> int | None:
    """Where the last step of this kind is among those that are pending; None where there is none."""
    return next((position for position in reversed(range(len(pending))) if pending[position].kind == kind), None)


def _replaceable(pending: deque[_Step], step: _Step) -> int | None:
    """Where a step is pending that this one makes needless: not one from before a join or a leave."""
    position = None if step.kind is None else _position(pending, step.kind)
    if position is None or any(later.ends_wait for later in islice(pending, position, None)):
        return None
    return position


def _is_meant(channel: Channel, subject: str | None) -> bool:
    return channel.room.private and subject in (None, channel.claims.subject)


def _refusal(join: Message, others: int, limits: Limits, too_many: bool) -> RealtimeError | None:
    """Why a join is not even looked at; `others` is how many topics the socket has joined or is joining."""
    if too_many:
        return TooManyJoins()
    if others >= limits.max_channels:
        return TooManyChannels()
    # The channel keeps what it was joined with.
    return PayloadTooLarge() if len(join.payload) > LARGEST_JOIN_BYTES else None


def _next_look(channel: Channel) -> float:
    """When the channel's token expires or is to be warned of; that may be over."""
    return channel.claims.expires_at - (0.0 if channel.warned else WARNING_S)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_brief(claims: Claims) -> bool:
    """Whether these claims expire so soon that a warning would say nothing new."""
    return claims.expires_at - time.time() <= WARNING_S
