"""Makes the process that imports it one that engines are forked from: see services.inference.vllm_nursery.

That is how such a process starts that was not forked off a worker.
"""

from services.inference.vllm_environment import ignore_warnings
from services.inference.vllm_nursery import import_vllm
from services.inference.vllm_plugin import tie

tie()
ignore_warnings()
import_vllm()
