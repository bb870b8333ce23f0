"""What an operator does to a running engine: puts it to sleep, wakes it, gives it other weights."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from services.common.errors import MeshError, Reason
from services.inference.gate import Gate, State
from services.inference.generations import Generations

__all__ = ["Lifecycle"]

_RETRY_SECONDS: Final = 1.0


class Lifecycle:
    """One such thing at a time; while it lasts, the worker takes no generations, and says why."""

    def __init__(self, gate: Gate, generations: Generations, *, drain_seconds: float) -> None:
        """Running generations may go on for `drain_seconds` before new weights replace those that they use."""
        self._gate = gate
        self._generations = generations
        self._drain_seconds = drain_seconds
        self._busy = False
        self._asleep = False

    async def sleep(self, level: int) -> None:
        """Gives the GPU's memory back until wake().

        Raises:
            MeshError: FAILED_PRECONDITION, generations run, or the engine can't; INVALID_REQUEST, no such level.
        """
        if level not in (0, 1, 2):
            raise MeshError(Reason.INVALID_REQUEST, f"level: {level} is not 1 or 2", field="level")
        async with self._alone():
            if self._asleep:
                return
            if not self._generations.is_idle:
                raise MeshError(Reason.FAILED_PRECONDITION, "generations run; drain the worker first")
            self._gate.hold(State.ASLEEP, "the worker falls asleep")
            try:
                await self._gate.engine.sleep(level or 1)
            except Exception:
                self._gate.release()
                raise
            except BaseException:
                # Whoever asked is gone, but the engine may go on falling asleep: wake() brings it back in any case.
                self._fallen_asleep()
                raise
            self._fallen_asleep()

    async def wake(self) -> None:
        """Takes the GPU's memory again and serves; nothing happens when the worker is awake."""
        async with self._alone():
            if self._asleep:
                await self._gate.engine.wake()
                self._asleep = False
                self._gate.release()

    async def reload(self, path: str) -> None:
        """Replaces the weights; what runs is finished first, and what doesn't finish in time goes on elsewhere.

        Raises:
            MeshError: FAILED_PRECONDITION, the worker is asleep or the checkpoint can't be used.
        """
        async with self._alone():
            if self._asleep:
                raise MeshError(Reason.FAILED_PRECONDITION, "the worker is asleep")
            with self._gate.holding(State.DRAINING, "the weights are being replaced"):
                await self._generations.finish(
                    self._drain_seconds,
                    MeshError(
                        Reason.NO_READY_WORKER, "the weights are being replaced", retry_after_seconds=_RETRY_SECONDS
                    ),
                )
                await self._gate.engine.reload_weights(path)

    def _fallen_asleep(self) -> None:
        self._asleep = True
        self._gate.hold(State.ASLEEP, "the worker is asleep")

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        if self._busy:
            raise MeshError(Reason.FAILED_PRECONDITION, "the worker is being put to sleep, woken or reloaded already")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
