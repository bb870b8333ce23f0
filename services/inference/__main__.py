"""`python -m services.inference --config FILE`: one worker."""

import asyncio
import logging
import os
import sys
from collections.abc import Iterator

from services.common.config import ConfigError
from services.common.engine_args import parallel_size
from services.common.entry import start
from services.common.settings_worker import WorkerSettings
from services.inference.gpus import gpu_names, wait_for_room
from services.inference.vllm_environment import has_cuda, vllm_version
from services.inference.worker import Worker

# What an engine before this one held is free soon after its end.
_ROOM_SECONDS = 5.0


async def main(settings: WorkerSettings, stop: asyncio.Event) -> int:
    """Runs the worker until `stop` is set."""
    try:
        return await Worker(settings).run(stop)
    except OSError as error:
        logging.getLogger(__name__).error("can't serve", extra={"cause": str(error)})  # noqa: TRY400  # a port that is taken needs no traceback
        return 1
    except ExceptionGroup as errors:
        wrong, others = errors.split(ConfigError)
        if wrong is None or others is not None:
            raise
        cause = str(next(_leaves(wrong)))
        logging.getLogger(__name__).error("can't serve", extra={"cause": cause})  # noqa: TRY400  # it names the key
        return 2


def _leaves(errors: BaseExceptionGroup[ConfigError]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        yield from _leaves(error) if isinstance(error, BaseExceptionGroup) else (error,)


def prepare(settings: WorkerSettings) -> None:
    """Does what an engine needs done before there are threads.

    Raises:
        ConfigError: there is no vLLM, or others hold too much of its GPUs.
    """
    if settings.engine == "vllm":
        _wait_for_room(settings)
        from services.inference.vllm_nursery import prepare_process  # noqa: PLC0415  # not where there is no vLLM

        prepare_process(settings)


def _wait_for_room(settings: WorkerSettings) -> None:
    vllm_version()
    names = gpu_names(settings.gpu, os.environ)
    if not names and has_cuda():
        names = [str(index) for index in range(parallel_size(settings.engine_args))]
    if names and settings.engine_args.get("distributed_executor_backend") != "ray":
        wait_for_room(names, settings.gpu_memory_utilization, seconds=_ROOM_SECONDS)


if __name__ == "__main__":
    sys.exit(start("inference", WorkerSettings, main, prepare=prepare))
