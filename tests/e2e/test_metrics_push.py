"""Every process pushes what it serves for scrapes over OTLP, where that is wanted."""

from collections.abc import Iterator

import httpx
import pytest

from tests.support.mesh import Mesh, running_mesh
from tests.support.otlp_metrics import MetricsReceiver, Series, metrics_receiver, scraped, series_of
from tests.support.waiting import wait_until

pytestmark = pytest.mark.beside_others
CONFIG = """
models: [{{name: sim}}]
pools: [{{name: default, serves: [sim], workers: [{{name: worker-0, engine: sim}}]}}]
metrics_push: {{endpoint: "{endpoint}", seconds: 0.5}}
"""


@pytest.fixture(scope="module")
def receiver() -> Iterator[MetricsReceiver]:
    with metrics_receiver() as running:
        yield running


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, receiver: MetricsReceiver) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("pushing")
    config = folder / "mesh.yaml"
    config.write_text(CONFIG.format(endpoint=receiver.endpoint))
    with running_mesh(folder / "state", "--config", str(config)) as running:
        yield running


def ours(series: Series) -> Series:
    return {key: value for key, value in series.items() if key[0].startswith("tokenloom_")}


def pushed_by(receiver: MetricsReceiver, process: str) -> Series:
    metrics = receiver.latest().get(process, {})
    return ours({key: value for metric in metrics.values() for key, value in series_of(metric).items()})


@pytest.mark.parametrize(
    ("service", "name"),
    [("gateway", "gateway"), ("router", "router"), ("inference", "worker-0"), ("telemetry", "telemetry")],
)
def test_a_backend_has_every_series_that_a_scrape_shows(
    mesh: Mesh, receiver: MetricsReceiver, service: str, name: str
) -> None:
    body = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    assert httpx.post(f"{mesh.edge}/v1/chat/completions", json=body, headers=mesh.headers).status_code == 200
    port = mesh.process(name)["ports"]["metrics"]

    def page() -> Series:
        return ours(scraped(httpx.get(f"http://127.0.0.1:{port}/metrics").text))

    wait_until(lambda: pushed_by(receiver, f"tokenloom-{service}/{name}").keys() == page().keys(), within=10)
    if name != "gateway":
        return
    # What only counts stands still once nobody asks.
    counts = {key: value for key, value in page().items() if key[0].endswith(("_total", "_count", "_bucket"))}
    wait_until(lambda: counts.items() <= pushed_by(receiver, f"tokenloom-{service}/{name}").items(), within=10)
    assert sum(value for (name, _), value in counts.items() if name == "tokenloom_gateway_requests_total") >= 1
