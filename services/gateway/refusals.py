"""Refusals of keys that are over a limit, whatever they ask for: told before anybody looks at their requests."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from time import monotonic
from typing import Final

import msgspec
from opentelemetry.trace import Span
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from services.common.endpoints import endpoint_of
from services.common.errors import MeshError
from services.common.ids import random_hex
from services.common.quota import NO_LIMITS
from services.gateway.accounts import Accounts
from services.gateway.checks import KnownAnswer
from services.gateway.http import JSON, Headers, error_headers
from services.gateway.identity import Authenticator, Identity
from services.gateway.metrics import GatewayMetrics
from services.gateway.recording import request_ended, request_span
from services.gateway.routes import Routes

__all__ = ["Refusals"]

# What these ask for is not seen before all the rest is: such a request goes the usual way.
_UNUSUAL: Final = (b"content-encoding", b"transfer-encoding", b"x-priority")


class Refusals:
    """Answers a whole request that has nothing else wrong and comes with a key that may make none for now.

    The answer is what the usual way would come to, which is a task, a body decoded and a conversion later.
    """

    def __init__(
        self,
        routes: Routes,
        authenticator: Authenticator,
        accounts: Accounts,
        metrics: GatewayMetrics,
        *,
        max_body_bytes: int,
    ) -> None:
        """`max_body_bytes`: what is larger is refused for that."""
        limited = [route.path for route in routes.all if route.is_limited and route.method == "POST"]
        self._paths = {path.encode(): path for path in limited if "{" not in path}
        self._authenticator = authenticator
        self._accounts = accounts
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    def known_answer(self, method: bytes, url: bytes, headers: Headers) -> KnownAnswer | None:
        """The whole HTTP answer, and what is to be done right after it; None: ask in the usual way."""
        path = self._paths.get(url)
        if path is None or method != b"POST":
            return None
        asked = dict(headers)
        identity = self._authenticator.known(asked.get(b"authorization", b"").decode("latin-1"))
        if identity is None or identity.limits == NO_LIMITS or len(asked) < len(headers):
            return None
        if not self._is_usual(asked) or not _may_ask(identity, path):
            return None
        shown: list[tuple[bytes, bytes]] = []
        try:
            self._accounts.refuse_early(identity, lambda name, value: shown.append((name.encode(), value.encode())))
        except MeshError as error:
            return self._refused(error, path, asked, identity.tenant, shown)
        return None

    def _is_usual(self, asked: Mapping[bytes, bytes]) -> bool:
        length = asked.get(b"content-length", b"")
        return (
            asked.get(b"content-type") == b"application/json"
            and length.isdigit()
            and int(length) <= self._max_body_bytes
            and not any(name in asked for name in _UNUSUAL)
        )

    def _refused(
        self, error: MeshError, path: str, asked: Mapping[bytes, bytes], tenant: str, shown: Headers
    ) -> KnownAnswer:
        began = monotonic()
        request_id = asked.get(b"x-request-id", b"").decode("latin-1") or random_hex(32)
        body = msgspec.json.encode(error.http_body())
        length = (b"content-length", str(len(body)).encode())
        headers = ((b"x-request-id", request_id.encode()), *shown, length, JSON, *error_headers(error))
        lines = b"".join([b"%s: %s\r\n" % header for header in headers])
        answer = b"%s%s\r\n%s" % (STATUS_LINE[error.row.http], lines, body)
        parent = _text(asked, b"traceparent"), _text(asked, b"tracestate")
        span = request_span("POST", path, request_id, *parent)
        return answer, partial(self._note, span, error, path=path, request_id=request_id, tenant=tenant, began=began)

    def _note(
        self,
        of_request: AbstractContextManager[Span],
        error: MeshError,
        *,
        path: str,
        request_id: str,
        tenant: str,
        began: float,
    ) -> None:
        with of_request as span:
            span.set_attribute("error.type", error.reason.value)
            request_ended(
                self._metrics,
                span,
                request_id=request_id,
                endpoint=path,
                outcome=error.reason.value.lower(),
                status=error.row.http,
                seconds=monotonic() - began,
                facts={"tenant": tenant},
            )


def _text(asked: Mapping[bytes, bytes], name: bytes) -> str | None:
    value = asked.get(name)
    return None if value is None else value.decode("latin-1")


def _may_ask(identity: Identity, path: str) -> bool:
    return identity.endpoints is None or endpoint_of(path) in identity.endpoints
