"""The client's side of the wire: binary frames made and read by the reference alone, and frames recorded from official clients.

Nothing here uses the server's codecs: these are what the tests hold them against.
Source: realtime-js `src/lib/serializer.ts`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "wire" / "recorded"
CLIENTS = sorted(path.stem for path in RECORDED.glob("*.json"))


def user_broadcast_push(
    topic: str,
    event: str,
    payload: bytes,
    *,
    is_json: bool,
    join_ref: str = "",
    ref: str = "",
    metadata: bytes = b"",
) -> bytes:
    """Kind 3, as clients of version 2.0.0 send every broadcast; `topic` with `realtime:`."""
    fields = [join_ref.encode(), ref.encode(), topic.encode(), event.encode(), metadata]
    return bytes([3, *map(len, fields), is_json]) + b"".join(fields) + payload


@dataclass(frozen=True)
class UserBroadcast:
    topic: str
    event: str
    metadata: Any
    payload: bytes
    is_json: bool

    @classmethod
    def read(cls, frame: bytes) -> UserBroadcast:
        """Kind 4, the only binary frame that clients read."""
        kind, *lengths, encoding = frame[:5]
        assert kind == 4, f"the JavaScript client throws at kind {kind}"
        assert encoding in (0, 1)
        rest, fields = frame[5:], []
        for length in lengths:
            fields.append(rest[:length])
            rest = rest[length:]
        topic, event, metadata = fields
        return cls(topic.decode(), event.decode(), json.loads(metadata) if metadata else None, rest, encoding == 1)


@dataclass(frozen=True)
class Recording:
    """Frames between an official client and a server, in their order; tokens are replaced by the word TOKEN."""

    client: str
    vsn: str
    sent: list[str | bytes]
    received: list[str | bytes]


def recording(name: str) -> Recording:
    """One of CLIENTS: a join, broadcasts, presence, a new token, heartbeats and a leave."""
    content = json.loads((RECORDED / f"{name}.json").read_text())
    frames: dict[str, list[str | bytes]] = {"client": [], "server": []}
    for frame in content["frames"]:
        frames[frame["from"]].append(frame["text"] if "text" in frame else bytes.fromhex(frame["hex"]))
    return Recording(content["client"], content["vsn"], frames["client"], frames["server"])
