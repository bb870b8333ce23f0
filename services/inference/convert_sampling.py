"""Sampling parameters and structured outputs of the protos as the engine's, within every documented bound."""

from typing import Any, Final

from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.errors import MeshError, Reason
from services.inference.checks import (
    Range,
    check_count,
    check_decimal,
    check_integer,
    check_text,
    check_texts,
    check_token_ids,
    invalid,
    json_object,
)
from services.inference.convert_chat import MAX_SCHEMA_BYTES
from services.inference.engine import Capability, EngineCard
from services.inference.request import Sampling, StructuredOutput

__all__ = ["sampling_from_proto", "structured_output_from_proto"]

_MAX_STOPS: Final = 16
_MAX_STOP_CHARACTERS: Final = 256
_MAX_STOP_TOKEN_IDS: Final = 64
_MAX_LOGIT_BIASES: Final = 1024
_MAX_LOGPROBS: Final = 20
_MAX_BAD_WORDS: Final = 64
_MAX_BAD_WORD_CHARACTERS: Final = 256
_MAX_ALLOWED_TOKEN_IDS: Final = 1024
_MAX_REGEX_BYTES: Final = 4 << 10
_MAX_CHOICES: Final = 1024
_MAX_CHOICE_CHARACTERS: Final = 1024

_DECIMALS: Final = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, above_low=True),
    "min_p": Range(0, 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, 10, above_low=True),
}
_BIAS_RANGE: Final = Range(-100, 100)
_LOGPROBS: Final = ("logprob_count", "prompt_logprob_count")
_OPTIONAL: Final = (*_DECIMALS, "top_k", "max_tokens", "min_tokens", "seed", *_LOGPROBS)


def sampling_from_proto(proto: pb.SamplingParameters, card: EngineCard) -> Sampling:
    """How to choose tokens.

    Raises:
        MeshError: INVALID_REQUEST with the field at fault; UNIMPLEMENTED for what the model can't do.
    """
    given = {name: getattr(proto, name) for name in _OPTIONAL if proto.HasField(name)}  # type: ignore[arg-type]  # the stub lists the names one by one
    for name, bounds in _DECIMALS.items():
        if name in given:
            check_decimal(f"sampling.{name}", given[name], bounds)
    _check_lengths(given, card)
    _check_logprobs(given, card)
    _check_texts(proto)
    _check_tokens(proto, card)
    return Sampling(
        **given,
        stop=tuple(proto.stop),
        stop_token_ids=tuple(proto.stop_token_ids),
        ignore_eos=proto.ignore_eos,
        logit_bias=dict(proto.logit_bias),
        bad_words=tuple(proto.bad_words),
        allowed_token_ids=tuple(proto.allowed_token_ids),
        keep_special_tokens=proto.keep_special_tokens,
        include_stop_string=proto.include_stop_string,
    )


def _check_lengths(given: dict[str, Any], card: EngineCard) -> None:
    most, least = given.get("max_tokens"), given.get("min_tokens", 0)
    if most is not None:
        check_integer("sampling.max_tokens", most, low=1, high=2**32)
        if least > most:
            raise invalid("sampling.min_tokens", f"must be at most max_tokens, {most}", "integer_above_max_value")
    # A prompt has one token at least.
    check_integer("sampling.min_tokens", least, high=card.max_context_tokens - 1)


def _check_logprobs(given: dict[str, Any], card: EngineCard) -> None:
    for name in _LOGPROBS:
        if name not in given:
            continue
        if Capability.LOGPROBS not in card.capabilities:
            message = f"sampling.{name}: the model {card.model!r} reports no log-probabilities"
            raise MeshError(Reason.UNIMPLEMENTED, message, field=f"sampling.{name}")
        check_integer(f"sampling.{name}", given[name], high=_MAX_LOGPROBS)


def _check_texts(proto: pb.SamplingParameters) -> None:
    check_texts("sampling.stop", proto.stop, most=_MAX_STOPS, characters=_MAX_STOP_CHARACTERS)
    check_texts("sampling.bad_words", proto.bad_words, most=_MAX_BAD_WORDS, characters=_MAX_BAD_WORD_CHARACTERS)


def _check_tokens(proto: pb.SamplingParameters, card: EngineCard) -> None:
    check_count("sampling.stop_token_ids", proto.stop_token_ids, _MAX_STOP_TOKEN_IDS, "tokens")
    check_token_ids("sampling.stop_token_ids", proto.stop_token_ids, card.vocabulary_size)
    check_count("sampling.allowed_token_ids", proto.allowed_token_ids, _MAX_ALLOWED_TOKEN_IDS, "tokens")
    check_token_ids("sampling.allowed_token_ids", proto.allowed_token_ids, card.vocabulary_size)
    if len(proto.logit_bias) > _MAX_LOGIT_BIASES:
        raise invalid("sampling.logit_bias", f"at most {_MAX_LOGIT_BIASES} entries", "array_above_max_length")
    for token_id, bias in proto.logit_bias.items():
        field = f"sampling.logit_bias[{token_id}]"
        if token_id >= card.vocabulary_size > 0:
            raise invalid(field, f"{token_id} is not below the vocabulary's size, {card.vocabulary_size}")
        check_decimal(field, bias, _BIAS_RANGE)


def structured_output_from_proto(proto: pb.StructuredOutput, card: EngineCard) -> StructuredOutput:
    """The form that an output must have; whether it can be compiled is another question. Raises MeshError."""
    if Capability.STRUCTURED_OUTPUT not in card.capabilities:
        message = f"structured_output: the output of the model {card.model!r} can't be held to a form"
        raise MeshError(Reason.UNIMPLEMENTED, message, field="structured_output")
    match proto.WhichOneof("form"):
        case "json_schema":
            json_object("structured_output.json_schema", proto.json_schema, MAX_SCHEMA_BYTES)
            return StructuredOutput(kind="json_schema", value=proto.json_schema)
        case "json_object":
            return StructuredOutput(kind="json_object")
        case "regex":
            _check_bytes("structured_output.regex", proto.regex, _MAX_REGEX_BYTES)
            return StructuredOutput(kind="regex", value=proto.regex)
        case "grammar":
            _check_bytes("structured_output.grammar", proto.grammar, MAX_SCHEMA_BYTES)
            return StructuredOutput(kind="grammar", value=proto.grammar)
        case "choices":
            texts = proto.choices.texts
            if not texts:
                raise invalid("structured_output.choices.texts", "at least one text", "empty_array")
            field = "structured_output.choices.texts"
            check_texts(field, texts, most=_MAX_CHOICES, characters=_MAX_CHOICE_CHARACTERS)
            return StructuredOutput(kind="choice", choices=tuple(texts))
        case _:
            raise invalid("structured_output", "one form is required", "missing_required_parameter")


def _check_bytes(field: str, text: str, most: int) -> None:
    check_text(field, text, most, least=1)
    if len(text.encode()) > most:
        raise invalid(field, f"at most {most} bytes", "string_above_max_length")
