"""What happens inside the processes that vLLM starts: they end with the worker, and keep nothing of its connections.

vLLM calls register() in every process of its own that isn't a copy of one where it has called it already; the copies
come here through fork handlers. Neither happens outside a tokenloom worker.
"""

import gc
import os
import signal
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from services.common.process import die_with_parent

__all__ = ["WORKER_PID_VARIABLE", "register"]

WORKER_PID_VARIABLE: Final = "TOKENLOOM_WORKER_PID"
"""Set by a worker before it starts vLLM: its process id."""

_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)


def register() -> None:
    """Ties this process to the worker, or, in the worker itself, whatever is forked from it."""
    worker = os.environ.get(WORKER_PID_VARIABLE)
    if worker is None:
        return
    if int(worker) == os.getpid():
        os.register_at_fork(after_in_child=_after_fork)
    else:
        _tie(int(worker))
    _allow_matrix_tiles()


def _tie(worker: int) -> None:
    # A terminal's Ctrl-C is for the worker, which drains first.
    os.setpgid(0, 0)
    die_with_parent()
    try:
        os.kill(worker, 0)
    except ProcessLookupError:
        # It died before the kernel knew that it matters to us.
        os.kill(os.getpid(), signal.SIGKILL)


def _after_fork() -> None:
    worker = os.environ.get(WORKER_PID_VARIABLE)
    if worker is None:
        return
    _tie(int(worker))
    # What was inherited stays as it is: its finalizers are the worker's to run, and looking at it would copy its pages.
    gc.freeze()
    # Else a signal to this process would be read by the worker's event loop as a signal to the worker.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    _close_connections()


def _close_connections() -> None:
    """Closes the worker's listeners and connections here: its peers learn that one is closed when nobody holds it."""
    listing = Path("/proc/self/fd")
    for entry in list(listing.iterdir()) if listing.is_dir() else ():
        # The listing's own descriptor is gone by now.
        with suppress(OSError):
            _close_connection(int(entry.name))


def _close_connection(descriptor: int) -> None:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return
    found = socket.socket(fileno=descriptor)
    if found.family in _INTERNET:
        found.close()
    else:
        found.detach()


def _allow_matrix_tiles() -> None:
    """Asks the kernel for Intel AMX, which vLLM's CPU attention uses without asking and then dies of."""
    import torch  # noqa: PLC0415  # vLLM's processes have it; the worker reads this module's names without

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
