"""Which GPUs a worker runs on, by NVML's UUIDs: what the router joins telemetry's readings by."""

import logging
from collections.abc import Mapping

import pynvml

__all__ = ["gpu_uuids"]

_log = logging.getLogger(__name__)


def gpu_uuids(gpu: int | str | None, environment: Mapping[str, str]) -> list[str]:
    """The UUIDs of `gpu` (an index or a UUID), or else of CUDA_VISIBLE_DEVICES; none on a CPU or without NVML."""
    named = [str(gpu)] if gpu is not None else environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [name.strip() for name in named if name.strip()]
    if all(not name.isdigit() for name in names):
        return [name for name in names if name.startswith(("GPU-", "MIG-"))]
    return _uuids_of_indexes([int(name) for name in names if name.isdigit()])


def _uuids_of_indexes(indexes: list[int]) -> list[str]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        _log.warning("no NVML, so the router won't know this worker's GPU", extra={"cause": str(error)})
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in indexes]
        return [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    except pynvml.NVMLError as error:
        _log.warning("NVML doesn't know this worker's GPU", extra={"gpus": indexes, "cause": str(error)})
        return []
    finally:
        pynvml.nvmlShutdown()
