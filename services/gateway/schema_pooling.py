"""The request bodies beside generation: embeddings as OpenAI has them, the rest as vLLM, Jina and Cohere do."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from services.gateway.decoding import invalid
from services.gateway.schema import Label, ModelName

__all__ = [
    "Document",
    "EmbeddingsRequest",
    "Inputs",
    "RerankRequest",
    "ScoreRequest",
    "inputs_of",
]

_MAX_INPUTS = 2048
_MAX_PAIRS = 256
_MAX_TOKEN_IDS = 1 << 20
Text = Annotated[str, Meta(min_length=1)]
Truncation = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Inputs = list[str] | list[list[int]]


_IDS: dict[str, Any] = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    "minItems": 1,
    "maxItems": _MAX_TOKEN_IDS,
}
_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_INPUTS = {
    "anyOf": [_TEXT, _IDS]
    + [{"type": "array", "items": each, "minItems": 1, "maxItems": _MAX_INPUTS} for each in (_TEXT, _IDS)]
}


class _Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: ModelName
    user: Label | None = None
    truncate_prompt_tokens: Truncation | None = None
    """Keep only so many tokens; -1: as many as the model takes."""


class EmbeddingsRequest(_Request, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/embeddings"""

    MORE_SCHEMA: ClassVar[dict[str, Any]] = {"required": ["model", "input"]}

    input: Annotated[Any, Meta(extra_json_schema=_INPUTS)] | UnsetType = UNSET
    """A text, texts, token ids, or lists of token ids; see inputs_of()."""
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    """What truncate_prompt_tokens takes away: "right", the default, keeps the beginning."""


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """A text as an object, as Cohere and Jina have it."""

    text: Text


class RerankRequest(_Request, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/rerank"""

    query: Text
    documents: Text | Annotated[list[Text | Document], Meta(min_length=1, max_length=_MAX_INPUTS)]
    top_n: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    """How many of the best to answer; 0 and null answer all."""
    return_documents: bool | None = None

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        documents = [self.documents] if isinstance(self.documents, str) else self.documents
        return [entry if isinstance(entry, str) else entry.text for entry in documents]


Side = Text | Annotated[list[Text], Meta(min_length=1, max_length=_MAX_INPUTS)]
_SIDES = (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"))


class ScoreRequest(_Request, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/score: a query with each text, or pairs; under any of the names that vLLM takes."""

    MORE_SCHEMA: ClassVar[dict[str, Any]] = {"oneOf": [{"required": list(pair)} for pair in _SIDES]}

    queries: Side | None = None
    documents: Side | None = None
    items: Side | None = None
    text_1: Side | None = None
    text_2: Side | None = None
    data_1: Side | None = None
    data_2: Side | None = None

    def names(self) -> tuple[str, str]:
        """The names of the two fields that are used.

        Raises:
            MeshError: INVALID_REQUEST: none, several, or only half of a pair.
        """
        given = [name for pair in _SIDES for name in pair if getattr(self, name) is not None]
        given = list(dict.fromkeys(given))
        for pair in _SIDES:
            if sorted(given) == sorted(pair):
                return pair
        if not given:
            raise invalid("queries", "missing required parameter: queries", "missing_required_parameter")
        pairs = [pair for pair in _SIDES if given[0] in pair]
        if len(given) == 1:
            other = next(name for name in pairs[0] if name != given[0])
            raise invalid(other, f"missing required parameter: {other}", "missing_required_parameter")
        raise invalid(given[1], f"{given[1]}: not together with {given[0]}")

    def sides(self) -> tuple[list[str], list[str]]:
        """The texts of both sides: one query and any number of texts, or as many of both.

        Raises:
            MeshError: INVALID_REQUEST.
        """
        first, second = self.names()
        queries, texts = _listed(getattr(self, first)), _listed(getattr(self, second))
        if len(queries) not in (1, len(texts)):
            counts = f"{len(queries)} and {len(texts)}"
            raise invalid(first, f"{first}: give one, or as many as {second}; these are {counts}")
        if len(queries) > _MAX_PAIRS:
            raise invalid(first, f"{first}: at most {_MAX_PAIRS} pairs", "array_above_max_length")
        return queries, texts


def inputs_of(raw: object) -> Inputs:
    """The inputs of an embeddings request in their four forms; of one kind, texts or token ids.

    Raises:
        MeshError: INVALID_REQUEST.
    """
    if raw is UNSET or raw is None:
        raise invalid("input", "missing required parameter: input", "missing_required_parameter")
    if isinstance(raw, str):
        return [_text(raw, "input")]
    if not isinstance(raw, list):
        raise invalid("input", _EXPECTED, "invalid_type")
    if not raw:
        raise invalid("input", "input: must not be empty", "empty_array")
    if _is_token_ids(raw):
        return [_token_ids(raw, "input")]
    if len(raw) > _MAX_INPUTS:
        raise invalid("input", f"input: at most {_MAX_INPUTS} inputs a request", "array_above_max_length")
    if all(isinstance(entry, str) for entry in raw):
        return [_text(entry, f"input[{index}]") for index, entry in enumerate(raw)]
    if all(isinstance(entry, list) for entry in raw):
        return [_token_ids(entry, f"input[{index}]") for index, entry in enumerate(raw)]
    raise invalid("input", _EXPECTED, "invalid_type")


_EXPECTED = "input: expected a text, a list of texts, a list of token ids, or a list of such lists"


def _listed(side: str | list[str]) -> list[str]:
    return [side] if isinstance(side, str) else side


def _text(text: str, field: str) -> str:
    if not text:
        raise invalid(field, f"{field}: must not be empty")
    return text


def _is_token_ids(raw: list[Any]) -> bool:
    return isinstance(raw[0], int) and not isinstance(raw[0], bool)


def _token_ids(raw: list[Any], field: str) -> list[int]:
    if not raw:
        raise invalid(field, f"{field}: must not be empty", "empty_array")
    if len(raw) > _MAX_TOKEN_IDS:
        raise invalid(field, f"{field}: at most {_MAX_TOKEN_IDS} token ids", "array_above_max_length")
    for entry in raw:
        if not isinstance(entry, int) or isinstance(entry, bool):
            raise invalid(field, f"{field}: expected token ids alone", "invalid_type")
        if not 0 <= entry < 2**31:
            raise invalid(field, f"{field}: {entry} is not a token id")
    return raw
