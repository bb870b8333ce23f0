"""How large the KV cache of an engine on a CPU is: there is no card that it could fill, and others need memory, too."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from services.common.config import ConfigError
from services.common.kv_cache import KvCache

__all__ = ["CPU_BLOCK_TOKENS", "cpu_cache_bytes", "free_memory", "total_memory"]

CPU_BLOCK_TOKENS: Final = 32
_LEAST_BYTES: Final = 64 << 20
_MOST_BYTES: Final = 4 << 30
# What was asked for by name may take more than what is taken unasked.
_SHARE: Final = 0.25
_MOST_SHARE: Final = 0.8
# vLLM keeps one for itself.
_SPARE_BLOCKS: Final = 2
_GIB: Final = 1 << 30


def cpu_cache_bytes(cache: KvCache, tokens: int, *, free_bytes: int, arguments: Mapping[str, Any]) -> int:
    """Bytes for one request of `tokens` at least, as far as `free_bytes` of memory allow; `arguments` are engine_args.

    Where it is less than that request needs, requests have to be shorter.

    Raises:
        ConfigError: engine_args.max_model_len asks for more than there is.
    """
    if given := arguments.get("kv_cache_memory_bytes"):
        return int(given)
    blocks = -(-tokens // CPU_BLOCK_TOKENS) + _SPARE_BLOCKS
    # Windows save nothing: while changes of the cache are published, vLLM keeps all tokens of all layers.
    needed = int(cache.bytes_per_token * blocks * CPU_BLOCK_TOKENS)
    if (arguments.get("max_model_len") or -1) < 1:
        return max(_LEAST_BYTES, min(needed, _MOST_BYTES, int(free_bytes * _SHARE)))
    if needed > max(_LEAST_BYTES, free_bytes * _MOST_SHARE):
        raise ConfigError(
            f"engine_args.max_model_len: a request of {tokens} tokens needs a KV cache of {needed / _GIB:.2f} GiB, and "
            f"{free_bytes / _GIB:.2f} GiB of memory are free: expected less, or none, for what there is room for"
        )
    return max(_LEAST_BYTES, needed)


def total_memory() -> int:
    """Of this machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> int:
    """What programs of this machine could still take, in bytes."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return total_memory()
