"""What operators see of a real mesh with simulated engines, one of which is slow: top, doctor, explain."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import httpx
import pytest

from tests.support.commands import command, tokenloom
from tests.support.mesh import Mesh
from tests.support.uneven_mesh import MODEL, ended
from tests.support.waiting import wait_until

SLOW = "a decode step takes"
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


def test_top_tells_scripts_everything_once(uneven_mesh: Mesh) -> None:
    told = tokenloom(uneven_mesh, "top", "--once", "--json")
    assert told.returncode == 0, told.stderr
    seen = json.loads(told.stdout)
    assert [(worker["name"], worker["state"]) for worker in seen["workers"]] == [
        ("evil-0", "ready"),
        ("quick-0", "ready"),
        ("quick-1", "ready"),
        ("slow-0", "ready"),
    ]
    assert [bool(worker["slow_reasons"]) for worker in seen["workers"]] == [False, False, False, True]
    (trouble,) = seen["troubles"]
    assert trouble["subject"] == "slow-0"
    assert SLOW in trouble["what"]
    assert (seen["driver"], seen["gpus"], seen["waiting"]) == ("absent", [], 0)


def test_top_lives_in_a_terminal_of_eighty_columns_and_leaves_it_as_it_was(uneven_mesh: Mesh) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(follower)
    arguments = [sys.executable, "-m", "services.mesh", "top", "--state-dir", str(uneven_mesh.state_dir)]
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(arguments, stdin=follower, stdout=follower, stderr=follower, env=environment)
    try:
        said = read_until(leader, "slow-0: slow: a decode step", within=20)
        assert "\x1b[?1049h" in said
        # It goes on by itself, as the mesh tells what is new.
        read_until(leader, "4/4 workers", within=5)
        os.write(leader, b"q")
        last = read_until(leader, "\x1b[?1049l", within=5)
        assert process.wait(5) == 0
        assert "Traceback" not in said + last
        assert termios.tcgetattr(follower) == before
    finally:
        process.kill()
        process.wait()
        os.close(leader)
        os.close(follower)


def read_until(terminal: int, text: str, *, within: float) -> str:
    said, deadline = "", time.monotonic() + within
    while text not in said:
        left = deadline - time.monotonic()
        assert left > 0, f"{text!r} was not shown: {said[-2000:]!r}"
        if select.select([terminal], [], [], left)[0]:
            said = _COLORS.sub("", said + os.read(terminal, 65_536).decode(errors="replace"))
    return said


def test_top_without_a_mesh_says_so(tmp_path: Path) -> None:
    told = command("top", "--once", "--state-dir", str(tmp_path))
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == f"tokenloom: no mesh runs in {tmp_path}\n"


def test_another_mesh_is_reached_by_its_url_and_a_key(uneven_mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENLOOM_API_KEY", uneven_mesh.key)
    shown = command("top", "--once", "--edge", uneven_mesh.edge)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "slow-0" in shown.stdout
    monkeypatch.setenv("TOKENLOOM_API_KEY", "tl-nope")
    refused = command("top", "--once", "--edge", uneven_mesh.edge)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "API key" in refused.stderr
    monkeypatch.delenv("TOKENLOOM_API_KEY")
    assert "TOKENLOOM_API_KEY" in command("top", "--once", "--edge", uneven_mesh.edge).stderr


def test_doctor_finds_a_mesh_well_and_says_which_worker_is_slow(uneven_mesh: Mesh) -> None:
    told = tokenloom(uneven_mesh, "doctor", "--json")
    found = {finding["subject"]: finding for finding in json.loads(told.stdout)}
    troubles = [finding for finding in found.values() if finding["level"] == "trouble"]
    # How much memory this machine has at the moment is not this test's matter.
    assert [finding for finding in troubles if finding["subject"] not in ("memory", "disk")] == []
    assert {found[f"process {name}"]["level"] for name in ("envoy", "gateway", "router", "telemetry", "slow-0")} == {
        "ok"
    }
    assert (found["slow-0"]["level"], found["quick-0"]["level"]) == ("note", "ok")
    assert SLOW in found["slow-0"]["said"]
    assert found["slow-0"]["advice"]
    assert (found["request to sim"]["level"], found["usage"]["level"]) == ("ok", "ok")


def test_doctor_has_an_exit_code_and_advice_for_what_does_not_work(uneven_mesh: Mesh) -> None:
    assert tokenloom(uneven_mesh, "workers", "cordon", "quick-1").returncode == 0
    try:
        told = tokenloom(uneven_mesh, "doctor", "--no-requests")
    finally:
        assert tokenloom(uneven_mesh, "workers", "undrain", "quick-1").returncode == 0
    assert told.returncode == 1
    lines = told.stdout.splitlines()
    place = next(place for place, line in enumerate(lines) if "quick-1: takes no work: cordoned" in line)
    assert lines[place].startswith("TROUBLE")
    assert lines[place + 1].strip() == "→ tokenloom workers undrain gives it work again"


def test_workers_sleep_wake_and_reload_by_commands_and_doctor_names_the_one_to_use(uneven_mesh: Mesh) -> None:
    slept = tokenloom(uneven_mesh, "workers", "sleep", "quick-1")
    assert (slept.returncode, slept.stdout.startswith("quick-1 sleeps")) == (0, True), slept.stderr
    try:
        wait_until(lambda: "asleep" in listed(uneven_mesh)["quick-1"], within=5)
        told = tokenloom(uneven_mesh, "doctor", "--no-requests").stdout.splitlines()
        place = next(place for place, line in enumerate(told) if "quick-1: takes no work: asleep" in line)
        assert told[place + 1].strip() == "→ tokenloom workers wake brings it back"
    finally:
        woken = tokenloom(uneven_mesh, "workers", "wake", "--pool", "large")
    assert [line.split()[0] for line in woken.stdout.splitlines()] == ["quick-0", "quick-1", "slow-0"]
    assert " ready " in listed(uneven_mesh)["quick-1"]
    reloaded = tokenloom(uneven_mesh, "workers", "reload", "--model", MODEL)
    assert [line.split()[0] for line in reloaded.stdout.splitlines()] == ["quick-0", "quick-1", "slow-0"]
    failed = tokenloom(uneven_mesh, "workers", "reload", "--all", "--path", "/nowhere")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("tokenloom: evil-0: path: ")
    assert failed.stderr.endswith("left as they are: quick-0, quick-1, slow-0\n")


def test_commands_for_workers_and_adapters_reach_a_mesh_that_runs_elsewhere(
    uneven_mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENLOOM_API_KEY", uneven_mesh.key)
    edge = ("--edge", uneven_mesh.edge)
    shown = command("workers", *edge).stdout
    assert f"slow-0 is slow: {SLOW}" in shown
    assert command("workers", *edge, "wake", "quick-0").returncode == 0
    assert command("policy", "show", *edge).stderr == "version 1\n"
    assert command("adapters", "list", *edge).stdout.split() == ["NAME", "MODEL", "WORKERS"]
    refused = command("adapters", "load", "poet", "poet-1", "--model", MODEL, *edge)
    assert refused.returncode == 1
    assert "takes no adapters" in refused.stderr
    unknown = command("adapters", "unload", "poet", *edge)
    assert (unknown.returncode, "no worker" in unknown.stderr) == (1, True)


def listed(mesh: Mesh) -> dict[str, str]:
    """The lines of `workers list`, by worker."""
    return {line.split()[0]: line for line in tokenloom(mesh, "workers", "list").stdout.splitlines()}


def test_explain_tells_where_the_time_of_a_slow_request_went_and_why(uneven_mesh: Mesh) -> None:
    wait_until(lambda: bool(ended(uneven_mesh, worker="slow-0")), within=5)
    request_id = ended(uneven_mesh, worker="slow-0")[0]["request_id"]
    told = tokenloom(uneven_mesh, "explain", request_id)
    assert told.returncode == 0, told.stderr
    assert "on slow-0" in told.stdout
    assert f"slow-0 is slow at present: {SLOW}" in told.stdout
    decode = next(line for line in told.stdout.splitlines() if line.startswith("  decode"))
    pace = re.search(r"12 tokens, one every (\d+\.\d) ms", decode)
    assert pace is not None
    assert float(pace[1]) > 70
    assert "chosen: slow-0" in told.stdout
    as_json = json.loads(tokenloom(uneven_mesh, "explain", request_id, "--json").stdout)
    assert as_json["request"]["worker"] == "slow-0"
    assert as_json["decisions"][0]["worker_id"] == "slow-0"


def test_requests_that_ended_are_listed_for_operators_alone(uneven_mesh: Mesh) -> None:
    everything = ended(uneven_mesh)
    assert {row["outcome"] for row in everything} == {"ok"}
    assert ended(uneven_mesh, outcome="lost") == []
    assert len(ended(uneven_mesh, limit=2)) == 2
    assert [row["time"] for row in everything] == sorted((row["time"] for row in everything), reverse=True)
    for path, status in (
        ("/v1/admin/requests?limit=0", 400),
        ("/v1/admin/requests?limit=1001", 400),
        ("/v1/admin/requests/nonsense", 404),
    ):
        assert httpx.get(f"{uneven_mesh.edge}{path}", headers=uneven_mesh.headers, timeout=5).status_code == status
    made = tokenloom(uneven_mesh, "keys", "create", "--name", "plain", "--json")
    plain = {"authorization": f"Bearer {json.loads(made.stdout)['key']}"}

    def asked(path: str) -> int:
        return httpx.get(f"{uneven_mesh.edge}{path}", headers=plain, timeout=5).status_code

    wait_until(lambda: asked("/v1/models") == 200, within=5)
    assert asked("/v1/admin/requests") == asked(f"/v1/admin/requests/{everything[0]['request_id']}") == 403
