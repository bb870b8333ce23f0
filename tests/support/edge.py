"""The real Envoy with the mesh's own configuration, and small far ends behind it."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import uvicorn
from envoy.service.accesslog.v3 import als_pb2_grpc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc
from tokenloom.inference.v1 import inference_pb2_grpc
from tokenloom.router.v1 import admin_pb2_grpc
from tokenloom.telemetry.v1 import telemetry_pb2_grpc

from services.common.rpc import serve
from services.mesh.envoy import Edge, bootstrap
from services.mesh.envoy_binary import find_envoy
from tests.support.edge_far_ends import (
    Accounting,
    Admin,
    FarEnds,
    Gateway,
    Lists,
    OtherModel,
    Picker,
    Telemetry,
    Worker,
)
from tests.support.ports import free_port
from tests.support.waiting import eventually

__all__ = ["RunningEdge", "running_edge"]


class _HttpServer(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to the test."""
        yield


@asynccontextmanager
async def _http(app: Any) -> AsyncIterator[int]:
    port = free_port()
    server = _HttpServer(uvicorn.Config(app, port=port, lifespan="off", log_config=None, access_log=False))
    serving = asyncio.create_task(server.serve())
    await eventually(lambda: server.started, within=5)
    try:
        yield port
    finally:
        server.should_exit = True
        await serving


@dataclass(frozen=True, kw_only=True)
class RunningEdge:
    """The edge, and what is behind it."""

    url: str
    target: str
    admin: str
    seen: FarEnds
    access_log: Path
    stop_gateway: Callable[[], Awaitable[None]]
    stop_router: Callable[[], Awaitable[None]]

    def log_lines(self) -> list[dict[str, Any]]:
        """The access log so far."""
        return [json.loads(line) for line in self.access_log.read_text().splitlines()]


@asynccontextmanager
async def _grpc(add: Any, servicer: Any, name: str) -> AsyncIterator[str]:
    def register(server: grpc.aio.Server) -> list[str]:
        add(servicer, server)
        return [name]

    async with serve("127.0.0.1:0", register, grace_seconds=0) as server:
        await server.set_serving(True)
        yield f"127.0.0.1:{server.port}"


def _add_gateway(accounting: Accounting, server: grpc.aio.Server) -> None:
    als_pb2_grpc.add_AccessLogServiceServicer_to_server(accounting, server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Lists(accounting.seen), server)


def _add_router(servicers: tuple[Picker, Admin], server: grpc.aio.Server) -> None:
    external_processor_pb2_grpc.add_ExternalProcessorServicer_to_server(servicers[0], server)
    admin_pb2_grpc.add_RouterAdminServiceServicer_to_server(servicers[1], server)


@asynccontextmanager
async def running_edge(folder: Path, *, fallback: bool = False, **changes: Any) -> AsyncIterator[RunningEdge]:
    """Runs Envoy and every far end until the block is left; `changes` replace addresses of the edge's configuration.

    `fallback`: whether the edge does without the router while that is away; a worker with another model is there then.
    """
    seen = FarEnds()
    async with AsyncExitStack() as stack:
        gateways = await stack.enter_async_context(AsyncExitStack())
        gateway = await gateways.enter_async_context(_http(Gateway(seen)))
        accounting = await stack.enter_async_context(_grpc(_add_gateway, Accounting(seen), "accounting"))
        router = await stack.enter_async_context(AsyncExitStack())
        seen.worker_endpoint = await stack.enter_async_context(
            _grpc(inference_pb2_grpc.add_InferenceServiceServicer_to_server, Worker(seen), "worker")
        )
        addresses: dict[str, Any] = {
            "listen": f"127.0.0.1:{free_port()}",
            "admin": f"127.0.0.1:{free_port()}",
            "gateway": f"127.0.0.1:{gateway}",
            "accounting": (("gateway", accounting),),
            "router": (
                routed := await router.enter_async_context(_grpc(_add_router, (Picker(seen), Admin()), "router"))
            ),
            "picker": routed,
            "telemetry": await stack.enter_async_context(
                _grpc(telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server, Telemetry(), "telemetry")
            ),
            "access_log": str(folder / "access.jsonl"),
            **changes,
        }
        if fallback:
            add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
            other = await stack.enter_async_context(_grpc(add, OtherModel(seen), "other"))
            addresses |= {"fallback": f"127.0.0.1:{free_port()}", "workers": (other, seen.worker_endpoint)}
        edge = Edge(gateways=(addresses.pop("gateway"),), **addresses)
        stack.enter_context(_envoy(edge, folder))
        await _ready(edge.admin, folder)
        yield RunningEdge(
            url=f"http://{edge.listen}",
            target=edge.listen,
            admin=f"http://{edge.admin}",
            seen=seen,
            access_log=Path(edge.access_log),
            stop_gateway=gateways.aclose,
            stop_router=router.aclose,
        )


@contextmanager
def _envoy(edge: Edge, folder: Path) -> Iterator[None]:
    config = folder / "envoy.json"
    config.write_text(json.dumps(bootstrap(edge)))
    command = [
        str(find_envoy()),
        "-c",
        str(config),
        "--concurrency",
        "1",
        "--disable-hot-restart",
        "--file-flush-interval-msec",
        "50",
    ]
    with (folder / "envoy.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)


async def _ready(admin: str, folder: Path) -> None:
    deadline = asyncio.get_running_loop().time() + 10
    async with httpx.AsyncClient() as client:
        while True:
            try:
                if (await client.get(f"http://{admin}/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError((folder / "envoy.log").read_text())
            await asyncio.sleep(0.01)
