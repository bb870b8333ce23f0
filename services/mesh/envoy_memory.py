"""What the edge remembers for a moment of keys that the gateway has let in, so that their next calls need not ask."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from services.common.typed_calls import ACCOUNT_HEADER, EDGE_ACCOUNT, REMEMBER_HEADER
from services.mesh.envoy_types import any_of

__all__ = ["IS_UNKNOWN", "KEY_MEMORY", "key_memory"]

KEY_MEMORY: Final = "tokenloom.key_memory"
_SCRIPT: Final = Path(__file__).with_name("key_memory.lua")
_REMEMBERED: Final = "remembered"
# No answer holds for longer, whatever it says: a key is to stop within a second of its revocation.
_MOST_MS: Final = 500
# So many keys in each of two generations, for each of Envoy's threads.
_MOST: Final = 1024

IS_UNKNOWN: Final[dict[str, Any]] = {
    "filter": KEY_MEMORY,
    "path": [{"key": _REMEMBERED}],
    "value": {"bool_match": True},
    "invert": True,
}
"""Matches the metadata of calls that have to be asked about."""


def key_memory(gateways: Sequence[str]) -> dict[str, Any]:
    """The filter before the check. `gateways`: the names of those that can be told of calls without being asked."""
    return any_of(
        "envoy.extensions.filters.http.lua.v3.Lua",
        default_source_code={"inline_string": _script(gateways)},
        # What it sets is no matter of routes.
        clear_route_cache=False,
    )


def _script(gateways: Sequence[str]) -> str:
    texts = {
        "NAMESPACE": KEY_MEMORY,
        "ASKED": f"{KEY_MEMORY}.asked",
        "ANSWER": "envoy.filters.http.ext_authz",
        "REMEMBERED": _REMEMBERED,
        "REMEMBER": REMEMBER_HEADER,
        "ACCOUNT": ACCOUNT_HEADER,
        "HEADERS": "x-tokenloom-",
        "MARK": EDGE_ACCOUNT,
    }
    lines = [f"local {name} = {json.dumps(text)}" for name, text in texts.items()]
    lines += [f"local MOST, MOST_MS = {_MOST}, {_MOST_MS}", "local GATEWAYS = {"]
    lines += [f"  [{json.dumps(f'{name}.')}] = true," for name in gateways]
    return "\n".join([*lines, "}", _SCRIPT.read_text(encoding="utf-8")])
