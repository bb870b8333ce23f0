"""A whole mesh, started as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai

from tests.support.ports import free_port

__all__ = ["Mesh", "running_mesh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """A mesh that is up."""

    state_dir: Path
    entrance: str = "edge"
    """Which of its listeners is gone in by: the one for clients, or, where that speaks TLS, "operators"."""
    clients: ExitStack = field(default_factory=ExitStack)
    """What sdk() has made, closed with the mesh: a connection that nobody closes is a warning in whoever comes next."""

    @property
    def state(self) -> dict[str, Any]:
        """What mesh.json says now."""
        parsed: dict[str, Any] = json.loads((self.state_dir / "mesh.json").read_text())
        return parsed

    @property
    def edge(self) -> str:
        """The edge's URL."""
        return str(self.state[self.entrance])

    @property
    def edge_target(self) -> str:
        """The edge's address for gRPC."""
        return self.edge.removeprefix("http://")

    @property
    def key(self) -> str:
        """A key with every right."""
        return str(self.state["admin_key"])

    @property
    def headers(self) -> dict[str, str]:
        """Headers that carry the key."""
        return {"authorization": f"Bearer {self.key}"}

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Call metadata that carries the key."""
        return (("authorization", f"Bearer {self.key}"),)

    def process(self, name: str) -> dict[str, Any]:
        """The entry of one process."""
        found: dict[str, Any] = next(entry for entry in self.state["processes"] if entry["name"] == name)
        return found

    def sdk(self, **options: Any) -> openai.OpenAI:
        """The official SDK, pointed at the edge; closed with the mesh."""
        client = openai.OpenAI(base_url=f"{self.edge}/v1", api_key=self.key, **{"max_retries": 0, **options})
        return self.clients.enter_context(client)

    def async_sdk(self, **options: Any) -> openai.AsyncOpenAI:
        """The official SDK's async client, pointed at the edge; the caller closes it."""
        return openai.AsyncOpenAI(base_url=f"{self.edge}/v1", api_key=self.key, **{"max_retries": 0, **options})

    def metric(self, process: str, name: str) -> float:
        """The sum of a metric's series in one process; 0 when there are none."""
        return sum(value for _, value in self._series(process, name))

    def metric_by(self, label: str, process: str, name: str) -> dict[str, float]:
        """A metric's series in one process, by the value of a label that tells them apart."""
        pattern = re.compile(rf'[{{,]{label}="([^"]*)"')
        return {found[1]: value for labels, value in self._series(process, name) if (found := pattern.search(labels))}

    def _series(self, process: str, name: str) -> list[tuple[str, float]]:
        # Not httpx: it makes a TLS context each time, which takes longer than some of the waits that are measured here.
        with urlopen(f"http://127.0.0.1:{self.process(process)['ports']['metrics']}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        lines = [line.rpartition(" ") for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] == name]
        return [(labels, float(value)) for labels, _, value in lines]


@contextmanager
def running_mesh(state_dir: Path, *arguments: str, within: float = 60.0) -> Iterator[Mesh]:
    """Runs `tokenloom up` with these arguments on a free edge port until the block is left."""
    command = [sys.executable, "-m", "services.mesh", "up", "--state-dir", str(state_dir)]
    command += ["--edge-port", str(free_port()), *arguments]
    log = (state_dir.parent / f"{state_dir.name}.log").open("wb")
    launcher = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    mesh = Mesh(state_dir=state_dir)
    try:
        _wait((state_dir / "mesh.json").exists, launcher, log.name, within)
        with mesh.clients:
            yield mesh
    finally:
        launcher.send_signal(signal.SIGTERM)
        try:
            launcher.wait(30)
        except subprocess.TimeoutExpired:
            launcher.kill()
            raise
        finally:
            log.close()


def _wait(check: Callable[[], bool], launcher: "subprocess.Popen[bytes]", log: str, within: float) -> None:
    deadline = time.monotonic() + within
    while not check():
        if launcher.poll() is not None or time.monotonic() > deadline:
            launcher.kill()
            said = Path(log).read_text(errors="replace")[-4000:]
            raise AssertionError(f"the mesh did not come up (exit code {launcher.poll()}):{os.linesep}{said}")
        time.sleep(0.05)
