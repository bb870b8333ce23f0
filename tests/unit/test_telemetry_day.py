"""A day of samples, ten seconds apart, and what is left of it in memory."""

import gc

from services.telemetry.board import Board
from services.telemetry.gpu import Card, Driver, DriverState, EventKind, Incident, Process, Reading, Scan
from services.telemetry.roster import Roster

READY = Driver(state=DriverState.READY, version="570")
DAY = 86_400


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


async def test_a_day_of_samples_with_a_watcher_that_never_reads_leaves_no_more_than_an_hour_of_them() -> None:
    roster, board = Roster("node-1", worker_of=lambda pid: f"worker-{pid % 3}"), Board()
    board.publish(roster.update(scan(0), 0.0))
    idle = board.changes()
    await anext(idle)
    sizes = []
    for second in range(10, DAY, 10):
        board.publish(roster.update(scan(second), float(second)))
        if second in (7200, DAY - 10):
            gc.collect()
            sizes.append(len(gc.get_objects()))
    change = await anext(idle)
    await idle.aclose()

    assert abs(sizes[1] - sizes[0]) < 100
    assert len(change.gpus) == 2
    assert all(len(gpu.events) <= 8 and len(gpu.xid_counts) <= 256 for gpu in change.gpus)
