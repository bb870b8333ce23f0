"""The GPUs of a worker, by NVML: which they are, and whether there is room on them."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, Final

import pynvml

from services.common.config import ConfigError

__all__ = ["Gpu", "check_room", "gpu_names", "gpu_uuids", "read_gpus", "wait_for_room"]

_log = logging.getLogger(__name__)
_GIB: Final = 1 << 30
_POLL_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, or an instance of one that is split, and who holds memory on it."""

    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    holders: Sequence[tuple[int, int | None]] = ()
    """Processes, with the bytes that each holds where the driver tells."""


def gpu_names(gpu: int | str | None, environment: Mapping[str, str]) -> list[str]:
    """The GPUs that `gpu` names, by index or UUID, or else CUDA_VISIBLE_DEVICES does."""
    named = str(gpu) if gpu is not None else environment.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",") if name.strip()]


def gpu_uuids(gpu: int | str | None, environment: Mapping[str, str]) -> list[str]:
    """Their UUIDs: what the router joins telemetry's readings by. None on a CPU; without NVML those named by it."""
    names = gpu_names(gpu, environment)
    if all(not name.isdigit() for name in names):
        return [name for name in names if name.startswith(("GPU-", "MIG-"))]
    try:
        with _nvml():
            return [_uuid(_handle(name)) for name in names]
    except (pynvml.NVMLError, ConfigError) as error:
        _log.warning("NVML doesn't know this worker's GPU, so the router won't", extra={"cause": str(error)})
        return []


def read_gpus(names: Sequence[str]) -> list[Gpu] | None:
    """The GPUs of these names, as they are now; None where there is no NVML to ask.

    Raises:
        ConfigError: there is no such GPU, or it is split and no instance of it is named.
    """
    try:
        with _nvml():
            return [_gpu(name) for name in names]
    except pynvml.NVMLError as error:
        _log.warning("NVML can't be asked what is free on this worker's GPU", extra={"cause": str(error)})
        return None


def check_room(gpus: Sequence[Gpu], share: float) -> None:
    """Checks that each has room for a worker that takes `share` of its memory.

    Raises:
        ConfigError: one hasn't, with what is there and the setting to change.
    """
    for gpu in gpus:
        wanted = gpu.total_bytes * share
        if gpu.free_bytes >= wanted:
            continue
        held = gpu.total_bytes - gpu.free_bytes
        most = int(100 * gpu.free_bytes / gpu.total_bytes) / 100
        advice = f"set it to {most:g} or less, or free the GPU" if most >= 0.01 else "free the GPU, or take another one"
        raise ConfigError(
            f"gpu_memory_utilization: {share:g} of the {_gib(gpu.total_bytes)} of {gpu.uuid} ({gpu.name}) is "
            f"{_gib(wanted)}, and {_gib(gpu.free_bytes)} is free: {_gib(held)} is held{_by(gpu.holders)}; {advice}"
        )


def wait_for_room(names: Sequence[str], share: float, *, seconds: float) -> None:
    """Waits, for so many seconds at most, until there is room: whoever had it before may only just have ended. Blocks.

    Raises:
        ConfigError: there is none, or no such GPU.
    """
    deadline = monotonic() + seconds
    while True:
        gpus = read_gpus(names)
        if gpus is None:
            return
        try:
            check_room(gpus, share)
        except ConfigError:
            if monotonic() >= deadline:
                raise
        else:
            return
        sleep(_POLL_SECONDS)


def _gpu(name: str) -> Gpu:
    handle = _handle(name)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        uuid=_uuid(handle),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        holders=_holders(handle),
    )


def _handle(name: str) -> Any:
    get: Callable[[], Any]
    if name.isdigit():
        get = lambda: pynvml.nvmlDeviceGetHandleByIndex(int(name))  # noqa: E731  # two ways to do the same
    else:
        get = lambda: pynvml.nvmlDeviceGetHandleByUUID(name)  # noqa: E731
    try:
        handle = get()
    except (pynvml.NVMLError_InvalidArgument, pynvml.NVMLError_NotFound) as error:
        there = ", ".join(f"{index}: {uuid}" for index, uuid in enumerate(_all_uuids())) or "none"
        raise ConfigError(f"gpu: there is no GPU {name!r} here; NVML knows {there}") from error
    instances = _instances(handle)
    if instances:
        raise ConfigError(f"gpu: {name!r} is split into instances; name one of them: {', '.join(instances)}")
    return handle


def _instances(handle: Any) -> list[str]:
    """The UUIDs of a GPU's MIG instances; none where it isn't split."""
    found: list[str] = []
    # Cards that can't be split don't support the question, and instances themselves don't either.
    with suppress(pynvml.NVMLError_NotSupported, pynvml.NVMLError_InvalidArgument, pynvml.NVMLError_FunctionNotFound):
        if pynvml.nvmlDeviceGetMigMode(handle)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return []
        for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            with suppress(pynvml.NVMLError_NotFound):
                found.append(_uuid(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)))
    return found


def _holders(handle: Any) -> list[tuple[int, int | None]]:
    try:
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        # Who it is only makes the message better.
        return []
    return [(one.pid, None if one.usedGpuMemory is None else int(one.usedGpuMemory)) for one in running]


def _all_uuids() -> Iterator[str]:
    for index in range(pynvml.nvmlDeviceGetCount()):
        yield _uuid(pynvml.nvmlDeviceGetHandleByIndex(index))


def _uuid(handle: Any) -> str:
    return _text(pynvml.nvmlDeviceGetUUID(handle))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _by(holders: Sequence[tuple[int, int | None]]) -> str:
    if not holders:
        return " by others"
    listed = (f"process {pid}" + ("" if held is None else f" {_gib(held)}") for pid, held in holders)
    return f" by others ({', '.join(listed)})"


def _gib(count: float) -> str:
    return f"{count / _GIB:.1f} GiB"


@contextmanager
def _nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()
