"""Limits the rate of log lines that clients cause: a client that is refused a thousand times a second must not fill the disk.

Errors are always written: problems that clients cause are logged at a lower level.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import structlog

from realtime_server.limits import Bucket

# Names of the loggers of modules that log what clients did.
CLIENT_MODULES: Final = (
    "realtime_server.session",
    "realtime_server.endpoints.",
    "realtime_server.authorization",
    "realtime_server.presence_writer",
)
BURST_S: Final = 10.0
REPORT_S: Final = 1.0
# Clients choose topics, and parts of problems.
MAX_FIELD_CHARS: Final = 300

log = structlog.get_logger()


class ClientLines:
    """A structlog processor that writes a limited number of client lines a second, and reports how many were suppressed.

    The process has one bucket. A rate of 0 suppresses nothing.
    """

    def __init__(self, lines_per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bucket = Bucket(lines_per_second, BURST_S * lines_per_second, clock()) if lines_per_second > 0 else None
        self._suppressed = 0
        self._suppressed_since = 0.0

    def __call__(self, logger: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if not logger.name.startswith(CLIENT_MODULES):
            return event
        now = self._clock()
        if self._bucket is not None and method in ("debug", "info", "warning") and self._bucket.take(now) > 0:
            self._suppressed_since = self._suppressed_since if self._suppressed else now
            self._suppressed += 1
            raise structlog.DropEvent
        if self._suppressed and now >= self._suppressed_since + REPORT_S:
            count, self._suppressed = self._suppressed, 0
            log.warning(f"{count} more lines about clients were suppressed")
        return {name: _cut(value) for name, value in event.items()}


def _cut(value: object) -> object:
    if isinstance(value, str) and len(value) > MAX_FIELD_CHARS:
        return f"{value[:MAX_FIELD_CHARS]}..."
    return value
