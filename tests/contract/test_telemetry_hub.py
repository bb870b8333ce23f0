"""A hub that is given its agents by a name, as that of a headless Kubernetes service."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc.aio
import pytest
from tokenloom.telemetry.v1 import telemetry_pb2_grpc

from services.common.rpc import serve
from services.telemetry.gpu import Card
from services.telemetry.hub import Hub
from services.telemetry.roster import Roster
from services.telemetry.sampler import Sampler
from services.telemetry.servicer import TelemetryServicer
from tests.contract.test_telemetry_service import FULL, FarEnd
from tests.support.ports import free_port
from tests.support.waiting import eventually

NAME = "agents.example"


@asynccontextmanager
async def agent(host: str, port: int, node: str) -> AsyncIterator[None]:
    far_end = FarEnd(Card(index=0, uuid=f"GPU-{node}", name="NVIDIA L40", reading=FULL))
    sampler = Sampler(far_end.read, Roster(node), period_seconds=0.05, deadline_seconds=1)

    def register(server: grpc.aio.Server) -> Sequence[str]:
        telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server(TelemetryServicer(sampler), server)
        return ["tokenloom.telemetry.v1.TelemetryService"]

    running = asyncio.create_task(sampler.run())
    try:
        async with serve(f"{host}:{port}", register, grace_seconds=0):
            yield
    finally:
        running.cancel()
        await asyncio.wait({running})


@asynccontextmanager
async def hub_of(*agents: str) -> AsyncIterator[Hub]:
    hub = Hub(agents, kept_seconds=0.1)
    running = asyncio.create_task(hub.run())
    try:
        yield hub
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


def nodes(hub: Hub) -> dict[str, bool]:
    latest = hub.latest
    return {} if latest is None else {node.name: node.away for node in latest.nodes}


async def test_all_whom_a_name_stands_for_are_followed_as_they_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    port, known = free_port(), ["127.0.0.1"]

    def look_up(host: str, *_: Any, **__: Any) -> list[Any]:
        if host != NAME or not known:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("services.telemetry.hub._LOOK_UP_SECONDS", 0.1)
    async with agent("127.0.0.1", port, "one"), hub_of(f"{NAME}:{port}") as hub:
        await eventually(lambda: nodes(hub) == {"one": False}, within=5)
        async with agent("127.0.0.2", port, "two"):
            known.append("127.0.0.2")
            await eventually(lambda: nodes(hub) == {"one": False, "two": False}, within=5)
            known.remove("127.0.0.2")
            await asyncio.sleep(0.3)
            assert nodes(hub) == {"one": False, "two": False}
        await eventually(lambda: nodes(hub) == {"one": False}, within=5)
        assert hub.latest is not None
        assert [gpu.uuid for gpu in hub.latest.gpus] == ["GPU-one"]


async def test_a_name_that_nobody_knows_is_an_agent_that_is_away() -> None:
    async with hub_of("nobody.invalid:50051") as hub:
        await eventually(lambda: nodes(hub) == {"nobody.invalid:50051": True}, within=5)
        assert hub.agents == {"nobody.invalid:50051": False}
