"""Waiting for what becomes true, with a deadline."""

import asyncio
import time
from collections.abc import Callable

__all__ = ["eventually", "wait_until"]

_POLL_SECONDS = 0.01


async def eventually(check: Callable[[], bool], *, within: float) -> None:
    """Waits, on the event loop, until `check` is true; raises TimeoutError after `within` seconds."""
    deadline = time.monotonic() + within
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true within {within:g} s")
        await asyncio.sleep(_POLL_SECONDS)


def wait_until(check: Callable[[], bool], *, within: float) -> None:
    """Waits, blocking, until `check` is true; raises TimeoutError after `within` seconds."""
    deadline = time.monotonic() + within
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true within {within:g} s")
        time.sleep(_POLL_SECONDS)
