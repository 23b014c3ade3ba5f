"""A real browser, and pages in it that must stay clean: no error on the console, nothing asked of another host."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator
from typing import Any, Protocol
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright

FLAGS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


class PageFactory(Protocol):
    async def __call__(self, url: str, *, expected_error: str | None = None, **context: Any) -> Page: ...


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium is not None, "chromium is missing: run tests/install-parts"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        await browser.close()


@pytest.fixture
async def browser_page(browser: Browser) -> AsyncIterator[PageFactory]:
    """Factory of pages, each a browser profile of its own; `context` are playwright's options of one.

    The test fails if a page logs an error or a warning, throws, or asks another host than the one it was opened from.
    `expected_error` is a pattern of errors that the test provokes: chromium logs every socket that finds no server.
    """
    problems: list[str] = []
    pages: list[Page] = []

    async def open_page(url: str, *, expected_error: str | None = None, **context: Any) -> Page:
        host = urlsplit(url).netloc
        page = await (await browser.new_context(**context)).new_page()
        pages.append(page)

        def on_console(message: ConsoleMessage) -> None:
            is_expected = expected_error is not None and re.search(expected_error, message.text)
            if message.type in ("error", "warning") and not is_expected:
                problems.append(f"console {message.type}: {message.text}")

        def on_request(address: str) -> None:
            if urlsplit(address).netloc != host:
                problems.append(f"request to another host: {address}")

        page.on("console", on_console)
        page.on("pageerror", lambda error: problems.append(f"uncaught: {error}"))
        page.on("request", lambda request: on_request(request.url))
        page.on("websocket", lambda websocket: on_request(websocket.url))
        await page.goto(url)
        return page

    yield open_page
    for page in pages:
        await page.context.close()
    assert problems == []
