"""Forms of outputs as vLLM's engine is told of them."""

import copy
from typing import Any, Final

from transformers import PreTrainedTokenizerFast
from vllm.sampling_params import StructuredOutputsParams

from services.common.config import ConfigError
from services.common.settings_worker import WorkerSettings
from services.inference.request import StructuredOutput
from services.inference.vllm_forms import Forms

__all__ = ["form_checker", "form_params", "form_settings"]

# It compiles whatever it is given within narrow bounds, as it goes, and keeps control characters out of JSON. Where
# whitespace is allowed between the parts of a document, a model may go on with it forever.
_COMPILER: Final = "guidance"
_SETTINGS: Final = {"backend": _COMPILER, "disable_any_whitespace": True}


def form_settings(settings: WorkerSettings) -> dict[str, Any]:
    """vLLM's `structured_outputs_config`, with what the settings add to it; raises ConfigError."""
    given = settings.engine_args.get("structured_outputs_config", {})
    if not isinstance(given, dict):
        raise ConfigError("engine_args.structured_outputs_config: expected a mapping")
    if given.get("backend", _COMPILER) != _COMPILER:
        raise ConfigError(f"engine_args.structured_outputs_config.backend: only {_COMPILER!r} can be bounded")
    # The engine holds an output to its form from the end of the thinking on.
    return _SETTINGS | given | {"reasoning_parser": settings.model.reasoning_parser or ""}


def form_checker(llm: Any, *, new_per_minute: int) -> Forms | None:
    """What tries forms out; None where outputs can't be held to any."""
    tokenizer = llm.renderer.get_tokenizer()
    if llm.model_config.runner_type != "generate" or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    serialized = copy.copy(tokenizer.backend_tokenizer)
    serialized.no_padding()
    serialized.no_truncation()
    config = llm.vllm_config.structured_outputs_config
    return Forms(
        {
            "tokenizer": serialized.to_str(),
            "vocabulary": max(llm.model_config.get_vocab_size(), len(tokenizer)),
            "end_id": tokenizer.eos_token_id,
            "any_whitespace": not config.disable_any_whitespace,
        },
        new_per_minute=new_per_minute,
    )


def form_params(form: StructuredOutput) -> StructuredOutputsParams:
    """A form as vLLM takes it."""
    match form.kind:
        case "json_schema":
            params = StructuredOutputsParams(json=form.value)
        case "json_object":
            params = StructuredOutputsParams(json_object=True)
        case "choice":
            params = StructuredOutputsParams(choice=list(form.choices))
        case "regex":
            params = StructuredOutputsParams(regex=form.value)
        case "grammar":
            params = StructuredOutputsParams(grammar=form.value)
    # What vLLM does when it checks them itself.
    params._backend = _COMPILER
    return params
