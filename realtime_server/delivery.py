"""Dispatches rows that the relay has read: a broadcast goes to its room, and `revalidate` reauthorizes clients."""

from __future__ import annotations

from typing import Final

import structlog

from realtime_server.backpressure import Backpressure
from realtime_server.cursor import StreamPosition
from realtime_server.hub import Room
from realtime_server.protocol import messages
from realtime_server.protocol.frames import Broadcast
from realtime_server.relay import Row
from realtime_server.services import Services

# The approximate size of a frame without payload, names and cursor.
ENVELOPE_BYTES: Final = 100

log = structlog.get_logger()


class MessageDispatcher:
    """Receives the relay's rows. Its methods must not raise: a row that cannot be delivered is logged, and the relay continues."""

    def __init__(self, services: Services, backpressure: Backpressure) -> None:
        self._services = services
        self._backpressure = backpressure

    def row(self, row: Row, position: StreamPosition) -> bool:
        self._services.metrics.rows.inc()
        match row.extension:
            case "broadcast":
                self._broadcast(row, position)
            case "revalidate":
                self._revalidate(row)
        return self._backpressure.is_due

    async def ready(self) -> None:
        await self._backpressure.wait()

    def gap(self, oldest: str) -> None:
        problem = "gap: the database was restored or promoted, or away for longer than messages are kept"
        for member in list(self._services.active_clients):
            member.tell_gap(problem, oldest)
            # A `revalidate` row may be missing too.
            member.revalidate(None, None)

    def _broadcast(self, row: Row, position: StreamPosition) -> None:
        room = Room(messages.TOPIC_PREFIX + row.topic, row.private)
        readers = self._services.broadcasts.members(room)
        if not readers:
            return
        payload = row.binary_payload if row.payload is None else row.payload.encode()
        if row.event is None or payload is None:
            log.warning("message without event or payload is not delivered", id=str(row.id), topic=row.topic)
            return
        broadcast = Broadcast(
            room.topic, row.event, payload, is_json=row.payload is not None, id=str(row.id), cursor=position.cursor
        )
        self._services.publish(room, broadcast)
        size = len(payload) + len(position.cursor) + len(room.topic) + len(row.event) + ENVELOPE_BYTES
        self._backpressure.sent(room, readers, size)

    def _revalidate(self, row: Row) -> None:
        request = messages.loads_object((row.payload or "").encode()) or {}
        topic, subject = request.get("topic"), request.get("sub")
        log.info("reauthorizing channels", topic=topic, subject_given=subject is not None)
        for member in list(self._services.active_clients):
            member.revalidate(topic, subject)
