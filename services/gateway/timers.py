"""Timers of a few different lengths, nearly all of which are stopped before they go off."""

import asyncio
import itertools
from collections.abc import Callable
from functools import partial

__all__ = ["Timers"]


class _Queue:
    """Those of one length: the oldest is due first, so one of the event loop's is enough for all."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[float, Callable[[], None]]] = {}
        self._is_set = False

    def add(self, call: Callable[[], None]) -> Callable[[], object]:
        number, at = next(self._numbers), self._loop.time() + self._seconds
        self._waiting[number] = (at, call)
        if not self._is_set:
            self._is_set = True
            self._loop.call_at(at, self._look)
        return partial(self._waiting.pop, number, None)

    def _look(self) -> None:
        now = self._loop.time()
        while self._waiting:
            number = next(iter(self._waiting))
            at, call = self._waiting[number]
            if at > now:
                self._loop.call_at(at, self._look)
                return
            del self._waiting[number]
            self._loop.call_soon(call)
        self._is_set = False


class Timers:
    """Sets timers at a tenth of what the event loop takes for each of its own. For one event loop."""

    def __init__(self) -> None:
        self._queues: dict[float, _Queue] = {}

    def after(self, seconds: float, call: Callable[[], None]) -> Callable[[], object]:
        """Calls back after so long, which should be one of few lengths, unless what this returns is called before."""
        queue = self._queues.get(seconds)
        if queue is None:
            queue = self._queues[seconds] = _Queue(seconds)
        return queue.add(call)
