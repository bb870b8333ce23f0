"""What a safetensors file says of its tensors, read without loading any, and checked against the file's size."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["LENGTH_BYTES", "HeaderError", "Tensor", "entries", "read_header"]

# The largest that are published have a few thousand tensors of about 200 bytes each.
_MAX_HEADER_BYTES: Final = 32 << 20
LENGTH_BYTES: Final = 8
"""A file begins with the length of its header in so many bytes, the lowest first."""
_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip  # a table


class HeaderError(ValueError):
    """The file is not what it should be; the message says how."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file."""

    dtype: str
    """As the format names it: "F32", "BF16" and so on."""
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name. Blocks.

    Raises:
        HeaderError: it is no safetensors file, or is cut off.
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES or LENGTH_BYTES + length > size:
            raise HeaderError("is no safetensors file, or is cut off: its header does not fit into it")
        header = entries(file.read(length))
    tensors = {name: _tensor(name, said) for name, said in header.items()}
    _check_layout(header, size - LENGTH_BYTES - length)
    return tensors


def entries(text: bytes) -> dict[str, Any]:
    """What a header says of each tensor, by name, as it stands there.

    Raises:
        HeaderError: it is none.
    """
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HeaderError("is no safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise HeaderError("is no safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _tensor(name: str, said: Any) -> Tensor:
    match said:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if all(isinstance(each, int) and each >= 0 for each in shape) and 0 <= begin <= end:
                # A type that is not in the table is not ours to measure.
                if dtype in _BYTES and end - begin != math.prod(shape) * _BYTES[dtype]:
                    raise HeaderError(f"says that {name!r} is {dtype} {shape}, which its {end - begin} bytes are not")
                return Tensor(dtype, tuple(shape))
    raise HeaderError(f"has a broken entry for {name!r} in its header")


def _check_layout(header: Mapping[str, Any], body: int) -> None:
    end = 0
    for begin, stop in sorted(tuple(said["data_offsets"]) for said in header.values()):
        if begin != end:
            raise HeaderError("has tensors that overlap, or gaps between them")
        end = stop
    if end != body:
        raise HeaderError(f"has {body} bytes of tensors, but its header speaks of {end}")
