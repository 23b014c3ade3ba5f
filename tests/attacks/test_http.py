"""Hostile requests: what they may cost, what they may reach, and that other clients do not notice."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import httpx2
import msgspec
import pytest
from playwright.async_api import Page, expect
from starlette.datastructures import QueryParams
from starlette.requests import Request
from websockets.exceptions import InvalidStatus

from realtime_server import errors
from realtime_server.authorization import ALONE_AT_ONCE, EVERYTHING, Authorization, Policy, PolicyHeaders
from realtime_server.claims import Claims
from realtime_server.config import Settings
from realtime_server.database import Pool
from realtime_server.endpoints import broadcast, stream
from realtime_server.endpoints.bounds import MAX_HEADERS
from realtime_server.endpoints.broadcast import MAX_REPORTED, SLICE_STEPS, BroadcastEndpoints
from realtime_server.endpoints.caller import MAX_POLICY_HEADERS, policy_headers
from realtime_server.endpoints.sockets import Client, Pace, Sockets
from realtime_server.endpoints.stream import MAX_EVENTS, EventStream, StreamRequest
from realtime_server.endpoints.tickets import Tickets
from realtime_server.errors import InvalidTicket, RealtimeError
from realtime_server.hub import Room
from realtime_server.limits import Rate
from realtime_server.protocol import bindings, filters
from realtime_server.protocol.filters import Condition
from realtime_server.protocol.frames import Broadcast, ForwardedBroadcast
from tests.fix_browser import PageFactory
from tests.fix_database import Cluster
from tests.fix_events import EventsFactory
from tests.fix_proxy import ProxyFactory
from tests.fix_server import SECRET, Server, make_token
from tests.fix_wire import WireFactory

LIMIT_S = 20.0
CLAIMS = Claims("anon", None, 4e9, '{"role":"anon"}')


def request_with(headers: dict[str, str] | None = None, query: str = "") -> Request:
    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    return Request({"type": "http", "headers": raw, "query_string": query.encode(), "method": "GET", "path": "/"})


@pytest.fixture(scope="module")
async def production(cluster: Cluster) -> AsyncIterator[Server]:
    """A server that gives no key away and lets little wait for a socket."""
    database = cluster.create("heads")
    server = Server(database, changes="trigger", demo="0", max_buffered_bytes="100000")
    yield await server.start()
    await server.aclose()
    cluster.drop(database)


# -- parameters and headers


@pytest.mark.parametrize("path", ["/realtime/v1/stream", "/realtime/v1/messages", "/api/openapi", "/start.js"])
async def test_too_many_parameters_are_refused_before_they_are_read(
    shared_server: Server, http: httpx2.AsyncClient, path: str
) -> None:
    query = "&".join(f"event=e{number}" for number in range(301))
    answer = await http.get(f"{shared_server.url}{path}?{query}")
    assert (answer.status_code, answer.json()["code"]) == (400, "TooManyParameters")
    answer = await http.get(f"{shared_server.url}{path}?{query[: query.rindex('&')]}")
    assert answer.status_code in (200, 401)


async def test_handshake_with_too_much_is_refused(shared_server: Server, wire: WireFactory) -> None:
    key = shared_server.anon_key
    many = {f"x-{number}": "" for number in range(MAX_HEADERS)}
    large = {f"x-{number}": "v" * 2000 for number in range(5)}
    for query, headers, status in (("&a" * 300, {}, 400), ("", many, 431), ("", large, 431)):
        with pytest.raises(InvalidStatus) as refused:
            await wire(f"{shared_server.websocket_url}?apikey={key}{query}&", additional_headers=headers)
        assert refused.value.response.status_code == status
    few = {f"x-{number}": "v" * 100 for number in range(MAX_POLICY_HEADERS)}
    await wire(shared_server.websocket_url, key, additional_headers=few)


async def test_key_is_verified_before_the_rest_of_the_request_is_read(
    shared_server: Server, events: EventsFactory
) -> None:
    bad = {"schema": "public", "table": "t", "filter": "c=eq.((((" * 1000, "topic": "realtime:"}
    answer = await events(shared_server.url, ready=False, **bad)
    assert (answer.status, (await answer.body())["code"]) == (401, "MissingAPIKey")
    answer = await events(shared_server.url, shared_server.anon_key, ready=False, **bad)
    assert (answer.status, (await answer.body())["code"]) == (400, "TopicNameRequired")


def test_filter_is_read_once_however_many_events_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    parse = filters.parse

    def count(text: str) -> tuple[Condition, ...]:
        parsed.append(text)
        return parse(text)

    monkeypatch.setattr(filters, "parse", count)
    names = [f"e{number}" for number in range(MAX_EVENTS - 2)] + ["insert", "DELETE"]
    query = "schema=public&table=t&filter=c%3Deq.1" + "".join(f"&event={name}" for name in names)
    wish = stream._parse_request(request_with(query=query), 100)
    assert parsed == ["c=eq.1"]
    assert {binding.event for binding in wish.bindings} == {"*", "INSERT", "DELETE"}
    assert {binding.conditions for binding in wish.bindings} == {parse("c=eq.1")}


async def test_stream_of_too_many_events_is_refused(shared_server: Server, events: EventsFactory) -> None:
    names = [f"e{number}" for number in range(MAX_EVENTS + 1)]
    answer = await events(shared_server.url, shared_server.anon_key, topic="t", event=names, ready=False)
    assert (answer.status, (await answer.body())["code"]) == (400, "TooManyParameters")
    await events(shared_server.url, shared_server.anon_key, topic="t", event=names[1:])


REQUESTS: dict[str, tuple[str, str, bytes | None]] = {
    "stream": ("GET", "/realtime/v1/stream?topic=t", None),
    "messages": ("GET", "/realtime/v1/messages?topic=t", None),
    "batch": ("POST", "/api/broadcast", b'{"messages":[{"topic":"t","event":"e","payload":{}}]}'),
    "single": ("POST", "/api/broadcast/t/events/e", b"{}"),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_headers_for_policies_are_bounded(shared_server: Server, http: httpx2.AsyncClient, name: str) -> None:
    method, path, body = REQUESTS[name]
    for headers in (
        {f"x-{number}": "" for number in range(MAX_POLICY_HEADERS + 1)},
        {"x-long": "v" * 9000},
        {f"other-{number}": "" for number in range(MAX_HEADERS)},
    ):
        answer = await http.request(
            method, shared_server.url + path, content=body, headers={"apikey": shared_server.anon_key} | headers
        )
        assert (answer.status_code, answer.json()["code"]) == (431, "TooManyHeaders")


async def test_headers_are_encoded_once_for_all_topics_of_a_request() -> None:
    headers = policy_headers(request_with({"x-team": "red", "x-api-key": "secret", "accept": "*/*"}))
    assert json.loads(headers.json) == {"x-team": "red"}
    asked: list[str] = []

    class Answering:
        size = ALONE_AT_ONCE + 1

        async def stream(self, _: str, arguments: tuple[list[str], ...], **__: float) -> AsyncIterator[tuple[Any, ...]]:
            asked.extend(arguments[3])
            for number in range(1, len(arguments[3]) + 1):
                for extension in ("broadcast", "presence"):
                    yield number, extension, True, True, None

    authorization = Authorization(cast(Pool, Answering()), 5.0)
    task = asyncio.create_task(authorization.run())
    await asyncio.gather(*(authorization.authorize(f"t{number}", CLAIMS, headers) for number in range(100)))
    task.cancel()
    assert len(asked) == 100
    assert all(text is headers.json for text in asked)


@pytest.fixture
def team_topic(shared_server: Server) -> Iterator[str]:
    """A private topic that may be read with `x-team: red`, and by nobody whose policy sees a credential."""
    topic = f"team-{uuid4()}"
    seen = "current_setting('request.headers')::jsonb"
    shared_server.database.execute(
        "create policy team on realtime.messages for select to anon"
        f" using (topic = '{topic}' and {seen} ->> 'x-team' = 'red'"
        f" and not {seen} ?| array['x-api-key', 'x-auth-token', 'x-forwarded-access-token', 'authorization', 'apikey'])"
    )
    yield topic
    shared_server.database.execute("drop policy team on realtime.messages")


async def test_credentials_do_not_reach_policies(
    shared_server: Server, events: EventsFactory, wire: WireFactory, http: httpx2.AsyncClient, team_topic: str
) -> None:
    credentials = dict.fromkeys(("x-auth-token", "X-Forwarded-Access-Token"), "secret")
    credentials |= dict.fromkeys(("X-Api-Key", "apikey"), shared_server.anon_key)
    headers = {"x-team": "red"} | credentials
    await events(shared_server.url, topic=team_topic, private="true", headers=headers)
    socket = await wire(shared_server.websocket_url, additional_headers=headers)
    assert (await socket.join(team_topic, {"private": True}))["status"] == "ok"
    url = f"{shared_server.url}/realtime/v1/messages?topic={team_topic}&private=true"
    assert (await http.get(url, headers=headers)).status_code == 200
    assert (await http.get(url, headers=credentials)).status_code == 403


# -- batches


class Stage:
    """The REST endpoints without a server; every message has `members` receivers."""

    def __init__(self, *, members: int = 1, **settings: Any) -> None:
        self.sent: list[Broadcast] = []
        self.turns = 0
        self.sent_in_turn: list[int] = []
        self._members = members
        self.endpoints = BroadcastEndpoints(
            publish=self._publish,
            pace=lambda: Pace(Sockets(0)),
            authorize=self._authorize,
            verify=self._verify,
            settings=Settings(**settings),
            events=Rate(0),
        )

    async def send(self, body: bytes) -> Any:
        """The status, and the body of a refusal; meanwhile the turns of the loop are counted."""

        async def count() -> None:
            while True:
                self.turns += 1
                await asyncio.sleep(0)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        counting = asyncio.create_task(count())
        scope = {**request_with({"apikey": "x"}).scope, "method": "POST"}
        answer = await self.endpoints.send_batch(Request(scope, receive))
        counting.cancel()
        return answer.status_code, bytes(answer.body)

    def _publish(self, _: Room, message: Broadcast) -> int:
        self.sent.append(message)
        self.sent_in_turn.append(self.turns)
        return self._members

    async def _verify(self, _: str) -> Claims:
        return CLAIMS

    async def _authorize(self, _: str, __: Claims, ___: PolicyHeaders) -> Policy:
        return EVERYTHING


def batch_of(*items: bytes) -> bytes:
    return b'{"messages":[' + b",".join(items) + b"]}"


GOOD = b'{"topic":"t","event":"e","payload":{}}'


async def test_batch_is_counted_before_its_messages_are_taken_apart() -> None:
    stage = Stage()
    assert await stage.send(batch_of(*[GOOD] * 1000)) == (202, b"")
    for item in (b"{}", GOOD, b"[]", b"0"):
        body = batch_of(*[item] * (1_000_000 // (len(item) + 1)))
        raw = msgspec.json.decode(body, type=broadcast._RawBatch).messages
        tracemalloc.start()
        with pytest.raises(broadcast.HttpError):
            stage.endpoints._items(raw)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # One copy of the text, and a thousand elements at most.
        assert peak < len(body) + 1_000_000
    status, answer = await stage.send(batch_of(*[b"{}"] * 1001))
    assert status == 422
    assert json.loads(answer) == {"errors": {"messages": ["should have at most 1000 item(s)"]}}


@pytest.mark.parametrize("place", ["body", "message"])
async def test_keys_that_mean_nothing_are_not_kept(place: str) -> None:
    many = b",".join(b'"k%d":0' % number for number in range(200_000))
    body = batch_of(b"{%b,%b" % (many, GOOD[1:])) if place == "message" else b'{%b,"messages":[%b]}' % (many, GOOD)
    stage = Stage()
    tracemalloc.start()
    assert await stage.send(body) == (202, b"")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(body)


async def test_few_of_many_errors_are_told() -> None:
    status, answer = await Stage().send(batch_of(GOOD, *[b"{}"] * 999))
    assert status == 422
    first, *told, rest = json.loads(answer)["errors"]["messages"]
    assert first == {}
    blank = ["can't be blank"]
    assert told == [{"topic": blank, "event": blank, "payload": blank}] * MAX_REPORTED
    assert rest == f"{999 - MAX_REPORTED} more messages are invalid"
    assert len(answer) < 5000


@pytest.mark.parametrize("members", [0, 50])
async def test_loop_turns_while_a_batch_is_read_and_sent(members: int) -> None:
    stage = Stage(members=members)
    assert await stage.send(batch_of(*[GOOD] * 1000)) == (202, b"")
    assert len(stage.sent) == 1000
    assert (
        max(len(list(group)) for _, group in itertools.groupby(stage.sent_in_turn)) <= SLICE_STEPS // (1 + members) + 1
    )
    # While it is read too.
    assert stage.sent_in_turn[0] >= 1000 // SLICE_STEPS


class Slow:
    """A client that takes what it was sent once it was asked about `polls` times; None: never."""

    def __init__(self, polls: int | None) -> None:
        self.polls = polls
        self.asked = 0

    @property
    def is_filling(self) -> bool:
        self.asked += 1
        return self.polls is None or self.asked <= self.polls

    def close(self, code: int, reason: str = "") -> None: ...


async def test_batch_waits_for_healthy_sockets_and_not_for_stuck_ones() -> None:
    sockets = Sockets(0)
    stuck = Slow(None)
    sockets.add(cast(Client, stuck))
    pace = Pace(sockets)
    await pace.wait()
    assert stuck.asked < 5, "it was slow before the batch"
    healthy = Slow(3)
    sockets.add(cast(Client, healthy))
    await pace.wait()
    assert healthy.asked > 3, "it was waited for"
    newly = Slow(None)
    sockets.add(cast(Client, newly))
    await pace.wait()
    asked = newly.asked
    await pace.wait()
    assert newly.asked <= asked + 3, "it had its time"


async def test_batch_reaches_a_reader_for_whom_little_may_wait(
    production: Server, wire: WireFactory, events: EventsFactory, http: httpx2.AsyncClient
) -> None:
    socket = await wire(production.websocket_url, production.anon_key)
    await socket.join("t")
    subscription = await events(production.url, production.anon_key, topic="t")
    messages = [{"topic": "t", "event": "e", "payload": {"n": number, "text": "x" * 5000}} for number in range(1000)]

    async def read() -> None:
        for number in range(1000):
            assert b'"n":%d,' % number in await socket.hear_bytes()

    url = f"{production.url}/api/broadcast"
    headers = {"apikey": production.anon_key}
    answer, _, numbers = await asyncio.gather(
        http.post(url, json={"messages": messages}, headers=headers, timeout=60), read(), subscription.numbers(1000)
    )
    assert answer.status_code == 202
    assert numbers == list(range(1000))


async def test_callers_without_a_subject_do_not_share_idempotency_keys(
    shared_server: Server, http: httpx2.AsyncClient
) -> None:
    url = f"{shared_server.url}/api/broadcast/t/events/e"
    theirs = str(uuid4())

    async def send(token: str, body: dict[str, int]) -> int:
        headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": theirs}
        return (await http.post(url, json=body, headers=headers)).status_code

    one, other = (make_token("service_role", tenant=tenant) for tenant in ("one", "other"))
    assert await send(one, {"n": 1}) == 202
    assert await send(other, {"n": 2}) == 202
    assert await send(one, {"n": 2}) == 422
    assert await send(one, {"n": 1}) == 202


# -- event streams


def test_event_of_a_broadcast_is_read_once_for_all_streams() -> None:
    name = "a name that nothing has a reason to share"
    message = ForwardedBroadcast.parse("realtime:t", json.dumps({"event": name, "payload": {}}).encode())
    assert message.event == name
    assert message.event is message.event


@pytest.mark.parametrize("has_topic", [True, False])
async def test_stream_of_row_changes_alone_is_told_no_gap_of_messages(has_topic: bool) -> None:
    services = cast(Any, SimpleNamespace(position=lambda: None))
    wish = StreamRequest(
        (Room("realtime:t", False),) if has_topic else (), (bindings.parse({"table": "t"}),), frozenset(), None
    )
    following = EventStream(services, Sockets(0), wish, CLAIMS, PolicyHeaders(), 100_000, None)
    following._is_following = True
    following.tell_gap("gap: restored", "cursor")
    assert any(b"event: gap" in frame.data for frame in following._waiting) is has_topic


async def test_token_that_ends_while_policies_are_asked_is_told_by_the_status(
    shared_server: Server, events: EventsFactory
) -> None:
    topic = f"slow-{uuid4()}"
    shared_server.database.execute(
        "create policy slow on realtime.messages for select to authenticated"
        f" using (topic = '{topic}' and (select pg_sleep(1.5)) is not null)"
    )
    try:
        token = make_token(expires_in=1)
        answer = await events(shared_server.url, token, topic=topic, private="true", ready=False)
        assert (answer.status, (await answer.body())["code"]) == (401, "InvalidJWTToken")
    finally:
        shared_server.database.execute("drop policy slow on realtime.messages")


# -- tickets


def open_with(tickets: Tickets, ticket: str, query: str = "topic=t") -> str:
    return tickets.open(ticket, QueryParams(query))


def test_ticket_is_good_for_its_time_and_for_servers_with_the_secret() -> None:
    now = 1_000_000.0
    one, other, alone, unlike = (Tickets(secret, 3600, lambda: now) for secret in (SECRET, SECRET, None, "s" * 40))
    ticket, expires_in = one.issue("token", CLAIMS, QueryParams("apikey=x"))
    assert expires_in == 3600
    assert "token" not in ticket
    assert one.issue("token", Claims("anon", None, now + 60, "{}"), QueryParams())[1] == 60
    for tickets in (one, other):
        assert open_with(tickets, ticket) == "token"
    for tickets in (alone, unlike):
        with pytest.raises(InvalidTicket):
            open_with(tickets, ticket)
    for bad in ("", "x", "é", "\udc80", ticket[:-1], f"x{ticket[1:]}", "token"):
        with pytest.raises(InvalidTicket):
            open_with(one, bad)
    now += 3601
    with pytest.raises(InvalidTicket):
        open_with(one, ticket)


def test_ticket_with_the_parameters_of_a_stream_opens_no_other_one() -> None:
    tickets = Tickets(None, 3600)
    ticket, _ = tickets.issue("token", CLAIMS, QueryParams("topic=a&topic=b&private=true"))
    for query in ("private=true&topic=b&topic=a", "topic=a&topic=b&private=true&after=c&ticket=x&apikey=y"):
        assert open_with(tickets, ticket, query) == "token"
    for query in (
        "",
        "topic=a&private=true",
        "topic=a&topic=b",
        "topic=a&topic=b&topic=c&private=true",
        "topic=a,topic=b",
    ):
        with pytest.raises(InvalidTicket):
            open_with(tickets, ticket, query)


async def test_ticket_is_no_key_and_ends_with_its_token(
    shared_server: Server, events: EventsFactory, http: httpx2.AsyncClient
) -> None:
    url = f"{shared_server.url}/realtime/v1/stream/ticket"
    ends_at = time.time() + 2
    token = make_token(exp=ends_at)
    given = (await http.post(url, headers={"Authorization": f"Bearer {token}"})).json()
    assert given["expires_in"] <= 2
    ticket = given["ticket"]
    for path in ("/realtime/v1/messages?topic=t", "/realtime/v1/stream?topic=t"):
        assert (await http.get(shared_server.url + path, headers={"apikey": ticket})).status_code == 401
    assert (await http.post(f"{url}?ticket={ticket}")).status_code == 401
    await asyncio.sleep(ends_at - time.time() + 0.1)
    answer = await events(shared_server.url, topic="t", ticket=ticket, ready=False)
    assert (answer.status, (await answer.body())["code"]) == (401, "InvalidJWTToken")


PAGE = """(url) => {
    window.got = []; window.opened = 0
    window.source = new EventSource(url)
    source.onmessage = (event) => { got.push(JSON.parse(event.data).payload.n); document.title = got.join(" ") }
    source.addEventListener("ready", () => opened++)
}"""


async def test_browser_with_a_ticket_comes_back_after_a_restart_and_a_cut_line(
    server: Server, proxy_to: ProxyFactory, browser_page: PageFactory, http: httpx2.AsyncClient
) -> None:
    proxy = await proxy_to(server.port)
    query = "topic=t&private=true"
    headers = {"Authorization": f"Bearer {server.service_key}"}
    given = await http.post(f"{server.url}/realtime/v1/stream/ticket?{query}", headers=headers)
    page = await browser_page(f"{proxy.url}/healthz", expected_error="Failed to load resource|ERR_|404")
    await page.evaluate(PAGE, f"/realtime/v1/stream?{query}&ticket={given.json()['ticket']}")
    await page.wait_for_function("opened == 1")

    def send(number: int) -> None:
        server.database.execute(f"select realtime.send('{{\"n\": {number}}}', 'e', 't', true)")

    async def seen(numbers: str) -> None:
        await page.wait_for_function(f'document.title == "{numbers}"')

    send(1)
    await seen("1")
    proxy.cut()
    send(2)
    await seen("1 2")
    await server.stop()
    send(3)
    await server.start()
    await seen("1 2 3")
    send(4)
    await seen("1 2 3 4")
    assert await page.evaluate("source.readyState") == 1


# -- the start page's key


async def raw_answer(server: Server, method: str, target: str, headers: dict[str, str] | None = None) -> bytes:
    """What the server says to a request whose target no client library has put in order."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    lines = {"Host": f"127.0.0.1:{server.port}", "Connection": "close"} | (headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    writer.write(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1"))
    async with asyncio.timeout(LIMIT_S):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize("target", ["/start.json", "/start%2ejson", "//start.json", "/./start.json", "/START.JSON"])
async def test_key_of_the_start_page_is_for_its_own_origin(shared_server: Server, target: str) -> None:
    port = shared_server.port
    key = shared_server.anon_key.encode()
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://localhost:{port}"},
        {"Origin": f"http://127.0.0.1:{port + 1}"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": f"evil.example:{port}"},
        {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},
        {"Host": f"127.0.0.1.evil.example:{port}"},
        {"Host": ""},
    ):
        answer = await raw_answer(shared_server, "GET", target, headers)
        assert key not in answer, headers
    for origin in (f"http://127.0.0.1:{port}", "https://evil.example"):
        for method in ("GET", "OPTIONS"):
            headers = {"Origin": origin, "Access-Control-Request-Method": "GET"}
            answer = await raw_answer(shared_server, method, "/start.json", headers)
            assert b"access-control-allow-origin" not in answer.lower()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "LOCALHOST"])
async def test_key_of_the_start_page_is_given_to_the_page(shared_server: Server, host: str) -> None:
    host = f"{host}:{shared_server.port}"
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    for given in ({"Host": host}, headers):
        assert shared_server.anon_key.encode() in await raw_answer(shared_server, "GET", "/start.json", given)


async def test_server_on_a_given_database_gives_no_key_away(
    production: Server, browser_page: PageFactory, http: httpx2.AsyncClient
) -> None:
    assert (await http.get(f"{production.url}/start.json")).json() == {"anon_key": None}
    page: Page = await browser_page(production.url)
    await expect(page.get_by_label("API key")).to_be_visible()
    await expect(page.locator("#join")).to_be_disabled()
    await page.get_by_label("API key").fill(production.anon_key)
    await expect(page.locator("#curl")).to_contain_text(production.anon_key)
    await page.get_by_label("API key").press("Enter")
    await expect(page.locator("#state-text")).to_have_text("Joined room:1", timeout=15_000)
    assert production.anon_key not in await page.evaluate("location.href")


# -- routes and labels

TRICKS: tuple[Callable[[str], str], ...] = (
    lambda path: path,
    lambda path: f"/{path}",
    lambda path: f"{path}/",
    lambda path: f"/.{path}",
    lambda path: f"/x/..{path}",
    lambda path: f"/x/%2e%2e{path}",
    lambda path: f"{path}/%2e%2e",
    lambda path: f"{path}/..",
    lambda path: path.replace("/", "%2f"),
    lambda path: "/" + path[1:].replace("/", "%2f"),
    lambda path: path.replace("/", "%5c"),
    lambda path: path.upper(),
    lambda path: f"{path}%00",
    lambda path: f"{path};x=1",
    lambda path: f"{path}%20",
    lambda path: f"{path}?apikey=",
    lambda path: f"http://127.0.0.1{path}",
    lambda path: f"{path}%2f",
    lambda path: "".join(f"%{ord(letter):02x}" if letter != "/" else letter for letter in path),
)
GUARDED = {
    "/metrics": b"realtime_connections",
    "/metrics/eu": b"realtime_connections",
    "/realtime/v1/messages?topic=t": b'"cursor"',
    "/realtime/v1/stream?topic=t": b"event: ready",
    "/realtime/v1/stream/ticket": b'"ticket"',
    "/api/broadcast": b" 202 ",
    "/api/broadcast/t/events/e": b" 202 ",
}
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE")


@pytest.mark.parametrize("path", GUARDED)
async def test_no_spelling_of_a_path_gets_around_its_check(shared_server: Server, path: str) -> None:
    place, _, query = path.partition("?")

    async def ask(method: str, trick: Callable[[str], str]) -> tuple[str, str, bytes]:
        target = trick(place)
        if query:
            target += ("&" if "?" in target else "?") + query
        return method, target, await raw_answer(shared_server, method, target, {"Content-Length": "0"})

    asked: list[Awaitable[tuple[str, str, bytes]]] = [ask(method, trick) for method in METHODS for trick in TRICKS]
    for method, target, answer in await asyncio.gather(*asked):
        assert answer.startswith(b"HTTP/1.1 "), (method, target)
        assert GUARDED[path] not in answer, (method, target)
        assert b"HTTP/1.1 5" not in answer, (method, target)


async def test_labels_of_metrics_come_from_the_table_of_errors(
    shared_server: Server, wire: WireFactory, http: httpx2.AsyncClient
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    for number in range(5):
        for payload in (
            {"config": {"private": True}},
            {"access_token": f"token-{number}"},
            {"config": {"broadcast": {"cursor": f"cursor-{number}"}}},
        ):
            topic = f"realtime:label-{number}-{uuid4()}"
            await socket.say(topic, "phx_join", payload, ref=f"r{number}", join_ref=f"r{number}")
            await socket.hear()
            await socket.say(topic, f"event-{number}", payload, ref=f"r{number}")
            await socket.say(topic, "presence", {"event": f"event-{number}"}, ref=f"r{number}")
    headers = {"Authorization": f"Bearer {shared_server.service_key}"}
    text = (await http.get(f"{shared_server.url}/metrics", headers=headers)).text
    labels = {line.partition('{code="')[2].partition('"')[0] for line in text.splitlines() if '{code="' in line}
    members = [member for _, member in inspect.getmembers(errors, inspect.isclass) if issubclass(member, RealtimeError)]
    assert "Unauthorized" in labels
    assert labels <= {member.code for member in members}
