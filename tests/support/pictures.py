"""Pictures, and what engines are asked about them."""

import io
from typing import Any

import numpy as np
from PIL import Image

from services.inference.engine import ChatMessage, Generation, Media, Sampling

__all__ = ["QUESTION", "about", "picture"]

QUESTION = "Say what there is to be seen in the picture, in as many simple words as you need, and then once more." * 2
"""Long enough for whole blocks of the prefix cache to be behind the picture."""


def picture(seed: int, kind: str = "PNG") -> bytes:
    """Noise, which is another one for each seed."""
    to = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(to, kind)
    return to.getvalue()


def about(name: str, *pictures: bytes, emitted: list[int] | None = None, **sampling: Any) -> Generation:
    """A greedy generation about pictures that no end-of-sequence token ends."""
    media = [Media(kind="image", mime_type="image/png", content=content) for content in pictures]
    values: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 24} | sampling
    return Generation(
        id=name,
        model="demo",
        prompt=[ChatMessage(role="user", content="", parts=("Look:", *media, QUESTION))],
        kind="chat",
        sampling=Sampling(**values),
        emitted_token_ids=emitted or (),
    )
