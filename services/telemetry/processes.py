"""Which process of the mesh a process on this machine belongs to."""

from pathlib import Path
from typing import Final

from services.common.process import NAME_VARIABLE

__all__ = ["WorkerNames"]

_ROOT: Final = Path("/proc")
_MOST_KNOWN: Final = 1024
_LONGEST_NAME: Final = 63


class WorkerNames:
    """Looks process ids up, each one once: processes of the mesh have their name in their children's environment.

    A process that runs as somebody else, or in a pid namespace that this one doesn't see, has no name here.
    """

    def __init__(self, root: Path = _ROOT) -> None:
        """`root` is where procfs is mounted."""
        self._root = root
        self._known: dict[int, tuple[str, str]] = {}

    def of(self, pid: int) -> str:
        """The name, for example "worker-0"; empty when it has none, or may not be looked at."""
        started = self._started(pid)
        known = self._known.get(pid)
        # Process ids are used again.
        if known is None or known[0] != started:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[pid] = (started, self._name(pid))
        return known[1]

    def _started(self, pid: int) -> str:
        try:
            # After the command, which may hold anything, the twentieth field is the time of its start.
            return (self._root / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[19]
        except (OSError, IndexError):
            return ""

    def _name(self, pid: int) -> str:
        try:
            environment = (self._root / str(pid) / "environ").read_bytes()
        except OSError:
            return ""
        prefix = f"{NAME_VARIABLE}=".encode()
        for line in environment.split(b"\0"):
            if line.startswith(prefix):
                return line.removeprefix(prefix).decode(errors="replace")[:_LONGEST_NAME]
        return ""
