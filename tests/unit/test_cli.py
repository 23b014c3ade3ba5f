"""What the command line prints."""

from __future__ import annotations

import pytest

from realtime_server.cli import _url


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:4000"),
        ("localhost", "http://localhost:4000"),
        ("::1", "http://[::1]:4000"),
    ],
)
def test_urls_of_any_host_can_be_opened(host: str, url: str) -> None:
    assert _url(host, 4000) == url
