"""What rows of the outbox become: a broadcast for a room, or a word to the servers themselves."""

from __future__ import annotations

import asyncio

import structlog

from realtime_server.cursor import Place
from realtime_server.hub import Room
from realtime_server.protocol import messages
from realtime_server.protocol.frames import Broadcast
from realtime_server.relay import Row
from realtime_server.services import Services

log = structlog.get_logger()


class Delivery:
    """The relay's receiver. Nothing in here may raise: a row that cannot be delivered is logged, and the relay goes on."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def row(self, row: Row, behind: Place) -> None:
        self._services.metrics.rows.inc()
        match row.extension:
            case "broadcast":
                self._broadcast(row, behind)
            case "revalidate":
                self._revalidate(row)

    async def ready(self) -> None:
        # Rows that are here already would keep the loop to themselves, and no frame would leave.
        await asyncio.sleep(0)

    def gap(self, oldest: str) -> None:
        problem = "gap: the database was restored or promoted, or away for longer than messages are kept"
        for member in list(self._services.users):
            member.tell_gap(problem, oldest)
            # A word of lost rights may be missing too.
            member.revalidate(None, None)

    def _broadcast(self, row: Row, behind: Place) -> None:
        room = Room(messages.TOPIC_PREFIX + row.topic, row.private)
        if room not in self._services.broadcasts:
            return
        payload = row.binary_payload if row.payload is None else row.payload.encode()
        if row.event is None or payload is None:
            log.warning("message without event or payload is not delivered", id=str(row.id), topic=row.topic)
            return
        broadcast = Broadcast(
            room.topic, row.event, payload, is_json=row.payload is not None, id=str(row.id), cursor=behind.cursor
        )
        self._services.publish(room, broadcast)

    def _revalidate(self, row: Row) -> None:
        wish = messages.loads_object((row.payload or "").encode()) or {}
        topic, subject = wish.get("topic"), wish.get("sub")
        log.info("asking policies again", topic=topic, subject_given=subject is not None)
        for member in list(self._services.users):
            member.revalidate(topic, subject)
