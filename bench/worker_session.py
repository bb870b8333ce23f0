"""What one worker process costs: CPU a streamed token when paced, and tokens a second when it runs as fast as it can.

    python bench/worker_session.py [--seconds 8] [--streams 64]

One session, as a gateway holds it, over a worker with the simulated engine. CPU is user plus system of the worker's
process, read from the operating system.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import worker_pb2, worker_pb2_grpc

from services.common import rpc
from services.common.settings_worker import SimSettings
from tests.support.workers import worker_config, worker_process

_STEP_MS = 10.0
_PACED = SimSettings(
    decode_step_ms=_STEP_MS, decode_step_ms_per_sequence=0, prefill_tokens_per_second=1e6, kv_blocks=100_000
)
_UNPACED = SimSettings(
    decode_step_ms=0.001,
    decode_step_ms_per_sequence=0,
    prefill_tokens_per_second=1e9,
    max_num_seqs=1024,
    max_model_len=1_000_000,
    kv_blocks=4_000_000,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a run of one worker gave."""

    tokens: int
    messages: int
    seconds: float
    cpu_seconds: float

    def __str__(self) -> str:
        cpu = self.cpu_seconds / self.tokens * 1e6
        return (
            f"{self.tokens / self.seconds:>9,.0f} tokens/s  {cpu:5.2f} µs CPU a token  "
            f"{self.messages / self.seconds:>6,.0f} messages/s  {self.tokens / self.messages:6.1f} tokens a message"
        )


async def measure(sim: SimSettings, *, streams: int, seconds: float) -> Figures:
    """Streams for some seconds, after a second to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        async with (
            worker_process(worker_config(sim=sim), Path(folder)) as worker,
            rpc.channel(worker.address) as channel,
        ):
            call = worker_pb2_grpc.WorkerServiceStub(channel).Session()
            await call.write(worker_pb2.SessionRequest(submissions=map(_submission, range(1, streams + 1))))
            process = psutil.Process(worker.process.pid)
            await _read(call, seconds=1.0)
            cpu, begun = process.cpu_times(), time.monotonic()
            tokens, messages = await _read(call, seconds=seconds)
            spent, took = process.cpu_times(), time.monotonic() - begun
            call.cancel()
    cpu_seconds = spent.user + spent.system - cpu.user - cpu.system
    return Figures(tokens=tokens, messages=messages, seconds=took, cpu_seconds=cpu_seconds)


async def _read(call: Any, *, seconds: float) -> tuple[int, int]:
    tokens = messages = 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        message = await call.read()
        assert not message.ends, message.ends[:1]
        tokens += len(message.token_ids)
        messages += 1
    return tokens, messages


def _submission(handle: int) -> worker_pb2.Submission:
    sampling = pb.SamplingParameters(temperature=0, ignore_eos=True)
    request = pb.GenerateRequest(model="sim", text=f"the prompt of stream {handle}", sampling=sampling)
    return worker_pb2.Submission(handle=handle, request_id=f"bench-{handle}", request=request)


async def main() -> None:
    """Prints both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="how long each part lasts")
    parser.add_argument("--streams", type=int, default=64)
    options = parser.parse_args()
    paced = await measure(_PACED, streams=options.streams, seconds=options.seconds)
    print(f"paced, {options.streams} streams x {1000 / _STEP_MS:g} tokens/s: {paced}")
    unpaced = await measure(_UNPACED, streams=options.streams, seconds=options.seconds)
    print(f"unpaced, {options.streams} streams:            {unpaced}")


if __name__ == "__main__":
    uvloop.run(main())
