"""Small models that take images or sounds, made once and kept: the demo model with eyes or ears of random weights."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.demo_model import demo_model

__all__ = ["IMAGES_AT_MOST", "IMAGE_TOKENS", "SOUNDS_AT_MOST", "SOUND_SECONDS", "audio_model", "image_model"]

_KEPT = Path(__file__).resolve().parents[2] / ".tokenloom" / "test-models"
_SEED = 20260102
_IMAGE_SIDE, _PATCH, _SCALE = 64, 16, 2
IMAGE_TOKENS = (_IMAGE_SIDE // _PATCH // _SCALE) ** 2
"""That an image takes in a prompt, whatever its size, beside the marks around them."""
IMAGES_AT_MOST = 2
"""In a prompt, where tests say so."""
_IMAGE = "<image>"
_IMAGE_MARKS = (_IMAGE, "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
SOUNDS_AT_MOST = 2
"""In a prompt, where tests say so."""
SOUND_SECONDS = 30
"""That the model hears of a sound: what vLLM has every Qwen2-Audio hear."""
_SOUND = "<|AUDIO|>"
_SOUND_MARKS = (_SOUND, "<|audio_bos|>", "<|audio_eos|>")
_MEL_BINS, _FRAMES_A_SECOND, _EAR = 32, 100, 64

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}
{%- elif part['type'] == 'audio' -%}{{- '<|audio_bos|><|AUDIO|><|audio_eos|>' -}}
{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@cache
def image_model() -> Path:
    """The folder of an Idefics3: SigLIP's encoder, two layers, in front of the demo model and its tokenizer."""
    return _made("idefics3", _write_seeing)


@cache
def audio_model() -> Path:
    """The folder of a Qwen2-Audio: Whisper's encoder, two layers, in front of the demo model and its tokenizer."""
    return _made("qwen2-audio", _write_hearing)


def _made(name: str, write: Callable[[Path], None]) -> Path:
    version = hashlib.sha256(Path(__file__).read_bytes() + demo_model().name.encode()).hexdigest()[:16]
    path = _KEPT / f"{name}-{version}"
    if not path.exists():
        _KEPT.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=_KEPT))
        try:
            write(scratch)
            # Last: what is saved with the weights has none of it.
            for own in ("tokenizer_config.json", "generation_config.json"):
                shutil.copy(demo_model() / own, scratch / own)
            (scratch / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
            scratch.rename(path)
        except OSError:
            # Somebody else was faster; theirs is the same.
            if not path.exists():
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return path


def _write_json(folder: Path, **contents: dict[str, Any]) -> None:
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def _write_seeing(folder: Path) -> None:
    side = {"longest_edge": _IMAGE_SIDE}
    images = {"image_processor_type": "Idefics3ImageProcessor", "size": side, "max_image_size": side}
    _write_json(
        folder,
        processor_config={"processor_class": "Idefics3Processor", "image_seq_len": IMAGE_TOKENS},
        preprocessor_config={**images, "do_image_splitting": False},
    )
    _write_eyes(folder, _write_tokenizer(folder, _IMAGE_MARKS))


def _write_hearing(folder: Path) -> None:
    _write_json(
        folder,
        preprocessor_config={
            "processor_class": "Qwen2AudioProcessor",
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": _MEL_BINS,
            "chunk_length": SOUND_SECONDS,
            "return_attention_mask": True,
        },
    )
    _write_ears(folder, _write_tokenizer(folder, _SOUND_MARKS))


def _write_tokenizer(folder: Path, marks: Sequence[str]) -> dict[str, int]:
    """The demo model's with further marks; returns their ids."""
    tokenizer = json.loads((demo_model() / "tokenizer.json").read_bytes())
    taken = [*tokenizer["model"]["vocab"].values(), *(added["id"] for added in tokenizer["added_tokens"])]
    ids = {mark: max(taken) + at for at, mark in enumerate(marks, start=1)}
    added = dict(tokenizer["added_tokens"][0])
    tokenizer["added_tokens"] += [added | {"id": ids[mark], "content": mark, "special": True} for mark in marks]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return ids


def _text_config(marks: dict[str, int]) -> dict[str, Any]:
    text: dict[str, Any] = json.loads((demo_model() / "config.json").read_bytes())
    return text | {"vocab_size": max(marks.values()) + 1}


def _write_eyes(folder: Path, marks: dict[str, int]) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration  # noqa: PLC0415

    text = _text_config(marks)
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
    _draw(model, "text_model", marks=len(marks))
    model.save_pretrained(folder)


def _draw(model: Any, text_part: str, *, marks: int) -> None:
    """Draws the weights of a model; those of the part that reads text are the demo model's."""
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    draw = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3, generator=draw)
        # Of text it says what the demo model says, and never a mark.
        model.lm_head.weight[-marks:] = 0.0
        named = dict(model.named_parameters())
        for name, values in load_file(demo_model() / "model.safetensors").items():
            own = name if name.startswith("lm_head") else name.replace("model.", f"model.{text_part}.", 1)
            named[own][: len(values)] = values


def _write_ears(folder: Path, marks: dict[str, int]) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch  # noqa: PLC0415  # as above
    from safetensors.torch import save_file  # noqa: PLC0415
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration  # noqa: PLC0415

    # A Qwen2 whose attention has no bias is a Llama, which the demo model is.
    text = _text_config(marks) | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    audio = {
        "d_model": _EAR,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 2 * _EAR,
        "num_mel_bins": _MEL_BINS,
        # The first convolutions halve them.
        "max_source_positions": SOUND_SECONDS * _FRAMES_A_SECOND // 2,
    }
    config = Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=marks[_SOUND], dtype="float32", eos_token_id=2
    )
    config.architectures = ["Qwen2AudioForConditionalGeneration"]
    model = Qwen2AudioForConditionalGeneration(config)
    _draw(model, "language_model", marks=len(marks))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "language_model" in name and name.endswith("_proj.bias"):
                values.zero_()
    # Under the names of the checkpoints that there are, which are the only ones that vLLM reads.
    published = {_published(name): values.contiguous() for name, values in model.state_dict().items()}
    save_file(published, folder / "model.safetensors")
    config.save_pretrained(folder)


def _published(name: str) -> str:
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return f"language_model.{name}" if name.startswith("lm_head") else name.removeprefix("model.")
