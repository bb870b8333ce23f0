"""A gateway with a real router and real simulated workers behind it, without the edge, in one process."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from services.common.keystore import KeyStore
from services.common.settings import RouterSettings
from services.common.settings_gateway import GatewaySettings
from services.common.settings_worker import ModelSettings, SimSettings, WorkerSettings
from services.gateway.__main__ import main as gateway_main
from services.inference.worker import Worker
from services.router.__main__ import main as router_main
from tests.support.ports import free_port

__all__ = ["Lane", "openai_lane"]


class Lane:
    """What runs, and how to reach it."""

    def __init__(
        self, base_url: str, *, metrics_url: str, key: str, keys: str, workers: Sequence[asyncio.Event]
    ) -> None:
        self.base_url = base_url
        self.metrics_url = metrics_url
        """Of the gateway."""
        self.key = key
        self.keys = keys
        """The database of keys and usage: a file, or a URL."""
        self._workers = workers

    def stop_worker(self, index: int) -> None:
        """Asks a worker to stop, as SIGTERM does; it drains for a tenth of a second."""
        self._workers[index].set()

    async def make_key(self, name: str, **options: Any) -> str:
        """A new key, once it works."""
        with KeyStore(self.keys) as store:
            _, key = store.create(name, **options)
        async with asyncio.timeout(1), httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}) as client:
            while (await client.get(f"{self.base_url}/v1/models")).status_code == 401:
                await asyncio.sleep(0.01)
        return key

    def new_key(self, tenant: str) -> str:
        """A key of somebody else."""
        with KeyStore(self.keys) as store:
            _, key = store.create(tenant)
        return key

    @property
    def headers(self) -> dict[str, str]:
        """Headers with a key that may do anything."""
        return {"authorization": f"Bearer {self.key}"}


@asynccontextmanager
async def openai_lane(
    folder: Path, sim: SimSettings, *, workers: int = 1, database: str | None = None, **settings: Any
) -> AsyncIterator[Lane]:
    """Runs them until the block is left, each as its own `main` with its own stop event.

    `database`: where keys and usage are; None: a file. `settings` are further ones of the gateway.
    """
    router_address, http = _address(), _address()
    keys = database or str(folder / "keys.db")
    with KeyStore(keys) as store:
        _, key = store.create("test", admin=True, debug=True)
    async with AsyncExitStack() as stack:
        router = RouterSettings(name="router", listen=router_address, metrics=_address())
        await stack.enter_async_context(_process(lambda stop: router_main(router, stop)))
        stops = []
        for index in range(workers):
            address = _address()
            worker = WorkerSettings(
                name=f"worker-{index}",
                listen=address,
                advertise=address,
                metrics=_address(),
                routers=[router_address],
                model=ModelSettings(name="sim"),
                engine="sim",
                sim=sim,
                drain_seconds=0.1,
            )
            stops.append(await stack.enter_async_context(_process(Worker(worker).run)))
        gateway = GatewaySettings(
            name="gateway",
            listen=_address(),
            metrics=_address(),
            http=http,
            routers=[router_address],
            database=keys,
            max_body_bytes=1 << 20,
            drain_seconds=1,
            **settings,
        )
        await stack.enter_async_context(_process(lambda stop: gateway_main(gateway, stop)))
        lane = Lane(f"http://{http}", metrics_url=f"http://{gateway.metrics}", key=key, keys=keys, workers=stops)
        async with asyncio.timeout(30), httpx.AsyncClient() as client:
            while not await _lists_a_model(client, lane):
                await asyncio.sleep(0.02)
        yield lane


@asynccontextmanager
async def _process(main: Callable[[asyncio.Event], Coroutine[None, None, int]]) -> AsyncIterator[asyncio.Event]:
    stop = asyncio.Event()
    task = asyncio.create_task(main(stop))
    try:
        yield stop
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)


async def _lists_a_model(client: httpx.AsyncClient, lane: Lane) -> bool:
    try:
        answer = await client.get(f"{lane.base_url}/v1/models", headers=lane.headers)
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and bool(answer.json()["data"])


def _address() -> str:
    return f"127.0.0.1:{free_port()}"
