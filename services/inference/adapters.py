"""LoRA adapters on disk: whether one may be taken, and fits, is found out before an engine sees it.

An engine that meets a broken adapter while it generates dies of it, with everybody's generations.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from services.common.errors import MeshError, Reason
from services.common.safetensors_header import HeaderError, Tensor, read_header

__all__ = ["BaseModel", "check_adapter", "check_adapter_name", "read_base_model"]

_CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = "adapter_model.safetensors"
_PICKLES: Final = ("adapter_model.bin", "adapter_model.pt")
_MAX_CONFIG_BYTES: Final = 1 << 20
_MAX_PATH_CHARACTERS: Final = 4096
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,254}")
_FLOATS: Final = frozenset({"F16", "BF16", "F32"})
# Only these hold a weight in its own shape; others are packed.
_PLAIN: Final = _FLOATS | {"F64", "F8_E4M3", "F8_E5M2"}
_WEIGHT: Final = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)
_COPIES: Final = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
"""Of the base model's own weights, which some tools save along; engines leave them out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """What an adapter must fit."""

    names: frozenset[str]
    """By which adapters may know it: the last parts of paths, in lower case."""
    max_rank: int
    shapes: Mapping[str, tuple[int, ...] | None]
    """Of its weights, by the module that they belong to; None where it isn't known. Empty: nothing is known."""


class _Pair(NamedTuple):
    a: tuple[int, ...]
    b: tuple[int, ...]
    is_embedding: bool


def check_adapter_name(name: str) -> None:
    """Raises MeshError unless a model may have this name."""
    if not _NAME.fullmatch(name):
        raise _invalid("name", 'one to 255 letters, digits and "._:/@+-", beginning with a letter or digit')


def read_base_model(folder: Path, *, names: Iterable[str], max_rank: int) -> BaseModel:
    """What the weights in a folder say of a model; nothing where they are no safetensors files. Blocks.

    Raises:
        HeaderError: a file is broken.
        OSError: a file can't be read.
    """
    shapes: dict[str, tuple[int, ...] | None] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_header(path).items():
            module, _, kind = name.rpartition(".")
            if kind == "weight":
                shapes[module] = tensor.shape if tensor.dtype in _PLAIN else None
            elif kind in {"qweight", "weight_packed", "blocks"}:
                shapes[module] = None
    return BaseModel(names=frozenset(map(_last, names)), max_rank=max_rank, shapes=shapes)


def check_adapter(path: str, directory: Path, base: BaseModel) -> tuple[Path, dict[str, Any]]:
    """The folder of an adapter that may be loaded, with its configuration. Blocks.

    Args:
        path: as it was asked for; a relative one is inside `directory`.
        directory: the only place to take adapters from.
        base: the model that it must fit.

    Raises:
        MeshError: INVALID_REQUEST on "path", with what is wrong with it.
    """
    try:
        folder = _folder(path, directory)
        config = _config(_file(folder, _CONFIG, directory))
        _check_config(config, base)
        tensors = read_header(_file(folder, _WEIGHTS, directory))
        _check_weights(tensors, config, base)
    except HeaderError as error:
        raise _invalid("path", f"{_WEIGHTS} {error}") from error
    except OSError as error:
        raise _invalid("path", f"can't be read: {error.strerror}") from error
    return folder, config


def _folder(path: str, directory: Path) -> Path:
    if not path:
        raise _invalid("path", "is required")
    if len(path) > _MAX_PATH_CHARACTERS or not path.isprintable():
        raise _invalid("path", f"at most {_MAX_PATH_CHARACTERS} printable characters")
    folder = _resolved(directory / path, directory)
    if folder is None or folder == directory.resolve():
        raise _invalid("path", "must be a folder inside the one that this worker takes adapters from")
    if not folder.is_dir():
        raise _invalid("path", "there is no such folder")
    return folder


def _file(folder: Path, name: str, directory: Path) -> Path:
    file = _resolved(folder / name, directory)
    if file is None:
        raise _invalid("path", f"{name} is a link to a place outside the one that this worker takes adapters from")
    if not file.is_file():
        pickled = [each for each in _PICKLES if (folder / each).exists()]
        hint = f"; {pickled[0]} is a pickle, which can run code, so it is not taken" if pickled else ""
        raise _invalid("path", f"there is no file {name} in it{hint if name == _WEIGHTS else ''}")
    return file


def _resolved(path: Path, directory: Path) -> Path | None:
    try:
        found = path.resolve()
    except RuntimeError:
        # Links that lead to themselves, before Python 3.13.
        return None
    return found if found.is_relative_to(directory.resolve()) else None


def _config(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise _invalid("path", f"{_CONFIG} must have at most {_MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _invalid("path", f"{_CONFIG} is not JSON") from error
    if not isinstance(config, dict):
        raise _invalid("path", f"{_CONFIG} must be a JSON object")
    return config


def _check_config(config: Mapping[str, Any], base: BaseModel) -> None:
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise _wrong("peft_type", 'must be "LORA"')
    for key, ranks in (("r", [config.get("r")]), ("rank_pattern", _values(config, "rank_pattern"))):
        if not all(type(rank) is int and rank > 0 for rank in ranks):
            raise _wrong(key, "must be a positive integer")
        if max(ranks, default=0) > base.max_rank:
            raise _wrong(
                key, f"must be at most {base.max_rank}, which is this worker's max_lora_rank, got {max(ranks)}"
            )
    for key, scales in (
        ("lora_alpha", [config.get("lora_alpha")]),
        ("alpha_pattern", _values(config, "alpha_pattern")),
    ):
        if not all(isinstance(scale, int | float) and math.isfinite(scale) for scale in scales):
            raise _wrong(key, "must be a number")
    modules = config.get("target_modules")
    if not (isinstance(modules, str) or (isinstance(modules, list) and all(isinstance(each, str) for each in modules))):
        raise _wrong("target_modules", "must be a list of names, or an expression")
    _check_base_name(config.get("base_model_name_or_path"), base)


def _values(config: Mapping[str, Any], key: str) -> list[Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise _wrong(key, "must be an object")
    return list(pattern.values())


def _check_base_name(said: object, base: BaseModel) -> None:
    if said is None or said == "":
        return
    if not isinstance(said, str) or _last(said) not in base.names:
        known = ", ".join(sorted(base.names))
        raise _wrong(
            "base_model_name_or_path",
            f"must name the model that is served here ({known}; more by the setting model.adapter_bases), "
            f"got {str(said)[:256]!r}",
        )


def _check_weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: BaseModel) -> None:
    pairs = dict(_pairs(tensors))
    if not pairs:
        raise _invalid("path", f"{_WEIGHTS} has no LoRA weights")
    flipped = config.get("fan_in_fan_out") is True
    for module, pair in pairs.items():
        rank = pair.a[0]
        if rank > base.max_rank:
            raise _invalid("path", f"{module} has rank {rank}, at most {base.max_rank} is possible (max_lora_rank)")
        if rank not in {config["r"], *_values(config, "rank_pattern")}:
            raise _invalid("path", f"{module} has rank {rank}, but {_CONFIG} says {config['r']}")
        if base.shapes:
            _check_fit(module, pair, base, flipped=flipped)


def _pairs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, _Pair]]:
    sides: dict[tuple[str, bool], dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if name.endswith(_COPIES):
            continue
        found = _WEIGHT.fullmatch(name)
        if found is None:
            raise _invalid("path", f"{_WEIGHTS} has {name[:256]!r}, which is no LoRA weight")
        if tensor.dtype not in _FLOATS:
            raise _invalid("path", f"{name} must be one of {', '.join(sorted(_FLOATS))}, got {tensor.dtype}")
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise _invalid("path", f"{name} must have two dimensions, got the shape {list(tensor.shape)}")
        side = found["side"] or found["embedding"]
        sides.setdefault((found["module"], found["side"] is None), {})[side] = tensor.shape
    for (module, is_embedding), found_sides in sides.items():
        if len(found_sides) != 2:
            raise _invalid("path", f"{module} has only one of lora_A and lora_B")
        pair = _Pair(found_sides["A"], found_sides["B"], is_embedding)
        if pair.a[0] != pair.b[1]:
            raise _invalid("path", f"{module} has lora_A of rank {pair.a[0]} and lora_B of rank {pair.b[1]}")
        yield module, pair


def _check_fit(module: str, pair: _Pair, base: BaseModel, *, flipped: bool) -> None:
    if ".experts" in module:
        # Checkpoints and engines name experts in many ways; the engine says whether it knows these.
        return
    found = _candidates(module, base.shapes)
    if not found:
        raise _invalid("path", f"this model has no module {module[:256]!r}")
    fits = (pair.b[0], pair.a[1])
    wanted = fits[::-1] if pair.is_embedding or flipped else fits
    if None not in found and wanted not in found:
        shape = next(shape for shape in found if shape is not None)
        raise _invalid(
            "path", f"{module} changes a weight of the shape {list(wanted)}, but this model's has {list(shape)}"
        )


def _candidates(module: str, shapes: Mapping[str, tuple[int, ...] | None]) -> list[tuple[int, ...] | None]:
    if module in shapes:
        return [shapes[module]]
    # The same model is saved under different prefixes: "model.", "model.language_model.", "language_model.model.".
    tail = _tail(module)
    found = [shape for name, shape in shapes.items() if _tail(name) == tail]
    if not found and tail == "lm_head":
        # Tied: the checkpoint has the embedding alone.
        return _candidates("embed_tokens", shapes)
    return found


def _tail(module: str) -> str:
    _, layers, rest = module.rpartition("layers.")
    return layers + rest if layers else module.rpartition(".")[2]


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _wrong(key: str, message: str) -> MeshError:
    return _invalid("path", f"{_CONFIG}: {key}: {message}")


def _invalid(field: str, message: str) -> MeshError:
    return MeshError(Reason.INVALID_REQUEST, f"{field}: {message}", field=field)
