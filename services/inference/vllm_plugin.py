"""What happens inside the processes that vLLM starts: they end with the worker.

vLLM calls register() in every process that it loads its plugins in, the worker's own included. Outside a tokenloom
worker nothing happens.
"""

import os
import signal
from typing import Final

from services.common.process import die_with_parent

__all__ = ["WORKER_PID_VARIABLE", "register", "tie"]

WORKER_PID_VARIABLE: Final = "TOKENLOOM_WORKER_PID"
"""Set by a worker before it starts vLLM: its process id."""


def register() -> None:
    """Ties this process to the worker, unless it is the worker."""
    if WORKER_PID_VARIABLE in os.environ:
        tie()
        _allow_matrix_tiles()
        if not _is_worker():
            _carry_on()


def tie() -> None:
    """Has this process end when the worker does, or whatever process of the worker's has started this one."""
    if _is_worker():
        return
    # A terminal's Ctrl-C is for the worker, which drains first.
    os.setpgid(0, 0)
    die_with_parent()
    try:
        os.kill(_worker(), 0)
    except ProcessLookupError:
        # It died before the kernel knew that it matters to us.
        os.kill(os.getpid(), signal.SIGKILL)


def _worker() -> int:
    return int(os.environ[WORKER_PID_VARIABLE])


def _is_worker() -> bool:
    return _worker() == os.getpid()


def _carry_on() -> None:
    from services.inference.vllm_emitted_form import carry_forms_on  # noqa: PLC0415  # it imports vLLM
    from services.inference.vllm_seeded import carry_draws_on  # noqa: PLC0415  # it imports vLLM

    carry_forms_on()
    carry_draws_on()


def _allow_matrix_tiles() -> None:
    """Asks the kernel for Intel AMX, which vLLM's CPU attention uses without asking and then dies of."""
    import torch  # noqa: PLC0415  # vLLM's processes have it; the worker reads this module's names without

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
