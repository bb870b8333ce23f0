"""What http_parity.py asks: each field of the OpenAI API, good and bad, and what differs on purpose."""

from typing import Any, Final

__all__ = ["BAD", "GOOD", "NAMES", "NOWHERE", "ONLY_OURS", "OTHERWISE", "STRICTER", "UNSERVED", "Body"]

Body = dict[str, Any]
_CHAT: Final = "/v1/chat/completions"
_LEGACY: Final = "/v1/completions"
_USER: Final = {"role": "user", "content": "How is the weather?"}
_PARAMETERS: Final = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
_TOOL: Final = {"type": "function", "function": {"name": "get_weather", "parameters": _PARAMETERS}}
_NAMED: Final = {"type": "function", "function": {"name": "get_weather"}}
_CALL: Final = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
}
_SCHEMA: Final = {"type": "json_schema", "json_schema": {"name": "weather", "schema": _PARAMETERS}}
# Its answers are full of characters of several tokens, and of halves of them.
_WIDE: Final = {"logit_bias": dict.fromkeys(map(str, range(130, 260)), 60), "max_tokens": 40}
_SAMPLED: Final = {"temperature": 1, "seed": 7}
_THOUGHT: Final = '%llguidance {}\nstart: "Rain, perhaps." </think> "Fine."\n'

_BOTH_GOOD: Final[list[Body]] = [
    {},
    {"max_tokens": 1},
    {"max_tokens": 40, "ignore_eos": True},
    {"max_tokens": 40, "min_tokens": 30},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 2, "seed": -5},
    {**_SAMPLED, "top_p": 0.5},
    {**_SAMPLED, "top_k": 5},
    {**_SAMPLED, "top_k": -1},
    {**_SAMPLED, "top_k": 0},
    {**_SAMPLED, "min_p": 0.2},
    {**_SAMPLED, "n": 3},
    {"presence_penalty": 1.5, "max_tokens": 30},
    {"frequency_penalty": -1.5, "max_tokens": 30},
    {"repetition_penalty": 1.7, "max_tokens": 30},
    {"logit_bias": {"100": 100}},
    {"logit_bias": {"5": -50.5, "7": 3}},
    {"stop": "e", "max_tokens": 60},
    {"stop": ["zz", " a", "o"], "max_tokens": 60},
    {"stop": ["e"], "include_stop_str_in_output": True, "max_tokens": 60},
    {"stop_token_ids": list(range(3, 60)), "max_tokens": 60},
    {"bad_words": ["the", "a"]},
    {"allowed_token_ids": [70, 71, 72, 73]},
    {"skip_special_tokens": False},
    {"truncate_prompt_tokens": 5},
    {"return_token_ids": True},
    {"prompt_logprobs": 2},
    {"prompt_logprobs": 0},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}, "max_tokens": 40},
    {"response_format": _SCHEMA, "max_tokens": 60},
    {"structured_outputs": {"regex": "[0-9]{3}-(yes|no)"}},
    {"structured_outputs": {"choice": ["one", "two words"]}},
    {"structured_outputs": {"json": _PARAMETERS}, "max_tokens": 60},
    {"structured_outputs": {"grammar": 'root ::= ("ab" | "cd")+ "!"'}},
    {"cache_salt": "salt"},
    {"user": "somebody"},
    {"stream": True},
    {"stream": False},
    {"stream": True, "stream_options": {"include_usage": False}},
    {"temperature": None, "top_p": None, "stop": None, "seed": 3, "n": None, "user": None},
]
_BOTH_BAD: Final[list[Body]] = [
    {"model": "nothing"},
    *({"temperature": value} for value in (-0.1, "hot")),
    *({"top_p": value} for value in (0, 1.1, -1, "x")),
    *({"top_k": value} for value in (-2, "x")),
    *({"min_p": value} for value in (-0.1, 1.5)),
    *({"max_tokens": value} for value in (0, -1, 1.5, "x", 3000)),
    *({"min_tokens": value} for value in (-1, 13)),
    *({"n": value} for value in (0, -1, 100_000)),
    *({"presence_penalty": value} for value in (-2.1, 2.1)),
    *({"frequency_penalty": value} for value in (-2.1, 2.1)),
    *({"repetition_penalty": value} for value in (0, -1)),
    *({"logit_bias": value} for value in ({"a": 1}, {"99999": 1}, [1])),
    {"stop": [""]},
    {"stop_token_ids": [99_999]},
    {"allowed_token_ids": [99_999]},
    {"allowed_token_ids": []},
    {"bad_words": [""]},
    {"prompt_logprobs": -5},
    {"prompt_logprobs": 1000},
    {"prompt_logprobs": 1, "stream": True},
    {"seed": 2**64},
    {"stream_options": {"include_usage": True}},
    {"cache_salt": ""},
    {"response_format": {"type": "nothing"}},
    {"response_format": {"type": "json_schema"}},
    {"structured_outputs": {"regex": "(unclosed"}},
    {"structured_outputs": {"json": {"type": "nothing"}}},
    {"structured_outputs": {"grammar": "no grammar"}},
    {"structured_outputs": {"regex": "a", "choice": ["b"]}},
]

GOOD: Final[dict[str, list[Body]]] = {
    _CHAT: [
        *_BOTH_GOOD,
        {"max_tokens": ..., "max_completion_tokens": 5},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True},
        {**_WIDE, "logprobs": True, "top_logprobs": 5},
        {**_WIDE, "logprobs": True, "top_logprobs": 5, "tools": [_TOOL]},
        {"messages": [{"role": "user", "content": "日本語🚀é"}], **_WIDE, "logprobs": True, "top_logprobs": 3},
        {"logprobs": False},
        {"tools": [_TOOL]},
        {"tools": [_TOOL], "tool_choice": "none"},
        {"tools": [_TOOL], "tool_choice": "auto"},
        {"tools": [_TOOL], "tool_choice": "required", "max_tokens": 80},
        {"tools": [_TOOL], "tool_choice": _NAMED, "max_tokens": 80},
        {"tools": [_TOOL], "parallel_tool_calls": False},
        {"messages": [{"role": "system", "content": "Be brief."}, _USER]},
        {"messages": [{"role": "developer", "content": "Be brief."}, _USER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "How"}, {"type": "text", "text": "is"}]}]},
        {"messages": [_USER, {"role": "assistant", "content": "Fine."}, _USER]},
        {
            "messages": [
                _USER,
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."},
            ]
        },
        {"messages": [_USER, {"role": "assistant", "content": "It is"}], "add_generation_prompt": False,
         "continue_final_message": True},
        {"messages": [{**_USER, "name": "Ann"}]},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"thinking": True}, "structured_outputs": {"grammar": _THOUGHT}, "max_tokens": 60},
        {"chat_template_kwargs": {"thinking": True}, "structured_outputs": {"grammar": _THOUGHT}, "max_tokens": 60,
         "include_reasoning": False},
        {"reasoning_effort": "low"},
    ],
    _LEGACY: [
        *_BOTH_GOOD,
        {"max_tokens": ...},
        {"prompt": ["One", "Two two"]},
        {"prompt": [74, 467, 81]},
        {"prompt": [[74, 467, 81], [5, 6]]},
        {"prompt": ["One", "Two"], **_SAMPLED, "n": 2},
        {"logprobs": 0},
        {"logprobs": 3},
        {"logprobs": 2, "return_tokens_as_token_ids": True},
        {"echo": True},
        {"echo": True, "logprobs": 2},
        {**_WIDE, "logprobs": 5},
        {**_WIDE, "prompt": "A 日本語🚀é", "echo": True, "logprobs": 5},
        {"add_special_tokens": False},
        {"suffix": None},
    ],
}  # fmt: skip  # a table
BAD: Final[dict[str, list[Body]]] = {
    _CHAT: [
        *_BOTH_BAD,
        {"messages": ...},
        {"messages": "How?"},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "word " * 5000}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 1000},
        {"logprobs": True, "top_logprobs": -2},
        {"tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tool_choice": "required"},
        {"tool_choice": _NAMED},
        {"tools": [{"type": "function"}]},
        {"tools": "x"},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"reasoning_effort": "much"},
    ],
    _LEGACY: [
        *_BOTH_BAD,
        {"prompt": ...},
        {"prompt": []},
        {"prompt": [99_999]},
        {"prompt": [-1]},
        {"prompt": "word " * 5000},
        {"prompt": {"a": 1}},
        {"logprobs": 1000},
        {"logprobs": -5},
        {"suffix": "x"},
    ],
}

NOWHERE: Final[dict[str, str]] = {
    "watermarking": "not offered",
    "priority": "the key's and the header x-priority's, else anybody could jump the queue",
    "request_id": "made at the edge, since ids that clients choose are a way into other requests",
    "session_id": "the header x-session-id",
    "kv_transfer_params": "between workers, and never a client's: it names addresses to connect to",
    "ec_transfer_params": "between workers, and never a client's: it names addresses to connect to",
    "vllm_xargs": "means what plugins say, which workers don't load",
    "mm_payload": "of vLLM's render endpoints alone",
    "return_mm_kwargs": "of vLLM's render endpoints alone",
}
"""vLLM's fields that no path takes, and why."""
_SHARED: Final[dict[str, str]] = {
    **NOWHERE,
    "use_beam_search": "beams can't be streamed, moved to another worker or scheduled fairly",
    "length_penalty": "of beams alone",
    "spaces_between_special_tokens": "of slow tokenizers alone, which vLLM does without",
    "truncation_side": "prompts keep their end; embeddings have it",
    "logprob_token_ids": "not offered",
    "repetition_detection": "not offered",
    "thinking_token_budget": "not offered",
    "stream_interval": "each step's tokens are sent when they are there",
    "routed_experts_prompt_start": "not offered",
    "return_token_offsets": "of vLLM's render endpoints alone",
}
UNSERVED: Final[dict[str, dict[str, str]]] = {
    _CHAT: {
        **_SHARED,
        "echo": "not offered in chat",
        "add_special_tokens": "the chat template adds them",
        "documents": "chat_template_kwargs has them",
        "chat_template": "a template is a program; it comes with the model, never with a request",
        "media_io_kwargs": "the model's, since it opens what a decoder may take",
        "mm_processor_kwargs": "the model's, since it opens what a decoder may take",
        "return_prompt_text": "return_token_ids and /v1/detokenize",
    },
    _LEGACY: {**_SHARED, "prompt_embeds": "tensors from clients are a way into the engine (CVE-2025-62164)"},
}
"""vLLM's fields that are refused by name, and why."""
ONLY_OURS: Final[dict[str, list[Body]]] = {
    _CHAT: [
        # vLLM makes a structural tag of them that guidance does not take: "Invalid grammar specification: 'triggers'".
        {"tools": [_TOOL], "tool_choice": "required"},
        {"tools": [_TOOL], "tool_choice": _NAMED},
        {"tools": [_TOOL], "parallel_tool_calls": False},
    ],
    # null is the default everywhere.
    _LEGACY: [{"n": None}],
}
"""What vLLM's server refuses, and we don't."""
STRICTER: Final[dict[str, list[Body]]] = {_CHAT: [{"messages": [{"role": "user"}]}], _LEGACY: []}
"""What we refuse, and vLLM's server doesn't: a user who says nothing."""
NAMES: Final = {
    "input_tokens": ("messages", "prompt"),
    "max_tokens": ("messages", "prompt"),
    "logprobs": ("top_logprobs",),
}
"""What fields are called in vLLM's refusals, and what in OpenAI's."""
OTHERWISE: Final = [
    "bytes of alternatives are those of their texts, also where tokens are written as token_id:N",
    "in chat, alternatives are the likeliest tokens, where vLLM gives the last place to a chosen one that is none",
    "the first token of an echoed prompt has the text that the others leave, also where that is half a character",
    "offsets are those of the text, also where tokens are written as token_id:N",
    "temperature above 2, more than 4 stops, logit_bias beyond 100, seeds beyond 64 bits: OpenAI's bounds, not vLLM's",
    "unknown fields: refused by name, where vLLM ignores them with a warning in its log",
]
"""What else differs on purpose."""
