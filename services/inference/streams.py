"""The generations that an engine has, each with the task that runs it."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from services.common.errors import MeshError, Reason
from services.inference.request import Generation

__all__ = ["Streams"]


class _Stream(Protocol):
    generation: Generation
    task: asyncio.Task[None] | None
    accepted: asyncio.Future[None]
    """Done when the engine has taken it; fails when it doesn't."""

    @property
    def sequences(self) -> int: ...

    def accept(self) -> None: ...

    def close(self) -> None: ...

    def fail(self, error: MeshError) -> None: ...


S = TypeVar("S", bound=_Stream)


class Streams(Generic[S]):
    """Streams by the ids of their generations. Iterating goes over those of now, whoever leaves meanwhile."""

    def __init__(self) -> None:
        self._by_id: dict[str, S] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[S]:
        return iter(list(self._by_id.values()))

    @property
    def sequences(self) -> int:
        """How many sequences they are in the engine."""
        return sum(stream.sequences for stream in self._by_id.values())

    def check_new(self, generation: Generation) -> None:
        """Raises MeshError (INTERNAL) when there is one of the same id."""
        if generation.id in self._by_id:
            raise MeshError(Reason.INTERNAL, "two generations have the same id")

    def add(self, stream: S) -> None:
        """It counts as load, and can be aborted, from here on."""
        self._by_id[stream.generation.id] = stream

    def remove(self, stream: S) -> bool:
        """Lets go of one that is over; False, and nothing happens, where that was done before."""
        if self._by_id.get(stream.generation.id) is not stream:
            return False
        del self._by_id[stream.generation.id]
        return True

    async def accepted(self, stream: S, task: asyncio.Task[None], leave: Callable[[S], None]) -> None:
        """Returns when the engine has accepted a stream, which `task` runs; `leave` is called once that is over.

        Raises:
            MeshError: the engine doesn't.
        """
        stream.task = task
        # A task that is cancelled before its first turn does nothing at all.
        task.add_done_callback(lambda _: leave(stream))
        try:
            await stream.accepted
        except asyncio.CancelledError:
            stream.close()
            raise

    def abort(self, generation_id: str) -> None:
        """Stops a generation; its sink hears nothing more. Unknown ids are ignored."""
        if (stream := self._by_id.get(generation_id)) is not None:
            stream.close()

    def fail_all(self, error: MeshError) -> None:
        """Stops all of them, and says why."""
        for stream in self:
            stream.fail(error)
            stream.close()
