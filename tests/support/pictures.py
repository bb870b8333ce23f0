"""Pictures and sounds, and what engines are asked about them."""

import io
import wave
from typing import Any

import numpy as np
from PIL import Image

from services.inference.request import ChatMessage, Generation, Media, Sampling

__all__ = ["QUESTION", "about", "about_sounds", "picture", "sound"]

QUESTION = "Say what there is to be seen in the picture, in as many simple words as you need, and then once more." * 2
"""Long enough for whole blocks of the prefix cache to be behind the file."""


def picture(seed: int, kind: str = "PNG") -> bytes:
    """Noise, which is another one for each seed."""
    to = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(to, kind)
    return to.getvalue()


def sound(seed: int, *, seconds: float = 0.5, rate: int = 16_000, channels: int = 1) -> bytes:
    """Noise as WAV, which is another one for each seed."""
    to = io.BytesIO()
    frames = np.random.default_rng(seed).integers(-9000, 9000, (round(seconds * rate), channels), dtype="<i2")
    with wave.open(to, "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(frames.tobytes())
    return to.getvalue()


def about(name: str, *pictures: bytes, emitted: list[int] | None = None, **sampling: Any) -> Generation:
    """A greedy generation about pictures that no end-of-sequence token ends."""
    return _asked(
        name, [Media(kind="image", mime_type="image/png", content=each) for each in pictures], emitted, sampling
    )


def about_sounds(name: str, *sounds: bytes, emitted: list[int] | None = None, **sampling: Any) -> Generation:
    """A greedy generation about sounds that no end-of-sequence token ends."""
    return _asked(
        name, [Media(kind="audio", mime_type="audio/wav", content=each) for each in sounds], emitted, sampling
    )


def _asked(name: str, media: list[Media], emitted: list[int] | None, sampling: dict[str, Any]) -> Generation:
    values: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 24} | sampling
    return Generation(
        id=name,
        model="demo",
        prompt=[ChatMessage(role="user", content="", parts=("Look:", *media, QUESTION))],
        kind="chat",
        sampling=Sampling(**values),
        emitted_token_ids=emitted or (),
    )
