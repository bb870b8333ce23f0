"""`tokenloom bench` against a running mesh, on both lanes."""

import json

import pytest

from services.mesh.__main__ import main
from tests.support.mesh import Mesh


@pytest.mark.parametrize("lane", [("--api", "openai"), ("--api", "tokenloom"), ("--endpoint", "completions")])
def test_a_load_is_measured(sim_mesh: Mesh, lane: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    load = ("--requests", "20", "--concurrency", "4", "--output-tokens", "10", "--ignore-eos")
    assert main(["bench", "--state-dir", str(sim_mesh.state_dir), *lane, *load, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["requests"] == {"sent": 20, "ok": 20, "not_sent": 0}
    assert report["throughput"]["output_tokens"] == pytest.approx(10 * report["throughput"]["requests"], rel=0.01)
    assert 0 < report["ttft_ms"]["p50"] < report["e2e_ms"]["p50"]
    assert report["tpot_ms"]["p50"] > 5


def test_requests_that_come_at_a_rate_and_are_refused_are_reported(
    sim_mesh: Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ("--requests", "5", "--rate", "100", "--warm-up", "0")
    assert main(["bench", "--state-dir", str(sim_mesh.state_dir), "--model", "nobodys", *load]) == 1
    assert "0 of 5 answered" in (said := capsys.readouterr().out)
    assert "failed: 5 model_not_found" in said
