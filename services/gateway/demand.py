"""What a generate request asks for, as far as that can be told before a worker has seen it."""

from typing import Final

from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2

__all__ = ["estimated_prompt_tokens", "most_output_tokens", "needed_capabilities"]

# A picture is a few hundred to a thousand tokens for most models; only the worker knows.
_TOKENS_PER_MEDIUM: Final = 512
_NEEDED_BY_PART: Final[dict[str | None, inference_pb2.Capability.ValueType]] = {
    "image": inference_pb2.CAPABILITY_IMAGES,
    "audio": inference_pb2.CAPABILITY_AUDIO,
}


def estimated_prompt_tokens(request: pb.GenerateRequest) -> int:
    """How many tokens the prompt has, about."""
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        return len(request.token_ids.ids)
    if kind == "chat":
        return sum([_message_tokens(message) for message in request.chat.messages])
    return len(request.text) // 4 + 1


def most_output_tokens(request: pb.GenerateRequest) -> int | None:
    """The most tokens that are wanted, of all choices together; None where nobody says."""
    sampling = request.sampling
    if not sampling.HasField("max_tokens"):
        return None
    return sampling.max_tokens * max(1, request.choice_count)


def needed_capabilities(chat: pb.ChatPrompt) -> set[inference_pb2.Capability.ValueType]:
    """What a worker must be able to do for the parts of a conversation."""
    kinds = {part.WhichOneof("content") for message in chat.messages for part in message.parts}
    return {_NEEDED_BY_PART[kind] for kind in kinds if kind in _NEEDED_BY_PART}


def _message_tokens(message: pb.ChatMessage) -> int:
    texts, media = len(message.content), 0
    for part in message.parts:
        if part.HasField("text"):
            texts += len(part.text)
        else:
            media += 1
    return texts // 4 + 4 + _TOKENS_PER_MEDIUM * media
