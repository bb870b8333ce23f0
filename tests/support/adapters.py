"""Tiny LoRA adapters for the demo model, whole or broken in some way."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["adapter_tensors", "make_adapter", "write_safetensors"]

# The demo model's: rows and columns of their weights.
_MODULES = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 128)}


def make_adapter(
    folder: Path,
    *,
    seed: int = 1,
    rank: int = 8,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """Writes an adapter that changes what the model says; `config` and `tensors` replace entries, None removes them."""
    folder.mkdir(parents=True, exist_ok=True)
    said: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "down_proj"],
        "base_model_name_or_path": "somewhere/demo",
    }
    said |= config or {}
    kept = {key: value for key, value in said.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept), encoding="utf-8")
    weights = adapter_tensors(seed, rank) | dict(tensors or {})
    write_safetensors(folder / "adapter_model.safetensors", {k: v for k, v in weights.items() if v is not None})
    return folder


def adapter_tensors(seed: int = 1, rank: int = 8) -> dict[str, Any]:
    """Random weights, large enough to matter."""
    draw = np.random.default_rng(seed)
    found = {}
    for layer in range(2):
        for module, (rows, columns) in _MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            found[f"{name}.lora_A.weight"] = draw.standard_normal((rank, columns), np.float32) * np.float32(0.5)
            found[f"{name}.lora_B.weight"] = draw.standard_normal((rows, rank), np.float32) * np.float32(0.5)
    return found


def write_safetensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Writes arrays of float32 as the format has them."""
    header, body = {}, bytearray()
    for name, values in tensors.items():
        start = len(body)
        body += np.ascontiguousarray(values, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [start, len(body)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(body))
