"""Reading a stream while it is written to."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

__all__ = ["reading"]

T = TypeVar("T")


@asynccontextmanager
async def reading(
    stream: AsyncIterator[T], take: Callable[[T], None], *, ended: Callable[[], None]
) -> AsyncIterator["asyncio.Task[None]"]:
    """Passes what comes to `take` beside the block, calls `ended` once no more comes, and is over with the block.

    The task that it yields has failed if `take` or the stream did. A task group would not do: the block is part of an
    async generator, which may be closed by another task than the one that entered it.
    """

    async def read() -> None:
        try:
            async for item in stream:
                take(item)
        finally:
            ended()

    task = asyncio.create_task(read())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])
