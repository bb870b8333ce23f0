"""The form of a generation that goes on elsewhere: it begins where the tokens emitted so far have got it to.

vLLM takes tokens that were emitted elsewhere for prompt, and has a form begin after the prompt, or after the thinking
that follows it. So in the engine process a form that was just made is taken through those tokens, by what vLLM itself
does after each of its steps: what is chosen then is the same to the last bit.
"""

import functools
from typing import Any

from vllm.v1.structured_output import StructuredOutputManager

from services.inference.vllm_params import FORM_ARGUMENT

__all__ = ["carry_forms_on"]


def carry_forms_on() -> None:
    """Has every form that this process makes from now on begin where it is to."""
    make = StructuredOutputManager._create_grammar

    @functools.wraps(make)
    def make_and_advance(manager: Any, request: Any) -> Any:
        grammar = make(manager, request)
        emitted = (request.sampling_params.extra_args or {}).get(FORM_ARGUMENT, 0)
        if emitted:
            _advance(manager, request, grammar, request.prompt_token_ids[-emitted:])
        return grammar

    StructuredOutputManager._create_grammar = make_and_advance


def _advance(manager: Any, request: Any, grammar: Any, emitted: list[int]) -> None:
    start, _ = manager._get_constraint_bounds(request, emitted, spec_tokens_committed=True)
    if start > len(emitted):
        # It still thinks.
        return
    request.structured_output_request.reasoning_ended = True
    if not grammar.accept_tokens(request.request_id, emitted[start:]):
        raise ValueError("the tokens that were emitted do not have the form")
