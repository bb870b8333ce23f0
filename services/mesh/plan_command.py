"""tokenloom plan: whether a model fits, and whether a mesh.yaml is right, before anything starts."""

import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from services.common.config import ConfigError
from services.common.engine_args import check_engine_args, parallel_size
from services.mesh.checkpoint import Checkpoint, described, read_checkpoint
from services.mesh.config import MeshConfig
from services.mesh.config_file import load_mesh
from services.mesh.config_rules import advice_on, check_folders
from services.mesh.fit import Fit, fit, fit_cpu
from services.mesh.places import Place, Places
from services.mesh.plan_words import as_json, in_words

__all__ = ["plan"]

_SHARE: Final = 0.8
_ARGUMENTS: Final = ("tensor_parallel_size", "pipeline_parallel_size", "max_model_len", "dtype", "kv_cache_dtype")
_SHAPE: Final = ("layers", "kv_heads", "head_dim")
_PARAMETERS: Final = re.compile(r"(?P<count>\d+(?:\.\d+)?)\s*(?P<unit>[MBT])?", re.IGNORECASE)
_UNITS: Final = {"": 1, "M": 10**6, "B": 10**9, "T": 10**12}
_FITS, _DOES_NOT_FIT, _NOT_KNOWN = 0, 1, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """A model in a place."""

    name: str
    checkpoint: Checkpoint
    place: Place
    share: float
    arguments: Mapping[str, Any]


def plan(arguments: Namespace) -> int:
    """Says it; the exit code is 0 when everything fits, 1 when something doesn't, and 3 when that can't be told.

    Raises:
        ConfigError: the options or the mesh.yaml can't be used.
    """
    ways = (arguments.config, arguments.model, arguments.parameters)
    if sum(way is not None for way in ways) != 1:
        raise ConfigError("plan: give either --model PATH, --parameters 8B or --config FILE")
    places = Places(arguments)
    if arguments.config is None:
        questions, notes = list(_of_options(arguments, places)), list[str]()
    else:
        mesh = check_folders(load_mesh(arguments.config), str(arguments.config))
        questions, notes = list(_of_mesh(mesh, arguments, places)), list(advice_on(mesh))
    found = [(question, _answer(question, arguments.typical_length)) for question in questions]
    if arguments.json:
        models = [as_json(one.name, one.checkpoint, fits, one.place, one.share) for one, fits in found]
        config = None if arguments.config is None else str(arguments.config)
        _print(json.dumps({"config": config, "notes": notes, "models": models}, indent=2))
    else:
        if arguments.config is not None:
            _print("\n".join((_of_config(str(arguments.config), questions), *(f"  note: {note}" for note in notes))))
        for one, fits in found:
            _print("\n".join(in_words(one.name, one.checkpoint, fits, one.place, one.share)))
    if any(one.place.bytes is not None and not fits.fits for one, fits in found):
        return _DOES_NOT_FIT
    return _NOT_KNOWN if any(one.place.bytes is None for one in questions) else _FITS


def _of_config(name: str, questions: list[_Question]) -> str:
    unknown = sum(question.place.bytes is None for question in questions)
    if not unknown:
        return f"{name} is right"
    return (
        f"{name} has no mistakes in its keys; whether {unknown} of its {len(questions)} vLLM workers fit is not known"
    )


def _of_options(arguments: Namespace, places: Places) -> Iterator[_Question]:
    _refuse(arguments, _SHAPE if arguments.parameters is None else (), "goes with --parameters")
    given = {name: getattr(arguments, name) for name in _ARGUMENTS if getattr(arguments, name) is not None}
    for name, value in given.items():
        # In the words of the option that says it.
        check_engine_args({name: value}, "plan")
    share = _SHARE if arguments.gpu_memory_utilization is None else arguments.gpu_memory_utilization
    if not 0 < share <= 1:
        raise ConfigError(f"--gpu-memory-utilization: expected above 0 to 1, got the value {share}")
    if arguments.model is not None:
        checkpoint, name = read_checkpoint(arguments.model), arguments.model
    else:
        checkpoint, name = _described(arguments), f"a model of {arguments.parameters}"
    for place in places.for_model(parallel_size(given)):
        yield _Question(name=name, checkpoint=checkpoint, place=place, share=share, arguments=given)


def _described(arguments: Namespace) -> Checkpoint:
    found = _PARAMETERS.fullmatch(arguments.parameters.strip())
    if found is None or not float(found["count"]):
        raise ConfigError(f"--parameters: expected a number such as 8B, got the value {arguments.parameters!r}")
    shape = [getattr(arguments, name) for name in _SHAPE]
    if any(shape) and not all(shape):
        raise ConfigError("--layers, --kv-heads and --head-dim: all of them, or none")
    for name, value in zip(_SHAPE, shape, strict=True):
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, got the value {value}")
    return described(
        parameters=int(float(found["count"]) * _UNITS[(found["unit"] or "").upper()]),
        dtype=arguments.dtype or "bfloat16",
        layers=arguments.layers,
        heads=arguments.kv_heads,
        size=arguments.head_dim,
    )


def _of_mesh(mesh: MeshConfig, arguments: Namespace, places: Places) -> Iterator[_Question]:
    options = (*_ARGUMENTS, *_SHAPE, "gpu_memory_utilization")
    _refuse(arguments, options, "not together with --config, which says it itself")
    read = cache(read_checkpoint)
    for pool in mesh.pools:
        for worker in pool.workers:
            path = mesh.model(pool.model_of(worker)).path
            if worker.engine == "vllm" and path is not None:
                yield _Question(
                    name=f"worker {worker.name}, model {pool.model_of(worker)}",
                    checkpoint=read(path),
                    place=places.for_worker(worker.gpu, parallel_size(worker.engine_args)),
                    share=worker.gpu_memory_utilization,
                    arguments=worker.engine_args,
                )


def _refuse(arguments: Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: {why}")


def _answer(question: _Question, typical: int | None) -> Fit:
    checkpoint, arguments, size = question.checkpoint, question.arguments, question.place.bytes or 0
    if question.place.kind == "cpu":
        return fit_cpu(checkpoint, free_bytes=size, arguments=arguments, typical_tokens=typical)
    return fit(checkpoint, gpu_bytes=size, share=question.share, arguments=arguments, typical_tokens=typical)


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
