"""The real engine as one that embeds and scores, behind the engine interface."""

import asyncio
import math
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from services.common.errors import MeshError, Reason
from services.common.kv_cache import kv_cache
from services.inference.engine import Capability, Engine
from services.inference.pooling import EmbedJob, Pooler, ScoreJob
from services.inference.request import Generation, Sampling
from services.inference.vllm_engine import VllmEngine
from services.inference.vllm_nursery import prepare_process
from services.mesh.checkpoint import read_checkpoint
from tests.support.demo_model import demo_model
from tests.support.engine_process import worker_settings
from tests.support.sinks import Kept
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
    *(pytest.mark.filterwarnings(f"ignore:::{package}") for package in ("torch", "vllm", "transformers", "importlib")),
]

ARGUMENTS = {"runner": "pooling", "convert": "embed", "max_num_seqs": 4, "max_model_len": 256}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[VllmEngine]:
    """One engine for all the tests."""
    environment = dict(os.environ)
    settings = worker_settings(str(demo_model()), engine_args=ARGUMENTS, max_queued=2)
    prepare_process(settings)
    async with VllmEngine(settings) as running:
        yield running
    os.environ.clear()
    os.environ.update(environment)


def pooler(engine: VllmEngine) -> Pooler:
    found = engine.pooler
    assert found is not None
    return found


def embed_job(name: str, inputs: Sequence[str | Sequence[int]], **others: Any) -> EmbedJob:
    return EmbedJob(**{"id": name, "inputs": inputs, "field": "texts", **others})


async def refusal(call: Any) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await call
    return caught.value


async def test_the_card_says_that_it_embeds_and_scores_and_does_not_generate(engine: VllmEngine) -> None:
    as_interface: Engine = engine
    card = as_interface.card
    assert card.capabilities == {Capability.EMBED, Capability.SCORE}
    assert (card.embedding_dimensions, card.max_context_tokens, card.max_running) == (64, 256, 4)
    generation = Generation(id="g", model="demo", prompt="x", kind="text", sampling=Sampling())
    assert (await refusal(engine.submit(generation, Kept()))).reason == Reason.UNIMPLEMENTED


async def test_the_plan_reckons_with_as_many_blocks_of_kv_cache_as_vllm_makes(engine: VllmEngine) -> None:
    checkpoint = read_checkpoint(str(demo_model()))
    cache = kv_cache(checkpoint.config, dtype_bytes=4, tensor_parallel=1, pipeline_parallel=1)
    made = engine._life.backend.llm.vllm_config.cache_config
    assert made.num_gpu_blocks == made.kv_cache_memory_bytes // (cache.bytes_per_token * made.block_size)
    assert engine.card.kv_cache_tokens == made.kv_cache_memory_bytes // cache.bytes_per_token


async def test_texts_and_their_tokens_give_the_same_unit_vectors_alone_and_together(engine: VllmEngine) -> None:
    texts = ["hello world", "a quiet garden of the mind", "hello world"]
    together = await pooler(engine).embed(embed_job("a", texts))
    tokens = [await engine.tokenize(text) for text in texts]
    assert together.prompt_tokens == sum(map(len, tokens))
    assert all(math.isclose(math.hypot(*vector), 1.0, rel_tol=1e-4) for vector in together.vectors)
    assert together.vectors[0] == pytest.approx(together.vectors[2], abs=1e-5)
    by_tokens = await pooler(engine).embed(embed_job("b", tokens))
    for alone, vector in zip(by_tokens.vectors, together.vectors, strict=True):
        assert alone == pytest.approx(vector, abs=1e-5)


async def test_a_limit_keeps_the_end_or_the_beginning_of_what_is_too_long(engine: VllmEngine) -> None:
    tokens = await engine.tokenize("hello world this is a long text")
    text = "hello world this is a long text"
    end = await pooler(engine).embed(embed_job("c", [text], token_limit=3))
    beginning = await pooler(engine).embed(embed_job("d", [text], token_limit=3, keep_beginning=True))
    expected = await pooler(engine).embed(embed_job("e", [tokens[-3:], tokens[:3]]))
    assert end.vectors[0] == pytest.approx(expected.vectors[0], abs=1e-5)
    assert beginning.vectors[0] == pytest.approx(expected.vectors[1], abs=1e-5)
    assert end.prompt_tokens == 3


async def test_scores_are_the_cosines_of_the_embeddings(engine: VllmEngine) -> None:
    texts = ["hello world", "something else entirely", "hello"]
    scored = await pooler(engine).score(ScoreJob(id="s", query="hello world", texts=texts))
    vectors = (await pooler(engine).embed(embed_job("f", ["hello world", *texts]))).vectors
    cosines = [sum(map(float.__mul__, vectors[0], vector)) for vector in vectors[1:]]
    assert scored.scores == pytest.approx(cosines, abs=1e-5)
    assert scored.scores[0] == pytest.approx(1.0, abs=1e-5)


async def test_what_a_tenant_leaves_in_the_cache_serves_that_tenant_alone(engine: VllmEngine) -> None:
    inputs = [[5 + j for j in range(200)]]

    async def cached(name: str, tenant: str) -> int:
        return (await pooler(engine).embed(embed_job(name, inputs, cache_tenant=tenant))).cached_tokens

    assert await cached("t1", "ada") == 0
    assert await cached("t2", "ada") >= 128
    assert await cached("t3", "bob") == 0
    assert await cached("t4", "") == 0
    text = "a quiet garden of the mind " * 20

    async def scored(name: str, tenant: str) -> int:
        job = ScoreJob(id=name, query=text, texts=["garden"], token_limit=100, cache_tenant=tenant)
        return (await pooler(engine).score(job)).cached_tokens

    assert [await scored(f"u{n}", tenant) > 0 for n, tenant in enumerate(("ada", "ada", "bob"))] == [False, True, False]


async def test_what_does_not_fit_is_refused_by_its_field(engine: VllmEngine) -> None:
    long = "word " * 400
    too_long = await refusal(pooler(engine).embed(embed_job("h", ["x", long])))
    assert (too_long.reason, too_long.field) == (Reason.CONTEXT_LENGTH_EXCEEDED, "texts[1]")
    far_too_long = await refusal(pooler(engine).embed(embed_job("i", ["x" * 2_000_000])))
    assert (far_too_long.reason, far_too_long.field) == (Reason.CONTEXT_LENGTH_EXCEEDED, "texts[0]")
    query = await refusal(pooler(engine).score(ScoreJob(id="j", query=long, texts=["x"])))
    assert (query.reason, query.field) == (Reason.CONTEXT_LENGTH_EXCEEDED, "query")
    text = await refusal(pooler(engine).score(ScoreJob(id="k", query="x", texts=["x", long])))
    assert (text.reason, text.field) == (Reason.CONTEXT_LENGTH_EXCEEDED, "texts[1]")
    shortened = await refusal(pooler(engine).embed(embed_job("l", ["x"], dimensions=8)))
    assert (shortened.reason, shortened.field) == (Reason.INVALID_REQUEST, "dimension_count")


async def test_a_cancelled_job_leaves_nothing_in_the_engine(engine: VllmEngine) -> None:
    inputs = [[1 + (7 * i + j) % 1000 for j in range(200)] for i in range(250)]
    job = asyncio.create_task(pooler(engine).embed(embed_job("m", inputs)))
    await eventually(lambda: engine.load.pending_prefill_tokens > 0, within=5)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert (engine.load.running, engine.load.pending_prefill_tokens) == (0, 0)
    llm = engine._life.backend.llm
    await eventually(lambda: llm.get_num_unfinished_requests() == 0, within=1)
    assert (await pooler(engine).embed(embed_job("n", ["still there"]))).vectors


async def test_a_crowd_is_turned_away_and_large_jobs_do_not_fill_the_engines_queue(engine: VllmEngine) -> None:
    inputs = [[1 + (3 * i + j) % 1000 for j in range(100)] for i in range(64)]
    jobs = [asyncio.create_task(pooler(engine).embed(embed_job(f"o{n}", inputs))) for n in range(6)]
    await eventually(lambda: engine.load.running == 4 and engine.load.waiting == 2, within=5)
    assert (await refusal(pooler(engine).embed(embed_job("p", ["x"])))).reason == Reason.NO_CAPACITY
    assert engine._life.backend.llm.get_num_unfinished_requests() <= 4
    assert [len((await job).vectors) for job in jobs] == [64] * 6
    assert engine.load.prefill_tokens_per_second is not None


async def test_tokens_can_be_had_plain_with_their_texts_and_go_back(engine: VllmEngine) -> None:
    text = "hello wörld"
    tokens = await engine.tokenize(text, special_tokens=False)
    assert await engine.detokenize(tokens) == text
    texts = await engine.token_texts(tokens)
    assert len(texts) == len(tokens)
    assert texts[0] == "h"
