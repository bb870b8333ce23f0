"""Envoy's external authorization, over real gRPC."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from envoy.service.auth.v3 import external_auth_pb2, external_auth_pb2_grpc

from services.common.keystore import KeyStore
from services.common.quota import KeyLimits
from services.common.rpc import channel, serve
from services.common.settings_guardrails import GuardrailSettings
from services.common.status import DETAILS_KEY
from services.common.typed_calls import ACCOUNT_HEADER, REMEMBER_HEADER
from services.gateway.authz import AuthorizationServicer, HttpAuthorization
from services.gateway.guardrails import Guardrails
from services.gateway.identity import Authenticator, KeyDirectory
from services.gateway.server import serve_http
from tests.support.books import typed_accounts


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys.db")


def authenticator(store: KeyStore) -> Authenticator:
    keys = KeyDirectory(lambda: store)
    keys.refresh()
    return Authenticator(keys)


@asynccontextmanager
async def authorization(store: KeyStore) -> AsyncIterator[external_auth_pb2_grpc.AuthorizationStub]:
    def register(server: grpc.aio.Server) -> list[str]:
        servicer = AuthorizationServicer(authenticator(store), Guardrails(GuardrailSettings()))
        external_auth_pb2_grpc.add_AuthorizationServicer_to_server(servicer, server)
        return ["envoy.service.auth.v3.Authorization"]

    async with serve("127.0.0.1:0", register) as server, channel(f"127.0.0.1:{server.port}") as connection:
        yield external_auth_pb2_grpc.AuthorizationStub(connection)
    store.close()


def check(key: str | None, *, right: str = "inference", content_type: str = "") -> external_auth_pb2.CheckRequest:
    request = external_auth_pb2.CheckRequest()
    if key is not None:
        request.attributes.request.http.headers["authorization"] = f"Bearer {key}"
    request.attributes.request.http.headers["content-type"] = content_type
    request.attributes.context_extensions["right"] = right
    return request


async def test_a_valid_key_passes_and_its_owner_is_handed_on(store: KeyStore) -> None:
    _, key = store.create("team", priority=2, models=["b", "a"])
    async with authorization(store) as stub:
        answer = await stub.Check(check(key))
    headers = {option.header.key: option.header.value for option in answer.ok_response.headers}
    assert answer.status.code == 0
    assert headers["x-tokenloom-tenant"] == "team"
    assert headers["x-tokenloom-priority"] == "2"
    assert json.loads(headers["x-tokenloom-models"]) == ["a", "b"]
    assert list(answer.ok_response.headers_to_remove) == ["authorization"]


async def test_no_key_is_unauthenticated(store: KeyStore) -> None:
    async with authorization(store) as stub:
        answer = await stub.Check(check(None))
    assert answer.status.code == grpc.StatusCode.UNAUTHENTICATED.value[0]
    assert answer.denied_response.status.code == 401
    assert json.loads(answer.denied_response.body)["error"]["code"] == "invalid_api_key"


async def test_the_admin_right_is_asked_for_where_the_route_says_so(store: KeyStore) -> None:
    _, plain = store.create("plain")
    _, admin = store.create("root", admin=True)
    async with authorization(store) as stub:
        refused = await stub.Check(check(plain, right="admin"))
        passed = await stub.Check(check(admin, right="admin"))
    assert refused.denied_response.status.code == 403
    assert passed.status.code == 0


async def test_a_grpc_client_gets_the_details_beside_the_message(store: KeyStore) -> None:
    async with authorization(store) as stub:
        answer = await stub.Check(check("nope", content_type="application/grpc"))
    headers = {option.header.key: option.header.value for option in answer.denied_response.headers}
    assert DETAILS_KEY in headers
    assert answer.denied_response.body == "this API key is not valid"


async def http_check(store: KeyStore, *headers: tuple[str, str], right: str | None = "inference") -> httpx.Response:
    """One check over HTTP, as Envoy sends it."""
    app = HttpAuthorization(authenticator(store), Guardrails(GuardrailSettings()))
    if right is not None:
        headers = (*headers, ("x-tokenloom-right", right))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        answer = await client.post("/authz/api/v1/generate", headers=list(headers))
    store.close()
    return answer


async def test_over_http_a_valid_key_passes_and_its_owner_is_handed_on(store: KeyStore) -> None:
    _, key = store.create("team", priority=2, models=["b", "a"])
    answer = await http_check(store, ("authorization", f"Bearer {key}"))
    assert answer.status_code == 200
    assert answer.headers["x-tokenloom-tenant"] == "team"
    assert answer.headers["x-tokenloom-priority"] == "2"
    assert json.loads(answer.headers["x-tokenloom-models"]) == ["a", "b"]
    assert answer.headers["x-envoy-auth-headers-to-remove"] == "authorization"


@pytest.mark.parametrize(
    ("admin", "right", "status"),
    [(False, "admin", 403), (False, None, 403), (True, "admin", 200), (True, None, 200), (False, "telemetry", 200)],
)
async def test_over_http_the_right_is_the_routes_and_without_one_it_is_the_highest(
    store: KeyStore, admin: bool, right: str | None, status: int
) -> None:
    _, key = store.create("team", admin=admin)
    answer = await http_check(store, ("authorization", f"Bearer {key}"), right=right)
    assert answer.status_code == status


async def test_over_http_two_keys_are_none(store: KeyStore) -> None:
    _, key = store.create("team")
    answer = await http_check(store, ("authorization", "Bearer no"), ("authorization", f"Bearer {key}"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_over_http_a_grpc_client_gets_the_details_beside_the_message(store: KeyStore) -> None:
    answer = await http_check(store, ("authorization", "Bearer no"), ("x-tokenloom-form", "grpc"))
    assert (answer.status_code, answer.text) == (401, "this API key is not valid")
    assert DETAILS_KEY in answer.headers


async def test_checks_and_other_requests_share_a_connection(store: KeyStore) -> None:
    _, key = store.create("team", priority=2)
    knows = authenticator(store)
    checks = HttpAuthorization(knows, Guardrails(GuardrailSettings()))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].startswith("/authz/"):
            await checks(scope, receive, send)
            return
        await receive()
        await send({"type": "http.response.start", "status": 204, "headers": [(b"x-path", scope["path"].encode())]})
        await send({"type": "http.response.body", "body": b""})

    good, right = {"authorization": f"Bearer {key}"}, {"x-tokenloom-right": "inference"}
    async with (
        serve_http(
            app, "127.0.0.1:0", short_cuts=(checks.known_answer,), when_noted=lambda call: call(), drain_seconds=1
        ) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=httpx.Limits(max_connections=1)) as client,
    ):
        for _ in range(3):
            passed = await client.post("/authz/x", headers={**good, **right}, content=b"")
            assert (passed.status_code, passed.headers["x-tokenloom-priority"]) == (200, "2")
            assert (await client.post("/v1/x", content=b"body")).headers["x-path"] == "/v1/x"
            # What takes more than a look is answered in the usual way.
            assert (await client.post("/authz/x", headers=right)).status_code == 401
            assert (await client.post("/authz/x", headers=good)).status_code == 403
            closing = {**good, **right, "connection": "close"}
            assert (await client.post("/authz/x", headers=closing)).status_code == 200
    store.close()


def answered(tmp_path: Path, store: KeyStore, key: str, right: str = "inference") -> dict[str, str]:
    """The headers of what a gateway with accounts answers at once; none where it has to look closer."""
    asked = [(b"authorization", f"Bearer {key}".encode()), (b"x-tokenloom-right", right.encode())]
    with typed_accounts(tmp_path) as accounts:
        checks = HttpAuthorization(authenticator(store), Guardrails(GuardrailSettings()), accounts)
        known = checks.known_answer(b"POST", b"/authz/api/v1/generate", asked)
    store.close()
    lines = [] if known is None else known[0].decode().split("\r\n")[1:]
    return dict(line.split(": ", 1) for line in lines if line)


def test_the_edge_may_remember_a_key_for_which_the_answer_is_always_the_same(tmp_path: Path, store: KeyStore) -> None:
    _, key = store.create("team", models=["a"], priority=1, debug=True, expires_at=time.time() + 60)
    headers = answered(tmp_path, store, key)
    assert headers[REMEMBER_HEADER] == "500"
    assert headers[ACCOUNT_HEADER].startswith("gateway.")


@pytest.mark.parametrize(
    "rights",
    [
        {"limits": KeyLimits(rpm=1000)},
        {"limits": KeyLimits(budget=1e9)},
        {"endpoints": ["generate"]},
        {"expires_at": 0.4},
        {"models": [f"model-{number:04}" for number in range(300)]},
    ],
    ids=["limited", "on a budget", "for some endpoints", "about to expire", "with very many models"],
)
def test_the_edge_may_not_remember_a_key(tmp_path: Path, store: KeyStore, rights: dict[str, Any]) -> None:
    if "expires_at" in rights:
        rights = {"expires_at": time.time() + rights["expires_at"]}
    _, key = store.create("team", **rights)
    assert REMEMBER_HEADER not in answered(tmp_path, store, key)


@pytest.mark.parametrize("right", ["admin", "telemetry"])
def test_the_edge_may_not_remember_what_was_asked_for_another_right(
    tmp_path: Path, store: KeyStore, right: str
) -> None:
    _, key = store.create("root", admin=True)
    assert REMEMBER_HEADER not in answered(tmp_path, store, key, right)
