"""The router with many workers and many live streams, in processes of their own: python -m bench.router_scale

A real router process; driver processes that keep the Register streams of simulated workers, each of which reports ten
times a second; and gateways' sessions in this process, which hold the leases. For each size: what it costs the router
to hear the reports, what memory a live stream takes, and, while streams begin and end, the CPU of a decision (an
acquire, its grant, a release) and the time until its answer is here.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.request import urlopen

import psutil
from tokenloom.inference.v1 import inference_pb2
from tokenloom.router.v1 import router_pb2, router_pb2_grpc

from bench.processes import cpu_seconds, program, service
from bench.routing.runs import percentile
from services.common.outbox import Outbox
from services.common.rpc import channel
from services.common.settings import RouterSettings
from tests.support.ports import free_port
from tests.support.waiting import eventually, wait_until

_MODEL: Final = "demo"
_REPORT_SECONDS: Final = 0.1
_SIZES: Final = ((16, 10_000), (64, 10_000), (256, 1_000), (256, 5_000), (256, 10_000))
_SLOTS: Final = 2_048
_DRIVERS: Final = 4
_SESSIONS: Final = 4
_TENANTS: Final = 50
_QUIET_SECONDS: Final = 4.0


class Row(NamedTuple):
    """What one size came to."""

    workers: int
    streams: int
    idle_share: float
    """Of one CPU, for the reports alone."""
    bytes_a_stream: float
    cpu_us: float
    p50_ms: float
    p99_ms: float


async def drive(address: str, first: int, count: int) -> None:
    """Registers workers and has them report until this process is killed."""
    async with channel(address) as to_router, asyncio.TaskGroup() as tasks:
        stub = router_pb2_grpc.RouterServiceStub(to_router)
        for number in range(first, first + count):
            tasks.create_task(_worker(stub, number, delay=_REPORT_SECONDS * (number - first) / count))


async def _worker(stub: Any, number: int, *, delay: float) -> None:
    await asyncio.sleep(delay)
    call = stub.Register(wait_for_ready=True)
    registration = router_pb2.Registration(
        worker_id=f"worker-{number}",
        endpoint=f"10.0.{number // 256}.{number % 256}:50061",
        models=[inference_pb2.ModelCard(name=_MODEL, max_context_token_count=8192)],
        engine="sim",
        pool="default",
        max_running_count=_SLOTS,
    )
    await call.write(router_pb2.RegisterRequest(registration=registration))
    load = router_pb2.LoadReport(state=router_pb2.WORKER_STATE_READY, prefill_tokens_per_second=50_000.0 + number)
    load.decode_step_duration.FromMilliseconds(20)
    report = router_pb2.RegisterRequest(load=load)
    due = time.monotonic()
    while True:
        await call.write(report)
        due += _REPORT_SECONDS
        await asyncio.sleep(max(0.0, due - time.monotonic()))


class Session:
    """A gateway's session: what it asked for, and when it was answered."""

    def __init__(self, number: int) -> None:
        self._outbox = Outbox(router_pb2.SessionRequest, max_edits=1_000_000)
        self._handles = itertools.count(1)
        self._number = number
        self._asked: dict[int, float] = {}
        self.waited: list[float] = []
        """Seconds until each grant."""
        self.live: deque[int] = deque()

    def acquire(self) -> None:
        """Asks for a worker."""
        handle = next(self._handles)
        self._asked[handle] = time.monotonic()
        self._outbox.edit().acquires.add(
            handle=handle,
            request_id=f"{self._number}-{handle}",
            model=_MODEL,
            prompt_token_count=20 + handle % 10,
            tenant_id=f"tenant-{handle % _TENANTS}",
        )

    def release(self) -> None:
        """Ends the oldest stream."""
        self._outbox.edit().releases.add(
            handle=self.live.popleft(), outcome=router_pb2.OUTCOME_COMPLETED, output_token_count=100
        )

    async def run(self, stub: Any) -> None:
        """Talks until cancelled."""
        async for message in stub.Session(self._outbox.messages(), wait_for_ready=True):
            now = time.monotonic()
            if message.rejections:
                raise AssertionError(message.rejections[0])
            for grant in message.grants:
                self.waited.append(now - self._asked.pop(grant.handle))
                self.live.append(grant.handle)


@asynccontextmanager
async def _sessions(address: str) -> AsyncIterator[list[Session]]:
    async with AsyncExitStack() as stack:
        sessions = [Session(number) for number in range(_SESSIONS)]
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        talks = []
        for session in sessions:
            stub = router_pb2_grpc.RouterServiceStub(await stack.enter_async_context(channel(address)))
            talks.append(tasks.create_task(session.run(stub)))
        try:
            yield sessions
        finally:
            for talk in talks:
                talk.cancel()


async def _until_live(sessions: Sequence[Session], count: int, *, within: float = 30.0) -> None:
    await eventually(lambda: sum(len(session.live) for session in sessions) >= count, within=within)


async def _fill(sessions: Sequence[Session], streams: int, rate: float) -> None:
    began = time.monotonic()
    for number in range(streams):
        sessions[number % len(sessions)].acquire()
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
    await _until_live(sessions, streams)


async def _churn(sessions: Sequence[Session], seconds: float, rate: float) -> int:
    began = time.monotonic()
    for number in range(int(seconds * rate)):
        session = sessions[number % len(sessions)]
        session.release()
        session.acquire()
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
    return int(seconds * rate)


async def measure(address: str, pid: int, size: tuple[int, int], *, seconds: float, rate: float) -> Row:
    """One size, on a router that knows its workers already."""
    workers, streams = size
    before = cpu_seconds(pid)
    await asyncio.sleep(_QUIET_SECONDS)
    idle = (cpu_seconds(pid) - before) / _QUIET_SECONDS
    async with _sessions(address) as sessions:
        # The latest decisions are kept however many are live, and so is what Python's allocator has got.
        await _fill(sessions, 500, rate)
        memory = psutil.Process(pid).memory_info().rss
        await _fill(sessions, streams, 4 * rate)
        grown = psutil.Process(pid).memory_info().rss - memory
        for session in sessions:
            session.waited.clear()
        before, began = cpu_seconds(pid), time.monotonic()
        decisions = await _churn(sessions, seconds, rate)
        spent = cpu_seconds(pid) - before - idle * (time.monotonic() - began)
        waited = [one for session in sessions for one in session.waited]
    return Row(
        workers,
        streams,
        idle,
        grown / (streams - 500),
        1e6 * spent / decisions,
        1000 * percentile(waited, 0.5),
        1000 * percentile(waited, 0.99),
    )


def _workers_of(metrics: str) -> float:
    try:
        with urlopen(f"http://{metrics}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return 0.0
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("tokenloom_router_workers{"))


def run_size(size: tuple[int, int], *, seconds: float, rate: float) -> Row:
    """Starts the router and the drivers, and measures."""
    address, metrics = (f"127.0.0.1:{free_port()}" for _ in range(2))
    settings = RouterSettings(name="router", listen=address, metrics=metrics)
    share = -(-size[0] // _DRIVERS)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        pid = stack.enter_context(service("services.router", settings, folder))
        for first in range(0, size[0], share):
            count = min(share, size[0] - first)
            command = [sys.executable, "-m", "bench.router_scale", "--drive", address, str(first), str(count)]
            stack.enter_context(program(command, folder / f"driver-{first}.log"))
        wait_until(lambda: _workers_of(metrics) >= size[0], within=60)
        return asyncio.run(measure(address, pid, size, seconds=seconds, rate=rate))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="how long streams begin and end")
    parser.add_argument("--rate", type=float, default=300.0, help="decisions a second meanwhile")
    parser.add_argument("--drive", nargs=3, metavar=("ADDRESS", "FIRST", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        asyncio.run(drive(options.drive[0], int(options.drive[1]), int(options.drive[2])))
        return
    print(
        f"{'workers':>8}{'streams':>9}{'CPU for reports':>17}{'bytes a stream':>16}"
        f"{'CPU us a decision':>19}{'answer p50 ms':>15}{'p99 ms':>9}"
    )
    for size in _SIZES:
        row = run_size(size, seconds=options.seconds, rate=options.rate)
        print(
            f"{row.workers:>8}{row.streams:>9,}{row.idle_share:>17.1%}{row.bytes_a_stream:>16.0f}"
            f"{row.cpu_us:>19.0f}{row.p50_ms:>15.1f}{row.p99_ms:>9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
