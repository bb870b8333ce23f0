"""What Linux says of a tree of processes: whether one is stopped, what they have computed, and would have."""

import os
from pathlib import Path
from typing import Final

from services.inference.watchdog import Signs

__all__ = ["signs_of"]

_PROC: Final = Path("/proc")
_TICK_SECONDS: Final = 1 / os.sysconf("SC_CLK_TCK")
_STOPPED: Final = ("T", "t")


def signs_of(pids: list[int]) -> Signs:
    """Of these processes and their descendants. Those that are gone, and other systems, tell nothing."""
    stopped, ticks, starved = False, 0, 0
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        try:
            # The name in parentheses may hold anything; what counts comes after it.
            fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            tasks = list((_PROC / str(pid) / "task").iterdir())
            children = [(task / "children").read_text() for task in tasks]
            starved += sum(map(_starved, tasks))
        except OSError:
            continue
        stopped |= fields[0] in _STOPPED
        ticks += int(fields[11]) + int(fields[12])
        waiting += [int(child) for listed in children for child in listed.split()]
    return Signs(stopped=stopped, cpu_seconds=ticks * _TICK_SECONDS, starved_seconds=starved / 1e9)


def _starved(task: Path) -> int:
    """Nanoseconds in which a thread could have run and did not; 0 where the system doesn't tell."""
    try:
        return int((task / "schedstat").read_text().split()[1])
    except (FileNotFoundError, IndexError):
        return 0
