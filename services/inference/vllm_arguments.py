"""engine_args as vLLM has them: what a configuration file can't write is made of what it can."""

import dataclasses
import enum
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Final

from vllm.engine import arg_utils
from vllm.engine.arg_utils import AsyncEngineArgs

from services.common.config import ConfigError

__all__ = ["vllm_arguments"]

# vLLM imports it for type checkers alone.
_MISSING: Final = {"QuantizationConfigArgs": dict}
# vLLM makes these itself, and more follows from their being dicts.
_MADE_BY_VLLM: Final = frozenset({"fault_tolerance_config", "quantization_config"})


def vllm_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are checked, with members of enumerations for their names, sets for lists, and configurations for
    the dicts that describe them.

    Raises:
        ConfigError: a configuration that vLLM refuses.
    """
    hints = typing.get_type_hints(AsyncEngineArgs, vars(arg_utils), _MISSING)
    return {name: _converted(name, value, list(_parts(hints[name]))) for name, value in arguments.items()}


def _converted(name: str, value: Any, parts: list[Any]) -> Any:
    for part in parts:
        if isinstance(value, list) and part is set:
            return set(value)
        if not isinstance(part, type):
            continue
        if isinstance(value, str) and issubclass(part, enum.Enum) and value in part.__members__:
            return part[value]
        if isinstance(value, dict) and dataclasses.is_dataclass(part) and name not in _MADE_BY_VLLM:
            try:
                return part(**value)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"engine_args.{name}: vLLM refuses the value {value!r}: {error}") from error
    return value


def _parts(hint: Any) -> Iterator[Any]:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _parts(part)
    else:
        yield origin or hint
