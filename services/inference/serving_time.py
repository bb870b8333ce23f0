"""How long requests are served, and so when a queue that is full has room again."""

from typing import Final

from services.common.errors import MeshError, Reason
from services.inference.calibration import MovingMean

__all__ = ["ServingTime"]

# While nothing is known of it.
_FIRST_GUESS_SECONDS: Final = 1.0
_SHORTEST_WAIT_SECONDS: Final = 0.1
_LONGEST_WAIT_SECONDS: Final = 60.0


class ServingTime:
    """The time that requests took lately, from their submission to their end."""

    def __init__(self) -> None:
        self._seconds = MovingMean()

    def observe(self, seconds: float) -> None:
        """One more took so long."""
        self._seconds.observe(seconds)

    def queue_full(self, *, waiting: int, max_running: int) -> MeshError:
        """What a request is refused with that would wait behind `waiting` others; `max_running` run at a time."""
        turns = (waiting + 1) / max_running
        wait = turns * (self._seconds.value or _FIRST_GUESS_SECONDS)
        seconds = min(_LONGEST_WAIT_SECONDS, max(_SHORTEST_WAIT_SECONDS, wait))
        return MeshError(Reason.NO_CAPACITY, "the worker's queue is full", retry_after_seconds=seconds)
