"""POST /v1/embeddings, as OpenAI has it."""

import base64
import re
import sys
from array import array
from collections.abc import Iterable
from typing import Any, Final

from tokenloom.inference.v1 import generation_pb2, inference_pb2
from tokenloom.router.v1 import router_pb2

from services.gateway.schema_pooling import EmbeddingsRequest, Inputs, inputs_of
from services.gateway.unary import Ask, Part, UnaryKind

__all__ = ["EMBEDDINGS", "token_limit"]

# What one call of a worker takes.
_INPUTS_A_CALL: Final = 256
_BYTES_PER_TOKEN: Final = 4
_WHOLE_CONTEXT: Final = 2**31 - 1
_NAMES: Final = {"dimension_count": "dimensions", "prompt_token_limit": "truncate_prompt_tokens"}
_INPUT: Final = re.compile(r"(?:texts|token_ids)\[(?P<index>\d+)\](?:\.ids(?P<token>\[\d+\])?)?")


async def _answer(body: EmbeddingsRequest, ask: Ask) -> dict[str, Any]:
    inputs = inputs_of(body.input)
    answers = await ask.all([_part(body, inputs, start) for start in range(0, len(inputs), _INPUTS_A_CALL)])
    vectors = [embedding.values for answer in answers for embedding in answer.embeddings]
    encode = _base64 if body.encoding_format == "base64" else list
    return {
        "id": f"embd-{ask.request_id}",
        "object": "list",
        "created": ask.created,
        "model": ask.model,
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)
        ],
        "usage": ask.usage,
    }


EMBEDDINGS: Final = UnaryKind(
    operation="embeddings", shape=EmbeddingsRequest, task=router_pb2.TASK_EMBED, answer=_answer
)


def token_limit(truncate: int) -> int:
    """vLLM's truncate_prompt_tokens as a worker's limit; -1 is whatever the model takes."""
    return _WHOLE_CONTEXT if truncate < 0 else truncate


def _part(body: EmbeddingsRequest, inputs: Inputs, start: int) -> Part:
    request = inference_pb2.EmbedRequest(model=body.model, dimension_count=body.dimensions)
    tokens = 0
    for entry in inputs[start : start + _INPUTS_A_CALL]:
        if isinstance(entry, str):
            request.texts.append(entry)
            tokens += len(entry) // _BYTES_PER_TOKEN + 1
        else:
            request.token_ids.append(generation_pb2.TokenIds(ids=entry))
            tokens += len(entry)
    if body.truncate_prompt_tokens is not None:
        request.prompt_token_limit = token_limit(body.truncate_prompt_tokens)
        request.keep_beginning = body.truncation_side != "left"
    is_list = isinstance(body.input, list) and not isinstance(body.input[0], int)

    def rename(field: str) -> str:
        found = _INPUT.fullmatch(field)
        if found is None:
            return _NAMES.get(field, field)
        where = f"[{start + int(found['index'])}]" if is_list else ""
        return f"input{where}{found['token'] or ''}"

    return Part(method="Embed", request=request, prompt_tokens=tokens, rename=rename)


def _base64(values: Iterable[float]) -> str:
    """The components as 32-bit floats, little-endian, as OpenAI's SDK reads them."""
    packed = array("f", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()
