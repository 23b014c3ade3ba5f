"""The start page in a real browser: what a newcomer sees, and lines that do what the page says when they are pasted into a shell."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import uuid
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from playwright.async_api import Page, expect

from tests.fix_browser import PageFactory
from tests.fix_clients import CLIENTS
from tests.fix_server import Server, ServerFactory, make_token

AWKWARD_TOPIC = """it's "50 %" of $HOME `id` \\ !! {a;b} <i>é</i> & more"""
SHELL_LIMIT_S = 20.0
# supabase-js wants a WebSocket that older Node versions do not have.
GLOBAL_WEBSOCKET = 'import WebSocket from "ws"; globalThis.WebSocket ??= WebSocket;\n'


async def expect_key(page: Page) -> None:
    """The page knows the API key, which stands in its lines and lets it join."""
    await expect(page.locator("#join")).to_be_enabled(timeout=15_000)


async def choose(page: Page, topic: str, *, private: bool = False, token: str = "") -> None:
    await expect_key(page)
    await page.get_by_label("Topic", exact=True).fill(topic)
    await page.get_by_label("Private" if private else "Public", exact=True).check(force=True)
    await page.get_by_label("Token").fill(token)


async def join(page: Page, topic: str, *, private: bool = False, token: str = "") -> None:
    await choose(page, topic, private=private, token=token)
    await page.get_by_label("Topic", exact=True).press("Enter")
    await expect_joined(page, topic)


async def expect_joined(page: Page, topic: str) -> None:
    await expect(page.locator("#state-text")).to_have_text(f"Joined {topic}", timeout=15_000)


async def expect_message(page: Page, event: str) -> str:
    """The payload as it is shown of the only message with this event, once it is there."""
    message = page.locator("li.message").filter(has=page.get_by_text(event, exact=True))
    await expect(message).to_have_count(1)
    return await message.locator("pre").inner_text()


async def shell(line: str, **environment: str) -> str:
    """What bash prints for a line; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", line, env=dict(os.environ) | environment, stdout=PIPE, stderr=STDOUT
    )
    async with asyncio.timeout(SHELL_LIMIT_S):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def broadcast(http: httpx2.AsyncClient, server: Server, topic: str, event: str, payload: dict[str, Any]) -> None:
    answer = await http.post(
        f"{server.url}/realtime/v1/api/broadcast",
        headers={"apikey": server.anon_key},
        json={"messages": [{"topic": topic, "event": event, "payload": payload}]},
    )
    assert answer.status_code == 202


async def test_messages_from_sql_and_http_appear_newest_on_top(
    server: Server, browser_page: PageFactory, http: httpx2.AsyncClient
) -> None:
    page = await browser_page(server.url)
    await join(page, "room:1")

    server.database.execute("select realtime.send('{\"hello\": \"world\"}', 'greeting', 'room:1', false)")
    payload = json.loads(await expect_message(page, "greeting"))
    assert payload["hello"] == "world"
    assert uuid.UUID(payload["id"])
    await expect(page.locator("li.message .id")).to_have_text(payload["id"])

    await broadcast(http, server, "room:1", "progress", {"percent": 50})
    assert json.loads(await expect_message(page, "progress")) == {"percent": 50}
    await expect(page.locator("li.message .event")).to_have_text(["progress", "greeting"])
    await expect(page.get_by_label("messages received")).to_have_text("2")


async def test_numbers_keep_their_digits_and_bytes_are_shown_as_hex(server: Server, browser_page: PageFactory) -> None:
    page = await browser_page(server.url)
    await join(page, "room:1")
    server.database.execute(
        "select realtime.send('{\"big\": 9007199254740993, \"price\": 12.50}', 'row', 'room:1', false)"
    )
    server.database.execute("select realtime.send_binary('\\x00deadbeef', 'bytes', 'room:1', false)")
    shown = await expect_message(page, "row")
    assert '"big": 9007199254740993' in shown
    assert '"price": 12.50' in shown
    assert await expect_message(page, "bytes") == "00 de ad be ef"


async def test_what_a_message_holds_is_shown_as_text(
    server: Server, browser_page: PageFactory, http: httpx2.AsyncClient
) -> None:
    page = await browser_page(server.url)
    topic = "<b>room</b>"
    await join(page, topic)
    await broadcast(http, server, topic, "<i>event</i>", {"text": "<img src=x onerror=alert(1)>"})
    assert json.loads(await expect_message(page, "<i>event</i>")) == {"text": "<img src=x onerror=alert(1)>"}
    await expect(page.locator("img, #messages b, #messages i, #state b, .line b")).to_have_count(0)


@pytest.mark.parametrize("topic", ["room:1", AWKWARD_TOPIC])
async def test_displayed_lines_send_to_the_topic_when_run_in_a_shell(
    server: Server, browser_page: PageFactory, topic: str
) -> None:
    page = await browser_page(server.url)
    await join(page, topic)
    await shell(await page.locator("#psql").inner_text(), DATABASE_URL=server.database.url)
    assert json.loads(await expect_message(page, "greeting"))["hello"] == "world"

    await page.get_by_role("button", name="Clear").click()
    await shell(f"{await page.locator('#curl').inner_text()} --silent --show-error --fail")
    assert json.loads(await expect_message(page, "greeting")) == {"hello": "curl"}


async def test_displayed_lines_send_to_a_private_topic(server: Server, browser_page: PageFactory) -> None:
    page = await browser_page(server.url)
    await join(page, "it's private", private=True, token=server.service_key)
    curl = await page.locator("#curl").inner_text()
    assert server.anon_key not in curl
    await shell(f"{curl} --silent --show-error --fail", SERVICE_KEY=server.service_key)
    assert json.loads(await expect_message(page, "greeting")) == {"hello": "curl"}

    await page.get_by_role("button", name="Clear").click()
    await shell(await page.locator("#psql").inner_text(), DATABASE_URL=server.database.url)
    assert json.loads(await expect_message(page, "greeting"))["hello"] == "world"


@pytest.mark.parametrize("private", [False, True])
async def test_displayed_module_joins_the_topic_with_the_official_client(
    server: Server, browser_page: PageFactory, private: bool
) -> None:
    page = await browser_page(server.url)
    topic = AWKWARD_TOPIC
    await choose(page, topic, private=private)
    async with displayed_module(page, token=server.service_key) as process:
        await output_until(process, "SUBSCRIBED")
        server.database.execute("select realtime.send('{\"hello\": \"node\"}', 'greeting', %s, %s)", topic, private)
        await output_until(process, "hello: 'node'")


@asynccontextmanager
async def displayed_module(page: Page, *, token: str) -> AsyncIterator[Process]:
    """The module on the page, run by Node."""
    module = GLOBAL_WEBSOCKET + await page.locator("#javascript").inner_text()
    process = await asyncio.create_subprocess_exec(
        *("node", "--input-type=module", "-e", module),
        cwd=CLIENTS / "js",
        env=dict(os.environ) | {"TOKEN": token},
        stdout=PIPE,
        stderr=STDOUT,
    )
    try:
        yield process
    finally:
        process.kill()
        await process.communicate()


async def output_until(process: Process, words: str, *, limit_s: float = SHELL_LIMIT_S) -> str:
    """What the process prints, up to the line with these words."""
    assert process.stdout is not None
    seen = ""
    async with asyncio.timeout(limit_s):
        while words not in seen:
            line = await process.stdout.readline()
            assert line, f"{words} did not come:\n{seen}"
            seen += line.decode()
    return seen


def publish_todos(server: Server) -> None:
    server.database.execute("create table todos (id int primary key, title text, done boolean)")
    server.database.execute("grant select on todos to anon")
    server.database.execute("alter publication supabase_realtime add table todos")


async def test_row_changes_of_a_table_appear(server: Server, browser_page: PageFactory) -> None:
    publish_todos(server)
    page = await browser_page(server.url)
    await page.get_by_label("Table").fill("todos")
    await join(page, "room:1")
    await expect(page.locator("#state-reason")).to_have_text("Row changes of public.todos: Subscribed to PostgreSQL")
    server.database.execute("insert into todos values (1, '<i>one</i>', false)")
    server.database.execute("update todos set done = true")
    server.database.execute("delete from todos")
    new = {"id": 1, "title": "<i>one</i>", "done": True}
    assert json.loads(await expect_message(page, "INSERT")) == {"record": {**new, "done": False}}
    assert json.loads(await expect_message(page, "UPDATE")) == {"record": new, "old_record": {"id": 1}}
    assert json.loads(await expect_message(page, "DELETE")) == {"old_record": {"id": 1}}
    await expect(page.locator("li.message .id").first).to_have_text("public.todos")
    await expect(page.get_by_label("messages received")).to_have_text("3")
    server.database.execute("select realtime.send('{}', 'greeting', 'room:1', false)")
    await expect_message(page, "greeting")


async def test_row_changes_are_filtered_and_in_the_link(server: Server, browser_page: PageFactory) -> None:
    publish_todos(server)
    page = await browser_page(server.url)
    await page.get_by_label("Table").fill("todos")
    await page.get_by_label("Filter").fill('title=eq."a,b",done=is.true')
    await page.get_by_label("Changes", exact=True).select_option("UPDATE")
    await join(page, "room:1")
    other = await browser_page(await page.evaluate("location.href"))
    for each in (page, other):
        await expect(each.locator("#state-reason")).to_contain_text("Subscribed to PostgreSQL")
    server.database.execute("insert into todos values (1, 'a,b', true), (2, 'a,b', false), (3, 'a', true)")
    server.database.execute("update todos set title = title")
    for each in (page, other):
        assert json.loads(await expect_message(each, "UPDATE"))["record"] == {"id": 1, "title": "a,b", "done": True}
        await expect(each.locator("li.message")).to_have_count(1)


async def test_row_changes_that_cannot_be_had_say_why(server: Server, browser_page: PageFactory) -> None:
    page = await browser_page(server.url)
    await page.get_by_label("Table").fill("todos")
    await join(page, "room:1")
    await expect(page.locator("#state-reason")).to_contain_text("Unable to subscribe to changes with given parameters")
    await expect(page.locator("#state-hint")).to_contain_text("alter publication supabase_realtime add table")
    # The table that is published meanwhile is found with the next attempt.
    publish_todos(server)
    await page.get_by_label("Filter").fill("owner=eq.me")
    await join(page, "room:1")
    await expect(page.locator("#state-reason")).to_contain_text("invalid column for filter owner")
    await page.get_by_label("Filter").fill("")
    await join(page, "room:1")
    await expect(page.locator("#state-reason")).to_contain_text("Subscribed to PostgreSQL")
    await expect(page.locator("#state-hint")).to_be_hidden()


async def test_displayed_module_hears_of_row_changes_as_its_user(server: Server, browser_page: PageFactory) -> None:
    server.database.execute("create table notes (id int primary key, owner text)")
    server.database.execute("alter table notes enable row level security")
    server.database.execute("create policy own on notes for select using (owner = auth.jwt() ->> 'name')")
    server.database.execute("grant select on notes to authenticated")
    server.database.execute("alter publication supabase_realtime add table notes")
    page = await browser_page(server.url)
    await page.get_by_label("Table").fill("notes")
    await page.get_by_label("Filter").fill('owner=neq."nobody\'s"')
    await choose(page, "room:1", token=make_token(name="ann"))
    async with displayed_module(page, token=make_token(name="ann")) as process:
        await output_until(process, "SUBSCRIBED")
        for number in range(1000):
            # Joined is not yet subscribed.
            server.database.execute("insert into notes values (%s, 'bob'), (%s, 'ann')", 2 * number, 2 * number + 1)
            with contextlib.suppress(TimeoutError):
                seen = await output_until(process, "new: {", limit_s=0.2)
                break
        seen += await output_until(process, "}")
    assert "owner: 'ann'" in seen
    assert "owner: 'bob'" not in seen


async def test_lines_follow_the_form_and_hold_no_password(server: Server, browser_page: PageFactory) -> None:
    page = await browser_page(server.url)
    await choose(page, "orders")
    await expect(page.locator("#psql")).to_have_text(
        """psql "$DATABASE_URL" -c "select realtime.send('{\\"hello\\": \\"world\\"}', 'greeting', 'orders', false)\""""
    )
    await choose(page, "orders", private=True)
    await expect(page.locator("#psql")).to_contain_text("'orders', true)")
    await expect(page.locator("#curl")).to_contain_text('-H "apikey: $SERVICE_KEY"')
    await expect(page.locator("#curl")).to_contain_text('"private": true')
    await expect(page.locator("#javascript")).to_contain_text('.channel("orders", { config: { private: true } })')
    for address in ("", "start.js", "start.json"):
        text = await (await page.request.get(f"{server.url}/{address}")).text()
        assert server.database.url not in text
        assert server.service_key not in text


@pytest.mark.parametrize("has_clipboard", [True, False], ids=["clipboard", "fallback"])
@pytest.mark.parametrize("name", ["psql line", "curl line", "supabase-js code"])
async def test_copy_takes_the_whole_text(
    shared_server: Server, browser_page: PageFactory, name: str, has_clipboard: bool
) -> None:
    page = await browser_page(shared_server.url)
    await expect_key(page)
    if not has_clipboard:
        await page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    payload = page.get_by_label("Payload")
    await payload.fill("what the clipboard held before")
    await payload.press("Control+A")
    await payload.press("Control+X")
    button = page.get_by_role("button", name=f"Copy the {name}")
    await button.click()
    await expect(button).to_have_text("Copied")
    shown = await page.locator(f"#{await button.get_attribute('data-copies')}").text_content()
    await payload.press("Control+V")
    assert await payload.input_value() == shown


async def test_private_topic_without_a_right_shows_the_reason(server: Server, browser_page: PageFactory) -> None:
    page = await browser_page(server.url)
    await choose(page, "secret:1", private=True)
    await page.get_by_role("button", name="Join", exact=True).click()
    await expect(page.locator("#state-text")).to_have_text("Refused by the server")
    await expect(page.locator("#state-reason")).to_have_text(
        "Unauthorized: You do not have permissions to read from this Channel topic: secret:1"
    )
    await expect(page.get_by_role("button", name="Send")).to_be_disabled()

    await page.get_by_label("Token").fill("no token")
    await page.get_by_label("Token").press("Enter")
    await expect(page.locator("#state-reason")).to_contain_text("The token provided is not a valid JWT")

    await join(page, "secret:1", private=True, token=server.service_key)
    await expect(page.locator("#state-reason")).to_be_hidden()


async def test_who_may_read_but_not_write_sees_that_nothing_was_sent(server: Server, browser_page: PageFactory) -> None:
    server.database.execute(
        "create policy anyone_may_read on realtime.messages for select to authenticated using (realtime.topic() = 'news')"
    )
    page = await browser_page(server.url)
    await join(page, "news", private=True, token=make_token())
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator("#send-result")).to_have_text("Not sent: unauthorized")
    await expect(page.locator("li.message")).to_have_count(0)


async def test_what_one_page_sends_arrives_in_another(shared_server: Server, browser_page: PageFactory) -> None:
    alice, bob = [await browser_page(shared_server.url) for _ in range(2)]
    topic = f"pages:{uuid.uuid4()}"
    for page in (alice, bob):
        await join(page, topic)
    await alice.get_by_label("Event").fill("hello")
    await alice.get_by_label("Payload").fill('{"big": 9007199254740993, "words": "from alice"}')
    await alice.get_by_label("Payload").press("Control+Enter")
    for page in (bob, alice):
        shown = await expect_message(page, "hello")
        assert json.loads(shown) == {"big": 9007199254740993, "words": "from alice"}
    await expect(alice.locator("#send-result")).to_have_text("Sent.")

    await alice.get_by_label("Payload").fill("{nothing")
    await alice.get_by_role("button", name="Send").click()
    await expect(alice.locator("#send-result")).to_contain_text("Not JSON")
    await expect(bob.locator("li.message")).to_have_count(1)


async def test_page_comes_back_after_a_restart_of_the_server(server: Server, browser_page: PageFactory) -> None:
    page = await browser_page(server.url, expected_error=r"^WebSocket connection to .* failed")
    await join(page, "room:1")
    assert await server.stop() == 0
    await expect(page.locator("#state-text")).to_contain_text("Connection lost, trying again")
    await expect(page.locator("li.note")).to_contain_text("service restart")
    await server.start()
    await expect_joined(page, "room:1")
    server.database.execute("select realtime.send('{\"after\": \"restart\"}', 'greeting', 'room:1', false)")
    assert json.loads(await expect_message(page, "greeting"))["after"] == "restart"


async def test_channel_closed_by_the_server_says_why(server: Server, browser_page: PageFactory) -> None:
    page = await browser_page(server.url)
    await join(page, "room:1", token=make_token(expires_in=3))
    await expect(page.locator("#state-text")).to_have_text("Closed by the server", timeout=15_000)
    await expect(page.locator("#state-reason")).to_contain_text("Token has expired")


async def test_after_leaving_nothing_arrives(
    server: Server, browser_page: PageFactory, http: httpx2.AsyncClient
) -> None:
    page, other = [await browser_page(server.url) for _ in range(2)]
    await join(other, "room:1")
    async with page.expect_websocket() as opened:
        await join(page, "room:1")
    socket = await opened.value
    async with socket.expect_event("close"):
        await page.get_by_role("button", name="Leave").click()
    await expect(page.locator("#state-text")).to_have_text("Not joined")
    await broadcast(http, server, "room:1", "late", {})
    assert await expect_message(other, "late") == "{}"
    await page.get_by_label("Topic", exact=True).press("Enter")
    await expect_joined(page, "room:1")
    await expect(page.locator("li.message")).to_have_count(0)


async def test_link_joins_its_topic_and_never_holds_the_token(shared_server: Server, browser_page: PageFactory) -> None:
    page = await browser_page(f"{shared_server.url}/#topic=room:1")
    await expect_joined(page, "room:1")
    await join(page, AWKWARD_TOPIC, private=True, token=shared_server.service_key)
    link = await page.evaluate("location.href")
    assert shared_server.service_key not in link
    assert "eyJ" not in link

    other = await browser_page(link)
    await expect(other.get_by_label("Topic", exact=True)).to_have_value(AWKWARD_TOPIC)
    await expect(other.get_by_label("Private", exact=True)).to_be_checked()
    await expect(other.locator("#state-reason")).to_contain_text(AWKWARD_TOPIC)


async def test_list_is_bounded_and_the_counter_is_not(start_server: ServerFactory, browser_page: PageFactory) -> None:
    server = await start_server()
    page = await browser_page(server.url)
    await join(page, "room:1")
    server.database.execute(
        "select realtime.send(jsonb_build_object('n', n), 'n' || n, 'room:1', false) from generate_series(1, 230) as n"
    )
    await expect(page.get_by_label("messages received")).to_have_text("230")
    await expect(page.locator("#messages li")).to_have_count(200)
    await expect(page.locator("li.message .event").first).to_have_text("n230")


async def test_page_fits_a_phone_and_tells_protocol_frames_apart(
    shared_server: Server, browser_page: PageFactory
) -> None:
    page = await browser_page(shared_server.url, viewport={"width": 390, "height": 844})
    await join(page, "room:" + "x" * 200)
    frame = page.locator("li.frame")
    await expect(frame).to_contain_text('{"status":"ok","response":{"postgres_changes":[]}}')
    await page.get_by_label("Protocol frames").uncheck()
    await expect(frame).to_be_hidden()
    assert await page.evaluate("document.documentElement.scrollWidth") == 390
