"""A mesh with simulated engines of which one is slow, and with a model that has a bad name."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.mesh import Mesh, running_mesh

__all__ = ["EVIL", "MODEL", "ended", "running_uneven_mesh"]

MODEL = "sim"
EVIL = "<img src=x onerror=document.title='owned'>"
_CONFIG = f"""
models: [{{name: {MODEL}}}, {{name: "{EVIL}"}}]
pools:
  - name: large
    serves: [{MODEL}]
    workers:
      - {{name: quick-0, engine: sim, sim: {{decode_step_ms: 10, max_num_seqs: 2}}}}
      - {{name: quick-1, engine: sim, sim: {{decode_step_ms: 10, max_num_seqs: 2}}}}
      - {{name: slow-0, engine: sim, sim: {{decode_step_ms: 80, max_num_seqs: 2}}}}
  - name: evil
    serves: ["{EVIL}"]
    workers: [{{name: evil-0, engine: sim}}]
ledger: {{default_gpu_hour_price: 1.5}}
"""


@contextmanager
def running_uneven_mesh(folder: Path) -> Iterator[Mesh]:
    """Runs it until the block is left; every worker of the model has measured itself."""
    config = folder / "mesh.yaml"
    config.write_text(_CONFIG)
    with running_mesh(folder / "state", "--config", str(config)) as mesh:
        asyncio.run(_ask_many(mesh))
        yield mesh


async def _ask_many(mesh: Mesh) -> None:
    async with httpx.AsyncClient(headers=mesh.headers, timeout=20) as client:
        body = {"model": MODEL, "prompt": "hello", "max_tokens": 12, "ignore_eos": True}
        asked = [client.post(f"{mesh.edge}/v1/completions", json=body) for _ in range(12)]
        assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}


def ended(mesh: Mesh, **wanted: Any) -> list[dict[str, Any]]:
    """Requests that have ended, as operators are told."""
    answer = httpx.get(f"{mesh.edge}/v1/admin/requests", params=wanted, headers=mesh.headers, timeout=5)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found
