"""What channels and streams have in common as subscribers to row changes: a client that waits for its subscription is told nothing before
it is told that it stands."""

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
    """A subscriber. What comes for one that `is_held` waits for `release`, which is for when its subscription stands.

    `client` is whose it is, where it is one of several. `established` of one that is held is done then, and raises InvalidBinding if that
    can never be. Passing trouble is no word.
    """

    def __init__(self, topic: str, encoding: Encoding, *, is_held: bool, client: Hashable | None = None) -> None:
        self.client: Hashable = self if client is None else client
        self.topic = topic
        self.encoding = encoding
        self.registration: Registration | None = None
        self.established: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Looked at here too, for when the client is gone before it is waited for.
        self.established.add_done_callback(lambda word: word.cancelled() or word.exception())
        self._held: list[Callable[[], None]] | None = [] if is_held else None

    def subscribe(
        self, feed: Feed, claims: Claims, bindings: Iterable[tuple[int, Binding]]
    ) -> Coroutine[Any, Any, None]:
        """Be counted in; what is returned makes the subscription stand, and is for the caller to run."""
        self.registration = Registration(self, claims, bindings)
        feed.register(self.registration)
        return self._enter(feed, self.registration)

    async def _enter(self, feed: Feed, registration: Registration) -> None:
        try:
            await feed.enter(registration)
        except Exception as error:
            if not self._is_waiting:
                raise
            self.established.set_exception(error)

    @property
    def _is_waiting(self) -> bool:
        return self._held is not None and not self.established.done()

    def abandon_wait(self) -> None:
        """Take it as if the subscription stood: who waits wants something else by now."""
        if self._is_waiting:
            self.established.set_result(None)

    def release(self) -> None:
        held, self._held = self._held or [], None
        for step in held:
            # One of them may have ended it.
            if self.registration is not None and self.registration.is_open:
                step()

    def changed(self, frame: Frame) -> None:
        self._do(partial(self.send, frame))

    def tell_changes(self, text: str, *, ok: bool) -> None:
        if self._is_waiting:
            if ok:
                self.established.set_result(None)
            elif text in RETRYABLE:
                return
            else:
                self.established.set_exception(InvalidBinding(text))
        self._do(partial(self.say, text, ok=ok))

    def tell_missing_changes(self, problem: str) -> None:
        self._do(partial(self.say_missing, problem))

    def _do(self, step: Callable[[], None]) -> None:
        if self._held is None:
            step()
        else:
            self._held.append(step)

    @abstractmethod
    def send(self, frame: Frame) -> None:
        """Send a change."""

    @abstractmethod
    def say(self, text: str, *, ok: bool) -> None:
        """Say what became of the subscription."""

    @abstractmethod
    def say_missing(self, problem: str) -> None:
        """Say that changes are missing here."""
