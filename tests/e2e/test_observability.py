"""A real Prometheus on a real mesh: the vocabulary holds, and every panel and rule has data."""

import json
import re
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from tests.support.mesh import Mesh
from tests.support.nvml.agent import TelemetryAgent, telemetry_agent
from tests.support.nvml.stub import L40, NvmlStub
from tests.support.prometheus import Prometheus, needs_prometheus, running_prometheus
from tests.support.vocabulary import FOLDER, strays
from tests.support.waiting import wait_until

OPEN_METRICS = {"accept": "application/openmetrics-text; version=1.0.0"}
VARIABLES = {"$__rate_interval": "30s", "$__range": "1m", "$process": "worker-0"}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, sim_mesh: Mesh) -> Iterator[TelemetryAgent]:
    """Telemetry of a machine with two cards, on one of which the mesh's first worker has memory."""
    folder = tmp_path_factory.mktemp("gpus")
    worker = sim_mesh.process("worker-0")["pid"]
    busy = replace(L40, processes=f"{worker}:4096", clock_reasons=0x40, events="1:8:31")
    stub = NvmlStub(folder)
    stub.show([busy, replace(L40, uuid="GPU-split", mig="MIG-1"), replace(L40, uuid="MIG-1", mig_instance=1)])
    with telemetry_agent(folder, environment=stub.environment) as agent:
        yield agent


def exposed(url: str) -> str:
    with httpx.Client() as client:
        return client.get(url).text


def pages(mesh: Mesh, agent: TelemetryAgent) -> Iterator[tuple[str, str]]:
    """What every process of our own serves, by service."""
    for process in mesh.state["processes"]:
        if process["service"] != "envoy":
            yield process["service"], exposed(f"http://127.0.0.1:{process['ports']['metrics']}/metrics")
    yield "telemetry", exposed(agent.metrics_url)


def ask(mesh: Mesh, count: int = 1) -> list[str]:
    """Asks on both lanes; returns the traces of the requests."""
    traces = []
    body = {"model": "sim", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "stream": True}
    plain = {"model": "sim", "text": "hello", "sampling": {"max_tokens": 8}}
    with httpx.Client(base_url=mesh.edge, headers=mesh.headers, timeout=20) as client:
        for _ in range(count):
            traces.append(secrets.token_hex(16))
            headers = {"traceparent": f"00-{traces[-1]}-{secrets.token_hex(8)}-01"}
            assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
            assert client.post("/api/v1/generate", json=plain).status_code == 200
    return traces


def test_processes_expose_the_vocabulary_and_nothing_else(sim_mesh: Mesh, agent: TelemetryAgent) -> None:
    ask(sim_mesh)
    found = [stray for service, page in pages(sim_mesh, agent) for stray in strays(service, page)]
    assert not found


@needs_prometheus
def test_what_processes_expose_is_as_prometheus_wants_it(sim_mesh: Mesh, agent: TelemetryAgent) -> None:
    for service, page in pages(sim_mesh, agent):
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=page, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, f"{service}: {done.stdout}{done.stderr}"


def test_measurements_lead_to_the_traces_of_their_requests(sim_mesh: Mesh) -> None:
    (trace_id,) = ask(sim_mesh)
    pattern = re.compile(rf'# {{trace_id="{trace_id}"}}')
    for name, metric in (
        ("gateway", "tokenloom_gateway_time_to_first_token_seconds_bucket"),
        ("gateway", "tokenloom_gateway_request_duration_seconds_bucket"),
    ):
        port = sim_mesh.process(name)["ports"]["metrics"]
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", headers=OPEN_METRICS).text
        assert [line for line in text.splitlines() if line.startswith(metric) and pattern.search(line)]


@pytest.fixture(scope="module")
def prometheus(
    tmp_path_factory: pytest.TempPathFactory, sim_mesh: Mesh, uneven_mesh: Mesh, agent: TelemetryAgent
) -> Iterator[Prometheus]:
    """A Prometheus that has scraped two meshes and the cards before, during and after some requests."""
    files = [mesh.state_dir / "targets.json" for mesh in (sim_mesh, uneven_mesh)]
    targets = [target for file in files for target in json.loads(file.read_text())]
    address = agent.metrics_url.removeprefix("http://").removesuffix("/metrics")
    targets.append({"targets": [address], "labels": {"process": "gpus", "service": "telemetry"}})
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), targets) as server:
        wait_until(lambda: server.values("sum(up)") == [len(targets)], within=15)
        time.sleep(0.6)
        ask(sim_mesh, 5)
        time.sleep(0.6)
        yield server


@needs_prometheus
def test_every_panel_of_every_dashboard_has_data(prometheus: Prometheus) -> None:
    empty = {}
    for file in sorted((FOLDER / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"]
                for variable, value in VARIABLES.items():
                    expression = expression.replace(variable, value)
                if not any(value == value for value in prometheus.values(expression)):  # noqa: PLR0124  # NaN is not
                    empty[f"{file.name}: {panel['title']}"] = expression
    assert not empty


@needs_prometheus
def test_prometheus_takes_every_rule_and_keeps_the_exemplars(sim_mesh: Mesh, prometheus: Prometheus) -> None:
    trace_id = ask(sim_mesh)[0]
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    # Nothing is the matter but with the card that is throttled and the worker that is slow.
    alerts = {rule["name"]: [alert["labels"] for alert in rule["alerts"]] for rule in rules if rule.get("alerts")}
    assert alerts.keys() - {"TokenloomGpuIdle"} == {"TokenloomGpuThrottled", "TokenloomWorkerSlow"}
    (slow,) = alerts["TokenloomWorkerSlow"]
    assert (slow["worker"], slow["cause"]) == ("slow-0", "decoding")

    def kept() -> bool:
        metric, now = "tokenloom_gateway_time_to_first_token_seconds_bucket", time.time()
        found = prometheus.get("query_exemplars", query=metric, start=now - 60, end=now + 60)
        return any(one["labels"]["trace_id"] == trace_id for series in found for one in series["exemplars"])

    wait_until(kept, within=10)
