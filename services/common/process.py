"""What every process of the mesh does around its work: the loop, the signals, the ties to its parent."""

import asyncio
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Final

import uvloop

__all__ = ["NAME_VARIABLE", "collect_rarely", "die_with_parent", "run"]

NAME_VARIABLE: Final = "TOKENLOOM_PROCESS"
"""In the environment of a process and of what it starts: its name. Telemetry tells by it whose memory is on a GPU."""

_PR_SET_PDEATHSIG = 1
# By default every 700 new objects are looked through, and every 70,000 all that there are.
_COLLECTED_AFTER: Final = (20_000, 20, 20)


def die_with_parent(signal_number: signal.Signals = signal.SIGKILL) -> None:
    """Has the kernel send this process a signal when the thread that started it ends (Linux only).

    Without it, killing a worker would leave its engine running, and holding the GPU.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() == 1 and os.getpid() != 1 and not _init_started_us():
        # The parent died before the kernel knew.
        os.kill(os.getpid(), signal_number)


def _init_started_us() -> bool:
    # In a container the service's parent may be process 1 itself, which is alive by definition.
    return os.environ.get("TOKENLOOM_PARENT_PID", "1") == "1"


def collect_rarely() -> None:
    """For a process that keeps many small objects for long and makes few cycles: looks for cycles less often."""
    gc.set_threshold(*_COLLECTED_AFTER)


def run(main: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    """Runs a process's main coroutine on uvloop until it returns its exit code.

    `main` gets an event that is set on SIGTERM or SIGINT: stop taking work, finish, return. A second signal ends the
    process at once.
    """
    code: int = uvloop.run(_with_signals(main))
    return code


async def _with_signals(main: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return await main(stop)
