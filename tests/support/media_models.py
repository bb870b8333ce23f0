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

__all__ = ["IMAGE_TOKENS", "image_model"]

_KEPT = Path(__file__).resolve().parents[2] / ".tokenloom" / "test-models"
_SEED = 20260102
_IMAGE_SIDE, _PATCH = 56, 14
IMAGE_TOKENS = (_IMAGE_SIDE // _PATCH) ** 2
"""That an image takes in a prompt, whatever its size."""

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
    """The folder of a LLaVA: CLIP's encoder, two layers, in front of the demo model's shape and tokenizer."""
    version = hashlib.sha256(Path(__file__).read_bytes() + demo_model().name.encode()).hexdigest()[:16]
    path = _KEPT / f"llava-{version}"
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
    for name in ("generation_config.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, folder / name)
    token = _write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": _PATCH,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
    }
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": _IMAGE_SIDE},
        "crop_size": {"height": _IMAGE_SIDE, "width": _IMAGE_SIDE},
    }
    (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")
    _write_weights(folder, token)


def _write_tokenizer(folder: Path) -> int:
    tokenizer = json.loads((demo_model() / "tokenizer.json").read_bytes())
    token = max(tokenizer["model"]["vocab"].values(), default=0)
    token = max([token, *(added["id"] for added in tokenizer["added_tokens"])]) + 1
    added = dict(tokenizer["added_tokens"][0])
    tokenizer["added_tokens"].append(added | {"id": token, "content": "<image>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return int(token)


def _write_weights(folder: Path, image_token: int) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch  # noqa: PLC0415  # it takes seconds, and only where the model is not there yet
    from transformers import LlavaConfig, LlavaForConditionalGeneration  # noqa: PLC0415

    text: dict[str, Any] = json.loads((demo_model() / "config.json").read_bytes())
    text["vocab_size"] = image_token + 1
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": _IMAGE_SIDE,
        "patch_size": _PATCH,
        "projection_dim": 64,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        dtype="float32",
        eos_token_id=2,
        bos_token_id=0,
        pad_token_id=0,
    )
    model = LlavaForConditionalGeneration(config)
    draw = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3, generator=draw)
    model.save_pretrained(folder)
