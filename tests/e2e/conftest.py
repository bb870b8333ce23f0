"""Meshes that several tests share. Tests that kill things start their own."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.failover import POISON
from tests.support.mesh import Mesh, running_mesh
from tests.support.otlp import Receiver, otlp_receiver
from tests.support.uneven_mesh import running_uneven_mesh

_DOUBLED = """
models: [{name: sim}]
gateways: 2
routers: 2
pools:
  - name: sim
    serves: [sim]
    workers:
      - {name: sim-0, engine: sim, sim: {decode_step_ms: 5}}
      - {name: sim-1, engine: sim, sim: {decode_step_ms: 5}}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A whole mesh needs the machine for itself, where its tests don't say otherwise."""
    for item in items:
        is_here = item.path.is_relative_to(Path(__file__).parent)
        if is_here and item.get_closest_marker("beside_others") is None:
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def spans() -> Iterator[Receiver]:
    """Where the shared meshes send their spans."""
    with otlp_receiver() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def sim_mesh(tmp_path_factory: pytest.TempPathFactory, spans: Receiver) -> Iterator[Mesh]:
    """Two simulated workers of two slots each, a token every 10 ms."""
    with running_mesh(
        tmp_path_factory.mktemp("sim") / "state",
        *("--engine", "sim", "--workers", "2", "--sim", "decode_step_ms=10,max_num_seqs=8,max_model_len=2048"),
        *("--otlp-endpoint", spans.endpoint),
    ) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def uneven_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Simulated workers, one of them slow."""
    with running_uneven_mesh(tmp_path_factory.mktemp("uneven")) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def large_mesh(tmp_path_factory: pytest.TempPathFactory, spans: Receiver) -> Iterator[Mesh]:
    """Four simulated workers of 64 slots each, which die of a poison and are soon back."""
    sim = f"decode_step_ms=10,max_num_seqs=64,max_model_len=4096,poison_text={POISON},restart_seconds=0.5"
    state_dir = tmp_path_factory.mktemp("large") / "state"
    arguments = ("--engine", "sim", "--workers", "4", "--sim", sim, "--otlp-endpoint", spans.endpoint)
    with running_mesh(state_dir, *arguments) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def doubled_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Two of each process that there may be two of, with simulated workers, and a database that is named."""
    folder = tmp_path_factory.mktemp("doubled")
    (folder / "mesh.yaml").write_text(f"{_DOUBLED}database_url: sqlite:///{folder}/shared.db\n")
    with running_mesh(folder / "state", "--config", str(folder / "mesh.yaml")) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def vllm_mesh(tmp_path_factory: pytest.TempPathFactory, spans: Receiver) -> Iterator[Mesh]:
    """What `make up` starts, real vLLM on the demo model, with two workers, so that one may be lost."""
    state_dir, trace = tmp_path_factory.mktemp("vllm") / "state", secrets.token_hex(16)
    with running_mesh(state_dir, "--workers", "2", "--otlp-endpoint", spans.endpoint, within=180) as mesh:
        yield mesh
        workers = [psutil.Process(mesh.process(name)["pid"]) for name in ("worker-0", "worker-1")]
        engines = [process for worker in workers for process in worker.children(recursive=True)]
        assert engines
        headers = {"traceparent": f"00-{trace}-{secrets.token_hex(8)}-01"}
        mesh.sdk().completions.create(model="demo", prompt="Goodbye", max_tokens=2, extra_headers=headers)
    # Workers that are stopped end well, leave nothing behind, and keep nothing to themselves.
    said = (state_dir.parent / f"{state_dir.name}.log").read_text().partition("stopping")[2]
    assert "exit code" not in said
    assert "did not stop" not in said
    assert psutil.wait_procs(engines, timeout=2)[1] == []
    assert ("tokenloom-inference: generate", "tokenloom-inference: decode") in spans.edges(trace)
