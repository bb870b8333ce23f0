"""What a worker finds out about its GPU before it starts, from a real NVML library that only claims to have GPUs."""

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.nvml.stub import L40, NOT_LOADED, RTX_4090, Card, NvmlStub
from tests.support.workers import worker_config

GIB = 1 << 30
FREE = replace(L40, memory_used=1 * GIB)
HELD = replace(L40, memory_used=30 * GIB, processes=f"4711:{29 * GIB} 4712:-")
INSTANCES = [
    Card(uuid=f"MIG-{n}", name="NVIDIA A100 MIG 1g.10gb", memory_total=10 * GIB, memory_used=n * GIB, mig_instance=1)
    for n in range(2)
]
SPLIT = Card(uuid="GPU-a100", name="NVIDIA A100", memory_total=80 * GIB, mig="MIG-0 MIG-1")
CALL = """
import json, sys
from services.common.config import ConfigError
from services.inference.gpus import gpu_uuids, wait_for_room
gpu, share, seconds = json.loads(sys.argv[1])
try:
    names = str(gpu).split(",")
    wait_for_room(names, share, seconds=seconds)
    print(json.dumps(["fits", gpu_uuids(gpu, {})]))
except ConfigError as error:
    print(json.dumps(["refused", str(error)]))
"""


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> NvmlStub:
    """The library."""
    return NvmlStub(tmp_path_factory.mktemp("nvml"))


def look(nvml: NvmlStub, gpu: int | str, share: float = 0.8, seconds: float = 0.0) -> tuple[str, Any]:
    command = [sys.executable, "-c", CALL, json.dumps([gpu, share, seconds])]
    done = subprocess.run(command, env=nvml.environment, capture_output=True, text=True, timeout=30, check=True)
    outcome, said = json.loads(done.stdout)
    return outcome, said


@pytest.mark.parametrize(
    ("gpu", "uuids"),
    [
        (0, ["GPU-l40"]),
        (1, ["GPU-4090"]),
        ("GPU-4090", ["GPU-4090"]),
        ("0,1", ["GPU-l40", "GPU-4090"]),
        ("MIG-1", ["MIG-1"]),
    ],
)
def test_gpus_are_named_by_index_by_uuid_and_by_instance(nvml: NvmlStub, gpu: int | str, uuids: list[str]) -> None:
    nvml.show([FREE, RTX_4090, SPLIT, *INSTANCES])
    assert look(nvml, gpu) == ("fits", uuids)


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        (0, ["gpu_memory_utilization: 0.8 of the 45.0 GiB of GPU-l40", "36.0 GiB", "15.0 GiB is free", "0.33 or less"]),
        (0, ["process 4711 29.0 GiB", "process 4712"]),
        ("0,1", ["GPU-l40"]),
        (7, ["gpu: there is no GPU '7'", "0: GPU-l40", "1: GPU-4090"]),
        ("GPU-none", ["gpu: there is no GPU 'GPU-none'"]),
        (2, ["gpu: '2' is split into instances", "MIG-0, MIG-1"]),
    ],
)
def test_what_does_not_fit_or_is_not_there_is_refused_with_numbers_and_names(
    nvml: NvmlStub, gpu: int | str, said: list[str]
) -> None:
    nvml.show([HELD, RTX_4090, SPLIT, *INSTANCES])
    outcome, message = look(nvml, gpu)
    assert outcome == "refused"
    assert all(part in message for part in said), message


def test_a_smaller_share_fits_beside_others(nvml: NvmlStub) -> None:
    nvml.show([HELD])
    assert look(nvml, 0, share=0.33)[0] == "fits"
    assert look(nvml, 0, share=0.34)[0] == "refused"


def test_without_nvml_nothing_is_refused(nvml: NvmlStub) -> None:
    nvml.show([HELD], error=NOT_LOADED)
    assert look(nvml, 0) == ("fits", [])


async def test_room_that_is_being_freed_is_waited_for(nvml: NvmlStub) -> None:
    nvml.show([HELD])
    looking = asyncio.create_task(asyncio.to_thread(look, nvml, 0, 0.8, 20.0))
    await asyncio.sleep(1.0)
    assert not looking.done()
    nvml.show([FREE])
    assert (await looking)[0] == "fits"


def test_a_worker_whose_card_is_taken_says_so_and_does_not_start(nvml: NvmlStub, tmp_path: Path) -> None:
    nvml.show([HELD])
    config = worker_config("vllm-0", engine="vllm", gpu=0, model={"name": "demo", "path": str(tmp_path)})
    path = tmp_path / "worker.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "services.inference", "--config", str(path)]
    done = subprocess.run(
        command, env={**os.environ, **nvml.environment}, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 2
    assert (
        "gpu_memory_utilization: 0.8 of the 45.0 GiB of GPU-l40 (NVIDIA L40) is 36.0 GiB" in done.stdout + done.stderr
    )
