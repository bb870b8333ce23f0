"""Which handler answers which method and path."""

import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from services.common.errors import MeshError, Reason
from services.gateway.caller import Caller
from services.gateway.identity import Identity
from services.gateway.request import Request
from services.gateway.response import Response

__all__ = ["UNKNOWN_PATH", "Handler", "Route", "Routes"]

UNKNOWN_PATH: Final = "other"
"""What metrics and spans call a path that is none of ours."""

Handler = Callable[[Request, Response, Identity, Caller], Awaitable[None]]
_PARAMETER: Final = re.compile(r"\{(\w+)(:path)?\}")


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path.

    A `{name}` in the path takes what has no slash, a `{name:path}` anything; they are found in `Request.parameters`.
    """

    method: str
    path: str
    handler: Handler
    body: type | None = None
    """The shape of the JSON body that it takes."""
    form: Mapping[str, Any] | None = None
    """The JSON Schema of the form that it takes."""
    query: Mapping[str, Any] = field(default_factory=dict)
    """The JSON Schema of each parameter that its query may have."""
    needs: Collection[str] = ()
    """Those of them that must be there."""
    answer: type | None = None
    """The shape of the JSON that it answers; None where it is no JSON."""
    streams: bool = False
    """Whether it answers with events when asked to."""
    may_be_put_off: bool = False
    """Whether it answers with a batch (202) where there is no room and its client prefers that."""
    is_limited: bool = False
    """Whether its requests count against the limits of their keys."""


class Routes:
    """The routes of an API."""

    def __init__(self, *routes: Route) -> None:
        self.all = routes
        self._exact = {(route.method, route.path): route for route in routes if "{" not in route.path}
        self._patterns = [(_pattern(route.path), route) for route in routes if "{" in route.path]
        self._methods: dict[str, list[str]] = {}
        for route in routes:
            self._methods.setdefault(route.path, []).append(route.method)

    def label(self, path: str) -> str:
        """The path of the route that answers a path, braces and all; "other" where there is none: what clients make up
        must not become labels.
        """
        if path in self._methods:
            return path
        return next((route.path for pattern, route in self._patterns if pattern.fullmatch(path)), UNKNOWN_PATH)

    def find(self, request: Request, response: Response) -> Route:
        """The route of a request, whose parameters are set.

        Raises:
            MeshError: NOT_FOUND; METHOD_NOT_ALLOWED, with the `allow` header on the response.
        """
        route = self._exact.get((request.method, request.path))
        if route is not None:
            return route
        allowed = self._methods.get(request.path) if "{" not in request.path else None
        for pattern, route in self._patterns:
            found = pattern.fullmatch(request.path)
            if found is None:
                continue
            if route.method == request.method:
                request.parameters = found.groupdict()
                return route
            allowed = self._methods[route.path]
        if allowed is None:
            raise MeshError(Reason.NOT_FOUND, f"there is no {request.path[:200]}", code="unknown_url")
        methods = ", ".join(sorted(allowed))
        response.add_header("allow", methods)
        raise MeshError(Reason.METHOD_NOT_ALLOWED, f"use {methods} for {request.path[:200]}")


def _pattern(path: str) -> re.Pattern[str]:
    pieces, position = [], 0
    for found in _PARAMETER.finditer(path):
        name, is_path = found.groups()
        pieces += [re.escape(path[position : found.start()]), f"(?P<{name}>{'.+' if is_path else '[^/]+'})"]
        position = found.end()
    return re.compile("".join([*pieces, re.escape(path[position:])]))
