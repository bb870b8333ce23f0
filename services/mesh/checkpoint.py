"""What a model's configuration and files say of how large it is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from services.common.config import ConfigError
from services.mesh.model_files import ModelFiles, model_files

__all__ = ["Checkpoint", "described", "read_checkpoint"]

# Weights of these types are loaded as the type that the model runs in.
_CAST: Final = frozenset({"F64", "F32", "F16", "BF16"})
_FLAT_RATE: Final = 1.2
_UNSAID_LENGTH: Final = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is known of a model before it is loaded."""

    config: Mapping[str, Any]
    """Of its text part, where there are several."""
    is_here: bool
    """Whether it is on this machine."""
    dtype: str
    """What it was saved in."""
    quantization: str
    """How its weights are quantised; empty: they are not."""
    has_files: bool
    """Whether it has safetensors files, whose headers were read."""
    stored_bytes: int
    """Of the tensors in them that are loaded as they are."""
    cast_values: int
    """Values in the others, which are loaded in whatever the model runs in."""
    parameters: int

    def weight_bytes(self, dtype_bytes: float) -> tuple[float, str]:
        """What its weights take on a GPU, and how that is known."""
        if not self.has_files:
            billions = self.parameters / 1e9
            said = f"estimated: {billions:.2f} billion parameters of {dtype_bytes:g} bytes, times {_FLAT_RATE}"
            return self.parameters * dtype_bytes * _FLAT_RATE, said
        if self.quantization:
            return self.stored_bytes, f"of the checkpoint's files, quantised by {self.quantization}"
        return self.stored_bytes + self.cast_values * dtype_bytes, "of the checkpoint's files"


def read_checkpoint(model: str) -> Checkpoint:
    """Reads what a folder, a Hugging Face id or a URL in S3 says of a model. Weights are never fetched.

    Raises:
        ConfigError: there is none, it can't be reached, or it can't be read.
    """
    files = model_files(model)
    whole = _json(files.config(), model)
    text = whole.get("text_config") or whole.get("llm_config") or whole
    config = {**whole, **text} if isinstance(text, dict) else whole
    quantization = whole.get("quantization_config") or config.get("quantization_config") or {}
    quantized = str(quantization.get("quant_method") or "")
    stored, cast, count = _sizes(files, quantized=bool(quantized))
    return Checkpoint(
        config=config,
        is_here=files.is_here,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
        quantization=quantized,
        has_files=count > 0,
        stored_bytes=stored,
        cast_values=cast,
        parameters=count or _parameters(config),
    )


def described(*, parameters: int, dtype: str, layers: int | None, heads: int | None, size: int | None) -> Checkpoint:
    """A model that is known by its numbers alone: `heads` of keys and values of `size` each in `layers`, if known."""
    config: dict[str, Any] = {}
    if layers and heads and size:
        config = {
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": size,
            "max_position_embeddings": _UNSAID_LENGTH,
        }
    return Checkpoint(
        config=config,
        is_here=False,
        dtype=dtype,
        quantization="",
        has_files=False,
        stored_bytes=0,
        cast_values=0,
        parameters=parameters,
    )


def _json(text: bytes, model: str) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{model}: config.json: {error}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"{model}: config.json: expected an object")
    return read


def _sizes(files: ModelFiles, *, quantized: bool) -> tuple[int, int, int]:
    """Bytes that stay as they are, values that are cast, and all values."""
    stored = cast = count = 0
    for tensor in files.tensors():
        count += tensor.values
        if tensor.kind in _CAST and not quantized:
            cast += tensor.values
        else:
            stored += tensor.size
    return stored, cast, count


def _parameters(config: Mapping[str, Any]) -> int:
    """About how many there are, of a model of the usual build."""
    try:
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        heads = int(config["num_attention_heads"])
        size = int(config.get("head_dim") or hidden // heads)
        groups = int(config.get("num_key_value_heads") or heads)
        inner = int(config.get("intermediate_size") or 4 * hidden)
        words = int(config["vocab_size"]) * (1 if config.get("tie_word_embeddings") else 2)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"config.json: it doesn't tell how large the model is: {error!r}") from error
    experts = int(config.get("num_local_experts") or config.get("n_routed_experts") or config.get("num_experts") or 0)
    each = int(config.get("moe_intermediate_size") or inner)
    mlp = 3 * hidden * (each * (experts + int(config.get("n_shared_experts") or 0)) if experts else inner)
    return words * hidden + layers * (2 * hidden * size * (heads + groups) + mlp)
