"""Whether one tenant can tell by the time to first token what another one has asked, over real vLLM."""

import json
import time
from collections.abc import Callable
from contextlib import closing

import httpx
import pytest

from tests.support.commands import tokenloom
from tests.support.mesh import Mesh
from tests.support.statistics import mann_whitney
from tests.support.waiting import wait_until

_ROUNDS = 40
_MODEL = "demo"


def _client(mesh: Mesh, name: str) -> httpx.Client:
    """A tenant of its own."""
    key = json.loads(tokenloom(mesh, "keys", "create", "--name", name, "--json").stdout)["key"]
    client = httpx.Client(base_url=mesh.edge, headers={"authorization": f"Bearer {key}"}, timeout=30)
    wait_until(lambda: client.get("/v1/models").status_code == 200, within=2)
    return client


def _asked(client: httpx.Client, prompt: str) -> tuple[float, int]:
    """The seconds until the answer, which is one token, and how many tokens of the prompt were cached."""
    body = {"model": _MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    began = time.perf_counter()
    answer = client.post("/v1/completions", json=body)
    seconds = time.perf_counter() - began
    usage = answer.json()["usage"]
    return seconds, (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _probe(
    victim: Callable[[str], object], prober: Callable[[str], tuple[float, int]], label: str, rounds: int = _ROUNDS
) -> tuple[float, int]:
    """The p-value that prompts which the victim has asked take as long as others do, and what of them was cached."""
    known: list[float] = []
    unknown: list[float] = []
    cached = 0
    for number in range(rounds):
        secrets = [f"{label} {kind} {number}: " + f"secret{number} " * 60 for kind in ("known", "other")]
        victim(secrets[0])
        for took, prompt in sorted(zip((known, unknown), secrets, strict=True), key=lambda _: number % 2):
            seconds, hit = prober(prompt)
            took.append(seconds)
            cached += hit
    return mann_whitney(known, unknown), cached


def test_no_tenant_learns_from_the_time_to_first_token_what_another_one_has_asked(vllm_mesh: Mesh) -> None:
    # 104
    with closing(_client(vllm_mesh, "probe-victim")) as victim, closing(_client(vllm_mesh, "probe-other")) as attacker:
        # The cache is there, and whose it is finds it.
        _, own = _probe(lambda prompt: _asked(victim, prompt), lambda prompt: _asked(victim, prompt), "own", rounds=4)
        assert own > 0
        # Chance alone is below 0.01 once in a hundred times, and whatever tells is so each time.
        for attempt in range(3):
            p_value, cached = _probe(
                lambda prompt: _asked(victim, prompt), lambda prompt: _asked(attacker, prompt), f"probe {attempt}"
            )
            assert cached == 0
            if p_value > 0.01:
                return
    pytest.fail(f"known prompts take another time than unknown ones: p = {p_value:.2g}")
