"""Which models a key may use, as the edge tells those who read a request's body; clients can't set these headers."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from services.common.errors import MeshError, Reason

__all__ = ["MODELS_HEADER", "UNROUTED_HEADER", "allows", "check_model", "check_unrouted"]

MODELS_HEADER: Final = "x-tokenloom-models"
"""A JSON list of names; missing where a key may use every model."""
UNROUTED_HEADER: Final = "x-tokenloom-unrouted"
"""There where no router could be asked, so that the worker is the first to read the body."""


def allows(allowed: str | None, model: str) -> bool:
    """Whether a model may be used where the header is `allowed`; None where it is missing."""
    return allowed is None or model in msgspec.json.decode(allowed, type=list[str])


def check_model(model: str | None, allowed: str | None) -> None:
    """Refuses a model that the header does not allow.

    Raises:
        MeshError: PERMISSION_DENIED.
    """
    if model is not None and not allows(allowed, model):
        raise MeshError(Reason.PERMISSION_DENIED, f"this key may not use the model {model!r}", field="model")


def check_unrouted(model: str, metadata: Mapping[str, Any]) -> None:
    """The same for a request that came past the routers; one that a router has seen is checked, and may name another.

    Raises:
        MeshError: PERMISSION_DENIED.
    """
    if UNROUTED_HEADER in metadata:
        allowed = metadata.get(MODELS_HEADER)
        check_model(model, None if allowed is None else str(allowed))
