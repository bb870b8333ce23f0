"""Embeddings, scores and tokens of InferenceService, over simulated engines and real gRPC."""

import math
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc.aio
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tokenloom.inference.v1 import generation_pb2, inference_pb2

from services.common.errors import MeshError, Reason
from services.common.settings_worker import SimSettings
from services.common.status import error_from_call
from services.inference import sim_text
from services.inference.pooling import Embedded, EmbedJob, Scored, ScoreJob
from services.inference.sim_embedding import cosine, expected_embedding
from services.inference.sim_pooling import SimPooler
from tests.support.waiting import eventually
from tests.support.workers import SimWorker, sim_worker

FAST = SimSettings(
    runner="pooling",
    embedding_dimensions=64,
    max_model_len=64,
    max_num_seqs=2,
    decode_step_ms=1.0,
    prefill_tokens_per_second=1_000_000.0,
)
SLOW = SimSettings(runner="pooling", max_num_seqs=2, decode_step_ms=30_000.0)


LONG = "word " * 70


def pooling_worker(sim: SimSettings = FAST, **options: Any) -> AbstractAsyncContextManager[SimWorker]:
    return sim_worker(sim, make_engine=SimPooler, **options)


def embed(*texts: str, **fields: Any) -> inference_pb2.EmbedRequest:
    return inference_pb2.EmbedRequest(**{"model": "sim", "texts": texts, **fields})


def score(query: str, *texts: str, **fields: Any) -> inference_pb2.ScoreRequest:
    return inference_pb2.ScoreRequest(**{"model": "sim", "query": query, "texts": texts, **fields})


def ids(*token_ids: int) -> generation_pb2.TokenIds:
    return generation_pb2.TokenIds(ids=token_ids)


async def failure(call: Any) -> MeshError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return error_from_call(raised.value)


async def test_each_text_gets_its_unit_vector_in_the_requests_order() -> None:
    async with pooling_worker() as worker:
        answer = await worker.inference.Embed(embed("a quiet garden", "an engine"))
    vectors = [list(embedding.values) for embedding in answer.embeddings]
    assert vectors == [
        pytest.approx(expected_embedding(text, 64), abs=1e-6) for text in ("a quiet garden", "an engine")
    ]
    assert all(math.isclose(math.hypot(*vector), 1.0, rel_tol=1e-5) for vector in vectors)
    tokens = sum(len(sim_text.tokenize(text)) for text in ("a quiet garden", "an engine"))
    assert answer.usage == generation_pb2.Usage(prompt_token_count=tokens)


async def test_token_ids_give_what_their_text_gives() -> None:
    tokens = sim_text.tokenize("a quiet garden")
    async with pooling_worker() as worker:
        by_text = await worker.inference.Embed(embed("a quiet garden"))
        by_ids = await worker.inference.Embed(inference_pb2.EmbedRequest(model="sim", token_ids=[ids(*tokens)]))
    assert by_ids == by_text


async def test_a_token_limit_keeps_the_end_or_the_beginning() -> None:
    async with pooling_worker() as worker:
        end = await worker.inference.Embed(embed("one two three", prompt_token_limit=2))
        beginning = await worker.inference.Embed(embed("one two three", prompt_token_limit=2, keep_beginning=True))
        tokens = sim_text.tokenize("one two three")
        whole = [ids(*tokens[-2:]), ids(*tokens[:2])]
        expected = await worker.inference.Embed(inference_pb2.EmbedRequest(model="sim", token_ids=whole))
        context = await worker.inference.Embed(embed(LONG, prompt_token_limit=2**31))
    assert [*end.embeddings, *beginning.embeddings] == list(expected.embeddings)
    assert end.usage.prompt_token_count == 2
    assert context.usage.prompt_token_count == 64


async def test_a_shortened_embedding_is_a_unit_vector_again() -> None:
    async with pooling_worker() as worker:
        answer = await worker.inference.Embed(embed("a quiet garden", dimension_count=8))
    values = list(answer.embeddings[0].values)
    whole = expected_embedding("a quiet garden", 64)[:8]
    assert values == pytest.approx([value / math.hypot(*whole) for value in whole], abs=1e-6)


async def test_scores_are_cosines_and_shared_words_score_higher() -> None:
    texts = ("the garden is quiet today", "engines burn fuel", "a quiet garden")
    async with pooling_worker() as worker:
        answer = await worker.inference.Score(score("a quiet garden", *texts))
    vectors = [expected_embedding(text, 64) for text in texts]
    wanted = expected_embedding("a quiet garden", 64)
    assert list(answer.scores) == [pytest.approx(cosine(wanted, vector), abs=1e-6) for vector in vectors]
    assert answer.scores[2] == pytest.approx(1.0)
    assert answer.scores[0] > answer.scores[1]
    tokens = sum(len(sim_text.tokenize(text)) for text in ("a quiet garden", *texts))
    assert answer.usage.prompt_token_count == tokens


REFUSED: list[tuple[inference_pb2.EmbedRequest | inference_pb2.ScoreRequest, str, str]] = [
    (embed(), "texts", "empty_array"),
    (embed(*["x"] * 257), "texts", "array_above_max_length"),
    (embed("x", ""), "texts[1]", "invalid_value"),
    (embed("x", LONG), "texts[1]", "context_length_exceeded"),
    (embed("x", "y" * 1_000_000), "texts[1]", "context_length_exceeded"),
    (embed("x", token_ids=[ids(1)]), "token_ids", "invalid_value"),
    (embed(token_ids=[ids(1), ids()]), "token_ids[1].ids", "empty_array"),
    (embed(token_ids=[ids(10**9)]), "token_ids[0].ids[0]", "invalid_value"),
    (embed(token_ids=[ids(*[1] * 65)]), "token_ids[0].ids", "context_length_exceeded"),
    (embed("x", dimension_count=0), "dimension_count", "integer_below_min_value"),
    (embed("x", dimension_count=65), "dimension_count", "integer_above_max_value"),
    (embed("x", prompt_token_limit=0), "prompt_token_limit", "integer_below_min_value"),
    (embed("x", model="other"), "model", "model_not_found"),
    (score("", "x"), "query", "missing_required_parameter"),
    (score("q"), "texts", "empty_array"),
    (score("q", *["x"] * 257), "texts", "array_above_max_length"),
    (score("q", ""), "texts[0]", "invalid_value"),
    (score(LONG, "x"), "query", "context_length_exceeded"),
    (score("q", "x", LONG), "texts[1]", "context_length_exceeded"),
]


async def test_bad_input_is_refused_by_its_field_and_the_worker_goes_on() -> None:
    async with pooling_worker() as worker:
        for request, field, code in REFUSED:
            if isinstance(request, inference_pb2.EmbedRequest):
                error = await failure(worker.inference.Embed(request))
            else:
                error = await failure(worker.inference.Score(request))
            assert (error.field, error.code) == (field, code), request
        assert (await worker.inference.Embed(embed("still there"))).embeddings
        refused = worker.metric("tokenloom_inference_requests_total", outcome="invalid_request")
        assert refused == sum(code not in ("context_length_exceeded", "model_not_found") for _, _, code in REFUSED)


async def test_a_model_says_what_it_can_and_refuses_the_rest() -> None:
    async with pooling_worker() as pooling, sim_worker() as generating:
        cards = [
            (await worker.inference.ListModels(inference_pb2.ListModelsRequest())).models[0]
            for worker in (pooling, generating)
        ]
        embedding = await failure(generating.inference.Embed(embed("x")))
        scoring = await failure(generating.inference.Score(score("q", "x")))
        call = pooling.inference.Generate(generation_pb2.GenerateRequest(model="sim", text="x"))
        generation = await failure(call.read())
    assert list(cards[0].capabilities) == [inference_pb2.CAPABILITY_EMBED, inference_pb2.CAPABILITY_SCORE]
    assert [card.embedding_dimension_count for card in cards] == [64, 0]
    assert [error.reason for error in (embedding, scoring, generation)] == [Reason.UNIMPLEMENTED] * 3
    assert "can embed and score, not generate" in generation.message
    assert "can generate, not embed" in embedding.message


async def test_a_cancelled_call_and_a_deadline_stop_the_work() -> None:
    async with pooling_worker(SLOW) as worker:
        call = worker.inference.Embed(embed("x"))
        await eventually(lambda: worker.engine.load.running == 1, within=5)
        call.cancel()
        await eventually(lambda: worker.engine.load.running == 0, within=0.5)
        error = await failure(worker.inference.Embed(embed("x"), timeout=0.1))
        assert error.reason == Reason.DEADLINE_EXCEEDED
        await eventually(lambda: worker.engine.load.running == 0, within=0.5)
        assert worker.engine.load.pending_prefill_tokens == 0
        await eventually(
            lambda: worker.metric("tokenloom_inference_requests_total", outcome="cancelled") == 2, within=0.5
        )


async def test_more_jobs_than_may_wait_are_turned_away() -> None:
    async with pooling_worker(SLOW, max_queued=1) as worker:
        calls = [worker.inference.Embed(embed("x")) for _ in range(3)]
        await eventually(lambda: worker.engine.load.running == 2 and worker.engine.load.waiting == 1, within=5)
        error = await failure(worker.inference.Embed(embed("x")))
        assert error.reason == Reason.NO_CAPACITY
        assert error.retry_after_seconds
        for call in calls:
            call.cancel()


async def test_what_runs_when_the_worker_stops_is_told_why() -> None:
    async with pooling_worker(SLOW) as worker:
        call = worker.inference.Embed(embed("x"))
        await eventually(lambda: worker.engine.load.running == 1, within=5)
        worker.pooling.fail_all(MeshError(Reason.NO_READY_WORKER, "this worker is stopping"))
        assert (await failure(call)).reason == Reason.NO_READY_WORKER
        await worker.pooling.wait_idle()


class _NotingPooler(SimPooler):
    def __init__(self, settings: SimSettings, model_name: str, max_queued: int) -> None:
        super().__init__(settings, model_name, max_queued)
        self.cache_tenants: list[str] = []

    async def embed(self, job: EmbedJob) -> Embedded:
        self.cache_tenants.append(job.cache_tenant)
        return await super().embed(job)

    async def score(self, job: ScoreJob) -> Scored:
        self.cache_tenants.append(job.cache_tenant)
        return await super().score(job)


@pytest.mark.parametrize("isolates", [True, False])
async def test_the_engine_is_told_whom_what_a_call_leaves_in_its_cache_serves(isolates: bool) -> None:
    metadata = (("x-tokenloom-tenant", "ada"),)
    async with sim_worker(FAST, make_engine=_NotingPooler, isolates_tenants=isolates) as worker:
        await worker.inference.Embed(embed("hello"), metadata=metadata)
        await worker.inference.Score(score("hello", "world"), metadata=metadata)
        await worker.inference.Embed(embed("hello"))
        assert isinstance(worker.engine, _NotingPooler)
        assert worker.engine.cache_tenants == (["ada", "ada", ""] if isolates else ["", "", ""])


async def test_usage_is_in_the_trailers_the_metrics_and_the_span() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with pooling_worker(tracer=provider.get_tracer("test")) as worker:
        call = worker.inference.Embed(embed("a quiet garden"), metadata=(("x-request-id", "r1"),))
        used = (await call).usage.prompt_token_count
        trailing = dict(await call.trailing_metadata())
        assert trailing["x-tokenloom-usage-prompt-tokens"] == str(used)
        assert trailing["x-tokenloom-usage-output-tokens"] == "0"
        assert worker.metric("tokenloom_inference_tokens_total", kind="prompt") == used
        assert worker.metric("tokenloom_inference_requests_total", outcome="embeddings") == 1
    (span,) = exporter.get_finished_spans()
    assert span.name == "embeddings"
    assert span.attributes is not None
    assert span.attributes["gen_ai.usage.input_tokens"] == used
    assert span.attributes["tokenloom.request_id"] == "r1"


async def test_tokens_come_with_their_texts_and_go_back_to_text() -> None:
    text = "a quiet gården"
    tokens = sim_text.tokenize(text)
    async with sim_worker() as worker:
        request = inference_pb2.TokenizeRequest(model="sim", text=text, with_token_texts=True)
        answer = await worker.inference.Tokenize(request)
        back = await worker.inference.Detokenize(inference_pb2.DetokenizeRequest(model="sim", token_ids=tokens))
        cut = await worker.inference.Detokenize(
            inference_pb2.DetokenizeRequest(model="sim", token_ids="å".encode()[:1])
        )
    assert list(answer.token_ids) == tokens
    assert list(answer.token_texts) == [sim_text.token_text(token) for token in tokens]
    assert back.text == text
    assert cut.text == "\N{REPLACEMENT CHARACTER}"


async def test_tokens_outside_of_the_vocabulary_or_too_many_are_refused() -> None:
    async with pooling_worker() as worker:
        outside = inference_pb2.DetokenizeRequest(model="sim", token_ids=[sim_text.VOCABULARY_SIZE])
        many = inference_pb2.DetokenizeRequest(model="sim", token_ids=[1] * 65)
        first, second = [await failure(worker.inference.Detokenize(request)) for request in (outside, many)]
    assert (first.field, first.reason) == ("token_ids[0]", Reason.INVALID_REQUEST)
    assert (second.field, second.reason) == ("token_ids", Reason.CONTEXT_LENGTH_EXCEEDED)
