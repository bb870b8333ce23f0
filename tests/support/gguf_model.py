"""The demo model in llama.cpp's format."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.support.demo_model import demo_model

__all__ = ["demo_gguf"]

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def demo_gguf(path: Path, context: int) -> Path:
    """Writes it to `path`, which is returned, as a model of so long a context as anybody asks for."""
    folder = demo_model()
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context)
    _add_shape(writer, config)
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for name, values in _tensors(folder / "model.safetensors"):
        plain = name.removesuffix(".weight")
        if plain.startswith("model.layers."):
            _, _, layer, part = plain.split(".", 3)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                values = _interleaved(values, config["num_attention_heads"])  # noqa: PLW2901  # the same in another order
            plain = f"blk.{layer}.{_NAMES[part]}"
        else:
            plain = _NAMES[plain]
        writer.add_tensor(f"{plain}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    texts = {token_id: text for text, token_id in tokenizer["model"]["vocab"].items()}
    types = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for token in tokenizer["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    order = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts[token_id] for token_id in order])
    writer.add_token_types([types[token_id] for token_id in order])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)  # the library's


def _tensors(path: Path) -> list[tuple[str, "np.ndarray[Any, Any]"]]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    del header["__metadata__"]
    return [
        (name, np.frombuffer(content[start + begin : start + end], "<f4").reshape(entry["shape"]))
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    ]


def _interleaved(values: "np.ndarray[Any, Any]", heads: int) -> "np.ndarray[Any, Any]":
    """llama.cpp rotates neighbours where others rotate the two halves of a head."""
    rows, columns = values.shape
    return np.ascontiguousarray(values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)).reshape(
        rows, columns
    )
