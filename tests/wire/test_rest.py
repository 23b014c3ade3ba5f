"""REST: what is sent arrives byte for byte, what is wrong is answered to the letter, and nothing is sent twice."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx2
import psycopg
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from realtime_server.authorization import EVERYTHING, Policy
from realtime_server.claims import Claims
from realtime_server.config import Settings
from realtime_server.endpoints.broadcast import BroadcastEndpoints, Seen, SeenKeys
from realtime_server.endpoints.sockets import Pace, Sockets
from realtime_server.hub import Room
from realtime_server.limits import Bucket, Rate
from realtime_server.protocol.frames import Broadcast
from tests.fix_server import Server, ServerFactory, make_token
from tests.fix_wire import WireFactory

PREFIXES = ["/realtime/v1", ""]
GOOD = {"topic": "t", "event": "e", "payload": {}}
JSON = {"content-type": "application/json"}
BYTES = {"content-type": "application/octet-stream"}


def kind_4(topic: str, event: str, payload: bytes, *, encoding: int = 1, meta: bytes = b"") -> bytes:
    """The frame as clients read it: five header bytes, names, metadata, payload."""
    wire_topic, name = f"realtime:{topic}".encode(), event.encode()
    return bytes([4, len(wire_topic), len(name), len(meta), encoding]) + wire_topic + name + meta + payload


def key(server: Server) -> dict[str, str]:
    return {"apikey": server.anon_key}


def single(server: Server, topic: str, event: str = "e", *, prefix: str = "/realtime/v1", query: str = "") -> str:
    return f"{server.url}{prefix}/api/broadcast/{quote(topic, safe='')}/events/{quote(event, safe='')}{query}"


def new_topic() -> str:
    return f"rest-{uuid.uuid4()}"


@pytest.fixture
def open_topic(shared_server: Server) -> Iterator[str]:
    """A private topic that role authenticated may read and write."""
    shared_server.database.execute(
        "create policy rest_read on realtime.messages for select to authenticated using (starts_with(topic, 'rest-open-'))"
    )
    shared_server.database.execute(
        "create policy rest_write on realtime.messages for insert to authenticated"
        " with check (starts_with(topic, 'rest-open-'))"
    )
    yield f"rest-open-{uuid.uuid4()}"
    shared_server.database.execute("drop policy rest_read on realtime.messages")
    shared_server.database.execute("drop policy rest_write on realtime.messages")


async def until_logged(server: Server, text: str) -> None:
    async with asyncio.timeout(10):
        while text not in server.log:
            await asyncio.sleep(0.01)


def refuse_connections(server: Server, *, limit: int) -> None:
    """0: the server's database takes no connection and loses those it has; -1: it takes them again."""
    name = psycopg.conninfo.conninfo_to_dict(server.database.url)["dbname"]
    with psycopg.connect(server.database.administrator_url, autocommit=True) as db:
        db.execute(f'alter database "{name}" connection limit {limit}')
        if limit == 0:
            db.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> pg_backend_pid()",
                (name,),
            )


# What is delivered


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_069_batch_reaches_both_versions_unchanged(
    shared_server: Server, wire: WireFactory, http: httpx2.AsyncClient, prefix: str
) -> None:
    topic = new_topic()
    new = await wire(shared_server.websocket_url, shared_server.anon_key)
    old = await wire(shared_server.websocket_url, shared_server.anon_key, vsn="1.0.0")
    for socket in (new, old):
        await socket.join(topic)
    payload = b'{ "a":1.50,"b" : 12345678901234567890, "private":true, "c":"\\u00fc\xc3\xbc" }'
    body = b'{"messages":[{"topic":"%b","event":"\xc3\xa9","payload":%b,"id":"m1"},{"topic":"%b","event":"f","payload":{}}]}'
    answer = await http.post(
        # The JavaScript client appends its socket's query.
        f"{shared_server.url}{prefix}/api/broadcast?apikey=x&vsn=2.0.0&private=true",
        headers=key(shared_server) | JSON,
        content=body % (topic.encode(), payload, topic.encode()),
    )
    assert (answer.status_code, answer.content) == (202, b"")
    assert await new.hear_bytes() == kind_4(topic, "é", payload, meta=b'{"id":"m1"}')
    assert await new.hear_bytes() == kind_4(topic, "f", b"{}")
    inner = {"type": "broadcast", "event": "é", "payload": json.loads(payload), "meta": {"id": "m1"}}
    assert await old.hear() == [None, None, f"realtime:{topic}", "broadcast", inner]
    assert (await old.hear())[4] == {"type": "broadcast", "event": "f", "payload": {}}


@pytest.mark.parametrize("private", [True, "true", "1"])
async def test_071_batch_drops_what_is_denied_and_sends_the_rest_public_first(
    shared_server: Server, wire: WireFactory, http: httpx2.AsyncClient, open_topic: str, private: Any
) -> None:
    token = make_token()
    closed = new_topic()
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join(open_topic, {"private": True}, access_token=token)
    await socket.join(closed)
    messages = [
        {"topic": open_topic, "event": "second", "payload": {}, "private": private},
        {"topic": closed, "event": "denied", "payload": {}, "private": private},
        {"topic": closed, "event": "first", "payload": {}, "private": "false"},
    ]
    answer = await http.post(
        f"{shared_server.url}/api/broadcast",
        headers={"Authorization": f"bearer {token}"},
        json={"messages": messages},
    )
    assert (answer.status_code, answer.content) == (202, b"")
    assert await socket.hear_bytes() == kind_4(closed, "first", b"{}")
    assert await socket.hear_bytes() == kind_4(open_topic, "second", b"{}")
    assert await socket.is_alive()
    await until_logged(shared_server, f'"topic": "{closed}"')


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "payload",
    [
        b"{}",
        b'{"a":1,"private":true}',
        b'[1, 2.0,"x"]',
        b'"\xc3\xbc\\n"',
        b"1e2",
        b"null",
        b"false",
        b'{"_binary":"AAA="}',
    ],
)
async def test_073_single_json_value_arrives_as_it_came(
    shared_server: Server, wire: WireFactory, http: httpx2.AsyncClient, prefix: str, payload: bytes
) -> None:
    topic = new_topic()
    new = await wire(shared_server.websocket_url, shared_server.anon_key)
    old = await wire(shared_server.websocket_url, shared_server.anon_key, vsn="1.0.0")
    for socket in (new, old):
        await socket.join(topic)
    answer = await http.post(
        single(shared_server, topic, prefix=prefix, query="?apikey=x&vsn=2.0.0"),
        headers=key(shared_server) | JSON,
        content=payload,
    )
    assert (answer.status_code, answer.content) == (202, b"")
    assert await new.hear_bytes() == kind_4(topic, "e", payload)
    inner = {"type": "broadcast", "event": "e", "payload": json.loads(payload)}
    assert await old.hear() == [None, None, f"realtime:{topic}", "broadcast", inner]


@pytest.mark.parametrize("payload", [b"", b"\x00\xff\n{", b'{"a":1}'])
async def test_073_single_bytes_arrive_as_they_came_and_not_at_all_in_version_1(
    shared_server: Server, wire: WireFactory, http: httpx2.AsyncClient, payload: bytes
) -> None:
    topic = new_topic()
    new = await wire(shared_server.websocket_url, shared_server.anon_key)
    old = await wire(shared_server.websocket_url, shared_server.anon_key, vsn="1.0.0")
    for socket in (new, old):
        await socket.join(topic)
    answer = await http.post(single(shared_server, topic), headers=key(shared_server) | BYTES, content=payload)
    assert (answer.status_code, answer.content) == (202, b"")
    assert await new.hear_bytes() == kind_4(topic, "e", payload, encoding=0)
    assert await old.is_alive()


@pytest.mark.parametrize(
    ("content_type", "encoding"),
    [
        ("application/json; charset=utf-8", 1),
        ("APPLICATION/JSON ;charset=utf-8", 1),
        (None, 1),
        ("application/octet-stream; x=y", 0),
    ],
)
async def test_single_media_type_counts_without_its_parameters(
    shared_server: Server, wire: WireFactory, http: httpx2.AsyncClient, content_type: str | None, encoding: int
) -> None:
    topic = new_topic()
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join(topic)
    headers = key(shared_server) | ({} if content_type is None else {"content-type": content_type})
    answer = await http.post(single(shared_server, topic), headers=headers, content=b"[1]")
    assert answer.status_code == 202
    assert await socket.hear_bytes() == kind_4(topic, "e", b"[1]", encoding=encoding)


@pytest.mark.parametrize("name", ["a/b", "room:1", "a%2Fb", "ü ?#", "..", "events", "a/events/b", "\x00"])
async def test_074_single_names_are_decoded_after_the_path_is_split(
    shared_server: Server, wire: WireFactory, http: httpx2.AsyncClient, name: str
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join(name)
    path = f"/realtime/v1/api/broadcast/{quote(name, safe='').replace('.', '%2E')}/events/{quote(name, safe='')}x"
    answer = await http.post(shared_server.url + path, headers=key(shared_server) | JSON, content=b"1")
    assert answer.status_code == 202
    assert await socket.hear_bytes() == kind_4(name, f"{name}x", b"1")


@pytest.mark.parametrize(
    ("query", "is_private"),
    [("?private=true", True), ("", False), ("?private=1", False), ("?private=True", False), ("?private=false", False)],
)
async def test_074_single_is_private_only_with_the_word_true(
    shared_server: Server, wire: WireFactory, http: httpx2.AsyncClient, open_topic: str, query: str, is_private: bool
) -> None:
    token = make_token()
    rooms = {}
    for private in (False, True):
        rooms[private] = await wire(shared_server.websocket_url, shared_server.anon_key)
        await rooms[private].join(open_topic, {"private": private}, access_token=token)
    answer = await http.post(
        single(shared_server, open_topic, query=query),
        headers={"Authorization": f"Bearer {token}"} | JSON,
        content=b'{"private":true}',
    )
    assert answer.status_code == 202
    assert await rooms[is_private].hear_bytes() == kind_4(open_topic, "e", b'{"private":true}')
    assert await rooms[not is_private].is_alive()


# What is refused

BLANK, INVALID = ["can't be blank"], ["is invalid"]
UNSUPPORTED = {"error": "Unsupported Media Type. Use application/json or application/octet-stream"}
NO_JSON = {"message": "Request body must be JSON"}
LONG = "ü" * 128
# Topic, event, headers, body; status and body of the answer.
BAD_SINGLES: dict[str, tuple[str, str, dict[str, str], bytes, int, Any]] = {
    "no JSON": ("t", "e", JSON, b"{", 400, NO_JSON),
    "two values": ("t", "e", JSON, b"1 2", 400, NO_JSON),
    "no UTF-8": ("t", "e", JSON, b'{"a":"\xff"}', 400, NO_JSON),
    "deep": ("t", "e", JSON, b"[" * 100_000 + b"]" * 100_000, 400, NO_JSON),
    "empty": ("t", "e", JSON, b"", 400, NO_JSON),
    "empty without a type": ("t", "e", {}, b"", 400, NO_JSON),
    "text": ("t", "e", {"content-type": "text/plain"}, b"{}", 415, UNSUPPORTED),
    "form": ("t", "e", {"content-type": "application/x-www-form-urlencoded"}, b"a=1", 415, UNSUPPORTED),
    "like JSON": ("t", "e", {"content-type": "application/jsonp"}, b"{}", 415, UNSUPPORTED),
    "blank topic": (" ", "e", JSON, b"1", 422, {"errors": {"topic": BLANK}}),
    "no names": ("", "", JSON, b"1", 422, {"errors": {"topic": BLANK, "event": BLANK}}),
    "long topic": (LONG, "e", JSON, b"1", 422, {"errors": {"topic": ["should be at most 255 byte(s)"]}}),
    "long event": ("t", LONG, BYTES, b"1", 422, {"errors": {"event": ["should be at most 255 byte(s)"]}}),
    "long topic of bytes": ("x" * 247, "e", BYTES, b"", 422, {"errors": {"topic": ["should be at most 246 byte(s)"]}}),
    "large": (
        "t",
        "e",
        JSON,
        b'"%b"' % (b"x" * 3_000_499),
        422,
        {"errors": {"payload": ["Payload size exceeds tenant limit"]}},
    ),
    "huge": ("t", "e", BYTES, b" " * 8_000_001, 413, {"message": "Request body is too large"}),
    "nested too deep": ("t", "e", JSON, b"[" * 65 + b"]" * 65, 422, {"errors": {"payload": INVALID}}),
    "long key": (
        "t",
        "e",
        JSON | {"idempotency-key": "k" * 256},
        b"1",
        400,
        {"message": "Idempotency-Key must be 1 to 255 visible ASCII characters"},
    ),
}


@pytest.mark.parametrize("case", BAD_SINGLES)
async def test_075_bad_single_is_refused_to_the_letter(
    shared_server: Server, http: httpx2.AsyncClient, case: str
) -> None:
    topic, event, headers, body, status, expected = BAD_SINGLES[case]
    answer = await http.post(single(shared_server, topic, event), headers=key(shared_server) | headers, content=body)
    assert (answer.status_code, answer.json()) == (status, expected)
    assert answer.headers["x-request-id"]


async def test_single_at_the_size_limit_is_accepted(shared_server: Server, http: httpx2.AsyncClient) -> None:
    body = b'  "%b"  ' % (b"x" * 3_000_498)
    answer = await http.post(single(shared_server, "t"), headers=key(shared_server) | JSON, content=body)
    assert answer.status_code == 202


async def test_single_with_names_that_are_no_utf_8_is_422(shared_server: Server, http: httpx2.AsyncClient) -> None:
    url = f"{shared_server.url}/api/broadcast/%FF/events/a%C3"
    answer = await http.post(url, headers=key(shared_server) | JSON, content=b"1")
    assert (answer.status_code, answer.json()) == (422, {"errors": {"topic": INVALID, "event": INVALID}})


@pytest.mark.parametrize(
    "body", [b'{"messages":[{"topic":"t","event":"e","payload":{"a":"\xff"}}]}', b'{"a":"\xed\xa0\x80"}']
)
async def test_batch_whose_payload_is_no_utf_8_is_400(
    shared_server: Server, http: httpx2.AsyncClient, body: bytes
) -> None:
    answer = await http.post(f"{shared_server.url}/api/broadcast", headers=key(shared_server), content=body)
    assert (answer.status_code, answer.json()) == (400, {"message": "Request body must be a JSON object"})


async def test_batch_with_a_number_out_of_range_is_422(shared_server: Server, http: httpx2.AsyncClient) -> None:
    body = b'{"messages":[{"topic":1e999,"event":"e","payload":{"a":1e999},"id":[]}]}'
    answer = await http.post(f"{shared_server.url}/api/broadcast", headers=key(shared_server), content=body)
    assert (answer.status_code, answer.json()) == (422, {"errors": {"messages": [{"topic": INVALID, "id": INVALID}]}})


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": f"Bearer {make_token()} more"},
        {"Authorization": make_token()},
        {"Authorization": f"Basic {make_token()}", "apikey": make_token()},
        {"Authorization": f"Bearer {make_token(expires_in=-5)}"},
        {"apikey": make_token(secret="x" * 40)},
        {"x-api-key": make_token()},
    ],
)
async def test_072_single_with_a_bad_token_is_401(
    shared_server: Server, http: httpx2.AsyncClient, headers: dict[str, str]
) -> None:
    answer = await http.post(single(shared_server, "t"), headers=headers | JSON, content=b"1")
    assert (answer.status_code, answer.json()) == (401, {"message": "Unauthorized"})


@pytest.mark.parametrize("headers", ["Authorization", "apikey"])
async def test_072_single_takes_the_token_from_either_header(
    shared_server: Server, http: httpx2.AsyncClient, headers: str
) -> None:
    token = make_token()
    value = f"bEARER  {token}" if headers == "Authorization" else token
    answer = await http.post(single(shared_server, "t"), headers={headers: value} | JSON, content=b"1")
    assert answer.status_code == 202


async def test_075_private_single_without_permission_is_403(
    shared_server: Server, http: httpx2.AsyncClient, open_topic: str
) -> None:
    url = single(shared_server, open_topic, query="?private=true")
    denied = await http.post(url, headers=key(shared_server) | JSON, content=b"1")
    assert (denied.status_code, denied.json()) == (403, {"message": "Unauthorized"})
    allowed = await http.post(url, headers={"apikey": make_token()} | JSON, content=b"1")
    assert allowed.status_code == 202


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("path", ["/api/broadcast", "/api/broadcast/t/events/e"])
@pytest.mark.parametrize(
    ("accept", "status"),
    [
        ("text/html", 406),
        ("application/json;q=0, */*", 406),
        ("application/json; q=0.0", 406),
        ("text/*, application/xml", 406),
        ("text/html, */*;q=0.1", 202),
        ("application/*", 202),
        ("application/json;charset=utf-8", 202),
        ("APPLICATION/JSON;q=0.9", 202),
        ("", 202),
    ],
)
async def test_accept_that_excludes_json_is_406(
    shared_server: Server, http: httpx2.AsyncClient, prefix: str, path: str, accept: str, status: int
) -> None:
    answer = await http.post(
        shared_server.url + prefix + path,
        headers=key(shared_server) | {"accept": accept},
        json={"messages": [GOOD]},
    )
    assert answer.status_code == status
    assert answer.content == (b"" if status == 202 else b'{"message":"Not Acceptable"}')


async def test_checks_come_in_their_order(shared_server: Server, http: httpx2.AsyncClient) -> None:
    """Each request is wrong in every way that the one before it was, but the first."""
    wrong = {"accept": "text/html", "content-type": "text/plain"}
    url, blank = single(shared_server, "t", query="?private=true"), single(shared_server, " ", query="?private=true")
    huge = await http.post(blank, headers=wrong, content=b" " * 8_000_001)
    no_json = await http.post(blank, headers=wrong | JSON, content=b"{")
    not_acceptable = await http.post(blank, headers=wrong, content=b"{")
    unsupported = await http.post(blank, headers=wrong | {"accept": "*/*"}, content=b"{")
    no_token = await http.post(blank, headers=JSON, content=b"{}")
    invalid = await http.post(blank, headers=JSON | key(shared_server), content=b"{}")
    denied = await http.post(url, headers=JSON | key(shared_server), content=b"{}")
    answers = [huge, no_json, not_acceptable, unsupported, no_token, invalid, denied]
    assert [answer.status_code for answer in answers] == [413, 400, 406, 415, 401, 422, 403]


@pytest.mark.parametrize("path", ["/api/broadcast", "/api/broadcast/t/events/e", "/realtime/v1/api/broadcast"])
async def test_other_methods_are_405(shared_server: Server, http: httpx2.AsyncClient, path: str) -> None:
    for method in ("GET", "PUT", "DELETE"):
        answer = await http.request(method, shared_server.url + path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_permission_that_cannot_be_found_out_is_told(
    start_server: ServerFactory, http: httpx2.AsyncClient
) -> None:
    server = await start_server(policy_timeout_s="0.5", database_timeout_s="1")
    server.database.execute(
        "create policy slow on realtime.messages for insert to authenticated with check (pg_sleep(60) is null)"
    )
    headers = {"Authorization": f"Bearer {make_token()}", "idempotency-key": "k"} | JSON
    url = single(server, "t", query="?private=true")
    slow = await http.post(url, headers=headers, content=b"1")
    assert (slow.status_code, slow.json()) == (422, {"message": "Query canceled"})
    refuse_connections(server, limit=0)
    away = await http.post(url, headers=headers, content=b"1")
    assert (away.status_code, away.json()) == (422, {"message": "Tenant database unavailable"})
    batch = {"messages": [GOOD | {"private": True}]}
    dropped = await http.post(f"{server.url}/api/broadcast", headers=headers | {"idempotency-key": "l"}, json=batch)
    assert dropped.status_code == 202
    await until_logged(server, "private broadcast could not be authorized")
    # Public messages need no database.
    assert (await http.post(single(server, "t"), headers=key(server) | JSON, content=b"1")).status_code == 202
    refuse_connections(server, limit=-1)


# How often


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_014_ping_needs_no_token_and_tells_the_rate(
    shared_server: Server, http: httpx2.AsyncClient, prefix: str
) -> None:
    answer = await http.get(f"{shared_server.url}{prefix}/api/ping", headers={"x-request-id": "my-request/1"})
    assert (answer.status_code, answer.json()) == (200, {"message": "Success"})
    assert answer.headers["content-type"] == "application/json"
    rolling, limit, remaining = (
        int(answer.headers[name]) for name in ("x-rate-rolling", "x-rate-limit", "x-rate-limit-remaining")
    )
    assert rolling >= 0
    assert remaining == limit - rolling
    assert answer.headers["x-request-id"] == "my-request/1"


async def test_014_healthcheck_is_ok(shared_server: Server, http: httpx2.AsyncClient) -> None:
    answer = await http.get(f"{shared_server.url}/healthcheck")
    assert (answer.status_code, answer.text, answer.headers["content-type"]) == (200, "ok", "text/plain; charset=utf-8")


@pytest.mark.parametrize("theirs", [None, "", "a b", "x" * 201, "ü"])
@pytest.mark.parametrize("path", ["/api/broadcast", "/realtime/v1/api/broadcast/t/events/e"])
async def test_request_id_that_is_not_sane_is_replaced(
    shared_server: Server, http: httpx2.AsyncClient, path: str, theirs: str | None
) -> None:
    headers = key(shared_server) | ({} if theirs is None else {"x-request-id": theirs.encode().decode("latin-1")})
    answer = await http.post(
        shared_server.url + path,
        headers=[(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
        json={"messages": [GOOD]},
    )
    assert answer.status_code == 202
    assert uuid.UUID(answer.headers["x-request-id"])
    assert int(answer.headers["x-rate-limit"]) > 0


async def test_076_too_many_messages_are_429(start_server: ServerFactory, http: httpx2.AsyncClient) -> None:
    server = await start_server(max_events_per_second="2")
    batch = f"{server.url}/realtime/v1/api/broadcast"
    answer = await http.post(batch, headers=key(server), json={"messages": [GOOD] * 3})
    assert (answer.status_code, answer.json()) == (
        429,
        {"message": "Too many messages to broadcast, please reduce the batch size"},
    )
    async with asyncio.timeout(30):
        while (answer := await http.get(f"{server.url}/api/ping")).status_code == 200:
            # A burst passes: the average changes only where five seconds end.
            burst = await http.post(batch, headers=key(server), json={"messages": [GOOD] * 2})
            assert burst.status_code in (202, 429)
            await asyncio.sleep(0.1)
    too_many = {"message": "Too many requests"}
    assert (answer.status_code, answer.json()) == (429, too_many)
    rolling = int(answer.headers["x-rate-rolling"])
    assert rolling >= 2
    assert (answer.headers["x-rate-limit"], answer.headers["x-rate-limit-remaining"]) == ("2", str(2 - rolling))
    # Before the token is looked at.
    for url in (batch, single(server, "t")):
        answer = await http.post(url, headers=JSON, content=b'{"messages":[]}')
        assert (answer.status_code, answer.json()) == (429, too_many)
        assert int(answer.headers["x-rate-limit-remaining"]) <= 0


async def test_without_a_limit_nothing_is_429(start_server: ServerFactory, http: httpx2.AsyncClient) -> None:
    server = await start_server(max_events_per_second="0")
    answer = await http.post(
        f"{server.url}/api/broadcast", headers=key(server), content=json.dumps({"messages": [GOOD] * 1000})
    )
    assert answer.status_code == 202
    # An integer and a remainder all the same.
    assert answer.headers["x-rate-limit"] == "2147483647"
    assert int(answer.headers["x-rate-limit-remaining"]) > 0


class Stage:
    """The endpoints without a server: time stands still, verifying a token may take as many events as the test says."""

    def __init__(self, **settings: Any) -> None:
        self.now = 0.0
        self.events_while_verifying = 0
        self.sent: list[Broadcast] = []
        self.policy_problem: Exception | None = None
        self.is_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.rate = Rate(10)
        endpoints = BroadcastEndpoints(
            publish=self.publish,
            pace=lambda: Pace(Sockets(0)),
            authorize=self.authorize,
            verify=self.verify,
            settings=Settings(**settings),
            events=self.rate,
            clock=lambda: self.now,
        )
        routes = [
            Route("/batch", endpoints.send_batch, methods=["POST"]),
            Route("/{topic}/{event}", endpoints.send_single, methods=["POST"]),
        ]
        transport = httpx2.ASGITransport(Starlette(routes=routes))
        self.http = httpx2.AsyncClient(transport=transport, base_url="http://stage")

    def publish(self, room: Room, broadcast: Broadcast) -> int:
        self.sent.append(broadcast)
        return 1

    async def verify(self, token: str) -> Claims:
        if self.events_while_verifying:
            self.rate.count(self.now, self.events_while_verifying)
            self.now += 5
        role, _, subject = token.partition(":")
        return Claims(role=role, subject=subject or None, expires_at=1e10, json="{}")

    async def authorize(self, topic: str, claims: Claims, headers: Any) -> Policy:
        self.is_asked.set()
        await self.may_answer.wait()
        if self.policy_problem is not None:
            raise self.policy_problem
        return EVERYTHING

    async def send(self, body: str = "1", *, path: str = "/t/e", key: str | None = None, caller: str = "anon") -> Any:
        """Status and body of the answer."""
        headers = {"apikey": caller} | ({} if key is None else {"idempotency-key": key})
        answer = await self.http.post(path, headers=headers, content=body)
        return answer.status_code, answer.json() if answer.content else None


async def test_rate_that_rises_while_the_token_is_verified_is_429() -> None:
    stage = Stage()
    stage.events_while_verifying = 51
    exceeded = 429, {"message": "You have exceeded your rate limit"}
    assert await stage.send() == exceeded
    stage = Stage()
    stage.events_while_verifying = 51
    assert await stage.send(json.dumps({"messages": [GOOD]}), path="/batch") == exceeded
    assert stage.sent == []


async def test_permission_that_fails_for_an_unknown_reason_is_500() -> None:
    stage = Stage()
    stage.policy_problem = RuntimeError("secret detail")
    assert await stage.send(path="/t/e?private=true") == (500, {"message": "Unable to authorize broadcast"})


# Not twice


@pytest.mark.parametrize("path", ["/api/broadcast", "/realtime/v1/api/broadcast/{topic}/events/e"])
async def test_repeated_request_is_answered_and_not_sent_again(
    shared_server: Server, wire: WireFactory, http: httpx2.AsyncClient, path: str
) -> None:
    topic = new_topic()
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join(topic)
    headers = key(shared_server) | {"Idempotency-Key": str(uuid.uuid4())}
    url = shared_server.url + path.replace("{topic}", topic)
    body = {"messages": [{"topic": topic, "event": "e", "payload": {}}]}
    for _ in range(3):
        answer = await http.post(url, headers=headers, json=body)
        assert (answer.status_code, answer.content) == (202, b"")
    await socket.hear_bytes()
    assert await socket.is_alive()
    other = await http.post(url, headers=headers, json=body | {"x": 1})
    assert (other.status_code, other.json()) == (
        422,
        {"message": "Idempotency-Key was already used for another request"},
    )
    assert await socket.is_alive()


REUSED = (422, {"message": "Idempotency-Key was already used for another request"})


async def test_same_key_of_another_caller_is_another_key() -> None:
    stage = Stage()
    for caller in ("anon", "authenticated", "authenticated:a", "authenticated:b"):
        assert await stage.send(key="k", caller=caller) == (202, None)
        assert await stage.send(key="k", caller=caller) == (202, None)
    assert len(stage.sent) == 4


async def test_same_body_with_other_names_is_another_request() -> None:
    stage = Stage()
    assert await stage.send(key="k") == (202, None)
    for path in ("/t/f", "/u/e", "/t/e?private=true"):
        assert await stage.send(path=path, key="k") == REUSED
    assert len(stage.sent) == 1


async def test_key_is_forgotten_after_ten_minutes() -> None:
    stage = Stage()
    await stage.send(key="k")
    stage.now = 599.9
    await stage.send(key="k")
    assert len(stage.sent) == 1
    stage.now = 600
    assert await stage.send("2", key="k") == (202, None)
    assert len(stage.sent) == 2


async def test_repeated_request_while_the_first_runs_is_409() -> None:
    stage = Stage()
    stage.may_answer.clear()
    first = asyncio.create_task(stage.send(path="/t/e?private=true", key="k"))
    await stage.is_asked.wait()
    assert await stage.send(path="/t/e?private=true", key="k") == (
        409,
        {"message": "A request with this Idempotency-Key is being processed"},
    )
    stage.may_answer.set()
    assert await first == (202, None)
    assert await stage.send(path="/t/e?private=true", key="k") == (202, None)
    assert len(stage.sent) == 1


async def test_key_of_a_request_that_failed_is_free_again() -> None:
    stage = Stage()
    stage.policy_problem = RuntimeError("broken")
    assert (await stage.send(path="/t/e?private=true", key="k"))[0] == 500
    stage.policy_problem = None
    assert await stage.send("2", path="/t/e?private=true", key="k") == (202, None)
    assert len(stage.sent) == 1


async def test_key_of_a_request_that_was_cancelled_is_free_again() -> None:
    stage = Stage()
    stage.may_answer.clear()
    first = asyncio.create_task(stage.send(path="/t/e?private=true", key="k"))
    await stage.is_asked.wait()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    stage.may_answer.set()
    assert await stage.send(path="/t/e?private=true", key="k") == (202, None)


def test_keys_that_were_not_used_for_longest_are_forgotten_first() -> None:
    keys = SeenKeys(capacity=2, keep_s=10)
    for key in (b"a", b"b"):
        assert keys.begin(key, b"1", 0) is Seen.NEW
        keys.finish(key, b"1", 0)
    assert keys.begin(b"a", b"1", 1) is Seen.ANSWERED
    assert keys.begin(b"c", b"1", 1) is Seen.NEW
    assert len(keys) == 2
    assert keys.begin(b"a", b"2", 1) is Seen.REUSED
    assert keys.begin(b"c", b"1", 1) is Seen.RUNNING
    assert keys.begin(b"b", b"1", 1) is Seen.NEW


# Browsers


@pytest.mark.parametrize(
    ("path", "method"),
    [
        (prefix + path, method)
        for prefix in PREFIXES
        for path, method in (
            ("/api/broadcast", "POST"),
            ("/api/broadcast/a%2Fb/events/e", "POST"),
            ("/api/ping", "GET"),
        )
    ],
)
async def test_077_preflight_allows_what_clients_send(
    shared_server: Server, http: httpx2.AsyncClient, path: str, method: str
) -> None:
    names = ["authorization", "apikey", "content-type", "x-client-info", "idempotency-key", "x-my-own"]
    answer = await http.options(
        shared_server.url + path,
        headers={
            "Origin": "https://app.example",
            "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": ", ".join(names),
        },
    )
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert method in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"].split(", ") == names


async def test_answers_let_browsers_read_the_rate(shared_server: Server, http: httpx2.AsyncClient) -> None:
    headers = key(shared_server) | JSON | {"Origin": "https://app.example"}
    answer = await http.post(single(shared_server, "t"), headers=headers, content=b"{")
    assert answer.status_code == 400
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["access-control-expose-headers"].split(", ") == [
        "x-rate-rolling",
        "x-rate-limit",
        "x-rate-limit-remaining",
        "x-request-id",
    ]


async def test_only_allowed_origins_pass(start_server: ServerFactory, http: httpx2.AsyncClient) -> None:
    server = await start_server(allowed_origins="https://a.example,https://b.example")
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "apikey"}
    url = single(server, "t")
    for origin, status, allowed in (
        ("https://b.example", 200, "https://b.example"),
        ("https://evil.example", 400, None),
    ):
        preflight = await http.options(url, headers={"Origin": origin} | asked)
        assert (preflight.status_code, preflight.headers.get("access-control-allow-origin")) == (status, allowed)
        answer = await http.post(url, headers={"Origin": origin} | key(server) | JSON, content=b"1")
        assert answer.headers.get("access-control-allow-origin") == allowed


# Limits by themselves


def test_rate_is_the_average_of_full_buckets_and_starts_short() -> None:
    rate = Rate(10)
    rate.count(100.0, 60)
    rate.count(104.9, 40)
    assert (rate.rolling(104.99), rate.is_over(104.99)) == (0.0, False)
    assert (rate.rolling(105.0), rate.is_over(105.0)) == (20.0, True)
    rate.count(105.0)
    assert rate.rolling(109.9) == 20.0
    assert rate.rolling(110.0) == 10.1
    assert rate.is_over(110.0)
    assert rate.rolling(115.0) == pytest.approx(101 / 15)
    assert not rate.is_over(115.0)


def test_rate_forgets_what_is_older_than_twelve_buckets() -> None:
    rate = Rate(1)
    rate.count(0.0, 60)
    rate.count(5.0, 120)
    assert rate.rolling(64.9) == 3.0
    assert rate.rolling(65.0) == 2.0
    assert rate.rolling(70.0) == 0.0
    rate.count(70.0, 600)
    assert rate.rolling(1e9) == 0.0


def test_rate_is_over_at_the_limit_itself_and_never_without_one() -> None:
    rate, unlimited = Rate(10), Rate(0)
    for each in (rate, unlimited):
        each.count(0.0, 50)
    assert rate.is_over(5.0)
    assert not unlimited.is_over(5.0)
    assert unlimited.rolling(5.0) == 10.0


def test_bucket_gives_a_burst_and_then_its_rate() -> None:
    bucket = Bucket(2.0, 3.0, 10.0)
    assert [bucket.take(10.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert bucket.take(10.25) == 0.25
    assert bucket.take(10.5) == 0.0
    assert bucket.take(1000.0, 3.0) == 0.0
    assert bucket.take(1000.0, 3.0) == 1.5
