"""How much KV cache a model needs, from its config.json alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from services.common.config import ConfigError

__all__ = ["DTYPE_BYTES", "KvCache", "kv_cache"]

DTYPE_BYTES: Final = {
    "float32": 4.0,
    "float": 4.0,
    "float16": 2.0,
    "half": 2.0,
    "bfloat16": 2.0,
    "fp8": 1.0,
    "fp8_e4m3": 1.0,
    "fp8_e5m2": 1.0,
    "fp8_inc": 1.0,
    "fp8_ds_mla": 1.0,
}
# What config.json calls layers that look back at everything, and at a window. All others keep a state of fixed size.
_FULL: Final = frozenset({"full_attention", "attention", "global"})
_SLIDING: Final = frozenset({"sliding_attention", "local_attention", "chunked_attention", "local"})
# Models whose window is for some layers, and that say so by their name alone.
_EVERY_SECOND: Final = frozenset({"gemma2", "cohere2"})


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """What one token costs on one GPU, in bytes: in layers that keep every token, and in those that keep a window."""

    full_bytes: float
    sliding_bytes: float
    window: int
    """Tokens that the latter keep; 0 where there are none."""
    kind: str
    """In words."""

    @property
    def bytes_per_token(self) -> float:
        """A token within the window."""
        return self.full_bytes + self.sliding_bytes

    def sequence_bytes(self, tokens: int) -> float:
        """A sequence of so many tokens."""
        return self.full_bytes * tokens + self.sliding_bytes * min(tokens, self.window or tokens)


def kv_cache(config: Mapping[str, Any], *, dtype_bytes: float, tensor_parallel: int, pipeline_parallel: int) -> KvCache:
    """The KV cache of a model on one of the GPUs that it is spread over.

    Raises:
        ConfigError: its configuration doesn't tell.
    """
    layers = _whole(config, "num_hidden_layers", "n_layer", "num_layers")
    full, sliding, window = _layers(config, layers)
    per_layer, kind = _layer_values(config, tensor_parallel)
    # The first stages take the layers that don't divide.
    stages = 1 / pipeline_parallel if layers % pipeline_parallel == 0 else -(-layers // pipeline_parallel) / layers
    if sliding:
        kind += f", {sliding} of {layers} layers keep the last {window} tokens"
    if full + sliding < layers:
        kind += f", {layers - full - sliding} of {layers} layers keep a state of fixed size"
    return KvCache(
        full_bytes=full * per_layer * dtype_bytes * stages,
        sliding_bytes=sliding * per_layer * dtype_bytes * stages,
        window=window if sliding else 0,
        kind=kind,
    )


def _layer_values(config: Mapping[str, Any], tensor_parallel: int) -> tuple[int, str]:
    """Values that one layer keeps of one token on one GPU, and how that comes."""
    rank = config.get("kv_lora_rank")
    if rank:
        # The compressed vector is every head's, so each GPU has it whole.
        return int(rank) + int(config.get("qk_rope_head_dim") or 0), "multi-head latent attention"
    heads = _whole(config, "num_attention_heads", "n_head")
    groups = int(config.get("num_key_value_heads") or (1 if config.get("multi_query") else heads))
    size = int(config.get("head_dim") or _whole(config, "hidden_size", "n_embd") // heads)
    kind = "multi-head attention" if groups == heads else f"grouped-query attention, {groups} of {heads} heads"
    # A GPU has at least one head, a copy where there are fewer than GPUs.
    return 2 * max(1, -(-groups // tensor_parallel)) * size, kind


def _layers(config: Mapping[str, Any], layers: int) -> tuple[int, int, int]:
    """Layers that keep everything, layers that keep a window, and the window."""
    window = int(config.get("sliding_window") or config.get("attention_chunk_size") or 0)
    types = config.get("layer_types") or config.get("layers_block_type")
    if types:
        return sum(one in _FULL for one in types), sum(one in _SLIDING for one in types), window
    attending = _attending(config, layers)
    if not window or config.get("use_sliding_window") is False:
        return attending, 0, 0
    every = int(config.get("sliding_window_pattern") or (2 if config.get("model_type") in _EVERY_SECOND else 0))
    full = layers // every if every else 0
    return full, layers - full, window


def _attending(config: Mapping[str, Any], layers: int) -> int:
    """Layers with attention, in a model where the others have none."""
    if pattern := config.get("hybrid_override_pattern"):
        return str(pattern).count("*")
    if (indices := config.get("attn_layer_indices")) is not None:
        return len(indices)
    if every := config.get("full_attention_interval"):
        return layers // int(every)
    if period := config.get("attn_layer_period"):
        return len(range(int(config.get("attn_layer_offset") or 0), layers, int(period)))
    return layers


def _whole(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise ConfigError(
        f"config.json: {names[0]}: expected a whole number above 0, got the value {config.get(names[0])!r}"
    )
