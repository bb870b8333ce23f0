"""Which handler answers which method and path."""

from collections.abc import MutableMapping
from typing import Any

import pytest

from services.common.errors import MeshError, Reason
from services.gateway.caller import Caller
from services.gateway.identity import Identity
from services.gateway.request import Request
from services.gateway.response import Response
from services.gateway.routes import Route, Routes


async def _handle(request: Request, response: Response, identity: Identity, caller: Caller) -> None:
    raise NotImplementedError


async def _receive() -> MutableMapping[str, Any]:
    raise NotImplementedError


async def _send(message: MutableMapping[str, Any]) -> None:
    raise NotImplementedError


ROUTES = Routes(
    Route("POST", "/v1/things", _handle),
    Route("GET", "/v1/things", _handle),
    Route("GET", "/v1/things/{thing}", _handle),
    Route("POST", "/v1/things/{thing}/end", _handle),
    Route("GET", "/v1/models/{model:path}", _handle),
)


def request(method: str, path: str) -> Request:
    return Request({"method": method, "path": path, "headers": []}, _receive)


@pytest.mark.parametrize(
    ("method", "path", "route", "parameters"),
    [
        ("POST", "/v1/things", "/v1/things", {}),
        ("GET", "/v1/things", "/v1/things", {}),
        ("GET", "/v1/things/5", "/v1/things/{thing}", {"thing": "5"}),
        ("POST", "/v1/things/a.b/end", "/v1/things/{thing}/end", {"thing": "a.b"}),
        ("GET", "/v1/models/org/name", "/v1/models/{model:path}", {"model": "org/name"}),
    ],
)
def test_a_path_finds_its_route(method: str, path: str, route: str, parameters: dict[str, str]) -> None:
    asked = request(method, path)
    assert ROUTES.find(asked, Response(_send, "r")).path == route
    assert asked.parameters == parameters
    assert ROUTES.label(path) == route


@pytest.mark.parametrize(
    "path", ["/", "/v1/thing", "/v1/things/", "/v1/things/5/6", "/v1/things/{thing}", "/v1/models/"]
)
def test_a_path_that_is_not_served_is_not_found(path: str) -> None:
    if path == "/v1/things/{thing}":
        assert ROUTES.find(request("GET", path), Response(_send, "r")).path == path
        return
    with pytest.raises(MeshError) as caught:
        ROUTES.find(request("GET", path), Response(_send, "r"))
    assert caught.value.reason is Reason.NOT_FOUND
    assert ROUTES.label(path) == "other"


@pytest.mark.parametrize("path", ["/v1/things", "/v1/things/5"])
def test_another_method_is_refused(path: str) -> None:
    with pytest.raises(MeshError) as caught:
        ROUTES.find(request("PUT", path), Response(_send, "r"))
    assert caught.value.reason is Reason.METHOD_NOT_ALLOWED
