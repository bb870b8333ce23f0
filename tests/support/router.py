"""A real router in process, and the far ends of its streams: a worker's registration and a gateway's session."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from opentelemetry.trace import Tracer
from tokenloom.inference.v1 import inference_pb2
from tokenloom.router.v1 import router_pb2, router_pb2_grpc

from services.common.rpc import channel
from services.common.settings import RouterSettings
from services.router.app import RunningRouter, running
from services.router.fleet import Fleet
from tests.support.waiting import eventually

__all__ = [
    "GatewaySession",
    "WorkerLink",
    "assert_stuck_alone",
    "duration",
    "gateway_session",
    "running_router",
    "tracer_to",
    "worker_link",
]


@asynccontextmanager
async def running_router(
    *, tracer: Tracer | None = None, **settings: Any
) -> AsyncIterator[tuple[RunningRouter, grpc.aio.Channel]]:
    """A router on free ports, and a channel to it."""
    chosen = {"name": "router-0", "listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", **settings}
    async with (
        running(RouterSettings(**chosen), tracer=tracer) as router,
        channel(f"127.0.0.1:{router.port}") as to_router,
    ):
        yield router, to_router


def tracer_to(exporter: SpanExporter) -> Tracer:
    """A tracer whose spans arrive at `exporter` at once."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider.get_tracer("tests")


def duration(seconds: float) -> Duration:
    """Seconds as a proto."""
    whole = math.floor(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


class WorkerLink:
    """A worker's end of Register. What the router tells it is in `commands`."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.commands: list[str] = []

    async def report(self, **load: Any) -> None:
        """Reports load; ready unless said otherwise."""
        message = router_pb2.LoadReport(**{"state": router_pb2.WORKER_STATE_READY, **load})
        await self._call.write(router_pb2.RegisterRequest(load=message))

    async def send(self, message: router_pb2.RegisterRequest) -> None:
        """Sends whatever it is."""
        await self._call.write(message)

    async def code(self) -> grpc.StatusCode:
        """How the stream ended."""
        return grpc.StatusCode(await self._call.code())

    async def listen(self) -> None:
        """Notes what the router says, until the stream ends."""
        async for message in self._call:
            self.commands.append(message.WhichOneof("message"))

    def lose(self) -> None:
        """The stream breaks, as it does when the process is killed."""
        self._call.cancel()


@asynccontextmanager
async def worker_link(
    router: RunningRouter,
    to_router: grpc.aio.Channel,
    worker_id: str = "worker-0",
    *,
    endpoint: str = "127.0.0.1:5001",
    models: tuple[str, ...] = ("demo",),
    max_running: int = 8,
    context: int = 4096,
    block_tokens: int = 0,
    pool: str = "default",
    gpu_uuids: tuple[str, ...] = (),
    report: bool = True,
) -> AsyncIterator[WorkerLink]:
    """Registers a worker, and has it report that it is ready."""
    call: Any = router_pb2_grpc.RouterServiceStub(to_router).Register()
    link = WorkerLink(call)
    before = router.fleet.get(worker_id)
    registration = router_pb2.Registration(
        worker_id=worker_id,
        endpoint=endpoint,
        models=[inference_pb2.ModelCard(name=name, max_context_token_count=context) for name in models],
        engine="sim",
        pool=pool,
        gpu_uuids=gpu_uuids,
        max_running_count=max_running,
        kv_cache_token_count=65_536,
        kv_block_token_count=block_tokens,
    )
    await call.write(router_pb2.RegisterRequest(registration=registration))
    listening = asyncio.create_task(link.listen())
    try:
        await eventually(lambda: router.fleet.get(worker_id) not in (before, None), within=2)
        if report:
            await link.report()
            await eventually(lambda: _is_reported(router, worker_id), within=2)
        yield link
    finally:
        call.cancel()
        await asyncio.wait([listening])


def _is_reported(router: RunningRouter, worker_id: str) -> bool:
    worker = router.fleet.get(worker_id)
    return worker is not None and worker.load.said is not None


async def assert_stuck_alone(fleet: Fleet, patient: "GatewaySession", stuck: "GatewaySession") -> None:
    """Of two gateways of a router that lets 20 answers be unread, the one that does not read is given up alone."""
    await patient.granted()
    # All answers to one message are there before the first of them can be sent.
    await stuck.acquire(count=30)
    assert await stuck.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await eventually(lambda: len(fleet.workers[0].leases) == 1, within=1)
    await patient.granted()


class GatewaySession:
    """A gateway's end of Session. What it is answered is in `grants`, `queued` and `rejections`, by handle."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._handle = 0
        self.grants: dict[int, router_pb2.Grant] = {}
        self.queued: dict[int, router_pb2.Queued] = {}
        self.rejections: dict[int, router_pb2.Rejection] = {}

    async def acquire(self, count: int = 1, **acquire: Any) -> list[int]:
        """Asks for workers, in one message; gives the handles."""
        handles = list(range(self._handle + 1, self._handle + count + 1))
        self._handle += count
        messages = [router_pb2.Acquire(**{"model": "demo", "handle": handle, **acquire}) for handle in handles]
        await self._call.write(router_pb2.SessionRequest(acquires=messages))
        return handles

    async def granted(self, **acquire: Any) -> router_pb2.Grant:
        """Asks for a worker, and waits for the grant."""
        (handle,) = await self.acquire(**acquire)
        await eventually(lambda: handle in self.grants, within=2)
        return self.grants[handle]

    async def rejected(self, **acquire: Any) -> router_pb2.Rejection:
        """Asks for a worker, and waits for the rejection."""
        (handle,) = await self.acquire(**acquire)
        await eventually(lambda: handle in self.rejections, within=5)
        return self.rejections[handle]

    async def release(self, *handles: int, outcome: Any = router_pb2.OUTCOME_COMPLETED, tokens: int = 1) -> None:
        """Ends leases, or gives up waiting."""
        releases = [router_pb2.Release(handle=h, outcome=outcome, output_token_count=tokens) for h in handles]
        await self._call.write(router_pb2.SessionRequest(releases=releases))

    async def listen(self) -> None:
        """Notes what the router answers, until the stream ends."""
        async for message in self._call:
            self.grants.update({grant.handle: grant for grant in message.grants})
            self.queued.update({queued.handle: queued for queued in message.queued})
            self.rejections.update({rejection.handle: rejection for rejection in message.rejections})

    def lose(self) -> None:
        """The stream breaks, as it does when the process is killed."""
        self._call.cancel()

    async def code(self) -> grpc.StatusCode:
        """How the stream ended."""
        return grpc.StatusCode(await self._call.code())


@asynccontextmanager
async def gateway_session(to_router: grpc.aio.Channel) -> AsyncIterator[GatewaySession]:
    """A gateway's session, open while the block runs."""
    call: Any = router_pb2_grpc.RouterServiceStub(to_router).Session()
    session = GatewaySession(call)
    listening = asyncio.create_task(session.listen())
    try:
        yield session
    finally:
        call.cancel()
        await asyncio.wait([listening])
