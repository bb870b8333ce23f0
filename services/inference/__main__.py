"""`python -m services.inference --config FILE`: one worker."""

import asyncio
import sys

from services.common.entry import start
from services.common.settings import WorkerSettings
from services.inference.worker import Worker


async def main(settings: WorkerSettings, stop: asyncio.Event) -> int:
    """Runs the worker until `stop` is set."""
    return await Worker(settings).run(stop)


if __name__ == "__main__":
    sys.exit(start("inference", WorkerSettings, main))
