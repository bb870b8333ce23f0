"""Small models that take images, made once and kept between runs: the demo model with eyes of random weights."""

import hashlib
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.demo_model import demo_model

__all__ = ["IMAGES_AT_MOST", "IMAGE_TOKENS", "image_model"]

_KEPT = Path(__file__).resolve().parents[2] / ".tokenloom" / "test-models"
_SEED = 20260102
_IMAGE_SIDE, _PATCH, _SCALE = 64, 16, 2
IMAGE_TOKENS = (_IMAGE_SIDE // _PATCH // _SCALE) ** 2
"""That an image takes in a prompt, whatever its size, beside the marks around them."""
IMAGES_AT_MOST = 2
"""In a prompt, where tests say so."""
_IMAGE = "<image>"
_MARKS = (_IMAGE, "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@cache
def image_model() -> Path:
    """The folder of an Idefics3: SigLIP's encoder, two layers, in front of the demo model and its tokenizer."""
    version = hashlib.sha256(Path(__file__).read_bytes() + demo_model().name.encode()).hexdigest()[:16]
    path = _KEPT / f"idefics3-{version}"
    if not path.exists():
        _KEPT.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=_KEPT))
        try:
            _write(scratch)
            scratch.rename(path)
        except OSError:
            # Somebody else was faster; theirs is the same.
            if not path.exists():
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return path


def _write(folder: Path) -> None:
    shutil.copy(demo_model() / "tokenizer_config.json", folder / "tokenizer_config.json")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    side = {"longest_edge": _IMAGE_SIDE}
    images = {"image_processor_type": "Idefics3ImageProcessor", "size": side, "max_image_size": side}
    for name, content in (
        ("processor_config.json", {"processor_class": "Idefics3Processor", "image_seq_len": IMAGE_TOKENS}),
        ("preprocessor_config.json", {**images, "do_image_splitting": False}),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    _write_weights(folder, _write_tokenizer(folder))
    # Last: what is saved with the weights has none of it.
    shutil.copy(demo_model() / "generation_config.json", folder / "generation_config.json")


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """The demo model's with further marks; returns their ids."""
    tokenizer = json.loads((demo_model() / "tokenizer.json").read_bytes())
    taken = [*tokenizer["model"]["vocab"].values(), *(added["id"] for added in tokenizer["added_tokens"])]
    ids = {mark: max(taken) + at for at, mark in enumerate(_MARKS, start=1)}
    added = dict(tokenizer["added_tokens"][0])
    tokenizer["added_tokens"] += [added | {"id": ids[mark], "content": mark, "special": True} for mark in _MARKS]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return ids


def _write_weights(folder: Path, marks: dict[str, int]) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch  # noqa: PLC0415  # it takes seconds, and only where the model is not there yet
    from safetensors.torch import load_file  # noqa: PLC0415
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration  # noqa: PLC0415

    text: dict[str, Any] = json.loads((demo_model() / "config.json").read_bytes())
    text["vocab_size"] = max(marks.values()) + 1
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": _IMAGE_SIDE,
        "patch_size": _PATCH,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=marks[_IMAGE],
        scale_factor=_SCALE,
        dtype="float32",
        eos_token_id=2,
        bos_token_id=0,
        pad_token_id=0,
    )
    model = Idefics3ForConditionalGeneration(config)
    draw = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3, generator=draw)
        # Of text it says what the demo model says, and never a mark.
        model.lm_head.weight[text["vocab_size"] - len(marks) :] = 0.0
        named = dict(model.named_parameters())
        for name, values in load_file(demo_model() / "model.safetensors").items():
            own = name if name.startswith("lm_head") else name.replace("model.", "model.text_model.", 1)
            named[own][: len(values)] = values
    model.save_pretrained(folder)
