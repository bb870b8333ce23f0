"""A real Prometheus server on the files of deploy/observability."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.ports import free_port
from tests.support.vocabulary import FOLDER
from tests.support.waiting import wait_until

__all__ = ["Prometheus", "needs_prometheus", "running_prometheus"]

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs prometheus and promtool, from the system's package prometheus",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prometheus:
    """A server that is ready."""

    client: httpx.Client

    def get(self, path: str, **parameters: str | float) -> Any:
        """The data of an answer of its API."""
        answer = self.client.get(f"/api/v1/{path}", params=parameters)
        body = answer.json()
        assert body["status"] == "success", f"{parameters}: {body}"
        return body["data"]

    def values(self, expression: str) -> list[float]:
        """What an expression gives now, one value a series."""
        return [float(series["value"][1]) for series in self.get("query", query=expression)["result"]]


@contextmanager
def running_prometheus(
    folder: Path, targets: Sequence[dict[str, Any]], *, scrape_interval: str = "250ms"
) -> Iterator[Prometheus]:
    """Runs it on our configuration and rules, only faster, until the block is left."""
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"] = {
        "scrape_interval": scrape_interval,
        "scrape_timeout": scrape_interval,
        "evaluation_interval": "500ms",
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(FOLDER / "rules.yaml", folder)
    (folder / "targets").mkdir()
    (folder / "targets" / "mesh.json").write_text(json.dumps(targets))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address={address}", "--enable-feature=exemplar-storage", "--log.level=warn"]
    # Else it looks every five seconds whether there are targets.
    command += ["--scrape.discovery-reload-interval=200ms"]
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=10) as client:
            wait_until(lambda: process.poll() is not None or _is_ready(client), within=20)
            assert process.poll() is None, log.read_text()
            yield Prometheus(client=client)
    finally:
        process.terminate()
        process.wait(10)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False
