"""LoRA adapters in the real engine: served beside the model, unloaded while in use, and never able to kill it."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry
from tokenloom.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from tokenloom.router.v1 import admin_pb2, admin_pb2_grpc

from services.common import rpc
from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.common.settings_worker import AdapterSettings, ModelSettings
from services.common.status import error_from_call
from services.inference.engine import Engine, cards_of
from services.inference.gate import Gate
from services.inference.generations import Generations
from services.inference.lifecycle import Lifecycle
from services.inference.metrics import WorkerMetrics
from services.inference.output import FinishReason
from services.inference.registration import Registration, registration_to_proto
from services.inference.request import Generation, Sampling
from services.inference.servicer import InferenceServicer, WorkerServicer, register
from services.inference.spans import Spans
from services.inference.vllm_engine import VllmEngine
from services.inference.vllm_nursery import prepare_process
from tests.support.adapters import make_adapter
from tests.support.demo_model import demo_model
from tests.support.engine_process import generate, worker_settings
from tests.support.router import running_router
from tests.support.sinks import Kept
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    # What they import and how is not ours; everything else is still an error.
    *(pytest.mark.filterwarnings(f"ignore:::{package}") for package in ("torch", "vllm", "transformers", "importlib")),
]

PROMPT = [40, 50, 60, 70] * 16
MOST = 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where adapters may come from."""
    directory = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("first", "poet", "lawyer", "cook"), start=1):
        make_adapter(directory / name, seed=seed)
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(directory: Path) -> AsyncIterator[VllmEngine]:
    """One engine for all the tests, with one adapter from its settings."""
    environment = dict(os.environ)
    prepare_process(settings(directory))
    async with VllmEngine(settings(directory)) as running:
        yield running
    os.environ.clear()
    os.environ.update(environment)


def settings(directory: Path, **model: Any) -> Any:
    """Those of a worker that takes adapters."""
    values: dict[str, Any] = {
        "adapters": [AdapterSettings(name="first", path="first")],
        "adapters_dir": str(directory),
        "max_adapters": MOST,
    }
    kept = ModelSettings(name="demo", path=str(demo_model()), **{**values, **model})
    return worker_settings(str(demo_model()), engine_args={"max_num_seqs": 8}, model_settings=kept)


def generation(model: str, name: str = "g", **sampling: Any) -> Generation:
    """A greedy generation that no end-of-sequence token ends."""
    values: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 12} | sampling
    return Generation(id=name, model=model, prompt=PROMPT, kind="tokens", sampling=Sampling(**values))


async def said(engine: VllmEngine, model: str) -> list[int]:
    """What a model says."""
    sink = await generate(engine, generation(model))
    assert sink.error is None
    return sink.token_ids


async def refusal(engine: VllmEngine, name: str, path: str) -> MeshError:
    """Why an adapter is refused."""
    with pytest.raises(MeshError) as caught:
        await engine._adapters.load(name, path)
    return caught.value


def served(engine: Engine) -> list[str]:
    """The names of what it serves."""
    return [card.model for card in cards_of(engine)]


async def test_an_adapter_is_served_beside_the_model_under_its_own_name(engine: VllmEngine) -> None:
    assert served(engine) == ["demo", "first"]
    base, adapted = await said(engine, "demo"), await said(engine, "first")
    assert base != adapted
    card = await engine._adapters.load("poet", "poet")
    assert (card.model, card.base_model, card.max_context_tokens) == ("poet", "demo", 2048)
    together = await asyncio.gather(
        *(generate(engine, generation(model, model)) for model in ("demo", "first", "poet"))
    )
    poet = together[2].token_ids
    assert [sink.token_ids for sink in together] == [base, adapted, poet]
    assert poet not in (base, adapted)
    await engine._adapters.unload("poet")
    assert served(engine) == ["demo", "first"]


async def test_another_adapter_under_the_same_name_finds_nothing_of_the_first_ones_cache(
    engine: VllmEngine,
) -> None:
    await engine._adapters.load("poet", "poet")
    poet = await said(engine, "poet")
    await engine._adapters.unload("poet")
    await engine._adapters.load("poet", "lawyer")
    sink = await generate(engine, generation("poet"))
    assert sink.starts == [(len(PROMPT), 0)]
    assert sink.token_ids != poet
    await engine._adapters.unload("poet")


async def test_an_adapter_that_is_unloaded_while_in_use_is_served_to_the_end_and_then_unknown(
    engine: VllmEngine, directory: Path
) -> None:
    path = shutil.copytree(directory / "poet", directory / "leaving")
    await engine._adapters.load("leaving", "leaving")
    expected = (await generate(engine, generation("leaving", max_tokens=100))).token_ids
    sink = Kept()
    await engine.submit(generation("leaving", "running", max_tokens=100), sink)
    await eventually(lambda: bool(sink.token_ids), within=5)
    await engine._adapters.unload("leaving")
    # The engine would load it again, and die of not finding it.
    shutil.rmtree(path)
    with pytest.raises(MeshError) as caught:
        await engine.submit(generation("leaving", "late"), Kept())
    assert (caught.value.reason, caught.value.field) == (Reason.MODEL_NOT_FOUND, "model")
    assert not sink.ended.is_set()
    await sink.ended.wait()
    assert (sink.reason, sink.token_ids) == (FinishReason.LENGTH, expected)
    await eventually(lambda: not engine._adapters._leaving, within=5)
    assert await engine._life.backend.llm.list_loras() == [1]


async def test_an_aborted_generation_gives_its_adapter_back(engine: VllmEngine) -> None:
    await engine._adapters.load("poet", "poet")
    sink = Kept()
    await engine.submit(generation("poet", "aborted", max_tokens=1000), sink)
    await eventually(lambda: bool(sink.token_ids), within=5)
    await engine._adapters.unload("poet")
    engine.abort("aborted")
    await eventually(lambda: not engine._adapters._leaving, within=5)
    assert await engine._life.backend.llm.list_loras() == [1]


async def test_bad_adapters_are_refused_and_the_engine_lives(engine: VllmEngine, directory: Path) -> None:
    base = await said(engine, "demo")
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
    make_adapter(directory / "shape", tensors={f"{q_proj}.lora_A.weight": np.zeros((8, 128), np.float32)})
    make_adapter(directory / "rank", rank=32)
    make_adapter(directory / "dora", config={"use_dora": True})
    make_adapter(directory / "init", config={"init_lora_weights": "pissa"})
    make_adapter(directory / "other", config={"base_model_name_or_path": "llama"})
    wanted = {
        "nowhere": "no such folder",
        "/etc": "inside the one",
        "shape": "but this model's has [64, 64]",
        "rank": "at most 16",
        "dora": "DoRA",
        "init": "pissa",
        "other": "base_model_name_or_path",
    }
    for path, message in wanted.items():
        error = await refusal(engine, "bad", path)
        assert (error.reason, error.field) == (Reason.INVALID_REQUEST, "path")
        assert message in error.message
    assert (await refusal(engine, "first", "poet")).reason is Reason.ALREADY_EXISTS
    assert (await refusal(engine, "demo", "poet")).reason is Reason.ALREADY_EXISTS
    assert (await refusal(engine, "a b", "poet")).field == "name"
    with pytest.raises(MeshError) as caught:
        await engine._adapters.unload("bad")
    assert caught.value.reason is Reason.NOT_FOUND
    assert served(engine) == ["demo", "first"]
    assert await said(engine, "demo") == base


async def test_what_only_the_engine_finds_wrong_is_refused_and_leaves_nothing_behind(
    engine: VllmEngine, directory: Path
) -> None:
    # What our check knows nothing of, as with a model without safetensors files.
    adapters, base = engine._adapters, engine._adapters._base
    assert base is not None
    make_adapter(
        directory / "late", tensors={
            "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight": np.zeros((8, 300), np.float32),
        },
    )  # fmt: skip
    adapters._base = type(base)(names=base.names, max_rank=base.max_rank, shapes={})
    try:
        error = await refusal(engine, "late", "late")
    finally:
        adapters._base = base
    assert "the engine refuses it" in error.message
    assert await engine._life.backend.llm.list_loras() == [1]
    assert (await said(engine, "first")) != await said(engine, "demo")


async def test_no_more_adapters_than_the_settings_say(engine: VllmEngine) -> None:
    for name in ("poet", "lawyer"):
        await engine._adapters.load(name, name)
    error = await refusal(engine, "cook", "cook")
    assert error.reason is Reason.FAILED_PRECONDITION
    assert "max_adapters" in error.message
    alone = [await said(engine, name) for name in ("first", "poet", "lawyer", "demo")]
    sinks = await asyncio.gather(
        *(generate(engine, generation(name, name)) for name in ("first", "poet", "lawyer", "demo"))
    )
    assert [sink.token_ids for sink in sinks] == alone
    for name in ("poet", "lawyer"):
        await engine._adapters.unload(name)


async def test_over_grpc_adapters_come_and_go_as_models_and_routers_learn_of_it(engine: VllmEngine) -> None:
    gate = Gate()
    gate.open(engine)
    registry = CollectorRegistry()
    generations = Generations(Spans(None, worker="w"), WorkerMetrics(registry))
    services = (
        InferenceServicer(gate, generations),
        WorkerServicer(gate, generations, Lifecycle(gate, generations, drain_seconds=1.0)),
    )
    async with (
        running_router() as (router, to_router),
        rpc.serve("127.0.0.1:0", lambda server: register(server, *services), grace_seconds=0) as server,
        rpc.channel(f"127.0.0.1:{server.port}") as channel,
        asyncio.TaskGroup() as tasks,
    ):
        who = registration_to_proto(engine.card, worker_id="w", endpoint=f"127.0.0.1:{server.port}", pool="p", gpus=[])
        keeping = tasks.create_task(Registration(who, gate, report_seconds=0.1).keep([f"127.0.0.1:{router.port}"]))
        await eventually(lambda: router.fleet.knows("first"), within=5)
        worker = worker_pb2_grpc.WorkerServiceStub(channel)
        # As an operator does it; what comes after is the worker's own.
        admin: Any = admin_pb2_grpc.RouterAdminServiceStub(to_router)
        load = admin_pb2.LoadAdapterRequest(worker_id="w", name="poet", path="poet")
        loaded = await admin.LoadAdapter(load)
        assert (loaded.model.name, loaded.model.base_model) == ("poet", "demo")
        await eventually(lambda: bool(list(router.fleet.serving("poet"))), within=2)
        inference = inference_pb2_grpc.InferenceServiceStub(channel)
        listed = await inference.ListModels(inference_pb2.ListModelsRequest())
        assert [model.name for model in listed.models] == ["demo", "first", "poet"]
        request = generation_pb2.GenerateRequest(
            model="poet",
            token_ids=generation_pb2.TokenIds(ids=PROMPT),
            sampling=generation_pb2.SamplingParameters(temperature=0, max_tokens=12, ignore_eos=True),
        )
        events = [event async for event in inference.Generate(request)]
        assert events[0].started.model == "poet"
        assert [token for event in events for token in event.delta.token_ids] == await said(engine, "poet")
        unload = admin_pb2.RollWorkersRequest(model="poet", unload_adapter=worker_pb2.UnloadAdapterRequest(name="poet"))
        assert [answer.worker_id async for answer in admin.RollWorkers(unload)] == ["w"]
        await eventually(lambda: not router.fleet.knows("poet"), within=2)
        for call, reason in (
            (
                admin.LoadAdapter(admin_pb2.LoadAdapterRequest(worker_id="w", name="x", path="..")),
                Reason.INVALID_REQUEST,
            ),
            (worker.UnloadAdapter(worker_pb2.UnloadAdapterRequest(name="poet")), Reason.NOT_FOUND),
            (worker.LoadAdapter(worker_pb2.LoadAdapterRequest(name="x", path="../x")), Reason.INVALID_REQUEST),
            (inference.Tokenize(inference_pb2.TokenizeRequest(model="poet", text="x")), Reason.MODEL_NOT_FOUND),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert error_from_call(caught.value).reason is reason
        keeping.cancel()


async def test_an_engine_that_starts_again_has_its_adapters_again_but_those_that_broke(
    engine: VllmEngine, directory: Path
) -> None:
    first = await said(engine, "first")
    make_adapter(directory / "fragile", seed=9)
    await engine._adapters.load("fragile", "fragile")
    (directory / "fragile" / "adapter_model.safetensors").write_bytes(b"broken")
    for child in psutil.Process().children(recursive=True):
        if "EngineCore" in child.name() or child.name().startswith("VLLM"):
            child.send_signal(signal.SIGKILL)
    await eventually(lambda: not engine.load.alive, within=10)
    await eventually(lambda: engine.load.alive, within=30)
    assert served(engine) == ["demo", "first"]
    assert await said(engine, "first") == first


async def test_an_adapter_of_the_settings_that_cannot_be_loaded_is_named(directory: Path) -> None:
    wrong = settings(
        directory, adapters=[AdapterSettings(name="first", path="first"), AdapterSettings(name="x", path="..")]
    )
    with pytest.raises(ConfigError, match=r"model\.adapters\[1\]\.path: must be a folder inside"):
        async with VllmEngine(wrong):
            pass
