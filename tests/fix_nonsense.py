"""Input that is random, valid but odd, or recorded from official clients and then damaged; and what it costs a server."""

from __future__ import annotations

import json
import os
import random
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fix_frames import CLIENTS, recording, user_broadcast_push
from tests.fix_server import Server, make_token

TOPICS = [
    "realtime:a",
    "realtime:b",
    "realtime:room:é",
    "realtime:",
    "phoenix",
    "realtime",
    "",
    "realtime:\0",
    "x" * 300,
]
EVENTS = ["phx_join", "phx_leave", "heartbeat", "access_token", "broadcast", "presence", "phx_close", "dance", ""]
ODD: list[Any] = [None, True, 0, -1, 1.5, 2**70, "", "1", "ü😀", "\0", "x" * 300, [], {}, [[[]]], {"ids": []}]
PIECES = [
    b"\0",
    b"\xff",
    b"[",
    b"{",
    b'"',
    b"\\",
    b"\\ud800",
    b"null",
    b",",
    b"9" * 400,
    b"1e999",
    b"\n",
    b"\x03",
    b"]}",
]


def seed() -> int:
    """Drawn anew for each run and printed; REALTIME_TEST_SEED sets it."""
    drawn = int(os.environ.get("REALTIME_TEST_SEED") or secrets.randbits(32))
    print(f"REALTIME_TEST_SEED={drawn}")
    return drawn


def damaged(chance: random.Random, content: bytes) -> bytes:
    """The content with up to five bytes or pieces changed, left out, put in, doubled or cut off."""
    result = bytearray(content)
    for _ in range(chance.choice([0, 1, 1, 2, 5])):
        at = chance.randrange(len(result) + 1)
        match chance.randrange(5):
            case 0:
                result[at : at + 1] = chance.randbytes(1)
            case 1:
                del result[at : at + chance.randrange(1, 20)]
            case 2:
                result[at:at] = chance.choice(PIECES)
            case 3:
                result[at:at] = result[at : at + chance.randrange(40)]
            case _:
                del result[at:]
    return bytes(result)


class Nonsense:
    """Frames that are random, valid but odd, or recorded from official clients and then damaged."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._recorded: dict[str, list[str | bytes]] = {"1.0.0": [], "2.0.0": []}
        for name in CLIENTS:
            recorded, token = recording(name), make_token()
            self._recorded[recorded.vsn] += [
                frame if isinstance(frame, bytes) else frame.replace("TOKEN", token) for frame in recorded.sent
            ]
        self._tokens = [make_token(), make_token(expires_in=-1), make_token("service_role"), "nonsense", "", "sb_x"]

    def frame(self, vsn: str) -> str | bytes:
        make: Callable[[str], str | bytes] = self.random.choices(
            [self._noise, self._message, self._push, self._damaged], [1, 4, 2, 4]
        )[0]
        return make(vsn)

    def value(self, depth: int = 0) -> Any:
        pick = self.random.random()
        if depth > 3 or pick < 0.6:
            return self.random.choice(ODD)
        if pick < 0.8:
            return [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        return {str(self.random.choice(ODD)): self.value(depth + 1) for _ in range(self.random.randrange(4))}

    def _noise(self, vsn: str) -> str | bytes:
        content = self.random.randbytes(self.random.randrange(60))
        return content if self.random.random() < 0.5 else content.decode("latin-1")

    def _message(self, vsn: str) -> str:
        topic, event = self.random.choice(TOPICS), self.random.choice(EVENTS)
        ref, join_ref = self.random.choice([None, "1", "2", 3, "ü", ""]), self.random.choice([None, "1", "2", 7])
        payload = self.value() if self.random.random() < 0.4 else self._payload(event)
        if vsn == "1.0.0":
            fields = {"topic": topic, "event": event, "payload": payload, "ref": ref, "join_ref": join_ref}
            if self.random.random() < 0.1:
                fields[self.random.choice(list(fields))] = self.value()
            return json.dumps(fields, ensure_ascii=self.random.random() < 0.5)
        items = [join_ref, ref, topic, event, payload]
        if self.random.random() < 0.1:
            items[self.random.randrange(5)] = self.value()
        return json.dumps(items, ensure_ascii=self.random.random() < 0.5)

    def _payload(self, event: str) -> Any:
        random = self.random
        match event:
            case "phx_join":
                config = {
                    "private": random.choice([True, False, "true", 5]),
                    "broadcast": random.choice([None, {"ack": True, "self": True}, {"replay": {"since": 1}}]),
                    "presence": random.choice([None, {"enabled": True}, {"key": self.value(), "enabled": True}]),
                    "postgres_changes": random.choice([None, [], [{"event": "*", "schema": "public"}], [self.value()]]),
                }
                return {"config": config, "access_token": random.choice([*self._tokens, None, self.value()])}
            case "presence":
                return {"event": random.choice(["track", "untrack", "TRACK", "", 5]), "payload": self.value()}
            case "access_token":
                return {"access_token": random.choice(self._tokens)}
        return {"type": "broadcast", "event": "e", "payload": self.value()}

    def _push(self, vsn: str) -> bytes:
        is_json = self.random.random() < 0.7
        content = json.dumps(self.value()).encode() if is_json else self.random.randbytes(30)
        if is_json and self.random.random() < 0.2:
            content = b'{"x":"' + self.random.choice(PIECES) + b'"}'
        topic = self.random.choice(TOPICS)[:200]
        return user_broadcast_push(topic, "e", content, is_json=is_json, ref="1")

    def _damaged(self, vsn: str) -> str | bytes:
        frame = self.random.choice(self._recorded[vsn])
        content = damaged(self.random, frame if isinstance(frame, bytes) else frame.encode())
        if isinstance(frame, bytes) or self.random.random() < 0.1:
            return content
        return content.decode(errors="surrogateescape").encode("utf-8", "replace").decode()


def resident_kb(server: Server) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def open_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
