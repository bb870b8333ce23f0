"""Bad HTTP, paths, keys and headers over the whole mesh: each is refused at once and harms nobody."""

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from tests.support.bad_inputs import Bad, Wire, assert_answered
from tests.support.mesh import Mesh

_VALUE: Final = "invalid_value"
_BODY: Final = b'{"model": "sim", "prompt": "hi", "max_tokens": 1}'
_SMUGGLED: Final = b"GET /v1/models HTTP/1.1\r\nhost: smuggled\r\nauthorization: Bearer %KEY%\r\n\r\n"


def _post(number: int, headers: str, rest: bytes = _BODY, **expected: Any) -> Bad:
    """A request for a completion with these framing headers and what follows them."""
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: edge\r\nauthorization: Bearer %KEY%\r\ncontent-type: application/json"
    )
    raw = f"{head}\r\n{headers}\r\n\r\n".encode("latin-1") + rest
    return Bad(number=number, path="/v1/completions", raw=raw, **{"code": _VALUE, **expected})


def _get(number: int, head: bytes, **expected: Any) -> Bad:
    """A request for the models whose request line and headers are these."""
    raw = head + b"\r\nauthorization: Bearer %KEY%\r\n\r\n"
    return Bad(number=number, method="GET", path="/v1/models", raw=raw, **{"code": _VALUE, **expected})


_LENGTH: Final = f"content-length: {len(_BODY)}"
_CHUNKED: Final = "transfer-encoding: chunked"
_LINE: Final = b"GET /v1/models HTTP/1.1\r\nhost: edge"
TRANSPORT = [
    _post(67, f"{_LENGTH}\r\n{_CHUNKED}", b"0\r\n\r\n" + _SMUGGLED),
    _post(67, "content-length: 0\r\ncontent-length: 50", _SMUGGLED),
    _post(67, f"content-length: +{len(_BODY)}"),
    _post(67, f"content-length: {len(_BODY)}, {len(_BODY)}"),
    _post(67, "content-length: -1"),
    _post(67, "transfer-encoding: chunked, identity", b"0\r\n\r\n" + _SMUGGLED),
    _post(67, "transfer-encoding: xchunked", b"0\r\n\r\n" + _SMUGGLED),
    _post(67, "transfer-encoding : chunked", b"0\r\n\r\n" + _SMUGGLED),
    _post(67, "transfer-encoding: chunked\r\ntransfer-encoding: identity", b"0\r\n\r\n" + _SMUGGLED),
    _post(67, _CHUNKED, b"5\r\nhello0\r\n\r\n" + _SMUGGLED),
    _post(67, _CHUNKED, b"fffffffffffffffff\r\n" + _SMUGGLED),
    _post(67, _CHUNKED, b"-1\r\n" + _SMUGGLED),
    # What chunks may have beside their sizes says nothing to anybody.
    _post(67, _CHUNKED, b"%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(_BODY), _BODY), status=200),
    # RFC 9112 lets a recipient take these two, and what is behind the edge never sees them: Envoy writes requests anew.
    _get(67, _LINE + b"\nx: y", status=200),
    _get(69, _LINE + b"\r\nx: a\r\n b", status=200),
    _get(68, _LINE + b"".join(b"\r\nx-%d: y" % index for index in range(10_001)), status=431, code="headers_too_large"),
    _get(68, _LINE + b"".join(b"\r\nx-%d: y" % index for index in range(101)), status=431, code="headers_too_large"),
    _get(68, _LINE + b"\r\nx: " + b"y" * (1 << 20), status=431, code="headers_too_large"),
    _get(68, _LINE + b"\r\ncookie: a=b" * 8192, status=431, code="headers_too_large"),
    _get(69, _LINE + b"\r\nx: a\0b"),
    _get(69, _LINE + b"\r\nx_y: a"),
    _get(69, _LINE + b"\r\nx y: a"),
    _get(69, _LINE + b"\r\n: a"),
    _get(70, b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nhost: edge", status=431, code="headers_too_large"),
    _get(70, b"CONNECT 169.254.169.254:80 HTTP/1.1\r\nhost: edge", status=404, code="unknown_url"),
    _get(70, b"GET http://169.254.169.254/latest HTTP/1.1\r\nhost: edge", status=404, code="unknown_url"),
    _get(70, b"NONSENSE"),
    _get(70, b"GET /v1/models HTTP/3.7\r\nhost: edge"),
    *(
        Bad(number=71, method=method, path=path, content=b"", status=405, code="method_not_allowed")
        for method, path in (
            ("GET", "/v1/chat/completions"),
            ("DELETE", "/v1/completions"),
            ("TRACE", "/v1/chat/completions"),
            ("PUT", "/v1/models"),
            ("GET", "/api/v1/generate"),
        )
    ),
    *(
        Bad(number=72, method="GET", path=path, content=b"", status=404, code="unknown_url")
        for path in (
            "/nope", "/v1", "/v1/../metrics", "/v1/%2e%2e/metrics", "/invocations", "/pause", "/tokenize", "/docs",
        )
    ),
    # Slashes are merged, so that no path has two spellings.
    Bad(number=72, path="/v1//chat/completions", status=200),
    Bad(number=72, method="GET", path="/v1%2fmodels", content=b"", code=_VALUE),
    _get(73, b"GET /v1/models HTTP/1.1"),
    _get(73, _LINE + b"\r\nhost: other"),
    # No answer allows a browser's other origins anything; who sends one besides a browser is not our concern.
    Bad(number=73, method="GET", path="/v1/models", content=b"", headers={"origin": "http://rebound"}, status=200),
    _post(74, f"{_LENGTH}\r\nupgrade: h2c\r\nconnection: upgrade", status=(200, 403), code=None),
    *(
        Bad(number=82, method="GET", path=path, content=b"", status=404, code="unknown_url")
        for path in ("/metrics", "/stats", "/config_dump", "/debug/pprof", "/admin", "/quitquitquit", "/authz/x")
    ),
]  # fmt: skip  # a table


def test_bad_http_is_refused_at_once_and_harms_nobody(sim_mesh: Mesh) -> None:
    assert_answered(sim_mesh, TRANSPORT)


def test_nothing_that_follows_bad_framing_is_taken_for_a_request(sim_mesh: Mesh) -> None:
    rows = [row for row in TRANSPORT if row.raw is not None and _SMUGGLED in row.raw]
    host, _, port = sim_mesh.edge_target.rpartition(":")

    def all_answers(row: Bad) -> bytes:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(row.encoded(sim_mesh.key))
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))

    # At the same time: the edge takes a second to close a connection, in case that its answer is still on its way.
    with ThreadPoolExecutor(len(rows)) as pool:
        for row, received in zip(rows, pool.map(all_answers, rows), strict=True):
            assert received.count(b"HTTP/1.1 ") == 1, row.name
            assert b'"object":"list"' not in received, row.name


_NOT_A_KEY: Final[dict[str, Any]] = {
    "status": 401,
    "code": "invalid_api_key",
    "method": "GET",
    "path": "/v1/models",
    "content": b"",
}


def _header(number: int, name: str, value: str, **expected: Any) -> Bad:
    return Bad(number=number, headers={name: value}, **{"status": 200, **expected})


IDENTITY = [
    Bad(number=76, headers={"authorization": ""}, **_NOT_A_KEY),
    *(
        Bad(number=76 + (value != "Bearer tl-nope"), headers={"authorization": value}, **_NOT_A_KEY)
        for value in (
            "Bearer tl-nope", "Bearer", "Bearer ", "Bearer ' OR 1=1--", "Bearer " + "k" * 50_000, "Bearer kéy",
            "Basic eDp5", "Bearer a.b.c", "Token x",
        )
    ),
    _get(77, _LINE + b"\r\nauthorization: Bearer tl-nope", status=401, code="invalid_api_key"),
    _get(77, _LINE + b"\r\nx-api-key: a\0b"),
    *(
        _header(78, name, "10.0.0.1:80")
        for name in ("x-gateway-destination-endpoint", "x-gateway-destination-endpoint-subset", "x-tokenloom-worker")
    ),
    *(
        _header(79, name, value)
        for name, value in (
            ("x-envoy-expected-rq-timeout-ms", "1"), ("x-envoy-retry-on", "5xx"), ("x-envoy-original-path", "/metrics"),
            ("x-forwarded-for", "127.0.0.1"), ("x-internal-user", "root"), ("x-tokenloom-tenant", "other"),
            ("x-tokenloom-priority", "-1000"), ("x-tokenloom-right", "admin"), ("grpc-timeout", "1n"),
            ("x-priority", "-1000"),
        )
    ),
    _header(79, "x-priority", "first", status=400, code=_VALUE, param="x-priority"),
    _header(80, "x-request-id", "___decode_addr_1.2.3.4:5"),
    _header(80, "x-request-id", "r" * 10_000),
    _header(81, "traceparent", "nonsense"),
    _header(81, "traceparent", f"00-{'0' * 32}-{'0' * 16}-01"),
    _header(81, "traceparent", f"ff-{'1' * 32}-{'1' * 16}-01"),
    *(_header(81, name, "a=" + "b" * 10_000) for name in ("tracestate", "baggage")),
]  # fmt: skip  # a table


def test_who_is_nobody_gets_nothing_and_what_clients_say_of_themselves_changes_nothing(sim_mesh: Mesh) -> None:
    assert_answered(sim_mesh, IDENTITY)


def test_ids_of_requests_are_made_at_the_edge(sim_mesh: Mesh) -> None:
    wire = Wire(sim_mesh)
    ids = [wire.ask(row).headers["x-request-id"] for row in IDENTITY if "x-request-id" in row.headers]
    wire.close()
    assert all(len(found) == 36 for found in ids)
    assert len(ids) == len(set(ids)) == 2
