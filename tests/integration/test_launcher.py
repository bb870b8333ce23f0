"""`tokenloom up` as users run it, with simulated engines."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from services.common.keystore import KeyStore
from services.mesh.child import Backoff
from tests.support.mesh import Mesh, running_mesh
from tests.support.ports import free_port
from tests.support.waiting import wait_until

pytestmark = pytest.mark.alone

TOKENLOOM = [sys.executable, "-m", "services.mesh"]
SIMULATED = ("--engine", "sim", "--workers", "2")
LARGE_LOG_BYTES = 17 << 20


def tokenloom(*arguments: str, within: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOKENLOOM, *arguments], capture_output=True, text=True, check=False, timeout=within)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One whose router wrote a log that was large already."""
    state = tmp_path_factory.mktemp("launcher") / "state"
    (state / "logs").mkdir(parents=True)
    with (state / "logs" / "router.jsonl").open("wb") as log:
        log.truncate(LARGE_LOG_BYTES)
    with running_mesh(state, *SIMULATED) as running:
        yield running


def pids(mesh: Mesh) -> dict[str, int]:
    return {process["name"]: process["pid"] for process in mesh.state["processes"]}


def launcher_of(mesh: Mesh) -> int:
    return int((mesh.state_dir / "lock").read_text())


def completes(mesh: Mesh, key: str | None = None) -> int:
    headers = mesh.headers if key is None else {"authorization": f"Bearer {key}"}
    body = {"model": "sim", "prompt": "hi", "max_tokens": 2}
    return httpx.post(f"{mesh.edge}/v1/completions", json=body, headers=headers, timeout=10).status_code


def test_mesh_json_has_one_entry_for_each_process(mesh: Mesh) -> None:
    state = mesh.state
    assert state.keys() == {"edge", "operators", "admin_key", "processes"}
    listed = {process["name"]: process for process in state["processes"]}
    assert {name: process["service"] for name, process in listed.items()} == {
        "telemetry": "telemetry",
        "router": "router",
        "worker-0": "inference",
        "worker-1": "inference",
        "gateway": "gateway",
        "envoy": "envoy",
    }
    for process in listed.values():
        assert process.keys() == {"name", "service", "pid", "ports"}
        assert psutil.Process(process["pid"]).ppid() == launcher_of(mesh)
    assert listed["worker-0"]["ports"].keys() == {"grpc", "metrics"}
    assert listed["gateway"]["ports"].keys() == {"grpc", "http", "metrics"}
    assert listed["envoy"]["ports"].keys() == {"http", "admin", "fallback"}
    assert state["operators"] == state["edge"]
    assert state["edge"] == f"http://127.0.0.1:{listed['envoy']['ports']['http']}"
    assert (mesh.state_dir / "mesh.json").stat().st_mode & 0o777 == 0o600
    assert (mesh.state_dir / "admin_key").stat().st_mode & 0o777 == 0o600


def test_the_first_request_after_mesh_json_works(mesh: Mesh) -> None:
    assert completes(mesh) == 200


def test_the_printed_curl_streams(mesh: Mesh) -> None:
    said = (mesh.state_dir.parent / "state.log").read_text()
    assert "starting worker-0 (sim)…  ready in" in said
    assert "The engines are simulated: their answers are made-up words" in said
    command = said[said.index("curl -N") :]
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    # What people do with it: paste it into a shell.
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=20)
    assert ran.stdout.startswith("data: {")
    assert ran.stdout.rstrip().endswith("data: [DONE]")


def test_status_says_that_all_is_ready(mesh: Mesh) -> None:
    told = tokenloom("status", "--json", "--state-dir", str(mesh.state_dir))
    assert told.returncode == 0
    assert {row["state"] for row in json.loads(told.stdout)["processes"]} == {"ready"}
    table = tokenloom("status", "--state-dir", str(mesh.state_dir)).stdout.splitlines()
    assert table[0] == mesh.edge
    assert len(table) == 2 + 6


def test_logs_are_json_lines_one_file_a_process(mesh: Mesh) -> None:
    completes(mesh)
    logs = [mesh.state_dir / "logs" / f"{name}.jsonl" for name in pids(mesh)]
    wait_until(lambda: all(log.stat().st_size for log in logs), within=5)
    for log in logs:
        for line in log.read_text().splitlines():
            assert json.loads(line)["service"], line


def test_a_log_that_has_grown_large_is_put_aside_when_its_process_starts(mesh: Mesh) -> None:
    logs = mesh.state_dir / "logs"
    assert (logs / "router.jsonl.1").stat().st_size == LARGE_LOG_BYTES
    assert (logs / "router.jsonl").stat().st_size < 1 << 20


def test_a_key_works_within_a_second_and_stops_within_a_second(mesh: Mesh) -> None:
    state = ("--state-dir", str(mesh.state_dir))
    made = json.loads(tokenloom("keys", "create", "--name", "ada", "--json", *state).stdout)
    wait_until(lambda: completes(mesh, made["key"]) == 200, within=1)
    assert tokenloom("keys", "revoke", made["id"], *state).returncode == 0
    wait_until(lambda: completes(mesh, made["key"]) == 401, within=1)


def test_a_second_launcher_on_the_same_folder_is_refused(mesh: Mesh) -> None:
    refused = tokenloom("up", *SIMULATED, "--edge-port", str(free_port()), "--state-dir", str(mesh.state_dir))
    assert refused.returncode == 1
    assert f"process {launcher_of(mesh)}" in refused.stdout
    assert completes(mesh) == 200


def test_an_edge_port_that_is_taken_is_named(mesh: Mesh, tmp_path: Path) -> None:
    port = mesh.edge.rpartition(":")[2]
    refused = tokenloom("up", *SIMULATED, "--edge-port", port, "--state-dir", str(tmp_path / "other"))
    assert refused.returncode == 2
    assert port in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["telemetry", "router", "worker-1", "gateway", "envoy"])
def test_what_is_killed_comes_back_on_the_ports_that_it_had(mesh: Mesh, name: str) -> None:
    before = mesh.process(name)
    os.kill(before["pid"], signal.SIGKILL)
    wait_until(lambda: mesh.process(name)["pid"] != before["pid"], within=20)
    assert mesh.process(name)["ports"] == before["ports"]
    wait_until(lambda: completes(mesh) == 200, within=10)


def test_killing_the_launcher_leaves_nothing_behind_and_a_folder_is_used_again_with_its_key_unless_that_was_revoked(
    tmp_path: Path,
) -> None:
    state = tmp_path / "state"
    command = [*TOKENLOOM, "up", *SIMULATED, "--edge-port", str(free_port()), "--state-dir", str(state)]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until((state / "mesh.json").exists, within=30)
        tree = psutil.Process(launcher.pid).children(recursive=True)
        key = Mesh(state_dir=state).key
        assert len(tree) >= 6
    finally:
        launcher.kill()
        launcher.wait(5)
    assert psutil.wait_procs(tree, timeout=5)[1] == []
    assert tokenloom("status", "--state-dir", str(state)).returncode == 1
    # Nobody was left to remove it; the next launcher would, but the test must not take it for the next one's.
    (state / "mesh.json").unlink()
    began = time.monotonic()
    with running_mesh(state, *SIMULATED) as again:
        assert again.key == key
        assert completes(again) == 200
    assert time.monotonic() - began < 30
    with KeyStore(state / "keys.db") as store:
        assert store.revoke(store.list()[0].id)
    with running_mesh(state, *SIMULATED, "--no-restart") as mesh:
        assert mesh.key != key
        assert completes(mesh) == 200
        check_that_what_dies_stays_dead(mesh)


def check_that_what_dies_stays_dead(mesh: Mesh) -> None:
    pid = mesh.process("worker-1")["pid"]
    os.kill(pid, signal.SIGKILL)
    log = mesh.state_dir.parent / "state.log"
    wait_until(lambda: "worker-1 was ended by SIGKILL" in log.read_text(), within=5)
    assert mesh.process("worker-1")["pid"] == pid
    assert tokenloom("status", "--state-dir", str(mesh.state_dir)).returncode == 1


def test_up_detached_returns_when_ready_and_down_lets_a_stream_finish_takes_nothing_new_and_stops_it_all(
    tmp_path: Path,
) -> None:
    state = ("--state-dir", str(tmp_path / "state"))
    slow = ("--sim", "decode_step_ms=20")
    started = tokenloom("up", *SIMULATED, *slow, "--edge-port", str(free_port()), "--detach", *state, within=40)
    try:
        assert started.returncode == 0, started.stdout
        assert "curl -N" in started.stdout
        mesh = Mesh(state_dir=tmp_path / "state")
        assert completes(mesh) == 200
        tree = psutil.Process(launcher_of(mesh)).children(recursive=True)
        check_that_down_lets_a_stream_finish(mesh)
    finally:
        tokenloom("down", *state)
    assert psutil.wait_procs(tree, timeout=5)[1] == []
    assert not (tmp_path / "state" / "mesh.json").exists()
    assert tokenloom("down", *state).returncode == 0


def check_that_down_lets_a_stream_finish(mesh: Mesh) -> None:
    body = {"model": "sim", "prompt": "x", "max_tokens": 100, "stream": True, "ignore_eos": True}
    url, headers = f"{mesh.edge}/v1/completions", mesh.headers
    with httpx.stream("POST", url, json=body, headers=headers, timeout=10) as answer:
        lines = answer.iter_lines()
        next(lines)
        down = subprocess.Popen([*TOKENLOOM, "down", "--state-dir", str(mesh.state_dir)], stdout=subprocess.DEVNULL)
        wait_until(lambda: not accepts(url), within=5)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert down.wait(20) == 0


def accepts(url: str) -> bool:
    try:
        httpx.post(url, json={}, timeout=1)
    except httpx.TransportError:
        # One that came in the very moment may be cut off instead of refused.
        return False
    return True


def test_a_process_that_cannot_start_is_named_with_what_it_said(tmp_path: Path) -> None:
    config = tmp_path / "mesh.yaml"
    mesh = {
        "models": [{"name": "sim"}],
        "pools": [{"name": "p", "serves": ["sim"], "workers": [{"name": "w", "engine": "sim"}]}],
        "edge": {"port": free_port()},
        "redis_url": "nonsense://here",
    }
    config.write_text(json.dumps(mesh))
    ran = tokenloom("up", "--config", str(config), "--state-dir", str(tmp_path / "state"))
    assert ran.returncode == 1
    assert "tokenloom: telemetry ended with exit code 2 before it was ready" in ran.stdout
    assert "  | redis_url: " in ran.stdout
    assert not (tmp_path / "state" / "mesh.json").exists()


def test_a_model_folder_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    config = tmp_path / "mesh.yaml"
    mesh = {
        "models": [{"name": "m", "path": "./nowhere"}],
        "pools": [{"name": "p", "serves": ["m"], "workers": [{"name": "w", "engine": "vllm"}]}],
    }
    config.write_text(json.dumps(mesh))
    ran = tokenloom("up", "--config", str(config), "--state-dir", str(tmp_path / "state"))
    assert ran.returncode == 2
    assert f"models[0].path: there is no folder, got the value '{tmp_path}/nowhere'" in ran.stderr
    assert ran.stdout == ""


def test_the_wait_before_a_restart_doubles_and_is_forgotten_by_a_long_life() -> None:
    backoff = Backoff()
    waits = [backoff.after(0.5) for _ in range(8)]
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert backoff.after(10.0) == 0.1
