"""The demo model for tests, made once and kept between runs, and one like it with other weights."""

import hashlib
import shutil
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from services.inference import demo_model as maker

__all__ = ["demo_model", "with_other_weights"]

_KEPT = Path(__file__).resolve().parents[2] / ".tokenloom" / "test-models"


@cache
def demo_model() -> Path:
    """Its folder. Another version of its maker makes another one."""
    version = hashlib.sha256(Path(maker.__file__).read_bytes()).hexdigest()[:16]
    return maker.make_demo_model(_KEPT / f"demo-{version}")


def with_other_weights(model: Path, folder: Path) -> Path:
    """Makes a checkpoint of the same shape in a folder that is not there yet, and returns it."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: np.roll(values, 1, 0) for name, values in weights.items()}, folder / "model.safetensors")
    return folder
