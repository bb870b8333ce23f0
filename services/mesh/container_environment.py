"""What containers get of the environment of whoever starts them: what mesh.yaml names, and what libraries look for."""

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from services.common.object_store import ENVIRONMENT, is_in_store
from services.common.settings import ProcessSettings
from services.common.settings_worker import WorkerSettings

__all__ = ["variables"]

_OF_BACKENDS: Final = (
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_EXPORTER_OTLP_METRICS_HEADERS",
    "OTEL_EXPORTER_OTLP_COMPRESSION",
)
_OF_HUGGING_FACE: Final = ("HF_TOKEN", "HF_ENDPOINT")


def variables(settings: ProcessSettings) -> list[str]:
    """The names of the variables that a process with these settings may need; which of them are there is theirs."""
    names = [*_named(msgspec.to_builtins(settings))]
    if settings.otlp_endpoint is not None or settings.metrics_push is not None:
        names += _OF_BACKENDS
    if isinstance(settings, WorkerSettings) and settings.engine == "vllm":
        names += _of_model(settings.model.path or "")
    return [*dict.fromkeys(names)]


def _of_model(path: str) -> tuple[str, ...]:
    if path.startswith("/"):
        return ()
    return ENVIRONMENT if is_in_store(path) else _OF_HUGGING_FACE


def _named(settings: Any) -> Iterator[str]:
    """What the settings call the variable of a key, however deep."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            if name == "api_key_variable" and value is not None:
                yield value
            else:
                yield from _named(value)
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _named(value)
