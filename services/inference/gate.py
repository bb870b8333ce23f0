"""Whether a worker takes work: its engine, and the reasons to keep requests away from it."""

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


class Gate:
    """The way to a worker's engine."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._drained = False
        self._stopping = False

    @property
    def state(self) -> State:
        """Whether the worker takes work, this moment."""
        if self._engine is None:
            return State.STARTING
        if not self._engine.load.alive:
            return State.UNAVAILABLE
        return State.DRAINING if self._drained or self._stopping else State.READY

    @property
    def engine(self) -> Engine:
        """The engine, for what is no generation; raises MeshError (NO_READY_WORKER) until it has started."""
        if self._engine is None:
            raise _not_ready("the model is still being loaded")
        return self._engine

    def admit(self) -> Engine:
        """The engine, for a generation; raises MeshError (NO_READY_WORKER) when none is taken."""
        if self._drained or self._stopping:
            raise _not_ready("this worker takes no new requests")
        engine = self.engine
        if not engine.load.alive:
            raise _not_ready("the engine starts again")
        return engine

    def open(self, engine: Engine) -> None:
        """The engine is up."""
        self._engine = engine

    def close(self) -> None:
        """The engine is gone."""
        self._engine = None

    def drain(self) -> None:
        """Takes nothing new, until undrain()."""
        self._drained = True

    def undrain(self) -> None:
        """Takes work again, unless the worker is stopping."""
        self._drained = False

    def stop(self) -> None:
        """Takes nothing new, ever."""
        self._stopping = True


def _not_ready(message: str) -> MeshError:
    return MeshError(Reason.NO_READY_WORKER, message, retry_after_seconds=_RETRY_SECONDS)
