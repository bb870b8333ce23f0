"""The first lines of every service's `python -m services.NAME --config FILE [--set KEY=TEXT]`."""

import argparse
import asyncio
import gc
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from services.common import logs, tracing
from services.common.config import ConfigError, load
from services.common.process import NAME_VARIABLE, run
from services.common.settings import ProcessSettings

__all__ = ["start"]

S = TypeVar("S", bound=ProcessSettings)


def start(
    service: str,
    shape: type[S],
    main: Callable[[S, asyncio.Event], Awaitable[int]],
    *,
    prepare: Callable[[S], None] = lambda _: None,
) -> int:
    """Reads the settings, sets logs and tracing up, and runs `main(settings, stop)` on uvloop; returns the exit code.

    `prepare(settings)` is called while the process has no second thread; it may raise ConfigError.

    Bad settings end the process with code 2 and one line on standard error that names the key.
    """
    parser = argparse.ArgumentParser(prog=f"python -m services.{service}")
    parser.add_argument("--config", type=Path, required=True, help="a YAML or JSON file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=TEXT", help="says one of its keys, whatever the file says"
    )
    arguments = parser.parse_args()
    try:
        settings = load(arguments.config, shape, over=arguments.set)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    os.environ[NAME_VARIABLE] = settings.name
    logs.setup(service, level=settings.log_level)
    try:
        prepare(settings)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    # Of a hundred thousand objects that stay for good: looking through them stops every stream for a tenth of a second.
    gc.freeze()
    with tracing.provider(service, endpoint=settings.otlp_endpoint, instance=settings.name, settings=settings.tracing):
        return run(lambda stop: main(settings, stop))
