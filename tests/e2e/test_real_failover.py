"""Streams of real vLLM go on with another worker's engine, to the last token as if nothing had been."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.demo_model import demo_model
from tests.support.failover import said
from tests.support.mesh import running_mesh

DRAWN: dict[str, Any] = {"temperature": 1.5, "top_k": 1}
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]


async def test_streams_survive_the_loss_of_one_of_two_workers(tmp_path: Path) -> None:
    arguments = ("--engine", "vllm", "--model", str(demo_model()), "--workers", "2")
    with running_mesh(tmp_path / "state", *arguments, within=180) as mesh:
        model = mesh.sdk().models.list().data[0].id
        prompts = [f"{index} mice lived in a small house" for index in range(32)]
        # Some are held to a form, and of some each token is drawn, from one.
        more: list[dict[str, Any]] = [{}, {"structured_outputs": {"regex": "[a-z ]{2000}"}}, DRAWN]
        undisturbed = await said(mesh, model, prompts, tokens=200, more=more)
        assert {tokens for _, tokens in undisturbed.values()} == {200}
        assert await said(mesh, model, prompts, tokens=200, more=more, kill=["worker-1"]) == undisturbed
