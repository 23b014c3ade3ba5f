"""The OpenAPI document is valid, and a fuzzer that reads nothing else finds no request whose answer it does not foretell."""

from __future__ import annotations

import uuid
from typing import Any

import httpx2
import hypothesis
import openapi_spec_validator
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis import GenerationMode

from tests.fix_server import Server, make_token

OPERATIONS = ["GET /api/ping", "POST /api/broadcast", "POST /api/broadcast/{topic}/events/{event}"]
# Not below /api/: path, and what it is below.
OTHERS = {
    "GET /stream": "/realtime/v1",
    "POST /stream/ticket": "/realtime/v1",
    "GET /messages": "/realtime/v1",
    "GET /websocket": "/realtime/v1",
    "GET /socket/websocket": "/",
    "GET /healthcheck": "/",
    "GET /healthz": "/",
    "GET /readyz": "/",
    "GET /metrics": "/",
    "GET /metrics/{region}": "/",
}


async def test_document_is_valid_and_names_every_operation(shared_server: Server, http: httpx2.AsyncClient) -> None:
    answer = await http.get(f"{shared_server.url}/api/openapi")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    document: dict[str, Any] = answer.json()
    openapi_spec_validator.validate(document)
    assert document["openapi"].startswith("3.1.")
    described = {
        f"{method.upper()} {path}": item.get("servers")
        for path, item in document["paths"].items()
        for method in item
        if method != "servers"
    }
    assert described == dict.fromkeys(OPERATIONS) | {name: [{"url": url}] for name, url in OTHERS.items()}
    operations = [item[method] for item in document["paths"].values() for method in item if method != "servers"]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    # It is for who stands behind a gateway, as upstream's is.
    assert (await http.get(f"{shared_server.url}/realtime/v1/api/openapi")).status_code == 404


async def test_fuzzer_finds_nothing_wrong_with_ping(shared_server: Server, http: httpx2.AsyncClient) -> None:
    document = await document_of(shared_server, http)
    fuzz(document, shared_server, OPERATIONS[0], GenerationMode.POSITIVE)


@pytest.mark.parametrize("operation", OPERATIONS[1:])
async def test_fuzzer_has_every_good_request_accepted_and_none_without_a_token(
    shared_server: Server, http: httpx2.AsyncClient, operation: str
) -> None:
    fuzz(await document_of(shared_server, http), shared_server, operation, GenerationMode.POSITIVE)


async def test_answers_outside_the_api_are_as_described(shared_server: Server, http: httpx2.AsyncClient) -> None:
    schema = schemathesis.openapi.from_dict(await document_of(shared_server, http))
    token = {"Authorization": f"Bearer {shared_server.service_key}"}
    for operation, headers, status in (
        ("GET /healthz", {}, 200),
        ("GET /healthcheck", {}, 200),
        ("GET /readyz", {}, 200),
        ("GET /metrics", token, 200),
        ("GET /metrics", {}, 403),
        ("POST /stream/ticket", token, 200),
        ("POST /stream/ticket", {}, 401),
        ("GET /messages?topic=t", token, 200),
        ("GET /messages?topic=t&limit=0", token, 400),
        ("GET /messages?topic=t", {}, 401),
        ("GET /messages?topic=t&after=x", token, 400),
        ("GET /stream", token, 400),
        ("GET /stream?topic=t", {}, 401),
    ):
        method, target = operation.split()
        path = target.partition("?")[0]
        prefix = OTHERS[f"{method} {path}"].rstrip("/")
        answer = await http.request(method, f"{shared_server.url}{prefix}{target}", headers=headers)
        assert answer.status_code == status, operation
        described = schema[path][method].definition.raw["responses"][str(status)]
        media_type = answer.headers.get("content-type", "").partition(";")[0]
        assert [media_type] * bool(answer.content) == list(described.get("content", {})), operation
        if media_type == "application/json":
            schema[path][method].validate_response(answer)


@pytest.mark.parametrize("operation", OPERATIONS[1:])
async def test_fuzzer_has_every_bad_request_refused(
    shared_server: Server, http: httpx2.AsyncClient, operation: str
) -> None:
    document = await document_of(shared_server, http)
    # Bad in other ways than by its token: that one would end every request.
    for name in OPERATIONS:
        method, path = name.split()
        document["paths"][path][method.lower()].pop("security", None)
    fuzz(document, shared_server, operation, GenerationMode.NEGATIVE)


async def document_of(server: Server, http: httpx2.AsyncClient) -> dict[str, Any]:
    document: dict[str, Any] = (await http.get(f"{server.url}/api/openapi")).json()
    return document


def fuzz(document: dict[str, Any], server: Server, operation: str, mode: GenerationMode) -> None:
    """Status, headers, media type and body of every answer must be as the document says."""
    method, path = operation.split()
    # The service role may write to private topics.
    headers = {"Authorization": f"Bearer {make_token('service_role')}"}
    strategy = schemathesis.openapi.from_dict(document)[path][method].as_strategy(generation_mode=mode)

    @hypothesis.settings(
        max_examples=50,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=strategy)
    def run(case: schemathesis.Case[Any]) -> None:
        if mode is GenerationMode.POSITIVE and "Idempotency-Key" in case.headers:
            # Two requests with the same key are no good requests.
            case.headers["Idempotency-Key"] = str(uuid.uuid4())
        case.call_and_validate(base_url=f"{server.url}/realtime/v1", headers=headers)

    run()
