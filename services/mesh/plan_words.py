"""What `tokenloom plan` says of one model in one place: in words, and as JSON."""

from collections.abc import Iterator
from typing import Any, Final

from services.mesh.checkpoint import Checkpoint
from services.mesh.fit import Fit
from services.mesh.places import Place

__all__ = ["as_json", "in_words"]

_GIB: Final = 1 << 30
_BILLION: Final = 10**9
_UNKNOWN_CACHE: Final = "not known: say --layers, --kv-heads and --head-dim, as the model's config.json has them"


def as_json(name: str, checkpoint: Checkpoint, found: Fit, place: Place, share: float) -> dict[str, Any]:
    """Sizes are bytes; what isn't known is null."""
    answer: dict[str, Any] = {
        "name": name,
        "device": place.kind,
        "parameters": checkpoint.parameters,
        "gpus": found.gpus,
        "weight_bytes_per_gpu": round(found.weight_bytes),
        "weights_known_by": found.weights_known_by,
        "kv_cache_bytes_per_token": round(found.cache.bytes_per_token) if found.knows_cache else None,
        "kv_cache_kind": found.cache.kind,
        "overhead_bytes_per_gpu": round(found.overhead_bytes),
        "max_model_len": found.max_model_len,
        "typical_length": found.typical_tokens,
        "fits": found.fits if place.bytes is not None else None,
    }
    if place.bytes is not None:
        answer |= {"memory_bytes": place.bytes, "budget_bytes_per_gpu": round(found.budget_bytes)}
        answer |= {"kv_cache_bytes_per_gpu": round(found.cache_bytes)}
        answer |= {"gpu_memory_utilization": share} if place.kind == "gpu" else {}
    if place.bytes is not None and found.knows_cache:
        answer |= {
            "kv_cache_tokens": found.cache_tokens,
            "concurrency_at_max_model_len": found.at_max_len,
            "concurrency_at_typical_length": found.at_typical,
            "longest_request": found.longest,
        }
    return answer


def in_words(name: str, checkpoint: Checkpoint, found: Fit, place: Place, share: float) -> Iterator[str]:
    """Lines."""
    on = "one GPU" if found.gpus == 1 else f"each of {found.gpus} GPUs"
    on = "the CPU" if place.kind == "cpu" else on
    yield f"{name}: {_count(checkpoint.parameters)} parameters"
    yield f"  weights      {_gib(found.weight_bytes)} on {on} ({found.weights_known_by})"
    if found.knows_cache:
        yield f"  KV cache     {found.cache.bytes_per_token / 1024:.1f} KiB a token on {on} ({found.cache.kind})"
    else:
        yield f"  KV cache     {_UNKNOWN_CACHE}"
    runtime = "PyTorch" if place.kind == "cpu" else "CUDA"
    yield f"  allowance    {_gib(found.overhead_bytes)} for {runtime}, one step's activations and its logits"
    if place.bytes is None:
        yield "  whether it fits is not known: no GPU's memory is; say --gpu-memory 24GiB, or one for each: 45,45,24"
        return
    if place.kind == "cpu":
        yield f"  memory       {_gib(place.bytes)} are free"
    else:
        yield f"  GPU          {_gib(place.bytes)}, of which vLLM may take {share:g}, {_gib(found.budget_bytes)}"
    yield from _verdict(found)


def _verdict(found: Fit) -> Iterator[str]:
    if found.left_bytes <= 0:
        yield f"  it does not fit: weights and allowance are {_gib(-found.left_bytes)} more than there is"
    elif not found.knows_cache:
        yield f"  the weights fit, and leave {_gib(found.left_bytes)}; for how many requests that is, is not known"
    elif found.fits:
        yield f"  left         {_gib(found.cache_bytes)} for the KV cache, {found.cache_tokens:,} tokens"
        yield f"  it fits: {_requests(found.at_max_len)} of {found.max_model_len:,} tokens at the same time, or"
        yield f"  {_requests(found.at_typical)} of {found.typical_tokens:,} tokens"
    else:
        yield (
            f"  it does not fit: {_gib(found.cache_bytes)} are left for the KV cache, and one request of "
            f"{found.max_model_len:,} tokens needs {_gib(found.cache.sequence_bytes(found.max_model_len))}; "
            f"with max_model_len {found.longest} it would"
        )


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count:,} requests"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= _BILLION / 10 else f"{parameters / 1e6:.2f} million"


def _gib(count: float) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.2f} MiB"
