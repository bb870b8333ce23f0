"""Makes a small real model, without a network: `python -m services.inference.demo_model DIR`.

A Llama of two layers with seeded random weights, a byte-level BPE tokenizer and a ChatML template that knows functions
as Hermes models do. It talks nonsense, but everything else about it is real, and greedy decoding is repeatable because
its logits are far apart.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["main", "make_demo_model"]

_SEED: Final = 20260101
_VOCABULARY: Final = 2048
_HIDDEN: Final = 64
_LAYERS: Final = 2
_HEADS: Final = 2
_HEAD_SIZE: Final = 32
_MLP: Final = 128
_CONTEXT: Final = 2048
# Far above the usual 0.02: the likeliest token is then likeliest by far, whatever the batch around it.
_WEIGHT_SCALE: Final = 0.3
_SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Each is one token, which stays in the text.
_MARKS: Final = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_WEIGHTS: Final = "model.safetensors"
_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    _WEIGHTS,
)

_CHAT_TEMPLATE: Final = """\
{%- if tools -%}
{{- '<|im_start|>system\\nFunctions that you may call:\\n' -}}
{%- for tool in tools -%}
{{- (tool | tojson) + '\\n' -}}
{%- endfor -%}
{{- 'Call one as <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
{{- '<|im_start|>' + role + (' name=' + message['name'] if message['name'] else '') + '\\n' -}}
{%- if message['reasoning'] -%}
{{- '<think>\\n' + message['reasoning'] + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- message['content'] or '' -}}
{%- for call in message['tool_calls'] or [] -%}
{{- '<tool_call>\\n{"name": "' + call['function']['name'] + '", "arguments": ' -}}
{{- (call['function']['arguments'] | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""

_COMMON: Final = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its "
    "about than into them can only other time new some could these two may first then do any like my now over such "
    "our man me even most made after also did many off before must well back through years where much your way down "
    "should because long each just state those people too mister how little good world make very year still see own "
    "work men day get here old life both between being under three never know same last another while us might great "
    "go come since against right came take used himself few house use place during high without again home around "
    "small however found part school thought went say general once upon every left don't does got united number war "
    "until always away something fact water less public put think almost hand enough took far yet government system "
    "set better told nothing night end why didn't know eyes find going look asked later point knew next city program "
    "business give group toward days young let room within children side social given order often present national "
    "second possible rather per face among form important looked early white case large need big four felt along "
    "best church ever least power light seemed country mind want thing interest area members others open service "
    "problem door kind turned began whole different sense help matter name line certain family however human history "
    "hold question river model language token engine memory stream answer letter paper garden window mountain winter "
    "summer morning evening bread music forest machine computer network server message picture colour silver golden "
    "simple ready quick quiet bright heavy gentle strong distant broken hidden ancient modern careful honest patient"
)
_WORDS: Final = _COMMON.split()
_ENDINGS: Final = ("", "s", "ed", "ing", "ly", "er")
_SENTENCES: Final = 6000


def make_demo_model(path: Path) -> Path:
    """Makes the model in the folder `path`, or leaves it as it is when it is there already; returns `path`.

    Raises:
        FileExistsError: `path` holds something else.
    """
    if _is_complete(path):
        return path
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not a model made here")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write(scratch)
        scratch.chmod(0o755)
        _publish(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def _is_complete(path: Path) -> bool:
    return all((path / name).is_file() for name in _FILES)


def _publish(scratch: Path, path: Path) -> None:
    try:
        scratch.rename(path)
    except OSError:
        # Somebody else was faster; theirs is the same.
        if not _is_complete(path):
            raise


def _write(folder: Path) -> None:
    _say("training a tokenizer")
    size = _write_tokenizer(folder)
    _say("drawing weights")
    _write_weights(folder / _WEIGHTS, size)
    for name, content in (
        ("config.json", _config(size)),
        ("generation_config.json", {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}),
        ("tokenizer_config.json", _tokenizer_config()),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")


def _say(what: str) -> None:
    sys.stderr.write(f"demo model: {what}\n")


def _write_tokenizer(folder: Path) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY - len(_MARKS),
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in _MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    size: int = tokenizer.get_vocab_size()
    return size


def _sentences() -> list[str]:
    """Text to train on, the same on every machine."""
    draw = random.Random(_SEED)  # noqa: S311  # repeatable on purpose
    return [_sentence(draw) for _ in range(_SENTENCES)]


def _sentence(draw: random.Random) -> str:
    words = [draw.choice(_WORDS) + draw.choice(_ENDINGS) for _ in range(draw.randint(4, 14))]
    return " ".join([words[0].capitalize(), *words[1:]]) + draw.choice(".,?!;:") + draw.choice(("\n", " ", "\n\n"))


def _shapes(size: int) -> dict[str, tuple[int, ...]]:
    inner = _HEADS * _HEAD_SIZE
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (size, _HIDDEN),
        "model.norm.weight": (_HIDDEN,),
        "lm_head.weight": (size, _HIDDEN),
    }
    for layer in range(_LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in (
                ("input_layernorm", (_HIDDEN,)),
                ("self_attn.q_proj", (inner, _HIDDEN)),
                ("self_attn.k_proj", (inner, _HIDDEN)),
                ("self_attn.v_proj", (inner, _HIDDEN)),
                ("self_attn.o_proj", (_HIDDEN, inner)),
                ("post_attention_layernorm", (_HIDDEN,)),
                ("mlp.gate_proj", (_MLP, _HIDDEN)),
                ("mlp.up_proj", (_MLP, _HIDDEN)),
                ("mlp.down_proj", (_HIDDEN, _MLP)),
            )
        }
    return shapes


def _write_weights(path: Path, size: int) -> None:
    """Writes the safetensors format: the header's length, the header, and the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = bytearray()
    for name, values in _weights(size):
        start = len(body)
        body += values
        header[name] = {"dtype": "F32", "shape": _shapes(size)[name], "data_offsets": [start, len(body)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(body))


def _weights(size: int) -> Iterator[tuple[str, bytes]]:
    draw = np.random.default_rng(_SEED)
    for name, shape in _shapes(size).items():
        if len(shape) == 1:
            values = np.ones(shape, np.float32)
        else:
            values = draw.standard_normal(shape, np.float32) * np.float32(_WEIGHT_SCALE)
        yield name, values.astype("<f4").tobytes()


def _config(size: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": _HIDDEN,
        "intermediate_size": _MLP,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "head_dim": _HEAD_SIZE,
        "hidden_act": "silu",
        "max_position_embeddings": _CONTEXT,
        "initializer_range": _WEIGHT_SCALE,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # With eight bits of mantissa the two likeliest tokens are equal at every tenth step or so.
        "dtype": "float32",
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": _CONTEXT,
    }


def main() -> int:
    """Makes the model in the folder given on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m services.inference.demo_model", description="Makes a small model.")
    parser.add_argument("dir", type=Path, help="the folder to make it in")
    path = parser.parse_args().dir
    try:
        make_demo_model(Path(os.path.abspath(path)))  # noqa: PTH100  # resolve() would follow a link to another name
    except OSError as error:
        sys.stderr.write(f"demo model: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
