"""The demo model for tests, made once and kept between runs."""

import hashlib
from functools import cache
from pathlib import Path

from services.inference import demo_model as maker

__all__ = ["demo_model"]

_KEPT = Path(__file__).resolve().parents[2] / ".tokenloom" / "test-models"


@cache
def demo_model() -> Path:
    """Its folder. Another version of its maker makes another one."""
    version = hashlib.sha256(Path(maker.__file__).read_bytes()).hexdigest()[:16]
    return maker.make_demo_model(_KEPT / f"demo-{version}")
