"""A blocking function that may never return, and an event loop that must not care."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["SlowCall"]

T = TypeVar("T")


class SlowCall(Generic[T]):
    """Calls a function in a thread of its own, one call at a time, and waits only so long for it.

    A call that is overdue can't be stopped. It keeps its thread, no second one is started beside it, and what it
    returns in the end is dropped, since it is old. The thread doesn't keep the process from ending.
    """

    def __init__(self, function: Callable[[], T], *, name: str) -> None:
        """`name` is the thread's."""
        self._function = function
        self._name = name
        self._pending: asyncio.Future[T] | None = None

    async def result(self, timeout_seconds: float) -> T:
        """Calls the function once no earlier call is under way.

        Raises:
            TimeoutError: it hasn't returned, or an earlier call hasn't.
            Exception: whatever the function raises.
        """
        async with asyncio.timeout(timeout_seconds):
            if self._pending is not None:
                await asyncio.wait({self._pending})
            self._pending = self._start()
            await asyncio.wait({self._pending})
        finished, self._pending = self._pending, None
        return finished.result()

    def _start(self) -> "asyncio.Future[T]":
        future: Future[T] = Future()
        threading.Thread(target=self._run, args=(future,), name=self._name, daemon=True).start()
        return asyncio.wrap_future(future)

    def _run(self, future: "Future[T]") -> None:
        try:
            result = self._function()
        except BaseException as error:  # noqa: BLE001  # it is raised again where the result is waited for
            future.set_exception(error)
        else:
            future.set_result(result)
