"""Whether a worker takes work: its engine, and the reasons to keep requests away from it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum

from services.common.errors import MeshError, Reason
from services.inference.engine import Engine

__all__ = ["Gate", "State"]

_RETRY_SECONDS = 1.0


class State(Enum):
    """Whether a worker takes work."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    UNAVAILABLE = "unavailable"
    ASLEEP = "asleep"


class Gate:
    """The way to a worker's engine."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._drained = False
        self._stopping = False
        self._held: tuple[State, str] | None = None
        self._resting: set[asyncio.Future[None]] = set()

    @property
    def state(self) -> State:
        """Whether the worker takes work, this moment."""
        return self._condition()[0]

    @property
    def reason(self) -> str:
        """Why it takes none, in words; empty when it does."""
        return self._condition()[1]

    def _condition(self) -> tuple[State, str]:
        if self._engine is None:
            return State.STARTING, "the model is still being loaded"
        trouble = self._engine.load.trouble
        if trouble:
            return State.UNAVAILABLE, trouble
        if self._held is not None:
            return self._held
        if self._drained or self._stopping:
            return State.DRAINING, "the worker is stopping" if self._stopping else "the worker is drained"
        return State.READY, ""

    @property
    def engine(self) -> Engine:
        """The engine, for what is no generation; raises MeshError (NO_READY_WORKER) until it has started."""
        if self._engine is None:
            raise _not_ready("the model is still being loaded")
        return self._engine

    def admit(self) -> Engine:
        """The engine, for a generation; raises MeshError (NO_READY_WORKER) when none is taken."""
        self._stir()
        if self._stopping:
            raise _not_ready("the worker is stopping")
        state, reason = self._condition()
        if state is not State.READY:
            raise _not_ready(reason)
        return self.engine

    async def stirred(self, within: float) -> bool:
        """Waits until something is admitted or the gate is moved; False after `within` seconds without either.

        What befalls the engine itself is not told.
        """
        waiter = asyncio.get_running_loop().create_future()
        self._resting.add(waiter)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(within):
                    await waiter
            return waiter.done() and not waiter.cancelled()
        finally:
            self._resting.discard(waiter)

    def _stir(self) -> None:
        for waiter in self._resting:
            if not waiter.done():
                waiter.set_result(None)

    def open(self, engine: Engine) -> None:
        """The engine is up."""
        self._engine = engine
        self._stir()

    def close(self) -> None:
        """The engine is gone."""
        self._engine = None

    def hold(self, state: State, reason: str) -> None:
        """Takes nothing new for a reason of its own, until release()."""
        self._held = state, reason
        self._stir()

    def release(self) -> None:
        """Ends hold()."""
        self._held = None
        self._stir()

    @contextmanager
    def holding(self, state: State, reason: str) -> Iterator[None]:
        """Does both around a block."""
        self.hold(state, reason)
        try:
            yield
        finally:
            self.release()

    def drain(self) -> None:
        """Takes nothing new, until undrain()."""
        self._drained = True
        self._stir()

    def undrain(self) -> None:
        """Takes work again, unless the worker is stopping."""
        self._drained = False
        self._stir()

    def stop(self) -> None:
        """Takes nothing new, ever."""
        self._stopping = True
        self._stir()


def _not_ready(message: str) -> MeshError:
    return MeshError(Reason.NO_READY_WORKER, message, retry_after_seconds=_RETRY_SECONDS)
