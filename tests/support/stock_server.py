"""vLLM's own HTTP server with its arguments: `python -m tests.support.stock_server ARGUMENTS`.

Its engine is forked from a process that has imported vLLM, as ours is, which spares importing it twice.
"""

import os
import runpy

from services.inference.vllm_environment import ignore_warnings
from services.inference.vllm_nursery import Nursery, import_vllm, plant
from services.inference.vllm_plugin import WORKER_PID_VARIABLE


def _main() -> None:
    os.environ[WORKER_PID_VARIABLE] = str(os.getpid())
    ignore_warnings()
    import_vllm()
    plant()
    from vllm.v1.engine import utils as engine_utils  # noqa: PLC0415  # it reads the environment

    with Nursery(forks=True).lent_to(engine_utils):
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    _main()
