"""Errors of workers, in the words of OpenAI's API."""

import pytest

from services.common.errors import MeshError, Reason
from services.gateway.convert import in_openai_terms


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("prompt", "prompt"),
        ("text", "prompt"),
        ("token_ids.ids", "prompt"),
        ("token_ids.ids[3]", "prompt[3]"),
        ("chat.messages[1].parts[2].image", "messages[1].content[2].image_url"),
        ("chat.messages[1].parts[2].audio.content", "messages[1].content[2].input_audio.content"),
        ("chat.messages[1].tool_calls[0].arguments_json", "messages[1].tool_calls[0].function.arguments"),
        ("chat.tools[4].parameters_json", "tools[4].function.parameters"),
        ("chat.tool_choice.mode", "tool_choice"),
        ("structured_output.regex", "response_format"),
        ("messages", "messages"),
        ("chat.messages[0].role", "messages[0].role"),
        ("sampling.min_tokens", "min_tokens"),
        ("sampling.logprob_count", "logprobs"),
    ],
)
def test_a_workers_field_gets_openais_name(field: str, expected: str) -> None:
    error = MeshError(Reason.INVALID_REQUEST, f"{field}: no", field=field, code="c", retry_after_seconds=2)
    told = in_openai_terms(error)
    assert (told.field, told.message, told.code, told.retry_after_seconds) == (expected, f"{expected}: no", "c", 2)


def test_an_error_without_a_field_stays_as_it_is() -> None:
    error = MeshError(Reason.ENGINE_FAILED, "gone")
    assert in_openai_terms(error) is error
