"""What a generate request's prompt begins with, as hashes: made alike by the gateway and by the endpoint picker."""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Final

from tokenloom.inference.v1 import generation_pb2 as pb

from services.common.prefix import TEXT_BLOCK_BYTES, salt_of, text_block_hashes

__all__ = ["prompt_hashes"]

# Longer prompts are compared by their first 128 KiB only: about 30,000 tokens, and 0.4 ms to hash.
_MOST_BYTES: Final = 512 * TEXT_BLOCK_BYTES
# A file counts as much as the text of the 512 tokens that an image takes in most models.
_DIGEST_REPEATS: Final = 2048 // 64


def prompt_hashes(request: pb.GenerateRequest) -> list[int]:
    """The chained hashes of the prompt's text; none for a prompt of tokens, which are compared themselves.

    Equal hashes mean equal beginnings of what the model will see, in blocks of 256 bytes. A conversation that goes on
    keeps the hashes of what was said before, but for the last block.
    """
    kind = request.WhichOneof("prompt")
    if kind == "text":
        text = request.text
    elif kind == "chat":
        text = "".join(_pieces(request.chat))
    else:
        return []
    return text_block_hashes(text[:_MOST_BYTES], salt=salt_of(request.model, request.cache_salt))


def _pieces(chat: pb.ChatPrompt) -> Iterator[str]:
    # Templates put tools first, then the messages in order. Control characters keep the fields apart.
    yield chat.template_arguments_json
    for tool in chat.tools:
        yield f"\x1dtool\x1f{tool.name}\x1f{tool.description}\x1f{tool.parameters_json}"
    for message in chat.messages:
        yield f"\x1d{message.role}\x1f{message.name}\x1f{message.tool_call_id}\x1f{message.reasoning}\x1f"
        yield message.content
        for part in message.parts:
            yield from _part(part)
        for call in message.tool_calls:
            yield f"\x1e{call.name}\x1f{call.arguments_json}"


def _part(part: pb.ContentPart) -> Iterator[str]:
    kind = part.WhichOneof("content")
    if kind == "text":
        yield "\x1e" + part.text
    elif kind is not None:
        media = part.image if kind == "image" else part.audio
        # Files that begin alike, as those of one program do, have nothing in common.
        digest = blake2b(media.content, digest_size=32).hexdigest()
        yield f"\x1e{media.mime_type}\x1f{digest * _DIGEST_REPEATS}"
