"""TCP ports for the processes of a mesh."""

import errno
import random
import socket
from pathlib import Path
from typing import Final

from services.common.config import ConfigError

__all__ = ["PortPicker", "check_free"]

_FIRST: Final = 15_000
_EPHEMERAL: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES: Final = 1000


def check_free(host: str, port: int) -> None:
    """Raises ConfigError when something listens on a port already, or it can't be had."""
    error = _try(host, port)
    if error == errno.EADDRINUSE:
        raise ConfigError(f"--edge-port: port {port} of {host} is taken: choose another one")
    if error:
        raise ConfigError(f"--edge-port: can't listen on port {port} of {host}: {errno.errorcode.get(error, error)}")


class PortPicker:
    """Picks free ports of an address, each once.

    They are below the range that outgoing connections take theirs from, so a port is still free when the process that
    had it starts again.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._last = _ephemeral_start() - 1
        self._taken: set[int] = set()

    def pick(self) -> int:
        """A free port."""
        for _ in range(_TRIES):
            port = random.randint(_FIRST, self._last)  # noqa: S311  # nothing secret about a port
            if port not in self._taken and not _try(self._host, port):
                self._taken.add(port)
                return port
        raise ConfigError(f"no free port on {self._host} between {_FIRST} and {self._last}")


def _ephemeral_start() -> int:
    try:
        start = int(_EPHEMERAL.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        start = 32_768
    return start if start > _FIRST + _TRIES else 65_536


def _try(host: str, port: int) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # Connections of an earlier run that linger are no reason not to listen.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno or errno.EADDRINUSE
    return 0
