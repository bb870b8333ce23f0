"""A gateway whose tracing is turned off by SIGUSR1 and on again by SIGUSR2, to see what it costs in one process.

python -m bench.toggled_gateway --config FILE
"""

import asyncio
import signal
import sys

from services.common import tracing
from services.common.entry import start
from services.common.settings_gateway import GatewaySettings
from services.common.trace_untraced import Untraced
from services.gateway.__main__ import main


async def toggled(settings: GatewaySettings, stop: asyncio.Event) -> int:
    """The gateway's own main."""
    traced, loop = tracing._Own.tracer, asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, setattr, tracing._Own, "tracer", Untraced())
    loop.add_signal_handler(signal.SIGUSR2, setattr, tracing._Own, "tracer", traced)
    return await main(settings, stop)


if __name__ == "__main__":
    sys.exit(start("gateway", GatewaySettings, toggled))
