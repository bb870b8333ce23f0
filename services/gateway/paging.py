"""Lists that are handed out page by page, as OpenAI's API does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from services.gateway.decoding import invalid

__all__ = ["PAGE_QUERY", "Page", "page_of"]

_DEFAULT: Final = 20
_MOST: Final = 100
PAGE_QUERY: Final[Mapping[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": _MOST, "default": _DEFAULT},
    "order": {"enum": ["asc", "desc"], "default": "desc"},
    "after": {"type": "string"},
}
"""The JSON Schema of what a query may say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Which part of a list is wanted."""

    limit: int
    after: str | None
    newest_first: bool

    def body(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The answer; `items` are one more than the limit where there are more."""
        shown = items[: self.limit]
        return {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(items) > self.limit,
        }


def page_of(query: Mapping[str, str]) -> Page:
    """The page that a query asks for.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    limit = query.get("limit", str(_DEFAULT))
    if not (limit.isdecimal() and 1 <= int(limit[:9]) <= _MOST):
        raise invalid("limit", f"limit: expected 1 to {_MOST}")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("order", "order: expected asc or desc")
    return Page(limit=int(limit), after=query.get("after"), newest_first=order == "desc")
