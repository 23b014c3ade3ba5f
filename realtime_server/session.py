"""Handles the messages of one client in order, and replies to them.

Frames are handled as they arrive. Where an operation has to wait (a join or a new token: keys may have to be fetched, the database
evaluates policies), later operations of the same topic queue behind it, in `_queues`. Heartbeats and other channels of the socket go on. An
unexpected exception ends its channel with `phx_error` and no other.
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
from realtime_server.changes.subscriber import RowChangeSubscriber
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
# Completes at once, or returns a coroutine that does the rest.
Action = Callable[[], Work | None]

# The event loop's clock and the wall clock may differ a little. A timer that fires too early would find a token that is still valid.
EXPIRY_MARGIN_S: Final = 0.05
WARNING_S: Final = 60.0
# Event loops reject delays of decades.
MAX_TIMER_S: Final = 86_400.0

# This limits replay by time. Replay by cursor has no limit.
MAX_REPLAYED: Final = 25
LATEST_TIME_MS: Final = 8_000_000_000_000_000
DRAIN_POLL_S: Final = 0.01

MAX_TOPIC_LENGTH: Final = 1000
# Refs are limited because the channel keeps its join ref and replies repeat the other.
MAX_REF_LENGTH: Final = 255
MAX_JOIN_BYTES: Final = 256_000

# The kind of operations that reauthorize a channel.
REAUTHORIZE: Final = "reauthorize"
# For this long after an authorization, its result also holds for a new token of the same identity.
POLICY_REUSE_S: Final = 60.0

TOO_MANY_MESSAGES: Final = "Too many messages per second"

log = structlog.get_logger()


class _PendingOperation(NamedTuple):
    """An operation that waits in the queue of a topic.

    `size` is how many bytes it holds until then. `cancels_wait` is set where it makes waiting for the row changes of an earlier join
    pointless. An operation of the same `kind` replaces one that is pending.
    """

    action: Action
    size: int = 0
    cancels_wait: bool = False
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
        self.warned = _expires_soon(claims)
        # How many reauthorizations were required, and which of them was completed last.
        self.auth_epoch = 0
        self.authorized_epoch = 0
        # Messages that were read during the join and are sent after its reply.
        self.replayed: list[Stored] = []
        self.position_at_join: StreamPosition | None = None
        self.is_resuming = False

    @property
    def registration(self) -> Registration | None:
        return None if self.rows is None else self.rows.registration

    @property
    def needs_reauthorization(self) -> bool:
        """Whether a reauthorization is pending or running."""
        return self.auth_epoch > self.authorized_epoch

    def require_reauthorization(self) -> bool:
        """Buffer messages until the channel is reauthorized. Returns whether that was pending already."""
        was_pending = self.needs_reauthorization
        self.auth_epoch += 1
        if self.buffer is None:
            CatchUpBuffer(self)
        return was_pending

    def deliver(self, message: Broadcast | ForwardedBroadcast, frame: Frame) -> None:
        # Buffered messages are checked when they are flushed; the first one over the rate ends the channel then.
        if self.buffer is None and self.session.services.rates.events.is_over(time.monotonic()):
            self.session.shut_down(self, TOO_MANY_MESSAGES)
        else:
            super().deliver(message, frame)


class PresenceSubscriber:
    """Sends presence changes to one channel. `has_missed` is set when some were dropped because a reauthorization was pending."""

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
    """Sends row changes to one channel."""

    def __init__(self, session: Session, channel: Channel, *, is_buffered: bool) -> None:
        super().__init__(channel.room.topic, channel.encoding, is_buffered=is_buffered, client=session)
        self._session = session
        self._channel = channel

    def send(self, frame: Frame) -> None:
        rates, now = self._session.services.rates, time.monotonic()
        rates.events.count(now)
        if rates.events.is_over(now):
            self._session.shut_down(self._channel, TOO_MANY_MESSAGES)
        else:
            self._session.connection.send(frame)

    def send_status(self, text: str, *, ok: bool) -> None:
        self._session.tell(self._channel, text, ok=ok, extension=messages.POSTGRES_CHANGES)

    def send_gap(self, problem: str) -> None:
        extension = messages.POSTGRES_CHANGES
        self._session.connection.push(messages.gap(self.topic, self._channel.join_ref, problem, None, extension))


class Session:
    """Holds the channels of one socket.

    `api_key` is the identity of channels that join without a token of their own; `headers` are the handshake's `x-` headers, which policies
    may read; `tasks` is the group in which pending operations run.
    """

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
        # Half the limit, so that flushing these buffers cannot alone make a client exceed it.
        self.byte_budget = ByteBudget(services.limits.max_pending_bytes // 2)
        self._tasks = tasks
        self._channels: dict[str, Channel] = {}
        self._queues: dict[str, deque[_PendingOperation]] = {}
        # Joins, by topic, whose reply waits until the subscription to row changes is established.
        self._awaiting_changes: dict[str, RowReader] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self._pending_bytes = 0
        refresh_rate = self._limits.max_token_refreshes_per_second
        # A client sends a new token on all of its channels at once.
        refresh_burst = 2 * self._limits.max_channels
        self._refreshes = Bucket(refresh_rate, refresh_burst, time.monotonic()) if refresh_rate else None

    @property
    def has_channels(self) -> bool:
        return bool(self._channels or self._queues)

    def receive(self, frame: str | bytes, *, too_many: bool = False) -> None:
        """Handle one frame of the client; `too_many` is set when it is over the socket's rate.

        Never raises: a malformed frame is dropped and logged, and the socket stays open.
        """
        try:
            message = decode(frame, self.connection.format)
            carries_json = isinstance(message, Message) or message.is_json
            if carries_json and messages.is_deeper_than(message.payload, self._limits.max_depth):
                raise MalformedFrame(f"payload nests deeper than {self._limits.max_depth} levels")
            if len(message.topic) > MAX_TOPIC_LENGTH:
                raise MalformedFrame(f"topic is longer than {MAX_TOPIC_LENGTH} characters")
            if any(isinstance(ref, str) and len(ref) > MAX_REF_LENGTH for ref in (message.join_ref, message.ref)):
                raise MalformedFrame(f"ref is longer than {MAX_REF_LENGTH} characters")
        except MalformedFrame as error:
            if not too_many:
                log.info("frame dropped", code=error.code, problem=str(error))
            return
        cancels_wait = isinstance(message, Message) and message.event in (messages.JOIN, messages.LEAVE)
        kind = (
            messages.ACCESS_TOKEN if isinstance(message, Message) and message.event == messages.ACCESS_TOKEN else None
        )
        operation = _PendingOperation(lambda: self._handle(message, too_many), len(message.payload), cancels_wait, kind)
        self._submit(message.topic, operation)

    def revalidate(self, topic: str | None, subject: str | None) -> None:
        """Reauthorize private channels: those of one topic (without `realtime:`), of one user, or all where None."""
        # Channels that are joining are included: their authorization may have used the state before the change.
        for wire_topic in {*self._channels, *self._queues}:
            if topic not in (None, wire_topic.removeprefix(messages.TOPIC_PREFIX)):
                continue
            channel = self._channels.get(wire_topic)
            if channel is not None and _is_affected(channel, subject) and channel.require_reauthorization():
                continue
            pending = self._queues.get(wire_topic)
            if pending is None:
                self._submit(
                    wire_topic, _PendingOperation(partial(self._revalidate, wire_topic, subject), kind=REAUTHORIZE)
                )
            elif (index := _last_index(pending, REAUTHORIZE)) is None:
                pending.appendleft(_PendingOperation(partial(self._revalidate, wire_topic, subject), kind=REAUTHORIZE))
            else:
                # Either request may concern the channel; merged into one, it reauthorizes in any case.
                pending[index] = _PendingOperation(partial(self._revalidate, wire_topic, None), kind=REAUTHORIZE)

    def tell_gap(self, problem: str, oldest: str) -> None:
        """Send a gap on every channel that receives broadcasts: messages of the database are missing from this point on."""
        for channel in self._channels.values():
            if channel.policy.can_read_broadcast:
                if channel.buffer is not None:
                    channel.buffer.reset()
                self._tell_gap(channel, problem, oldest)

    def close(self) -> None:
        """Leave all channels, because the socket is closed."""
        if self._expiry is not None:
            self._expiry.cancel()
        for channel in list(self._channels.values()):
            self._forget(channel)
        self.services.active_clients.discard(self)

    def shut_down(self, channel: Channel, reason: str) -> None:
        """Close a channel and send the reason, unless it is closed already. Clients do not rejoin by themselves."""
        if not self._is_open(channel):
            return
        topic = channel.room.topic
        self._forget(channel)
        log.info("channel shut down", code="ChannelShutdown", topic=topic, reason=reason)
        self.connection.push(messages.system(topic, channel.join_ref, reason, ok=False))
        self.connection.push(messages.closed(topic, channel.literal_join_ref))

    def _submit(self, topic: str, operation: _PendingOperation) -> None:
        """Run the operation now, or queue it behind the pending ones of its topic."""
        queue = self._queues.get(topic)
        if queue is None:
            work = self._guarded(topic, operation.action)
            if work is not None:
                self._queues[topic] = deque()
                self._spawn(self._drain(topic, work), work)
            return
        index = _replaceable_index(queue, operation)
        count, size = len(queue) + 1, operation.size
        if index is not None:
            count, size = count - 1, size - queue[index].size
        if count <= self._limits.max_pending_messages and self._pending_bytes + size <= self._limits.max_pending_bytes:
            self._pending_bytes += size
            if index is None:
                queue.append(operation)
            else:
                queue[index] = operation
            if operation.cancels_wait and topic in self._awaiting_changes:
                self._awaiting_changes[topic].abandon_wait()
        else:
            log.warning("message dropped, too many are pending for its topic", topic=topic)

    async def _drain(self, topic: str, work: Work | None) -> None:
        """Await the work, then run the operations that were queued for the topic in the meantime."""
        queue = self._queues[topic]
        try:
            while True:
                if work is not None:
                    try:
                        await work
                    except Exception:
                        self._crash(topic)
                if not queue:
                    return
                operation = queue.popleft()
                self._pending_bytes -= operation.size
                work = self._guarded(topic, operation.action)
        finally:
            del self._queues[topic]
            if not self.has_channels:
                self.services.active_clients.discard(self)

    def _spawn(self, task: Work, work: Work) -> None:
        """Start a task that awaits `work`. Closes `work` also where the socket ends before the task has begun."""
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
        # Without a channel the ref is null, which clients match with any channel of that topic.
        self.connection.push(messages.crashed(topic, None if channel is None else channel.literal_join_ref))

    def _handle(self, message: Message | BroadcastPush, too_many: bool) -> Work | None:
        """Handle a message now, or return a coroutine that does. `too_many` is set when the socket is over its rate."""
        channel = self._channels.get(message.topic)
        match message:
            case Message(topic=messages.PHOENIX, event=messages.HEARTBEAT):
                self._reply(message, None, self._heartbeat_response(message))
                return None
            case Message(event=messages.JOIN):
                # Pending joins count as well, because each holds a task.
                others = (self._channels.keys() | self._queues.keys()) - {message.topic}
                error = _join_error(message, len(others), self._limits, too_many)
                if error is not None:
                    self._refuse(message, message.join_ref, error)
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

    def _heartbeat_response(self, heartbeat: Message) -> dict[str, str]:
        """The response to a heartbeat: where it asks for it and all channels are live, the cursor after everything sent so far."""
        is_asked = heartbeat.payload != b"{}" and (messages.loads_object(heartbeat.payload) or {}).get("cursor") is True
        is_live = not self._queues and all(channel.buffer is None for channel in self._channels.values())
        position = self.services.position()
        return {"cursor": position.cursor} if is_asked and is_live and position is not None else {}

    # -- joining and leaving

    async def _join(self, message: Message) -> None:
        try:
            topic = messages.sub_topic(message.topic)
            old = self._channels.get(message.topic)
            if old is not None:
                # The old channel ends even if the new join fails. `phx_close` precedes the reply, because a client without join refs
                # could not tell which of the two is closed.
                self._forget(old)
                self.connection.push(messages.closed(message.topic, old.literal_join_ref))
            self._admit()
            # Added before authorization, so that `revalidate` reaches the join.
            self.services.active_clients.add(self)
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
            await self._prepare_join(channel, topic)
        except UnmatchedTopic as error:
            self._refuse(message, None, error)
        except RealtimeError as error:
            self._refuse(message, message.join_ref, error)
            if isinstance(error, TooManyJoins):
                self.connection.close(1001, "too many joins")
        else:
            self._complete_join(channel, message)

    def _admit(self) -> None:
        """Raises: TooManyUsers, TooManyJoins."""
        rates, now = self.services.rates, time.monotonic()
        if (
            rates.max_users
            and self not in self.services.active_clients
            and len(self.services.active_clients) >= rates.max_users
        ):
            raise TooManyUsers
        if rates.joins.is_over(now):
            raise TooManyJoins
        rates.joins.count(now)

    async def _prepare_join(self, channel: Channel, topic: str) -> None:
        """Subscribe the channel, and read the messages to be replayed by time.

        Raises: Unauthorized, UnableToReplay, DatabaseUnavailable, InvalidBinding, ChangesTimeout, TokenExpired.
        """
        config, replay = channel.config, channel.config.replay
        if config.has_replay and not channel.policy.can_read_broadcast:
            raise Unauthorized(topic)
        try:
            # The reply promises that no later message is missed, so it waits until the relay reads.
            await self.services.first_position()
        except DatabaseUnavailable:
            # Clients can exchange messages without the database.
            if config.with_cursor or "after" in replay:
                raise
        if config.has_replay:
            CatchUpBuffer(channel)
        if config.has_replay and "after" not in replay:
            channel.replayed = await self._read_by_time(channel)
        if config.wait_ms is not None and config.bindings:
            await self._await_changes(channel, config.wait_ms)
        if channel.claims.expires_at <= time.time():
            # The token expired during authorization, replay or the wait for row changes.
            self._forget(channel)
            raise TokenExpired(int(time.time() - channel.claims.expires_at))
        if channel.policy.can_read_broadcast:
            self.services.broadcasts.subscribe(channel.room, channel)

    async def _read_by_time(self, channel: Channel) -> list[Stored]:
        """Read the newest messages since a time. Raises: UnableToReplay."""
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

    def _complete_join(self, channel: Channel, message: Message) -> None:
        self._channels[message.topic] = channel
        self.services.metrics.joins.inc()
        config, position = channel.config, self.services.position()
        echoes = [{**msgspec.json.decode(binding), "id": id} for id, binding in enumerate(config.bindings, start=1)]
        response: dict[str, object] = {"postgres_changes": echoes}
        if config.with_cursor and config.replay.get("after") is not None:
            # The reply has no cursor: it would be after messages that are not replayed yet, and a client that stored it and lost the
            # connection would never get them.
            response["resumed"] = True
        elif config.with_cursor and position is not None:
            response["cursor"] = position.cursor
        self._reply(message, message.join_ref, response)
        if config.private and _last_index(self._queues[message.topic], REAUTHORIZE) is not None:
            # `revalidate` came after the authorization, so messages read and buffered since may have been written after the change.
            channel.require_reauthorization()
        after = config.replay.get("after")
        if after is not None:
            self._go_live(channel, after)
        elif config.has_replay and not channel.needs_reauthorization:
            self._replay(channel)
        if not self._is_open(channel):
            # Flushing the buffer has closed it.
            return
        if channel.rows is not None:
            channel.rows.flush()
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
        """Send the messages that were read during the join, then the buffered ones."""
        for stored in channel.replayed:
            channel.send_replayed(stored, channel.position_at_join)
        channel.replayed.clear()
        self._go_live(channel, None)

    def _try_to_subscribe(self, channel: Channel) -> None:
        """Subscribe to row changes. If that fails, the channel stays open."""
        rows = RowReader(self, channel, is_buffered=False)
        try:
            self._subscribe_to_changes(channel, rows)
        except InvalidBinding as error:
            self.services.metrics.count_error(error.code)
            rows.notify_status(str(error), ok=False)

    def _subscribe_to_changes(self, channel: Channel, rows: RowReader) -> None:
        """Raises: InvalidBinding."""
        wanted = bindings.parse_all(channel.config.bindings)
        channel.rows = rows
        entry = rows.subscribe(self.services.changes, channel.claims, wanted)
        self._spawn(self._run_guarded(channel, entry), entry)

    async def _await_changes(self, channel: Channel, wait_ms: int) -> None:
        """Delay the reply until the subscription to row changes is established, or the client leaves or rejoins.

        Source: Supabase Realtime, `postgres_changes_options`. Raises: InvalidBinding, ChangesTimeout.
        """
        topic, rows = channel.room.topic, RowReader(self, channel, is_buffered=True)
        try:
            self._subscribe_to_changes(channel, rows)
            self._awaiting_changes[topic] = rows
            if any(operation.cancels_wait for operation in self._queues[topic]):
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
            self._awaiting_changes.pop(topic, None)

    async def _run_guarded(self, channel: Channel, work: Work) -> None:
        try:
            await work
        except Exception:
            self._crash(channel.room.topic)

    def _go_live(self, channel: Channel, cursor: object) -> None:
        """Send the messages after the cursor, then flush the buffer. A cursor of None means that nothing is read first."""
        buffer = channel.buffer
        if buffer is not None and cursor is None and not buffer.overflowed:
            self._flush(channel, buffer)
        elif buffer is not None:
            channel.is_resuming = True
            self._tasks.create_task(self._resume(channel, buffer, buffer.begin if cursor is None else cursor))

    async def _catch_up(self, channel: Channel, buffer: CatchUpBuffer, cursor: object) -> None:
        """Send the messages after the cursor, or a gap where some are missing."""
        try:
            if not isinstance(cursor, str):
                raise MalformedCursor
            await buffer.catch_up(cursor, self.services.history.after, lambda: self._is_ready(channel))
        except Gap as error:
            self._tell_gap(channel, str(error), error.oldest)
        except MalformedCursor as error:
            # The messages that follow are those since the join.
            self._tell_gap(channel, str(error), buffer.begin)

    async def _resume(self, channel: Channel, buffer: CatchUpBuffer, cursor: object) -> None:
        """Send the messages after the cursor, then switch to live delivery."""
        try:
            await self._catch_up(channel, buffer, cursor)
            while await self._is_ready(channel) and buffer.overflowed and buffer.begin is not None:
                await buffer.catch_up(buffer.begin, self.services.history.after, lambda: self._is_ready(channel))
        except RealtimeError as error:
            # The channel has not caught up and must not continue as if it had: the client rejoins with the same cursor.
            self._close_retryable(channel, error)
            return
        except Exception:
            self._crash(channel.room.topic)
            return
        if self._is_open(channel):
            channel.is_resuming = False
            self._flush(channel, buffer)

    def _flush(self, channel: Channel, buffer: CatchUpBuffer) -> None:
        problem = buffer.flush()
        if problem is not None and self._is_open(channel):
            extension = messages.CLIENT_BROADCAST
            self.connection.push(messages.gap(channel.room.topic, channel.join_ref, problem, None, extension))

    async def _is_ready(self, channel: Channel) -> bool:
        """Wait until the client has received most of what was sent and no reauthorization is pending; False when the channel is closed."""
        pause_s = 0.0
        while self._is_open(channel) and (self.connection.is_filling or channel.needs_reauthorization):
            # The first wait only lets frames leave that were sent in this iteration of the event loop.
            await asyncio.sleep(pause_s)
            pause_s = DRAIN_POLL_S
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
            channel.buffer.discard()
        if self._channels.get(channel.room.topic) is channel:
            del self._channels[channel.room.topic]
        if not self.has_channels:
            self.services.active_clients.discard(self)

    # -- tokens

    async def _identify(self, config: join.Join) -> Claims:
        if config.token is not None:
            return await self.services.verify(config.token)
        if self._api_key.expires_at <= time.time():
            raise TokenExpired(int(time.time() - self._api_key.expires_at))
        return self._api_key

    def _refresh(self, message: Message, channel: Channel) -> Work | None:
        """Take a new token for a channel. It is never replied to, whether it is accepted or not."""
        token = (messages.loads_object(message.payload) or {}).get("access_token")
        if not isinstance(token, str) or token.startswith("sb_") or token == channel.token:
            return None
        return self._take_token(channel, token)

    async def _take_token(self, channel: Channel, token: str) -> None:
        while self._refreshes is not None and (delay_s := self._refreshes.take(time.monotonic())) > 0:
            await asyncio.sleep(delay_s)
            if _last_index(self._queues[channel.room.topic], messages.ACCESS_TOKEN) is not None:
                # A newer token is pending.
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
        if channel.room.private and not reuses_policy and not await self._update_policy(channel, claims):
            return
        if not self._is_open(channel):
            return
        channel.token, channel.claims, channel.warned = token, claims, _expires_soon(claims)
        self._watch_expiry()
        if channel.registration is not None and not is_same:
            change = self.services.changes.change_claims(channel.registration, claims)
            self._spawn(self._run_guarded(channel, change), change)

    async def _update_policy(self, channel: Channel, claims: Claims) -> bool:
        """Authorize the channel with `claims` and replace its policy; False when the channel was closed."""
        topic = messages.sub_topic(channel.room.topic)
        old = channel.policy
        try:
            new = await self.services.authorize(topic, claims, self._headers)
        except RealtimeError as error:
            # A failed query does not mean that access is denied.
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
        """Close a channel because of a transient error: clients rejoin by themselves."""
        log.warning("channel closed by a transient error", topic=channel.room.topic, code=error.code)
        if self._is_open(channel):
            self._forget(channel)
            self.connection.push(messages.crashed(channel.room.topic, channel.literal_join_ref))

    def _revalidate(self, topic: str, subject: str | None) -> Work | None:
        channel = self._channels.get(topic)
        if channel is None or not (channel.needs_reauthorization or _is_affected(channel, subject)):
            return None
        if not channel.needs_reauthorization:
            channel.require_reauthorization()
        return self._reauthorize(channel)

    async def _reauthorize(self, channel: Channel) -> None:
        while channel.needs_reauthorization:
            auth_epoch = channel.auth_epoch
            if not await self._update_policy(channel, channel.claims):
                return
            channel.authorized_epoch = auth_epoch
        if channel.buffer is not None and not channel.is_resuming:
            self._replay(channel)
        if channel.presence_subscriber.has_missed and self._is_open(channel):
            # Sending the state replaces the missed changes: clients compute the difference.
            self._watch_presence(channel)

    def _watch_expiry(self) -> None:
        """Set the one timer of the socket to the first token that expires or is due for a warning."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if self._channels:
            first = min(map(_next_deadline, self._channels.values()))
            delay = min(max(0.0, first - time.time() + EXPIRY_MARGIN_S), MAX_TIMER_S)
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
        """Send the presence state of the room and subscribe to its changes, if the policy allows it. The state follows a pending
        reauthorization."""
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
            # A client that tracks wants presence, and the JavaScript client applies no diff before it has the state.
            self._watch_presence(channel)
        ref = secrets.token_urlsafe(12)
        diff = self.services.presence.track(channel.room, channel, channel.presence_key, entry, ref)
        self.services.announce(channel.room, diff)

    def _presence_entry(self, channel: Channel, payload: bytes) -> bytes:
        """Encode the entry to be tracked. Raises: PresenceTooLarge, InvalidTrack, TrackDenied."""
        limits, tracked = self._limits, self.services.presence
        too_large = PresenceTooLarge("An entry of presence has", limits.max_presence_entry_bytes)
        # The size is checked before parsing as well.
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
            # Over the rate of joins a client may cause replies, but no log lines.
            log.info("refused", code=error.code, topic=push.topic, reason=str(error))
        self._reply(push, join_ref, error.response, ok=False)


def _last_index(pending: Sequence[_PendingOperation], kind: str) -> int | None:
    """The index of the last pending operation of this kind; None where there is none."""
    return next((index for index in reversed(range(len(pending))) if pending[index].kind == kind), None)


def _replaceable_index(pending: deque[_PendingOperation], operation: _PendingOperation) -> int | None:
    """The index of the pending operation that this one replaces: not one from before a join or a leave."""
    index = None if operation.kind is None else _last_index(pending, operation.kind)
    if index is None or any(later.cancels_wait for later in islice(pending, index, None)):
        return None
    return index


def _is_affected(channel: Channel, subject: str | None) -> bool:
    return channel.room.private and subject in (None, channel.claims.subject)


def _join_error(join: Message, others: int, limits: Limits, too_many: bool) -> RealtimeError | None:
    """The error for a join that is refused unparsed; `others` is how many topics the socket has joined or is joining."""
    if too_many:
        return TooManyJoins()
    if others >= limits.max_channels:
        return TooManyChannels()
    # The size is limited because the channel keeps the payload of its join.
    return PayloadTooLarge() if len(join.payload) > MAX_JOIN_BYTES else None


def _next_deadline(channel: Channel) -> float:
    """When the channel's token expires or is due for a warning; this may be in the past."""
    return channel.claims.expires_at - (0.0 if channel.warned else WARNING_S)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _expires_soon(claims: Claims) -> bool:
    """Whether these claims expire so soon that a warning would be redundant."""
    return claims.expires_at - time.time() <= WARNING_S
