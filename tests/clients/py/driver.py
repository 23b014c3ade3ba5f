"""Drives one unmodified Python client, `realtime` or `supabase`, for the tests; run it with `.venv-clients/bin/python`.

The command language is that of ../js/driver.mjs: JSON commands one a line on stdin, replies and events one a line on
stdout; commands start in the order of their lines and do not wait for each other. What differs lies in the clients: a
broadcast has no `type`, a change comes as `{"data": ..., "ids": ...}`, and a system message with status `error` is a
status `CHANNEL_ERROR` instead of a `system` event.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import importlib
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

LINE_LIMIT_BYTES = 64 * 1024 * 1024
CLOSE_LIMIT_S = 12.0

Values = dict[str, Any]

# The push that the current command has made; commands run at the same time, each in its own task.
last_push: ContextVar[Any] = ContextVar("last_push")


def write(message: Values) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class ErrorsAsEvents(logging.Handler):
    """The library logs a server message that it cannot read, and drops it; a failed task only shows in the log too.

    It also logs refused joins and lost sockets as errors. Those come as a status, so they are left out here.
    """

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info or message.startswith("Unrecognized message format"):
            write({"event": "client_error", "error": message})


def words(error: object) -> str | None:
    if error is None:
        return None
    return str(error) or repr(error)


def content(arguments: Values) -> Any:
    return base64.b64decode(arguments["base64"]) if "base64" in arguments else arguments.get("payload")


class Channel:
    """One channel of the library, with what its own calls do not hand out: the push made, and whether it has closed."""

    def __init__(self, name: str, library_channel: Any, config: Values) -> None:
        self.name = name
        self.library = library_channel
        self.wants_ack = bool((config.get("broadcast") or {}).get("ack"))
        self.closed = asyncio.Event()
        self.first_status: asyncio.Future[Values] | None = None
        plain_push = library_channel.push

        async def push(*arguments: Any, **options: Any) -> Any:
            sent = await plain_push(*arguments, **options)
            last_push.set(sent)
            return sent

        # track() and send_broadcast() call push() and drop what it returns, which alone knows the server's answer.
        library_channel.push = push

    def emit(self, event: str, **values: Any) -> None:
        write({"event": event, "channel": self.name, **values})

    def on_status(self, status: Any, error: Exception | None) -> None:
        if status.value == "CLOSED":
            self.closed.set()
        report = {"status": status.value, "error": words(error)}
        if self.first_status is not None and not self.first_status.done():
            self.first_status.set_result(report)
        else:
            self.emit("status", **report)

    def listen(self, broadcast: list[str], presence: bool, postgres_changes: list[Values]) -> None:
        library = self.library
        for event in broadcast:
            library.on_broadcast(event, lambda message: self.emit("broadcast", message=message))
        if presence:

            def on_change(kind: str, **values: Any) -> None:
                self.emit("presence", kind=kind, state=library.presence_state(), **values)

            library.on_presence_sync(lambda: on_change("sync"))
            library.on_presence_join(lambda key, old, new: on_change("join", key=key, current=old, new=new))
            library.on_presence_leave(lambda key, old, left: on_change("leave", key=key, current=old, left=left))
        for binding, filter_ in enumerate(postgres_changes):

            def on_row(payload: Any, binding: int = binding) -> None:
                self.emit("postgres_changes", binding=binding, payload=payload)

            library.on_postgres_changes(callback=on_row, **filter_)
        library.on_system(lambda payload: self.emit("system", payload=payload.model_dump()))

    async def answer(self, action: Awaitable[None]) -> str:
        """Result of one push in the words of the JavaScript client: `ok`, `error` or `timed out`."""
        await action
        push = last_push.get()
        result: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def answered(word: str) -> Callable[..., None]:
            return lambda *_: None if result.done() else result.set_result(word)

        push.receive("ok", answered("ok")).receive("error", answered("error"))
        push.receive("timeout", answered("timed out"))
        return await result


class Driver:
    def __init__(self, library_name: str) -> None:
        self.library_name = library_name
        self.library = importlib.import_module(library_name)
        self.client: Any = None
        self.channels: dict[str, Channel] = {}

    @property
    def realtime(self) -> Any:
        return self.client.realtime if self.library_name == "supabase" else self.client

    def known(self, name: str) -> Channel:
        if name not in self.channels:
            raise LookupError(f"no channel {name}: subscribe first")
        return self.channels[name]

    async def run(self, line: bytes) -> None:
        message = json.loads(line)
        number, name = message.pop("id"), message.pop("do")
        try:
            command = getattr(self, f"do_{name}", None)
            if command is None:
                raise LookupError(f"unknown command: {name}")
            if self.client is None and name not in ("connect", "exit"):
                raise LookupError("connect first")
            write({"reply": number, "ok": True, **(await command(message) or {})})
        except Exception as error:
            logging.exception("command %s failed", name)
            write({"reply": number, "ok": False, "error": words(error)})

    async def do_connect(self, given: Values) -> None:
        """Make the client; the socket opens at the first `subscribe` or at `open`, as in an application."""
        url, key, options = given["url"], given["key"], given.get("options") or {}
        if self.library_name == "supabase":
            client_options = self.library.AsyncClientOptions(realtime=options)
            self.client = await self.library.acreate_client(url, key, options=client_options)
        else:
            self.client = self.library.AsyncRealtimeClient(f"{url}/realtime/v1", key, **options)
        if given.get("token"):
            await self.realtime.set_auth(given["token"])

    async def do_open(self, given: Values) -> None:
        await self.realtime.connect()

    async def do_channel(self, given: Values) -> None:
        """A channel that does not join: for `http_send`."""
        config = given.get("config") or {}
        library_channel = self.client.channel(given["topic"], {"config": config})
        self.channels[given["channel"]] = Channel(given["channel"], library_channel, config)

    async def do_subscribe(self, given: Values) -> Values | None:
        if "topic" in given:
            await self.do_channel(given)
        channel = self.known(given["channel"])
        channel.listen(given.get("broadcast", []), given.get("presence", False), given.get("postgres_changes", []))
        if not given.get("wait", True):
            await channel.library.subscribe(channel.on_status)
            return None
        channel.first_status = asyncio.get_running_loop().create_future()
        await channel.library.subscribe(channel.on_status)
        return await channel.first_status

    async def do_send(self, given: Values) -> Values:
        channel = self.known(given["channel"])
        sending = channel.library.send_broadcast(given["event"], content(given))
        if channel.wants_ack:
            return {"result": await channel.answer(sending)}
        await sending
        return {"result": "ok"}

    async def do_http_send(self, given: Values) -> Values:
        await self.known(given["channel"]).library.http_send(given["event"], content(given))
        return {"result": {"success": True}}

    async def do_track(self, given: Values) -> Values:
        channel = self.known(given["channel"])
        return {"result": await channel.answer(channel.library.track(given["payload"]))}

    async def do_untrack(self, given: Values) -> Values:
        channel = self.known(given["channel"])
        return {"result": await channel.answer(channel.library.untrack())}

    async def do_presence_state(self, given: Values) -> Values:
        return {"state": self.known(given["channel"]).library.presence_state()}

    async def do_set_auth(self, given: Values) -> None:
        await self.realtime.set_auth(given["token"])

    async def do_unsubscribe(self, given: Values) -> Values:
        channel = self.known(given["channel"])
        await channel.library.unsubscribe()
        async with asyncio.timeout(CLOSE_LIMIT_S):
            await channel.closed.wait()
        if self.channels.get(channel.name) is channel:
            del self.channels[channel.name]
        return {"result": "ok"}

    async def do_remove_all(self, given: Values) -> None:
        await self.client.remove_all_channels()
        self.channels.clear()

    async def do_disconnect(self, given: Values) -> None:
        await self.realtime.close()

    async def do_status(self, given: Values) -> Values:
        return {"connected": self.realtime.is_connected}

    async def do_exit(self, given: Values) -> None:
        asyncio.get_running_loop().call_soon(sys.exit)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", choices=["realtime", "supabase"], required=True)
    driver = Driver(parser.parse_args().lib)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    for logger in ("realtime", "asyncio"):
        logging.getLogger(logger).addHandler(ErrorsAsEvents(logging.ERROR))

    lines = asyncio.StreamReader(limit=LINE_LIMIT_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    running: set[asyncio.Task[None]] = set()
    while line := await lines.readline():
        task = asyncio.create_task(driver.run(line))
        running.add(task)
        task.add_done_callback(running.discard)


if __name__ == "__main__":
    asyncio.run(main())
