"""Several parts of one request at the same time."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from services.common.errors import MeshError

__all__ = ["together"]

T = TypeVar("T")


async def together(parts: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What each gives; the first that fails stops the others and is what failed."""
    if len(parts) == 1:
        return [await parts[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in parts]
    except* MeshError as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
