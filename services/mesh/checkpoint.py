"""A model's folder: its configuration, and how much its weights take."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.common.config import ConfigError

__all__ = ["Checkpoint", "read_checkpoint"]

_MOST_HEADER_BYTES: Final = 100 << 20
# Weights of these types are loaded as the type that the model runs in.
_CAST: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_FLAT_RATE: Final = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is known of a model before it is loaded."""

    config: Mapping[str, Any]
    """Of its text part, where there are several."""
    dtype: str
    """What it was saved in."""
    quantization: str
    """How its weights are quantised; empty: they are not."""
    has_files: bool
    """Whether its safetensors files are there, and their headers were read."""
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
    """Reads the folder of a model, or of one that was downloaded from Hugging Face before. Nothing is fetched.

    Raises:
        ConfigError: there is none, or it can't be read.
    """
    folder = _folder(model)
    whole = _json(folder / "config.json")
    text = whole.get("text_config") or whole.get("llm_config") or whole
    config = {**whole, **text} if isinstance(text, dict) else whole
    quantization = whole.get("quantization_config") or config.get("quantization_config") or {}
    quantized = str(quantization.get("quant_method") or "")
    stored, cast, count = _sizes(folder, quantized=bool(quantized))
    return Checkpoint(
        config=config,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
        quantization=quantized,
        has_files=count > 0,
        stored_bytes=stored,
        cast_values=cast,
        parameters=count or _parameters(config),
    )


def _folder(model: str) -> Path:
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    kept = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{model.replace('/', '--')}" / "snapshots"
    found = sorted(kept.glob("*/config.json"), key=lambda path: path.stat().st_mtime) if kept.is_dir() else []
    if not found:
        raise ConfigError(f"model: there is no folder with a config.json, and no download of that name: {model!r}")
    return found[-1].parent


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"{path}: expected an object")
    return read


def _sizes(folder: Path, *, quantized: bool) -> tuple[int, int, int]:
    """Bytes that stay as they are, values that are cast, and all values."""
    stored = cast = count = 0
    for path in sorted(folder.glob("*.safetensors")):
        for kind, values, size in _tensors(path):
            count += values
            if kind in _CAST and not quantized:
                cast += values
            else:
                stored += size
    return stored, cast, count


def _tensors(path: Path) -> Iterator[tuple[str, int, int]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _MOST_HEADER_BYTES:
                raise ConfigError(f"{path}: not a safetensors file")
            header = json.loads(file.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                yield tensor["dtype"], math.prod(tensor["shape"]), end - begin
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a safetensors file: {error}") from error


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
