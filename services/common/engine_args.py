"""Checks a worker's engine_args before anything starts, whether or not vLLM is installed here."""

import difflib
from collections.abc import Mapping
from typing import Any, Final

from services.common.config import ConfigError
from services.common.vllm_options import OPTIONS, VERSION

__all__ = ["check_engine_args", "parallel_size"]

_SELF: Final = "a worker is one engine: list more workers instead"
# What is said elsewhere, or is ours to decide.
_OURS: Final = {
    "model": "it is models[].path",
    "served_model_name": "it is models[].name",
    "gpu_memory_utilization": "it is the worker's own gpu_memory_utilization",
    "otlp_traces_endpoint": "it is otlp_endpoint",
    "enable_lora": "it is models[].adapters_dir",
    "max_cpu_loras": "it is models[].max_adapters",
    "reasoning_parser": "it is models[].reasoning_parser",
    "disable_log_stats": "load reports need vLLM's statistics",
    "scheduling_policy": "keys have priorities, so it is 'priority'",
    "max_num_queued_reqs": "the worker bounds its queue itself, by max_queued",
    "max_num_queued_tokens": "the worker bounds its queue itself, by max_queued",
    "device_ids": "it is the worker's gpu",
    **{name: _SELF for name in OPTIONS if name.startswith("data_parallel_")},
}
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "list": (list,),
    "dict": (dict,),
}
# Lists of values that vLLM leaves open for plugins, and that a typo is likelier to miss than a plugin to need.
_CLOSED: Final = frozenset({"quantization", "distributed_executor_backend"})
_AT_LEAST: Final = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "block_size": 1,
    "kv_cache_memory_bytes": 1,
    "num_gpu_blocks_override": 1,
    "max_loras": 1,
    "nnodes": 1,
    "cpu_offload_gb": 0,
    "max_logprobs": -1,
    "max_model_len": -1,
}


def check_engine_args(arguments: Mapping[str, Any], where: str) -> None:
    """Checks the arguments; `where` begins the messages and names where they are, for example "engine_args".

    Raises:
        ConfigError: an argument that vLLM hasn't or that isn't to be given here, or a value that it can't have.
    """
    for name, value in arguments.items():
        key = f"{where}.{name}"
        if name not in OPTIONS:
            raise ConfigError(f"{key}: vLLM {VERSION} has no such argument{_did_you_mean(name)}")
        if name in _OURS:
            raise ConfigError(f"{key}: can't be set here, {_OURS[name]}")
        _check_value(key, name, value)


def parallel_size(arguments: Mapping[str, Any]) -> int:
    """How many GPUs an engine with these arguments takes."""
    return int(arguments.get("tensor_parallel_size", 1)) * int(arguments.get("pipeline_parallel_size", 1))


def _check_value(key: str, name: str, value: Any) -> None:
    allowed = OPTIONS[name]
    if name in _CLOSED:
        allowed = tuple(one for one in allowed if one != "str")
    if not any(_fits(value, one) for one in allowed):
        raise ConfigError(
            f"{key}: expected {_words(allowed)}, got the value {value!r}{_did_you_mean_of(value, allowed)}"
        )
    least = _AT_LEAST.get(name)
    if least is not None and value is not None and value < least:
        raise ConfigError(f"{key}: expected at least {least}, got the value {value!r}")


def _fits(value: Any, allowed: str) -> bool:
    if allowed == "null":
        return value is None
    if allowed in _TYPES:
        # True is an int for Python alone.
        return isinstance(value, _TYPES[allowed]) and (allowed == "bool" or not isinstance(value, bool))
    if allowed.startswith("'"):
        return isinstance(value, str) and value == allowed.strip("'")
    return isinstance(value, int) and not isinstance(value, bool) and value == int(allowed)


def _words(allowed: tuple[str, ...]) -> str:
    return allowed[0] if len(allowed) == 1 else f"{', '.join(allowed[:-1])} or {allowed[-1]}"


def _did_you_mean(name: str) -> str:
    near = difflib.get_close_matches(name, OPTIONS, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _did_you_mean_of(value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        return ""
    near = difflib.get_close_matches(value, [one.strip("'") for one in allowed if one.startswith("'")], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
