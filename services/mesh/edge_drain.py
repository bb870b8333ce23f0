"""Lets the edge finish what it has and take nothing new."""

import asyncio
import re
import urllib.request
from typing import Final

__all__ = ["drain_edge"]

_ACTIVE: Final = re.compile(rb"http\.edge\.downstream_rq_active: (\d+)")
_POLL_SECONDS: Final = 0.05
_TIMEOUT_SECONDS: Final = 2.0


async def drain_edge(admin: str, *, within: float) -> int:
    """Closes the edge's listener and waits, `within` seconds at most, until no request is left.

    `admin` is the URL of Envoy's admin interface. Returns how many requests are left; 0 also when Envoy is gone.
    """
    try:
        await asyncio.to_thread(_call, f"{admin}/drain_listeners", "POST")
        return await _wait_until_idle(admin, within)
    except OSError:
        return 0


async def _wait_until_idle(admin: str, within: float) -> int:
    active = await _count_active(admin)
    try:
        async with asyncio.timeout(within):
            while active:
                await asyncio.sleep(_POLL_SECONDS)
                active = await _count_active(admin)
    except TimeoutError:
        pass
    return active


async def _count_active(admin: str) -> int:
    stats = await asyncio.to_thread(_call, f"{admin}/stats?filter=^http.edge.downstream_rq_active$", "GET")
    found = _ACTIVE.search(stats)
    return int(found[1]) if found else 0


def _call(url: str, method: str) -> bytes:
    request = urllib.request.Request(url, method=method)  # noqa: S310  # Envoy's admin interface
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310  # as above
        body: bytes = answer.read()
    return body
