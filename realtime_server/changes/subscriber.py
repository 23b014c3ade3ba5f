"""Implements what channels and streams share as subscribers to row changes: a client that waits for its subscription gets nothing before it
is notified that the subscription is active."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Hashable, Iterable
from functools import partial
from typing import Any

from realtime_server.changes.feed import Feed
from realtime_server.changes.subscriptions import RETRYABLE, Registration
from realtime_server.claims import Claims
from realtime_server.errors import InvalidBinding
from realtime_server.protocol.bindings import Binding
from realtime_server.protocol.frames import Encoding, Frame


class RowChangeSubscriber(ABC):
    """A subscriber. With `is_buffered` its notifications and changes are buffered until `flush`, which is called once it is subscribed.

    `client` is the owner, where it has several subscribers. With `is_buffered`, `established` completes on activation, or raises
    InvalidBinding if that can never succeed. Temporary failures do not complete it.
    """

    def __init__(self, topic: str, encoding: Encoding, *, is_buffered: bool, client: Hashable | None = None) -> None:
        self.client: Hashable = self if client is None else client
        self.topic = topic
        self.encoding = encoding
        self.registration: Registration | None = None
        self.established: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Marks the exception as retrieved, for when the client is gone before it awaits the future.
        self.established.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._buffered: list[Callable[[], None]] | None = [] if is_buffered else None

    def subscribe(
        self, feed: Feed, claims: Claims, bindings: Iterable[tuple[int, Binding]]
    ) -> Coroutine[Any, Any, None]:
        """Register; the returned coroutine, which the caller must run, activates the subscription."""
        self.registration = Registration(self, claims, bindings)
        feed.register(self.registration)
        return self._activate(feed, self.registration)

    async def _activate(self, feed: Feed, registration: Registration) -> None:
        try:
            await feed.activate(registration)
        except Exception as error:
            if not self._is_waiting:
                raise
            self.established.set_exception(error)

    @property
    def _is_waiting(self) -> bool:
        return self._buffered is not None and not self.established.done()

    def abandon_wait(self) -> None:
        """Treat the subscription as active: the caller does not wait for it any more."""
        if self._is_waiting:
            self.established.set_result(None)

    def flush(self) -> None:
        buffered, self._buffered = self._buffered or [], None
        for step in buffered:
            # An earlier one may have closed the subscription.
            if self.registration is not None and self.registration.is_open:
                step()

    def changed(self, frame: Frame) -> None:
        self._send_or_buffer(partial(self.send, frame))

    def notify_status(self, text: str, *, ok: bool) -> None:
        if self._is_waiting:
            if ok:
                self.established.set_result(None)
            elif text in RETRYABLE:
                return
            else:
                self.established.set_exception(InvalidBinding(text))
        self._send_or_buffer(partial(self.send_status, text, ok=ok))

    def notify_gap(self, problem: str) -> None:
        self._send_or_buffer(partial(self.send_gap, problem))

    def _send_or_buffer(self, step: Callable[[], None]) -> None:
        if self._buffered is None:
            step()
        else:
            self._buffered.append(step)

    @abstractmethod
    def send(self, frame: Frame) -> None:
        """Send a change."""

    @abstractmethod
    def send_status(self, text: str, *, ok: bool) -> None:
        """Send the result of the subscription."""

    @abstractmethod
    def send_gap(self, problem: str) -> None:
        """Send that changes are missing here."""
