"""POST /v1/tokenize and /v1/detokenize, as `vllm serve` has them without the /v1."""

from typing import Annotated, Any, ClassVar, Final

import msgspec
from msgspec import Meta
from tokenloom.inference.v1 import inference_pb2
from tokenloom.router.v1 import router_pb2

from services.gateway.convert_chat import from_chat
from services.gateway.decoding import invalid
from services.gateway.schema import ModelName, TokenId
from services.gateway.schema_chat import ChatRequest, Message, Tool
from services.gateway.unary import Ask, Part, UnaryKind

__all__ = ["DETOKENIZE", "TOKENIZE", "DetokenizeRequest", "TokenizeRequest"]

_MAX_TOKENS: Final = 1 << 20
_NAMES: Final = {
    "text": "prompt",
    "chat": "messages",
    "without_special_tokens": "add_special_tokens",
    "template_arguments_json": "chat_template_kwargs",
}


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text, or a conversation to render with the model's chat template first."""

    MORE_SCHEMA: ClassVar[dict[str, Any]] = {"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}

    model: ModelName
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=10_000)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    """The text of each token on its own, too."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=32)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Tokens to turn back into text."""

    model: ModelName
    tokens: Annotated[list[TokenId], Meta(max_length=_MAX_TOKENS)]


async def _tokenize(body: TokenizeRequest, ask: Ask) -> dict[str, Any]:
    request = inference_pb2.TokenizeRequest(model=body.model, with_token_texts=bool(body.return_token_strs))
    if body.messages is not None:
        _set_chat(request, body)
    else:
        _set_text(request, body)
    answer = await ask.one(Part(method="Tokenize", request=request, rename=_client_name))
    return {
        "count": len(answer.token_ids),
        "max_model_len": answer.max_context_token_count,
        "tokens": list(answer.token_ids),
        "token_strs": list(answer.token_texts) if body.return_token_strs else None,
    }


async def _detokenize(body: DetokenizeRequest, ask: Ask) -> dict[str, Any]:
    request = inference_pb2.DetokenizeRequest(model=body.model, token_ids=body.tokens)
    answer = await ask.one(
        Part(method="Detokenize", request=request, rename=lambda field: field.replace("token_ids", "tokens", 1))
    )
    return {"prompt": answer.text}


TOKENIZE: Final = UnaryKind(
    operation="tokenize", shape=TokenizeRequest, task=router_pb2.TASK_TOKENIZE, answer=_tokenize
)
DETOKENIZE: Final = UnaryKind(
    operation="detokenize", shape=DetokenizeRequest, task=router_pb2.TASK_TOKENIZE, answer=_detokenize
)


def _set_text(request: inference_pb2.TokenizeRequest, body: TokenizeRequest) -> None:
    if body.prompt is None:
        raise invalid("prompt", "missing required parameter: prompt", "missing_required_parameter")
    for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools"):
        if getattr(body, name) is not None:
            raise invalid(name, f"{name}: only with messages")
    request.text = body.prompt
    request.without_special_tokens = body.add_special_tokens is False


def _set_chat(request: inference_pb2.TokenizeRequest, body: TokenizeRequest) -> None:
    if body.prompt is not None:
        raise invalid("prompt", "prompt: give prompt or messages, not both")
    if body.add_special_tokens:
        raise invalid("add_special_tokens", "add_special_tokens: the chat template adds them")
    assert body.messages is not None
    chat = ChatRequest(
        model=body.model,
        messages=body.messages,
        tools=body.tools,
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    chat.check()
    request.chat.CopyFrom(from_chat(chat)[0].chat)


def _client_name(field: str) -> str:
    field = field.removeprefix("chat.")
    return _NAMES.get(field, field)
