"""What `tokenloom doctor` finds on a machine: stub cards, files, ports, a real Redis, databases."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.mesh.config_checks import config_findings, database_finding, port_finding, redis_finding
from services.mesh.finding import Finding, Level
from services.mesh.machine_checks import machine_findings
from tests.support.commands import command
from tests.support.nvml.stub import L40, RTX_4090, NvmlStub
from tests.support.ports import free_port
from tests.support.redis import redis_server

GIB = 1 << 30


def doctor(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, dict[str, dict[str, str]]]:
    """Its exit code, and what it found by subject; in a process of its own, which loads its own NVML."""
    line = [sys.executable, "-m", "services.mesh", "doctor", "--json", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False, env=environment)
    assert done.stderr == ""
    return done.returncode, {finding["subject"]: finding for finding in json.loads(done.stdout)}


def test_cards_that_fail_are_trouble_and_full_ones_a_note(tmp_path: Path) -> None:
    stub = NvmlStub(tmp_path)
    lost = {**{name: getattr(L40, name) for name in L40.__dataclass_fields__}, "uuid": "GPU-lost", "error": 15}
    full = {**{name: getattr(L40, name) for name in L40.__dataclass_fields__}, "memory_used": 44 * GIB}
    stub.show([RTX_4090, type(L40)(**full), type(L40)(**lost)])
    code, found = doctor("--state-dir", str(tmp_path / "state"), environment=stub.environment)
    assert code == 1
    assert found["NVIDIA driver"]["said"] == "570.86.10, 3 GPUs"
    assert [found[f"GPU {index}"]["level"] for index in range(3)] == ["ok", "note", "trouble"]
    assert "23.0 of 24.0 GiB free" in found["GPU 0"]["said"]
    assert "gpu_memory_utilization" in found["GPU 1"]["advice"]
    assert "Xid" in found["GPU 2"]["advice"]


def test_a_machine_without_cards_is_told_what_it_has(tmp_path: Path) -> None:
    found = {one.subject: one for one in machine_findings(tmp_path, thorough=False)}
    assert found["Python"].level is Level.OK
    assert found["Envoy"].said.startswith("1.")
    assert found.keys() >= {"memory", "disk", "open files", "clock", "NVIDIA driver", "vLLM"}
    # Nothing that is fine needs advice, and nothing that is not is without it.
    assert all(one.advice for one in found.values() if one.level is Level.TROUBLE)


def test_an_envoy_that_does_not_run_is_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "envoy"
    program.write_text("#!/bin/false\n")
    program.chmod(0o755)
    monkeypatch.setenv("TOKENLOOM_ENVOY", str(program))
    found = next(one for one in machine_findings(tmp_path, thorough=False) if one.subject == "Envoy")
    assert (found.level, found.said) == (Level.TROUBLE, f"{program} does not run")


def mesh(tmp_path: Path, **more: Any) -> Path:
    path = tmp_path / "mesh.yaml"
    model = {"name": "m", **more.pop("model", {})}
    worker = {"name": "w", "engine": "vllm" if "path" in model else "sim"}
    pools = [{"name": "p", "serves": ["m"], "workers": [worker]}]
    path.write_text(json.dumps({"models": [model], "pools": pools, "edge": {"port": free_port()}, **more}))
    return path


def levels(found: list[Finding]) -> dict[str, str]:
    return {one.subject: one.level.value for one in found}


def test_a_configuration_is_looked_over_with_all_that_it_names(tmp_path: Path) -> None:
    dead = free_port()
    with redis_server(tmp_path) as server:
        path = mesh(tmp_path, redis_url=server.url, database_url=f"postgresql://me:secret@127.0.0.1:{dead}/none")
        found = list(config_findings(path, runs=False))
    assert levels(found) == {"configuration": "ok", "port": "ok", "Redis": "ok", "database": "trouble"}
    assert "secret" not in str(found)
    gone = redis_finding(f"redis://:secret@127.0.0.1:{dead}/0")
    assert (gone.level, "secret" in gone.said, bool(gone.advice)) == (Level.TROUBLE, False, True)


def test_a_server_behind_a_worker_is_to_be_reached(tmp_path: Path) -> None:
    path = mesh(tmp_path)
    described = json.loads(path.read_text())

    def found(port: int) -> Level:
        upstream = {"url": f"http://127.0.0.1:{port}/v1"}
        described["pools"][0]["workers"] = [{"name": "w", "engine": "openai", "upstream": upstream}]
        path.write_text(json.dumps(described))
        return next(one.level for one in config_findings(path, runs=True) if one.subject == "server behind w")

    with socket.create_server(("127.0.0.1", 0)) as server:
        assert found(server.getsockname()[1]) is Level.OK
    assert found(free_port()) is Level.TROUBLE


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("models: 1", "models"),
        ("{", "mesh.yaml"),
        ('{"models": [{"name": "m", "pth": "x"}], "pools": []}', "pth"),
    ],
)
def test_a_configuration_that_is_wrong_is_told_by_its_key(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(content)
    (found,) = config_findings(path, runs=False)
    assert found.level is Level.TROUBLE
    assert said in found.said


def test_a_model_that_is_half_there_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = mesh(tmp_path, model={"path": str(folder)})
    assert levels(list(config_findings(path, runs=True))) == {"configuration": "ok", "model m": "trouble"}
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    (folder / "config.json").write_text(json.dumps(dict.fromkeys(sizes, 8)))
    assert levels(list(config_findings(path, runs=True))) == {"configuration": "ok", "model m": "note"}


def test_a_port_that_is_taken_and_a_database_that_is_none_are_trouble(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert port_finding("127.0.0.1", taken.getsockname()[1]).level is Level.TROUBLE
    file = tmp_path / "keys.db"
    assert database_finding(str(file)).level is Level.OK
    assert not file.exists()
    file.write_text("this is no database, and never was one")
    assert database_finding(str(file)).level is Level.TROUBLE


def test_without_a_mesh_the_exit_code_is_that_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.mesh.doctor._EDGE_PORT", free_port())
    told = command("doctor", "--state-dir", str(tmp_path))
    assert "mesh: none runs" in told.stdout
    assert told.returncode == ("TROUBLE" in told.stdout)
