"""The pure parts of the Python client: the frames that only clients read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_server.errors import MalformedFrame
from realtime_server.protocol import binary

names = st.text(max_size=255).filter(lambda text: len(text.encode()) <= 255)


@given(names, names, names, st.binary(), st.booleans())
def test_broadcast_is_decoded_as_the_reference_lays_it_out(
    topic: str, event: str, metadata: str, payload: bytes, is_json: bool
) -> None:
    fields = [topic.encode(), event.encode(), metadata.encode()]
    frame = bytes([4, *map(len, fields), is_json]) + b"".join(fields) + payload
    assert binary.decode_broadcast(frame) == (topic, event, metadata.encode(), payload, is_json)
    # And the server's own encoder agrees.
    assert frame == binary.encode_broadcast(topic, event, payload, encoding=is_json, metadata=metadata.encode())


@given(st.binary(), st.booleans())
def test_any_bytes_are_a_broadcast_or_malformed(rest: bytes, is_kind_4: bool) -> None:
    frame = b"\x04" + rest if is_kind_4 else rest
    try:
        decoded = binary.decode_broadcast(frame)
    except MalformedFrame:
        return
    assert frame[0] == 4
    assert frame.endswith(decoded.payload)
    assert len(frame) == 5 + sum(len(text.encode()) for text in decoded[:2]) + len(decoded.metadata) + len(
        decoded.payload
    )


@pytest.mark.parametrize("frame", ["", "03", "04", "0401", "04010000", "0401000000", "040000ff01"])
def test_frame_of_another_kind_or_too_short_is_malformed(frame: str) -> None:
    with pytest.raises(MalformedFrame):
        binary.decode_broadcast(bytes.fromhex(frame))
