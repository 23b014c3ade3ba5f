"""Defines all Prometheus metrics. Topics, users and tokens must not be labels, because their number is unlimited."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


class Metrics:
    """Holds the metrics of one process. Gauges are computed when they are read; counters count events."""

    def __init__(self, version: str) -> None:
        self._registry = CollectorRegistry()
        info = Gauge("realtime_build_info", "The server's version, as a label.", ["version"], registry=self._registry)
        info.labels(version).set(1)
        self.joins = self._counter("realtime_channel_joins_total", "Channels joined.")
        self.broadcasts = self._counter(
            "realtime_broadcasts_total", "Messages for channels, of clients, REST and the database."
        )
        self.deliveries = self._counter("realtime_deliveries_total", "Messages handed to clients.")
        self.presence_diffs = self._counter("realtime_presence_diffs_total", "Changes of presence.")
        self.rows = self._counter("realtime_database_messages_total", "Messages read from the database.")
        self.changes = self._counter("realtime_row_changes_total", "Row changes read from the database.")
        self.change_deliveries = self._counter("realtime_row_change_deliveries_total", "Row changes handed to clients.")
        self._errors = Counter(
            "realtime_channel_errors_total",
            "Joins and pushes refused, by the code that clients see.",
            ["code"],
            registry=self._registry,
        )

    def count_error(self, code: str) -> None:
        self._errors.labels(code).inc()

    def watch(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is computed when metrics are read."""
        Gauge(name, documentation, registry=self._registry).set_function(value)

    def expose(self) -> bytes:
        """The metrics as text, of the media type CONTENT_TYPE_LATEST."""
        return generate_latest(self._registry)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(name, documentation, registry=self._registry)
