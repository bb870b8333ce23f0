"""`python -m services.inference --config FILE`: one worker."""

import asyncio
import logging
import sys

from services.common.entry import start
from services.common.settings import WorkerSettings
from services.inference.worker import Worker


async def main(settings: WorkerSettings, stop: asyncio.Event) -> int:
    """Runs the worker until `stop` is set."""
    try:
        return await Worker(settings).run(stop)
    except OSError as error:
        logging.getLogger(__name__).error("can't serve", extra={"cause": str(error)})  # noqa: TRY400  # a port that is taken needs no traceback
        return 1


def prepare(settings: WorkerSettings) -> None:
    """Does what an engine needs done before there are threads."""
    if settings.engine == "vllm":
        from services.inference.vllm_engine import prepare_process  # noqa: PLC0415  # not where there is no vLLM

        prepare_process(settings)


if __name__ == "__main__":
    sys.exit(start("inference", WorkerSettings, main, prepare=prepare))
