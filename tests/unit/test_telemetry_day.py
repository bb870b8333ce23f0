"""A day of samples, three seconds apart, and what is left of it in memory."""

import gc

import psutil

from services.telemetry.convert import watch_response
from services.telemetry.gpu import Card, Driver, DriverState, EventKind, Incident, Process, Reading, Scan
from services.telemetry.metrics import TelemetryCollector
from services.telemetry.roster import Roster
from services.telemetry.sampler import Sampler

READY = Driver(state=DriverState.READY, version="570")
DAY, STEP = 86_400, 3


def scan(second: int) -> Scan:
    """Two cards that change each second, have errors, and are lost for a while every hour."""
    lost = second % 3600 < 30
    incidents = (Incident(kind=EventKind.XID, xid=second // 100 % 700),) if second % 100 == 0 else ()
    reading = Reading(utilization_percent=second % 101, processes=(Process(pid=second, memory_used_bytes=second),))
    return Scan(
        driver=READY,
        cards=(
            Card(index=0, uuid="GPU-0", name="a", reading=reading, incidents=incidents),
            Card(index=1, uuid="GPU-1", name="b", reading=None if lost else reading, problem="lost" if lost else ""),
        ),
    )


async def test_a_day_of_samples_leaves_no_more_than_an_hour_of_them_whether_watchers_read_or_not() -> None:
    roster = Roster("node-1", worker_of=lambda pid: f"worker-{pid % 3}")
    board = Sampler(lambda: scan(0), roster, period_seconds=1, deadline_seconds=1)
    metrics = TelemetryCollector(board, publish_failures=lambda: 0, agents=dict)
    board.publish(roster.update(scan(0), 0.0))
    idle, eager = board.changes(), board.changes()
    await anext(idle)
    sizes, messages = list[tuple[int, int]](), 0
    for second in range(STEP, DAY, STEP):
        board.publish(roster.update(scan(second), float(second)))
        if second % 15 == 0:
            messages += len(watch_response(await anext(eager)).SerializeToString()) > 0
            # As a scrape has it.
            assert sum(len(family.samples) for family in metrics.collect()) < 300
        if second in (7200, DAY - STEP):
            gc.collect()
            sizes.append((len(gc.get_objects()), psutil.Process().memory_info().rss))
    change = await anext(idle)
    await idle.aclose()
    await eager.aclose()

    (objects, memory), (objects_then, memory_then) = sizes
    # Fewer are none of theirs: what earlier tests left behind ends now and then.
    assert objects_then - objects < 100
    assert memory_then - memory < 2 << 20
    assert messages == (DAY - 1) // 15
    assert len(change.gpus) == 2
    assert all(len(gpu.events) <= 8 and len(gpu.xid_counts) <= 256 for gpu in change.gpus)
