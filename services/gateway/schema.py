"""What the two ways to ask for text have in common, and the legacy one: POST /v1/completions.

Beyond OpenAI's fields these are vLLM's documented ones. A field that is not listed is refused by name, never ignored.
"""

from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from services.gateway.decoding import check_schema, invalid, is_given

__all__ = [
    "CompletionRequest",
    "GenerationRequest",
    "JsonSchemaFormat",
    "Label",
    "ModelName",
    "ResponseFormat",
    "SampledRequest",
    "StreamOptions",
    "StructuredOutputs",
]

_INT64: Final = 2**63 - 1
Bias = Annotated[float, Meta(ge=-100, le=100)]
ModelName = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]*\Z")]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Pattern = Annotated[str, Meta(min_length=1, max_length=4096)]
Grammar = Annotated[str, Meta(min_length=1, max_length=65_536)]
Choice = Annotated[str, Meta(min_length=1, max_length=1024)]
Label = Annotated[str, Meta(max_length=512, pattern=r"^[^\x00-\x1f\x7f]*\Z")]
"""What clients call something or somebody."""


_PROMPT_FORMS: Final[list[dict[str, Any]]] = [
    {"type": "string", "minLength": 1},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1},
]
_PROMPTS: Final = {
    "anyOf": [*_PROMPT_FORMS, {"type": "array", "items": {"anyOf": _PROMPT_FORMS}, "minItems": 1, "maxItems": 64}]
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How to stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON Schema with a name."""

    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]*\Z")]
    schema: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    description: Annotated[str, Meta(max_length=4096)] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's way to hold an answer to a form; exactly one of them."""

    json: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    regex: Pattern | None = None
    choice: Annotated[list[Choice], Meta(min_length=1, max_length=1024)] | None = None
    grammar: Grammar | None = None
    json_object: Literal[True] | None = None


class SampledRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What all requests for output have in common. null means the default everywhere."""

    model: ModelName
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=1024)] | None = None
    skip_special_tokens: bool | None = None
    seed: Annotated[int, Meta(ge=-_INT64 - 1, le=_INT64)] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[\x20-\x7e]*\Z")] | None = None
    stream: bool | None = None
    user: Label | None = None


class GenerationRequest(SampledRequest, kw_only=True, forbid_unknown_fields=True):
    """What chat and legacy completions have in common."""

    max_tokens: TokenCount | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    bad_words: Annotated[list[Stop], Meta(max_length=64)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=1024)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    truncate_prompt_tokens: TokenCount | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Refuses what is right field by field and wrong together.

        Raises:
            MeshError: INVALID_REQUEST.
        """
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options: only with stream")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise invalid("min_tokens", f"min_tokens: more than max_tokens ({self.max_tokens})")
        if self.stream and self.prompt_logprobs is not None:
            raise invalid("prompt_logprobs", "prompt_logprobs: not with stream")
        self._check_form()

    def _check_form(self) -> None:
        form = self.response_format
        if form is not None and form.type == "json_schema":
            if form.json_schema is None or not is_given(form.json_schema.schema):
                field = "response_format.json_schema" + (".schema" if form.json_schema else "")
                raise invalid(field, f"missing required parameter: {field}", "missing_required_parameter")
            check_schema(form.json_schema.schema, "response_format.json_schema.schema")
        if self.structured_outputs is None:
            return
        outputs = self.structured_outputs
        others = (outputs.regex, outputs.choice, outputs.grammar, outputs.json_object)
        if is_given(outputs.json) + sum(form is not None for form in others) != 1:
            raise invalid("structured_outputs", "structured_outputs: give exactly one form")
        if form is not None and form.type != "text":
            raise invalid("structured_outputs", "structured_outputs: not together with response_format")
        if is_given(outputs.json):
            check_schema(outputs.json, "structured_outputs.json")


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions"""

    MORE_SCHEMA: ClassVar[dict[str, Any]] = {"required": ["model", "prompt"]}

    prompt: Annotated[Any, Meta(extra_json_schema=_PROMPTS)] | UnsetType = UNSET
    """A text, a list of token ids, or a list of either; see `convert.prompts_of`."""
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
