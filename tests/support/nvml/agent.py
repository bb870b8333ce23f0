"""The real telemetry process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_until

__all__ = ["TelemetryAgent", "telemetry_agent"]


class TelemetryAgent:
    """A running `python -m services.telemetry`."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self._log = log
        wait_until(lambda: process.poll() is not None or bool(self._listening()), within=20)
        assert process.poll() is None, log.read_text()
        (listening,) = self._listening()
        self.target = f"127.0.0.1:{listening['grpc_port']}"
        self.metrics_url = f"http://127.0.0.1:{listening['metrics_port']}/metrics"

    @property
    def log(self) -> list[dict[str, Any]]:
        """What it has logged."""
        lines = self._log.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def logged(self, message: str) -> int:
        """How often it has logged a message."""
        return [line["message"] for line in self.log].count(message)

    def _listening(self) -> list[dict[str, Any]]:
        return [line for line in self.log if line["message"] == "listening"]


@contextmanager
def telemetry_agent(
    folder: Path, *, environment: Mapping[str, str] | None = None, **settings: Any
) -> Iterator[TelemetryAgent]:
    """Runs it on free ports with ten samples a second; on leaving it has to end well within five seconds."""
    config = folder / "telemetry.json"
    wanted = {"name": "telemetry", "listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "node": "node-1"}
    config.write_text(json.dumps({**wanted, "sample_seconds": 0.1, **settings}))
    log = folder / "telemetry.log"
    command = [sys.executable, "-m", "services.telemetry", "--config", str(config)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**(environment or os.environ)}, stdout=output, stderr=output)
    try:
        yield TelemetryAgent(process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0, log.read_text()
    finally:
        process.kill()
        process.wait(5)
