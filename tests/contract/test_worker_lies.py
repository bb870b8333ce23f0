"""Workers that lie or can't make up their mind, over real registrations: the others' shares stay fair.

How single figures that can't be true are taken: tests/unit/test_fleet.py and tests/contract/test_router_register.py.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from tokenloom.router.v1 import router_pb2

from tests.support.router import GatewaySession, WorkerLink, duration, gateway_session, running_router, worker_link

REQUESTS = 150
HELD_SECONDS = 0.1
FAIR = REQUESTS / 3
Odd = Callable[[WorkerLink], Coroutine[Any, Any, None]]
NAMES = ("odd", "steady-0", "steady-1")


async def _steady(link: WorkerLink) -> None:
    while True:
        await link.report(prefill_tokens_per_second=20_000, decode_step_duration=duration(0.01))
        await asyncio.sleep(0.1)


async def _flapping(link: WorkerLink) -> None:
    while True:
        for state in (router_pb2.WORKER_STATE_UNAVAILABLE, router_pb2.WORKER_STATE_READY):
            await link.report(state=state, prefill_tokens_per_second=20_000, decode_step_duration=duration(0.01))
            await asyncio.sleep(0.05)


async def _boasting(link: WorkerLink) -> None:
    """It says that it is infinitely fast and idle, whatever it has."""
    while True:
        await link.report(prefill_tokens_per_second=1e30, decode_step_duration=duration(1e-9))
        await asyncio.sleep(0.1)


async def _complaining(link: WorkerLink) -> None:
    """It says that it has an endless queue."""
    while True:
        await link.report(
            running_count=2**32 - 1,
            waiting_count=2**32 - 1,
            pending_prefill_token_count=2**63,
            kv_usage_ratio=float("inf"),
            prefill_tokens_per_second=float("nan"),
            decode_step_duration=duration(-3600),
        )
        await asyncio.sleep(0.1)


@asynccontextmanager
async def _fleet(odd: Odd) -> AsyncIterator[GatewaySession]:
    """Three workers of which one is odd, and a gateway."""
    async with AsyncExitStack() as stack:
        router, to_router = await stack.enter_async_context(running_router())
        reports = []
        for number, name in enumerate(NAMES):
            endpoint = f"127.0.0.1:{5001 + number}"
            link = await stack.enter_async_context(
                worker_link(router, to_router, name, endpoint=endpoint, max_running=64)
            )
            reports.append(asyncio.create_task((odd if name == "odd" else _steady)(link)))
        await asyncio.sleep(0.2)
        gateway = await stack.enter_async_context(gateway_session(to_router))
        try:
            yield gateway
        finally:
            for report in reports:
                report.cancel()
            await asyncio.wait(reports)


async def _shares(gateway: GatewaySession) -> Counter[str]:
    """Who got how many of requests that each take the same everywhere."""

    # gRPC takes one write of a stream at a time.
    writing = asyncio.Lock()

    async def one(number: int) -> str:
        await asyncio.sleep(number * 0.01)
        async with writing:
            (handle,) = await gateway.acquire(prompt_token_count=100, max_output_token_count=8)
        async with asyncio.timeout(5):
            while handle not in gateway.grants:
                await asyncio.sleep(0.002)
        await asyncio.sleep(HELD_SECONDS)
        async with writing:
            await gateway.release(handle, tokens=8)
        return gateway.grants[handle].worker_id

    return Counter(await asyncio.gather(*map(one, range(REQUESTS))))


@pytest.mark.parametrize("odd", [_flapping, _boasting, _complaining])
async def test_nobody_gets_much_more_than_a_fair_share(odd: Odd) -> None:
    # 100
    async with _fleet(odd) as gateway:
        shares = await _shares(gateway)
    assert shares.total() == REQUESTS
    assert all(shares[name] <= 1.5 * FAIR for name in NAMES), shares
