"""CPU time of one routing decision, whatever waits: python bench/router_decision.py

Two cases, each with 64 workers. "free": every worker has room, so every decision compares all of them. "full": every
slot is taken and N requests wait; a decision is one release, the grant that it leads to, and one new request that
joins the line. Reports of workers come in between and are not counted; the figure is the median of batches of 64.
Then what a decision and a live stream cost with few workers and with many: both should depend on neither number.
"""

import argparse
import gc
import itertools
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable

from services.common.process import collect_rarely
from services.router.admission import Admission
from services.router.card import Card, Load, WorkerState
from services.router.decisions import Decisions
from services.router.fleet import Fleet
from services.router.memory import AnswerLengths
from services.router.policy import Policies
from services.router.prefixes import Prefixes
from services.router.request import Request
from services.router.scheduler import Scheduler
from services.router.ticket import Ticket
from services.router.worker import Outcome

TENANTS = 200
REPORTED_EVERY = 64
"""Decisions between two reports of every worker."""
LATEST_DECISIONS = 5_000
"""More than the router keeps of them."""
WARM_TURNS = 20
"""So often not counted, until the router knows how long requests take."""


class Clock:
    """Time that passes when it is told to, so that no worker is silent while the machine does something else."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


class Silent:
    """Counts nothing."""

    def picked(self, seconds: float) -> None:
        """Nothing."""

    def decided(self, outcome: str, queue_seconds: float) -> None:
        """Nothing."""


def build(workers: int, slots: int) -> tuple[Clock, Fleet, Admission]:
    """A fleet of unequal workers, all ready and idle."""
    clock = Clock()
    fleet, prefixes, lengths = Fleet(clock), Prefixes(), AnswerLengths()
    admission = Admission(
        fleet=fleet,
        scheduler=Scheduler(fleet, prefixes, lengths, clock=clock, rng=random.Random(1)),
        policies=Policies(fleet, clock=clock),
        prefixes=prefixes,
        lengths=lengths,
        decisions=Decisions(),
        observer=Silent(),
        clock=clock,
        max_waiting=1_000_000,
        max_wait_seconds=1e9,
        ready_grace_seconds=5,
    )
    for number in range(workers):
        card = Card(
            worker_id=f"worker-{number}",
            endpoint=f"10.0.0.{number}:50061",
            models={"demo": 8192},
            max_running=slots,
            kv_tokens=262_144,
        )
        load = Load(
            state=WorkerState.READY,
            prefill_tokens_per_second=10_000 + 100 * number,
            decode_step_seconds=0.02,
            decode_step_per_sequence_seconds=0.0001,
            pending_prefill_tokens=0,
        )
        fleet.report(fleet.register(card), load)
    return clock, fleet, admission


def request(number: int) -> Request:
    """One of many, of one of 200 tenants and two classes."""
    return Request(
        model="demo",
        request_id=f"r{number}",
        prompt_tokens=200 + number % 1000,
        tenant=f"tenant-{number % TENANTS}",
        priority=number % 2,
        slo_class="batch",
    )


def reports(clock: Clock, fleet: Fleet) -> None:
    """A tenth of a second passes, and every worker reports that it has nothing to prefill."""
    clock.now += 0.1
    for worker in fleet.workers:
        fleet.report(worker, worker.load)


def timed(batch: Callable[[], None]) -> float:
    """Microseconds of CPU a decision of a batch."""
    started = time.process_time()
    batch()
    return 1e6 * (time.process_time() - started) / REPORTED_EVERY


def measure_free(workers: int, decisions: int) -> float:
    """Microseconds of CPU a decision while every worker has room."""
    clock, fleet, admission = build(workers, slots=4096)
    numbers = itertools.count()

    def batch() -> None:
        for _ in range(REPORTED_EVERY):
            admission.ask(request(next(numbers)), lambda _: None)

    spent = []
    for _ in range(decisions // REPORTED_EVERY):
        reports(clock, fleet)
        spent.append(timed(batch))
    assert admission.waiting_count == 0
    return statistics.median(spent)


def measure_full(workers: int, waiting: int, decisions: int) -> float:
    """Microseconds of CPU a decision while `waiting` requests wait."""
    clock, fleet, admission = build(workers, slots=64)
    running: list[Ticket] = []
    numbers, rng = itertools.count(), random.Random(2)
    while admission.waiting_count < waiting:
        admission.ask(request(next(numbers)), running.append)
        if len(running) < 64 * workers and len(running) % REPORTED_EVERY == 0:
            reports(clock, fleet)

    def batch() -> None:
        for _ in range(REPORTED_EVERY):
            place = rng.randrange(len(running))
            running[place], running[-1] = running[-1], running[place]
            admission.finish(running.pop(), Outcome.COMPLETED, output_tokens=100)
            admission.ask(request(next(numbers)), running.append)

    spent, granted = [], 0
    for turn in range(-WARM_TURNS, decisions // REPORTED_EVERY):
        reports(clock, fleet)
        before = len(running)
        took = timed(batch)
        if turn >= 0:
            spent.append(took)
            granted += len(running) - before + REPORTED_EVERY
    assert granted > 0.9 * REPORTED_EVERY * len(spent), "nearly every release should lead to a grant"
    return statistics.median(spent)


def measure_live(workers: int, streams: int) -> tuple[float, float]:
    """Microseconds of CPU a decision, and bytes a live stream, while `streams` of them have a worker."""
    tracemalloc.start()
    clock, fleet, admission = build(workers, slots=1 << 20)
    for number in range(LATEST_DECISIONS):
        # The latest decisions are kept to be explained, however many are live.
        if number % REPORTED_EVERY == 0:
            reports(clock, fleet)
        admission.finish(admission.ask(request(number), lambda _: None), Outcome.COMPLETED, output_tokens=100)
    live: list[Ticket] = []
    before = tracemalloc.get_traced_memory()[0]
    for number in range(streams):
        if number % REPORTED_EVERY == 0:
            reports(clock, fleet)
        admission.ask(request(number), live.append)
    size = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(live) == streams
    numbers = itertools.count(streams)

    def batch() -> None:
        for _ in range(REPORTED_EVERY):
            admission.ask(request(next(numbers)), live.append)

    spent = []
    for _ in range(20):
        reports(clock, fleet)
        spent.append(timed(batch))
    return statistics.median(spent), size / streams


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--decisions", type=int, default=5_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    # As the router's process does.
    gc.freeze()
    collect_rarely()
    repeats = range(options.repeats)
    free = statistics.median(measure_free(options.workers, options.decisions) for _ in repeats)
    print(f"{'case':<16}{'CPU us a decision':>18}")
    print(f"{'free':<16}{free:>18.1f}")
    for waiting in (100, 1_000, 10_000, 100_000):
        full = statistics.median(measure_full(options.workers, waiting, options.decisions) for _ in repeats)
        print(f"{f'{waiting:,} waiting':<16}{full:>18.1f}")
    print(f"{'workers':<10}{'live streams':>14}{'CPU us a decision':>20}{'bytes a stream':>17}")
    for workers, streams in ((16, 10_000), (64, 10_000), (256, 1_000), (256, 10_000)):
        spent, size = measure_live(workers, streams)
        print(f"{workers:<10}{streams:>14,}{spent:>20.1f}{size:>17.0f}")


if __name__ == "__main__":
    main()
