"""The scheduling class of a request: lower goes first. A client may put its own behind its key's, never before it."""

from typing import Final

from services.common.errors import MeshError, Reason

__all__ = ["PRIORITY_HEADER", "priority_of"]

PRIORITY_HEADER: Final = "x-priority"
"""The header, or gRPC metadata, in which a client says which class it wants."""
_FURTHEST: Final = 1000


def priority_of(asked: str | None, highest: int) -> int:
    """The class that a client asks for, but never one above its key's, which is `highest`.

    Raises:
        MeshError: INVALID_REQUEST, it is no whole number from -1000 to 1000.
    """
    if asked is None:
        return highest
    try:
        wanted = int(asked)
    except ValueError:
        wanted = None
    if wanted is None or abs(wanted) > _FURTHEST:
        bound = f"expected a whole number from -{_FURTHEST} to {_FURTHEST}"
        raise MeshError(Reason.INVALID_REQUEST, f"{PRIORITY_HEADER}: {bound}", field=PRIORITY_HEADER)
    return max(highest, wanted)
