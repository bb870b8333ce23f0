"""What the installed vLLM says of its engine's options, in the words of services/common/vllm_options.py.

`python -m tests.support.vllm_options` prints that file's table anew.
"""

import dataclasses
import enum
import sys
import textwrap
import types
import typing
import warnings
from collections.abc import Iterator
from typing import Any, Literal

__all__ = ["installed_options"]

_PLAIN = {bool: "bool", int: "int", float: "float", str: "str", types.NoneType: "null"}
_LISTS = (list, set, tuple)


def installed_options() -> dict[str, str]:
    """A specification an option, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.engine import arg_utils  # noqa: PLC0415  # it takes seconds, and reads the environment
        from vllm.model_executor.layers.quantization import QuantizationMethods  # noqa: PLC0415
        from vllm.model_executor.model_loader import LoadFormats  # noqa: PLC0415

        # vLLM imports it for type checkers alone.
        missing = {"QuantizationConfigArgs": dict}
        hints = typing.get_type_hints(arg_utils.AsyncEngineArgs, vars(arg_utils), missing)
        # At run time vLLM's options know no more of these than that they are anything.
        hints |= {"quantization": QuantizationMethods | str | None, "load_format": LoadFormats | str}
        names = [field.name for field in dataclasses.fields(arg_utils.AsyncEngineArgs)]
    return {name: _spec(hints[name]) for name in sorted(names) if not name.startswith("_")}


def _spec(hint: Any) -> str:
    found = list(dict.fromkeys(_parts(hint)))
    order = ("null", "bool", "int", "float", "list", "dict", "str")
    plain = [part for part in order if part in found]
    choices = [part for part in found if part not in order]
    return " | ".join([*choices, *plain])


def _parts(hint: Any) -> Iterator[str]:
    origin = typing.get_origin(hint)
    if hint in _PLAIN:
        yield _PLAIN[hint]
    elif origin is Literal:
        for value in typing.get_args(hint):
            yield str(value) if isinstance(value, int) else f"'{value}'"
    elif origin in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _parts(part)
    elif origin is typing.Annotated or isinstance(hint, typing.TypeVar):
        yield from _parts(typing.get_args(hint)[0])
    elif origin in _LISTS or hint in _LISTS:
        yield "list"
    elif origin is dict or hint is dict or dataclasses.is_dataclass(hint):
        yield "dict"
    elif isinstance(hint, type) and issubclass(hint, enum.IntEnum):
        yield from (str(int(member)) for member in hint)
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        yield from (f"'{member.name}'" for member in hint)
    # Classes and callables can't be written in a file.


def _main() -> None:
    for name, spec in installed_options().items():
        lines = textwrap.wrap(f"{name}: {spec}", 118, subsequent_indent="    ", break_on_hyphens=False)
        sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    _main()
