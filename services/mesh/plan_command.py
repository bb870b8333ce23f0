"""tokenloom plan: whether a model fits a GPU, and whether a mesh.yaml is right, before anything starts."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from services.common.config import ConfigError
from services.common.engine_args import check_engine_args
from services.mesh.checkpoint import Checkpoint, read_checkpoint
from services.mesh.config import MeshConfig
from services.mesh.config_file import load_mesh
from services.mesh.config_rules import check_folders
from services.mesh.fit import Fit, fit, parse_memory

__all__ = ["plan"]

_GIB: Final = 1 << 30
_BILLION: Final = 10**9
_SHARE: Final = 0.8
_ARGUMENTS: Final = ("tensor_parallel_size", "pipeline_parallel_size", "max_model_len", "dtype", "kv_cache_dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """A model on a worker."""

    name: str
    model: str
    share: float
    arguments: Mapping[str, Any]


def plan(arguments: Namespace) -> int:
    """Says it; the exit code is 0 when everything fits, and 1 when something doesn't.

    Raises:
        ConfigError: the options or the mesh.yaml can't be used.
    """
    if (arguments.config is None) == (arguments.model is None):
        raise ConfigError("plan: give either --model PATH or --config FILE")
    gpu_bytes = None if arguments.gpu_memory is None else parse_memory(arguments.gpu_memory)
    if arguments.model is not None:
        questions = [_of_options(arguments)]
    else:
        mesh = check_folders(load_mesh(arguments.config), str(arguments.config))
        questions = list(_of_mesh(mesh, arguments))
    answers = [_answer(question, gpu_bytes, arguments.typical_length) for question in questions]
    if arguments.json:
        _print(json.dumps({"config": _text(arguments.config), "models": [answer for answer, _ in answers]}, indent=2))
    else:
        if arguments.config is not None:
            _print(f"{arguments.config} is right")
        for _, lines in answers:
            _print("\n".join(lines))
    return 1 if any(answer["fits"] is False for answer, _ in answers) else 0


def _of_options(arguments: Namespace) -> _Question:
    given = {name: getattr(arguments, name) for name in _ARGUMENTS if getattr(arguments, name) is not None}
    for name, value in given.items():
        # In the words of the option that says it.
        check_engine_args({name: value}, "plan")
    share = _SHARE if arguments.gpu_memory_utilization is None else arguments.gpu_memory_utilization
    if not 0 < share <= 1:
        raise ConfigError(f"--gpu-memory-utilization: expected above 0 to 1, got the value {share}")
    return _Question(name=arguments.model, model=arguments.model, share=share, arguments=given)


def _of_mesh(mesh: MeshConfig, arguments: Namespace) -> Iterator[_Question]:
    for name in (*_ARGUMENTS, "gpu_memory_utilization"):
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: not together with --config, which says it itself")
    for pool in mesh.pools:
        for worker in pool.workers:
            path = mesh.model(pool.model_of(worker)).path
            if worker.engine == "vllm" and path is not None:
                name = f"worker {worker.name}, model {pool.model_of(worker)}"
                share = worker.gpu_memory_utilization
                yield _Question(name=name, model=path, share=share, arguments=worker.engine_args)


def _answer(question: _Question, gpu_bytes: int | None, typical: int | None) -> tuple[dict[str, Any], list[str]]:
    checkpoint = read_checkpoint(question.model)
    found = fit(
        checkpoint, gpu_bytes=gpu_bytes or 0, share=question.share, arguments=question.arguments, typical_tokens=typical
    )
    knows_gpu = gpu_bytes is not None
    answer: dict[str, Any] = {
        "name": question.name,
        "parameters": checkpoint.parameters,
        "gpus": found.gpus,
        "weight_bytes_per_gpu": round(found.weight_bytes),
        "weights_known_by": found.weights_known_by,
        "kv_cache_bytes_per_token": round(found.cache.bytes_per_token),
        "kv_cache_kind": found.cache.kind,
        "overhead_bytes_per_gpu": round(found.overhead_bytes),
        "max_model_len": found.max_model_len,
        "typical_length": found.typical_tokens,
        "fits": found.fits if knows_gpu else None,
    }
    if knows_gpu:
        answer |= {
            "gpu_memory_utilization": question.share,
            "budget_bytes_per_gpu": round(found.budget_bytes),
            "kv_cache_bytes_per_gpu": round(found.cache_bytes),
            "kv_cache_tokens": found.cache_tokens,
            "concurrency_at_max_model_len": found.at_max_len,
            "concurrency_at_typical_length": found.at_typical,
            "longest_request": found.longest,
        }
    return answer, list(_lines(question, checkpoint, found, gpu_bytes))


def _lines(question: _Question, checkpoint: Checkpoint, found: Fit, gpu_bytes: int | None) -> Iterator[str]:
    on = "one GPU" if found.gpus == 1 else f"each of {found.gpus} GPUs"
    yield f"{question.name}: {_count(checkpoint.parameters)} parameters"
    yield f"  weights      {_gib(found.weight_bytes)} on {on} ({found.weights_known_by})"
    yield f"  KV cache     {found.cache.bytes_per_token / 1024:.1f} KiB a token on {on} ({found.cache.kind})"
    yield f"  allowance    {_gib(found.overhead_bytes)} for CUDA, one step's activations and its logits"
    if gpu_bytes is None:
        yield "  whether it fits depends on the GPU: say --gpu-memory 24GiB, for example"
        return
    yield f"  GPU          {_gib(gpu_bytes)}, of which vLLM may take {question.share:g}, {_gib(found.budget_bytes)}"
    if found.fits:
        yield f"  left         {_gib(found.cache_bytes)} for the KV cache, {found.cache_tokens:,} tokens"
        yield f"  it fits: {_requests(found.at_max_len)} of {found.max_model_len:,} tokens at the same time, or"
        yield f"  {_requests(found.at_typical)} of {found.typical_tokens:,} tokens"
    elif found.cache_bytes <= 0:
        yield f"  it does not fit: weights and allowance are {_gib(-found.cache_bytes)} more than there is"
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


def _text(path: Any) -> str | None:
    return None if path is None else str(path)


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
