"""Whether a model fits a GPU, or several: weights, KV cache, and what is left for requests."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from services.common.config import ConfigError
from services.common.cpu_cache import CPU_BLOCK_TOKENS, cpu_cache_bytes
from services.common.engine_args import parallel_size
from services.common.kv_cache import DTYPE_BYTES, KvCache, kv_cache
from services.mesh.checkpoint import Checkpoint

__all__ = ["Fit", "fit", "fit_cpu", "parse_memory"]

_GIB: Final = 1 << 30
_MEMORY: Final = re.compile(r"(?P<count>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]i?B?|B)?", re.IGNORECASE)
_UNITS: Final = {"K": 1, "M": 2, "G": 3, "T": 4}
# CUDA's context, its graphs, and what libraries take.
_FIXED_BYTES: Final = 1 << 30
# The engine's process with PyTorch in it, and the worker's own.
_CPU_FIXED_BYTES: Final = 1 << 30
_BATCHED_TOKENS: Final = 2048
_MAX_SEQS: Final = 64
_DEFAULT_LENGTH: Final = 2048
_NO_CACHE: Final = KvCache(full_bytes=0, sliding_bytes=0, window=0, kind="not known")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The sum, for each of the GPUs that a model is spread over. Sizes are bytes."""

    gpus: int
    budget_bytes: float
    """What vLLM may take."""
    weight_bytes: float
    weights_known_by: str
    overhead_bytes: float
    cache: KvCache
    knows_cache: bool = True
    """Whether it is known how much a token takes in the KV cache."""
    cache_limit: float = math.inf
    """The most that the KV cache is made to be."""
    max_model_len: int
    typical_tokens: int

    @property
    def left_bytes(self) -> float:
        """What weights and allowance leave; negative when they are too much."""
        return self.budget_bytes - self.weight_bytes - self.overhead_bytes

    @property
    def cache_bytes(self) -> float:
        """What the KV cache has."""
        return min(self.left_bytes, self.cache_limit)

    @property
    def cache_tokens(self) -> int:
        """Tokens that it holds, all of them within a window where there is one."""
        return max(0, int(self.cache_bytes // self.cache.bytes_per_token)) if self.cache.bytes_per_token else 0

    @property
    def fits(self) -> bool:
        """Whether at least one request of the longest length does; or the weights, where more isn't known."""
        return self.at_max_len >= 1 if self.knows_cache else self.left_bytes > 0

    @property
    def at_max_len(self) -> int:
        """Requests of the longest length at the same time."""
        return self._at(self.max_model_len)

    @property
    def at_typical(self) -> int:
        """Requests of a typical length at the same time."""
        return self._at(self.typical_tokens)

    @property
    def longest(self) -> int:
        """The longest request that fits alone, up to the model's own length."""
        low, high = 0, self.max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            if self.cache.sequence_bytes(middle) <= self.cache_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def _at(self, tokens: int) -> int:
        each = self.cache.sequence_bytes(tokens)
        return max(0, int(self.cache_bytes // each)) if each else 0


def fit(
    checkpoint: Checkpoint,
    *,
    gpu_bytes: float,
    share: float,
    arguments: Mapping[str, Any],
    typical_tokens: int | None = None,
) -> Fit:
    """The sum for a model on GPUs of so much memory each, with these engine_args, which are checked.

    Raises:
        ConfigError: the model's configuration doesn't tell what is needed.
    """
    # vLLM halves what was saved with 32 bits.
    dtype_bytes = _run_bytes(checkpoint, arguments, most=2.0)
    tensor = int(arguments.get("tensor_parallel_size", 1))
    return _fit(
        checkpoint,
        arguments,
        dtype_bytes,
        budget_bytes=gpu_bytes * share,
        overhead_bytes=_FIXED_BYTES + _step_bytes(checkpoint, arguments, tensor, dtype_bytes),
        typical_tokens=typical_tokens,
    )


def fit_cpu(
    checkpoint: Checkpoint, *, free_bytes: int, arguments: Mapping[str, Any], typical_tokens: int | None = None
) -> Fit:
    """The sum for a model on a CPU, as a worker sizes its KV cache there when so much memory is free.

    Raises:
        ConfigError: the model's configuration doesn't tell what is needed, or engine_args ask for more than there is.
    """
    dtype_bytes = _run_bytes(checkpoint, arguments, most=4.0)
    found = _fit(
        checkpoint,
        arguments,
        dtype_bytes,
        budget_bytes=free_bytes,
        overhead_bytes=_CPU_FIXED_BYTES + _step_bytes(checkpoint, arguments, 1, dtype_bytes),
        typical_tokens=typical_tokens,
    )
    limit = cpu_cache_bytes(found.cache, found.max_model_len, free_bytes=free_bytes, arguments=arguments)
    if not arguments.get("max_model_len") and found.knows_cache and found.cache.full_bytes:
        # Requests are as long as there is room for, less a block that vLLM keeps for itself.
        blocks = int(limit // (found.cache.bytes_per_token * CPU_BLOCK_TOKENS))
        longest = min(found.max_model_len, max(1, (blocks - 1) * CPU_BLOCK_TOKENS))
        found = replace(found, max_model_len=longest, typical_tokens=min(found.typical_tokens, longest))
    return replace(found, cache_limit=limit)


def _fit(
    checkpoint: Checkpoint,
    arguments: Mapping[str, Any],
    dtype_bytes: float,
    *,
    budget_bytes: float,
    overhead_bytes: float,
    typical_tokens: int | None,
) -> Fit:
    gpus = parallel_size(arguments)
    cache = _NO_CACHE
    if checkpoint.config:
        cache = kv_cache(
            checkpoint.config,
            dtype_bytes=_cache_bytes(arguments, dtype_bytes),
            tensor_parallel=int(arguments.get("tensor_parallel_size", 1)),
            pipeline_parallel=int(arguments.get("pipeline_parallel_size", 1)),
        )
    weights, known_by = checkpoint.weight_bytes(dtype_bytes)
    longest = _max_model_len(checkpoint, arguments)
    return Fit(
        gpus=gpus,
        budget_bytes=budget_bytes,
        weight_bytes=weights / gpus,
        weights_known_by=known_by,
        overhead_bytes=overhead_bytes,
        cache=cache,
        knows_cache=bool(checkpoint.config),
        max_model_len=longest,
        typical_tokens=min(typical_tokens or _DEFAULT_LENGTH, longest),
    )


def parse_memory(text: str, option: str = "--gpu-memory") -> int:
    """Bytes, from what people write: 24GiB, 24G, 24 or 24576MiB; decimal units (24GB) count thousands.

    Raises:
        ConfigError: it isn't a size.
    """
    found = _MEMORY.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{option}: expected a size such as 24GiB, got the value {text!r}")
    unit = (found["unit"] or "GiB").upper()
    base = 1000 if len(unit) == 2 and unit.endswith("B") else 1024
    size = int(float(found["count"]) * base ** _UNITS.get(unit[0], 0))
    if size < 1:
        raise ConfigError(f"{option}: expected a size above 0, got the value {text!r}")
    return size


def _run_bytes(checkpoint: Checkpoint, arguments: Mapping[str, Any], *, most: float) -> float:
    wanted = str(arguments.get("dtype") or "auto")
    if wanted != "auto":
        return DTYPE_BYTES[wanted]
    return min(most, DTYPE_BYTES.get(checkpoint.dtype, 2.0))


def _cache_bytes(arguments: Mapping[str, Any], run_bytes: float) -> float:
    wanted = str(arguments.get("kv_cache_dtype") or "auto")
    if wanted == "auto":
        return run_bytes
    if wanted not in DTYPE_BYTES:
        raise ConfigError(f"kv_cache_dtype: it isn't known here how large {wanted!r} is")
    return DTYPE_BYTES[wanted]


def _max_model_len(checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> int:
    own = int(checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions") or 0)
    given = int(arguments.get("max_model_len") or 0)
    if given > 0:
        return given
    if not checkpoint.config:
        return _DEFAULT_LENGTH
    if own < 1:
        raise ConfigError("max_model_len: config.json doesn't tell it, so give it")
    return own


def _step_bytes(
    checkpoint: Checkpoint, arguments: Mapping[str, Any], tensor_parallel: int, dtype_bytes: float
) -> float:
    """An allowance for one step's activations and logits."""
    config = checkpoint.config
    tokens = int(arguments.get("max_num_batched_tokens") or _BATCHED_TOKENS)
    hidden, inner = int(config.get("hidden_size") or 0), int(config.get("intermediate_size") or 0)
    activations = tokens * (4 * hidden + 2 * inner / tensor_parallel) * dtype_bytes
    logits = int(arguments.get("max_num_seqs") or _MAX_SEQS) * int(config.get("vocab_size") or 0) * 4
    return activations + logits
