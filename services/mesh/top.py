"""tokenloom top: the fleet, live, in a terminal; or once, for scripts."""

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from services.mesh.edge_client import door_of
from services.mesh.fleet_watch import FleetWatch, watch_fleet

if TYPE_CHECKING:
    from services.mesh.top_screen import Screen

__all__ = ["top"]

# What terminals send for keys, and how far that scrolls; 0 begins anew at the top.
_SCROLLS: Final[dict[bytes, int]] = {
    b"\x1b[A": -1,
    b"\x1bOA": -1,
    b"k": -1,
    b"\x1b[B": 1,
    b"\x1bOB": 1,
    b"j": 1,
    b"\x1b[5~": -10,
    b"\x1b[6~": 10,
    b" ": 10,
    b"g": 0,
    b"\x1b[H": 0,
}
_QUITS: Final = (b"q", b"Q", b"\x03")
# A mesh that is away changes nothing, and its age is shown.
_SHOW_ANYWAY_SECONDS: Final = 2.0


def top(arguments: Namespace) -> int:
    """Shows the fleet until `q` is pressed; once where nobody is there to press it."""
    live = sys.stdout.isatty() and not arguments.once and not arguments.json
    return asyncio.run(_live(arguments) if live else _plainly(arguments))


async def _plainly(arguments: Namespace) -> int:
    """For scripts: JSON lines, or the same tables as text, once unless JSON is to go on."""
    # Importing rich takes longer than most commands: only those that need it do.
    from services.mesh.top_screen import print_view  # noqa: PLC0415

    with contextlib.suppress(BrokenPipeError):
        async with watch_fleet(door_of(arguments), interval_seconds=arguments.interval) as watch:
            view = await watch.first()
            while True:
                if arguments.json:
                    print(msgspec.json.encode(view).decode(), flush=True)
                else:
                    print_view(view)
                if arguments.once or not arguments.json:
                    return 0
                await _news(watch, arguments.interval)
                if watch.error is not None:
                    # A script is told, rather than what it knows already.
                    raise watch.error
                view = watch.view or view
    # Nobody reads on; Python would complain once more at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


async def _live(arguments: Namespace) -> int:
    from services.mesh.top_screen import Screen  # noqa: PLC0415  # as above

    done = asyncio.Event()
    async with watch_fleet(door_of(arguments), interval_seconds=arguments.interval) as watch:
        # What can't be shown at all is an error, not an empty screen.
        await watch.first()
        with Screen() as screen, _keys(lambda key: _pressed(key, screen, watch, done)):
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGWINCH, watch.changed.set)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.add_signal_handler(number, _end, watch, done)
            while not done.is_set():
                screen.show(watch.view, watch.error)
                await _news(watch, 0.0)
    return 0


async def _news(watch: FleetWatch, least_seconds: float) -> None:
    """Waits for what is new, at least so long."""
    await asyncio.sleep(least_seconds)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(watch.changed.wait(), _SHOW_ANYWAY_SECONDS)
    watch.changed.clear()


def _end(watch: FleetWatch, done: asyncio.Event) -> None:
    done.set()
    watch.changed.set()


def _pressed(key: bytes, screen: "Screen", watch: FleetWatch, done: asyncio.Event) -> None:
    if key in _QUITS:
        done.set()
    elif key in _SCROLLS:
        screen.scroll(_SCROLLS[key])
    watch.changed.set()


@contextmanager
def _keys(pressed: Callable[[bytes], None]) -> Iterator[None]:
    """Calls back for each key, until the block is left. Where there is no keyboard, nothing is pressed."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    loop = asyncio.get_running_loop()
    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, lambda: pressed(os.read(descriptor, 64)))
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
