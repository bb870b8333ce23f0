"""python -m services.router --config FILE"""

import asyncio
import logging
import sys

from services.common.entry import start
from services.common.process import collect_rarely
from services.common.settings import RouterSettings
from services.router.app import running

_log = logging.getLogger(__name__)


async def main(settings: RouterSettings, stop: asyncio.Event) -> int:
    """Serves until asked to stop."""
    async with running(settings) as router:
        # Whoever waits and whoever has a worker is an object for as long.
        collect_rarely()
        _log.info("router serves", extra={"port": router.port, "metrics_port": router.metrics_port})
        await stop.wait()
    return 0


if __name__ == "__main__":
    sys.exit(start("router", RouterSettings, main))
