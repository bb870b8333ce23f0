"""Simulated workers: in this process on a free port, or as the real process."""

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import msgspec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc, worker_pb2, worker_pb2_grpc

from services.common import rpc
from services.common.settings_worker import SimSettings
from services.inference.gate import Gate
from services.inference.generations import Generations
from services.inference.lifecycle import Lifecycle
from services.inference.metrics import WorkerMetrics
from services.inference.pooling_calls import PoolingCalls
from services.inference.registration import Registration, registration_to_proto
from services.inference.servicer import InferenceServicer, WorkerServicer, register
from services.inference.sim_engine import SimEngine
from services.inference.sim_pooling import SimPooler
from services.inference.spans import Spans
from tests.support.ports import free_port

__all__ = [
    "FAST",
    "SimWorker",
    "WorkerProcess",
    "WorkerSessionClient",
    "open_session",
    "registered",
    "sim_worker",
    "worker_config",
    "worker_process",
]

FAST = SimSettings(decode_step_ms=1.0, decode_step_ms_per_sequence=0.0, prefill_tokens_per_second=1_000_000.0)
"""An engine that hardly keeps a test waiting."""

_START_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimWorker:
    """A worker's services in this process, over a simulated engine."""

    address: str
    channel: grpc.aio.Channel
    engine: SimEngine | SimPooler
    gate: Gate
    generations: Generations
    pooling: PoolingCalls
    registry: CollectorRegistry
    server: rpc.Server

    @property
    def inference(self) -> "inference_pb2_grpc.InferenceServiceAsyncStub":
        """The typed lane's stub."""
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def worker(self) -> "worker_pb2_grpc.WorkerServiceAsyncStub":
        """The gateways' stub."""
        return worker_pb2_grpc.WorkerServiceStub(self.channel)

    @property
    def is_idle(self) -> bool:
        """Whether the engine has nothing to do and holds nothing."""
        load = self.engine.load
        return load.running == 0 and load.waiting == 0 and load.kv_usage == 0

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 while it isn't there."""
        return self.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def sim_worker(
    sim: SimSettings = FAST,
    *,
    model: str = "sim",
    max_queued: int = 64,
    tracer: Tracer | None = None,
    make_engine: Callable[[SimSettings, str, int], SimEngine | SimPooler] = SimEngine,
    isolates_tenants: bool = False,
) -> AsyncIterator[SimWorker]:
    """Serves a worker on a free port for as long as the block; it is not registered with any router."""
    gate, registry = Gate(), CollectorRegistry()
    spans, metrics = Spans(tracer, worker="sim-0"), WorkerMetrics(registry)
    generations = Generations(spans, metrics, isolates_tenants=isolates_tenants)
    inference = InferenceServicer(gate, generations)
    worker = WorkerServicer(gate, generations, Lifecycle(gate, generations, drain_seconds=1.0))
    async with (
        make_engine(sim, model, max_queued) as engine,
        rpc.serve("127.0.0.1:0", lambda server: register(server, inference, worker), grace_seconds=0) as server,
        rpc.channel(f"127.0.0.1:{server.port}") as channel,
    ):
        gate.open(engine)
        await server.set_serving(True)
        yield SimWorker(
            address=f"127.0.0.1:{server.port}",
            channel=channel,
            engine=engine,
            gate=gate,
            generations=generations,
            pooling=inference.pooling,
            registry=registry,
            server=server,
        )


@asynccontextmanager
async def registered(worker: SimWorker, *routers: str, worker_id: str = "sim-0") -> AsyncIterator[None]:
    """Keeps a worker registered with routers, which it reports to ten times a second."""
    who = registration_to_proto(
        worker.engine.card, worker_id=worker_id, endpoint=worker.address, pool="p", gpus=["GPU-1"]
    )
    keeping = asyncio.create_task(Registration(who, worker.gate, report_seconds=0.1).keep(routers))
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])


class WorkerSessionClient:
    """A gateway's end of a session; it collects what comes, by handle."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.started: dict[int, Any] = {}
        self.texts: dict[int, str] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.choice_token_counts: dict[int, Counter[int]] = {}
        self.choice_ends: dict[int, dict[int, pb.ChoiceEnded]] = {}
        self.ends: dict[int, worker_pb2.EndedGeneration] = {}
        self.messages = 0

    async def send(self, *submissions: worker_pb2.Submission, aborted: Sequence[int] = ()) -> None:
        """Sends one message."""
        await self.call.write(worker_pb2.SessionRequest(submissions=submissions, aborted_handles=aborted))

    async def read(self) -> bool:
        """Takes one message in; False when the session is over."""
        message = await self.call.read()
        if message is grpc.aio.EOF:
            return False
        self.apply(message)
        return True

    async def read_until_ended(self, *handles: int) -> None:
        """Takes messages in until all these generations are over."""
        while not self.ends.keys() >= set(handles):
            assert await self.read(), "the session ended before the generations did"

    def apply(self, message: worker_pb2.SessionResponse) -> None:
        """Takes a message in, in the order that the proto lays down, and checks that nothing follows an end."""
        self.messages += 1
        for start in message.starts:
            self._check_open(start.handle)
            self.started[start.handle] = start.started
        token_ids = iter(message.token_ids)
        for handle, text, count in zip(message.handles, message.texts, message.token_counts, strict=True):
            self._append(handle, text, [next(token_ids) for _ in range(count)])
        assert next(token_ids, None) is None
        for rich in message.deltas:
            assert rich.delta.choice_index not in self.choice_ends.get(rich.handle, {})
            counts = self.choice_token_counts.setdefault(rich.handle, Counter())
            counts[rich.delta.choice_index] += len(rich.delta.token_ids)
            self._append(rich.handle, rich.delta.text, rich.delta.token_ids)
            self.logprobs.setdefault(rich.handle, []).extend(rich.delta.logprobs)
        for ended in message.choice_ends:
            self._check_open(ended.handle)
            self.choice_ends.setdefault(ended.handle, {})[ended.ended.choice_index] = ended.ended
        for end in message.ends:
            self._check_open(end.handle)
            self.ends[end.handle] = end

    def _append(self, handle: int, text: str, token_ids: Sequence[int]) -> None:
        self._check_open(handle)
        assert handle in self.started, "a delta before the start"
        self.texts[handle] = self.texts.get(handle, "") + text
        self.token_ids.setdefault(handle, []).extend(token_ids)

    def _check_open(self, handle: int) -> None:
        assert handle not in self.ends, "something after the end"


@asynccontextmanager
async def open_session(channel: grpc.aio.Channel) -> AsyncIterator[WorkerSessionClient]:
    """A session with a worker; leaving the block breaks it off."""
    call = worker_pb2_grpc.WorkerServiceStub(channel).Session()
    try:
        yield WorkerSessionClient(call)
    finally:
        call.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProcess:
    """A real worker process."""

    process: asyncio.subprocess.Process
    address: str
    metrics: str
    log: Path

    async def health(self) -> str:
        """What it says of itself: "SERVING", "NOT_SERVING", or "UNREACHABLE"."""
        async with rpc.channel(self.address) as channel:
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
            except grpc.aio.AioRpcError:
                return "UNREACHABLE"
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    async def wait_for_health(self, wanted: str, *, within: float = _START_SECONDS) -> None:
        """Waits until it says so; raises TimeoutError."""
        async with asyncio.timeout(within):
            while await self.health() != wanted:
                assert self.process.returncode is None, self.log.read_text(encoding="utf-8")
                await asyncio.sleep(0.02)

    def terminate(self) -> None:
        """Asks it to drain and stop."""
        self.process.send_signal(signal.SIGTERM)

    async def exit_code(self, *, within: float) -> int:
        """Waits for its end; raises TimeoutError."""
        async with asyncio.timeout(within):
            return await self.process.wait()


def worker_config(name: str = "sim-0", *, sim: SimSettings = FAST, **settings: Any) -> dict[str, Any]:
    """The configuration of a simulated worker on free ports, with further settings on top."""
    address = f"127.0.0.1:{free_port()}"
    return {
        "name": name,
        "listen": address,
        "advertise": address,
        "metrics": f"127.0.0.1:{free_port()}",
        "routers": [],
        "model": {"name": "sim"},
        "engine": "sim",
        "sim": msgspec.to_builtins(sim),
        **settings,
    }


@asynccontextmanager
async def worker_process(config: dict[str, Any], folder: Path, *, within: float = 10) -> AsyncIterator[WorkerProcess]:
    """Runs `python -m services.inference` until the block is left, and yields once it serves."""
    path, log = folder / f"{config['name']}.json", folder / f"{config['name']}.log"
    path.write_text(json.dumps(config), encoding="utf-8")
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.inference",
            "--config",
            str(path),
            stdout=output,
            stderr=output,
            env=dict(os.environ),
        )
    worker = WorkerProcess(process=process, address=config["listen"], metrics=config["metrics"], log=log)
    try:
        await worker.wait_for_health("SERVING", within=within)
        yield worker
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
