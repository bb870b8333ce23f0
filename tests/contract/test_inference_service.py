"""InferenceService over a simulated engine and real gRPC."""

import asyncio
from typing import Any

import grpc.aio
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2, worker_pb2

from services.common.errors import MeshError, Reason
from services.common.settings_worker import SimSettings
from services.common.status import error_from_call
from services.inference import sim_text
from services.inference.request import ChatMessage
from tests.support.measured import measured
from tests.support.waiting import eventually
from tests.support.workers import FAST, sim_worker

SLOW = SimSettings(decode_step_ms=20.0)


def generate(text: str = "tell me", *, model: str = "sim", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=model, text=text, sampling=pb.SamplingParameters(**sampling))


async def rest(call: Any) -> list[pb.GenerateResponse]:
    """The events that are still to come."""
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


async def failure(call: Any) -> MeshError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await (rest(call) if hasattr(call, "read") else call)
    return error_from_call(raised.value)


async def test_the_simulated_engine_takes_no_adapters() -> None:
    async with sim_worker() as worker:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.worker.LoadAdapter(worker_pb2.LoadAdapterRequest(name="a", path="a"))
        assert error_from_call(caught.value).reason is Reason.FAILED_PRECONDITION
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.worker.UnloadAdapter(worker_pb2.UnloadAdapterRequest(name="a"))
        assert error_from_call(caught.value).reason is Reason.FAILED_PRECONDITION


async def test_a_generation_streams_started_then_deltas_then_completed() -> None:
    async with sim_worker() as worker:
        events = [event async for event in worker.inference.Generate(generate(max_tokens=40))]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "completed"
    assert set(kinds[1:-1]) == {"delta"}
    prompt = sim_text.tokenize("tell me")
    assert events[0].started == pb.Started(model="sim", prompt_token_count=len(prompt))
    assert "".join(event.delta.text for event in events) == sim_text.expected_text(prompt, 40)
    assert [i for event in events for i in event.delta.token_ids] == sim_text.expected_output(prompt, 40)
    completed = events[-1].completed
    assert completed.finish_reason == pb.FINISH_REASON_LENGTH
    assert completed.usage == pb.Usage(prompt_token_count=len(prompt), output_token_count=40)
    assert completed.timings.decode_duration.ToNanoseconds() > 0


async def test_a_chat_is_rendered_by_the_worker() -> None:
    request = pb.GenerateRequest(
        model="sim",
        chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="hi")]),
        sampling=pb.SamplingParameters(max_tokens=8),
    )
    async with sim_worker() as worker:
        events = [event async for event in worker.inference.Generate(request)]
    prompt = sim_text.render_chat([ChatMessage(role="user", content="hi")])
    assert "".join(event.delta.text for event in events) == sim_text.expected_text(prompt, 8)


async def test_log_probabilities_come_one_a_token() -> None:
    async with sim_worker() as worker:
        events = [event async for event in worker.inference.Generate(generate(max_tokens=5, logprob_count=3))]
    deltas = [event.delta for event in events if event.HasField("delta")]
    scores = [entry for delta in deltas for entry in delta.logprobs]
    assert [entry.chosen.token_id for entry in scores] == sim_text.expected_output(sim_text.tokenize("tell me"), 5)
    assert all(len(entry.alternatives) == 3 and entry.chosen.logprob < 0 for entry in scores)


async def test_the_trailing_metadata_repeats_the_usage() -> None:
    async with sim_worker() as worker:
        call = worker.inference.Generate(generate("x" * 100, max_tokens=3))
        events = [event async for event in call]
        trailing = dict(await call.trailing_metadata() or ())
    assert events
    assert trailing["x-tokenloom-usage-prompt-tokens"] == "25"
    assert trailing["x-tokenloom-usage-cached-tokens"] == "0"
    assert trailing["x-tokenloom-usage-output-tokens"] == "3"


@measured
async def test_a_cancelled_call_stops_in_the_engine_within_100_ms() -> None:
    async with sim_worker(SLOW) as worker:
        call = worker.inference.Generate(generate(max_tokens=4000))
        await call.read()
        assert worker.engine.load.running == 1
        call.cancel()
        await eventually(lambda: worker.is_idle, within=0.1)
        assert worker.metric("tokenloom_inference_requests_total", outcome="cancelled") == 1


async def test_a_client_whose_connection_breaks_stops_in_the_engine() -> None:
    async with sim_worker(SLOW) as worker, grpc.aio.insecure_channel(worker.address) as other:
        stub = type(worker.inference)(other)
        call = stub.Generate(generate(max_tokens=4000))
        await call.read()
        await other.close()
        await eventually(lambda: worker.is_idle, within=0.5)


@measured
async def test_hundreds_of_cancelled_calls_leave_nothing_behind() -> None:
    async with sim_worker(SLOW, max_queued=1000) as worker:
        calls = [worker.inference.Generate(generate(f"number {n}", max_tokens=4000)) for n in range(300)]
        await eventually(lambda: worker.engine.load.waiting > 200, within=20)
        for call in calls:
            call.cancel()
        await eventually(lambda: worker.is_idle, within=2)


async def test_a_deadline_ends_the_generation() -> None:
    async with sim_worker(SLOW) as worker:
        error = await failure(worker.inference.Generate(generate(max_tokens=4000), timeout=0.2))
        assert error.reason == Reason.DEADLINE_EXCEEDED
        await eventually(lambda: worker.is_idle, within=0.5)


async def test_a_slow_reader_gets_larger_deltas_and_no_less_text() -> None:
    prompt = sim_text.tokenize("tell me")
    async with sim_worker() as worker:
        call = worker.inference.Generate(generate(max_tokens=600, logprob_count=20))
        await call.read()
        await eventually(lambda: worker.is_idle, within=20)
        events = await rest(call)
    assert "".join(event.delta.text for event in events) == sim_text.expected_text(prompt, 600)
    assert max(len(event.delta.token_ids) for event in events) > 1


async def test_a_client_that_does_not_read_fails_and_frees_the_engine() -> None:
    sim = SimSettings(decode_step_ms=0.01, decode_step_ms_per_sequence=0, max_model_len=60_000, kv_blocks=4096)
    async with sim_worker(sim) as worker:
        call = worker.inference.Generate(generate(max_tokens=50_000, logprob_count=20))
        await call.read()
        await eventually(lambda: worker.is_idle, within=20)
        error = await failure(call)
    assert error.reason == Reason.NO_CAPACITY
    assert "not read in time" in error.message


BAD = [
    (generate(model=""), Reason.INVALID_REQUEST, "model"),
    (generate(model="other"), Reason.MODEL_NOT_FOUND, "model"),
    (generate(temperature=3), Reason.INVALID_REQUEST, "sampling.temperature"),
    (generate(temperature=float("nan")), Reason.INVALID_REQUEST, "sampling.temperature"),
    (pb.GenerateRequest(model="sim"), Reason.INVALID_REQUEST, "prompt"),
    (
        pb.GenerateRequest(model="sim", token_ids=pb.TokenIds(ids=[4_000_000_000])),
        Reason.INVALID_REQUEST,
        "token_ids.ids[0]",
    ),
    (generate("word " * 20_000), Reason.CONTEXT_LENGTH_EXCEEDED, "prompt"),
    (generate(max_tokens=8192), Reason.CONTEXT_LENGTH_EXCEEDED, "prompt"),
]


@pytest.mark.parametrize(("request_", "reason", "field"), BAD)
async def test_a_bad_request_is_refused_by_name(
    request_: pb.GenerateRequest, reason: Reason, field: str | None
) -> None:
    async with sim_worker() as worker:
        error = await failure(worker.inference.Generate(request_))
        assert worker.is_idle
        outcome = reason.value.lower()
        assert worker.metric("tokenloom_inference_requests_total", outcome=outcome) == 1
    assert (error.reason, error.field) == (reason, field)


async def test_a_request_that_no_router_has_seen_is_kept_to_the_models_of_its_key() -> None:
    allowed = (("x-tokenloom-models", '["another"]'),)
    async with sim_worker() as worker:
        calls: Any = (
            (worker.inference.Generate, generate(max_tokens=1)),
            (worker.inference.Embed, inference_pb2.EmbedRequest(model="sim")),
            (worker.inference.Score, inference_pb2.ScoreRequest(model="sim")),
            (worker.inference.Tokenize, inference_pb2.TokenizeRequest(model="sim", text="hi")),
            (worker.inference.Detokenize, inference_pb2.DetokenizeRequest(model="sim", token_ids=[1])),
        )
        for method, request in calls:
            error = await failure(method(request, metadata=(*allowed, ("x-tokenloom-unrouted", "1"))))
            assert (error.reason, error.field) == (Reason.PERMISSION_DENIED, "model")
        # A router may have chosen another model than was asked for.
        assert await rest(worker.inference.Generate(generate(max_tokens=1), metadata=allowed))


async def test_a_full_engine_refuses_with_a_time_to_retry() -> None:
    async with sim_worker(SimSettings(max_num_seqs=1, decode_step_ms=20), max_queued=1) as worker:
        calls = [worker.inference.Generate(generate(max_tokens=4000)) for _ in range(2)]
        await eventually(lambda: worker.engine.load.waiting + worker.engine.load.running == 2, within=5)
        error = await failure(worker.inference.Generate(generate()))
        for call in calls:
            call.cancel()
    assert error.reason == Reason.NO_CAPACITY
    assert error.retry_after_seconds


async def test_a_draining_worker_refuses_and_finishes_what_it_has() -> None:
    async with sim_worker() as worker:
        running = worker.inference.Generate(generate(max_tokens=100))
        await running.read()
        worker.gate.drain()
        error = await failure(worker.inference.Generate(generate()))
        events = await rest(running)
    assert error.reason == Reason.NO_READY_WORKER
    assert error.retry_after_seconds
    assert events[-1].HasField("completed")


async def test_a_worker_without_its_engine_refuses() -> None:
    async with sim_worker() as worker:
        worker.gate.close()
        errors = [
            await failure(call)
            for call in (
                worker.inference.Generate(generate()),
                worker.inference.ListModels(inference_pb2.ListModelsRequest()),
            )
        ]
    assert [error.reason for error in errors] == [Reason.NO_READY_WORKER] * 2


async def test_embedding_is_refused_with_what_the_model_can() -> None:
    async with sim_worker() as worker:
        error = await failure(worker.inference.Embed(inference_pb2.EmbedRequest(model="sim", texts=["a"])))
    assert error.reason == Reason.UNIMPLEMENTED
    assert "can generate, not embed" in error.message


async def test_tokenizing_gives_the_tokens_of_generate() -> None:
    text = "the répl 🚀 of it"
    async with sim_worker() as worker:
        plain = await worker.inference.Tokenize(inference_pb2.TokenizeRequest(model="sim", text=text))
        chat = await worker.inference.Tokenize(
            inference_pb2.TokenizeRequest(
                model="sim", chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=text)])
            )
        )
    assert sim_text.detokenize(list(plain.token_ids)) == text
    assert list(chat.token_ids) == sim_text.render_chat([ChatMessage(role="user", content=text)])
    assert plain.max_context_token_count == FAST.max_model_len


async def test_models_are_listed_with_what_they_can() -> None:
    async with sim_worker(model="tiny") as worker:
        answer = await worker.inference.ListModels(inference_pb2.ListModelsRequest())
    assert [(card.name, card.vocabulary_size) for card in answer.models] == [("tiny", sim_text.VOCABULARY_SIZE)]
    assert list(answer.models[0].capabilities) == [
        inference_pb2.CAPABILITY_GENERATE,
        inference_pb2.CAPABILITY_CHAT,
        inference_pb2.CAPABILITY_LOGPROBS,
    ]


async def test_a_call_continues_the_trace_that_its_metadata_names() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    metadata = (("traceparent", f"00-{7:032x}-{9:016x}-01"), ("x-request-id", "req-7"))
    async with sim_worker(tracer=provider.get_tracer("test")) as worker:
        await _drain(worker.inference.Generate(generate(max_tokens=3), metadata=metadata))
    (span,) = [span for span in exporter.get_finished_spans() if span.name == "generate"]
    assert span.parent is not None
    assert (span.parent.trace_id, span.parent.span_id) == (7, 9)
    assert (span.attributes or {})["tokenloom.request_id"] == "req-7"


async def test_outcomes_and_tokens_are_counted() -> None:
    async with sim_worker() as worker:
        await asyncio.gather(
            *(_drain(worker.inference.Generate(generate(f"prompt {n}", max_tokens=10))) for n in range(4))
        )
        assert worker.metric("tokenloom_inference_requests_total", outcome="length") == 4
        assert worker.metric("tokenloom_inference_tokens_total", kind="output") == 40
        assert worker.metric("tokenloom_inference_time_to_first_token_seconds_count") == 4


async def _drain(call: Any) -> None:
    async for _ in call:
        pass


async def test_choices_come_by_their_index_with_the_prompt_and_what_stopped_them() -> None:
    stop = sim_text.expected_text(sim_text.tokenize("tell me"), 20)[4:8]
    request = generate(max_tokens=20, stop=[stop], prompt_logprob_count=1)
    request.choice_count, request.echo = 3, True
    async with sim_worker() as worker:
        events = [event async for event in worker.inference.Generate(request)]
        assert (
            worker.metric("tokenloom_inference_requests_total", outcome="stop")
            + worker.metric("tokenloom_inference_requests_total", outcome="length")
            == 1
        )
    started, completed = events[0].started, events[-1].completed
    assert started.prompt_text == "tell me"
    assert list(started.prompt_token_ids) == sim_text.tokenize("tell me")
    assert len(started.prompt_logprobs) == len(started.prompt_token_ids) - 1
    ended = {event.choice_ended.choice_index: event.choice_ended for event in events if event.HasField("choice_ended")}
    assert sorted(ended) == [0, 1, 2]
    assert (ended[0].finish_reason, ended[0].stop_cause.text) == (pb.FINISH_REASON_STOP, stop)
    tokens = dict.fromkeys(ended, 0)
    for at, event in enumerate(events):
        tokens[event.delta.choice_index] += len(event.delta.token_ids)
        if event.HasField("choice_ended"):
            index = event.choice_ended.choice_index
            later = [e.delta for e in events[at + 1 :] if e.HasField("delta")]
            assert all(delta.choice_index != index for delta in later)
    assert sum(tokens.values()) == completed.usage.output_token_count


@pytest.mark.parametrize("text", ["-3", ""])
async def test_the_priority_that_the_edge_wrote_reaches_the_engine(text: str) -> None:
    async with sim_worker(SimSettings(decode_step_ms=5, max_num_seqs=1)) as worker:
        busy = worker.inference.Generate(generate(max_tokens=200))
        await busy.read()
        later = worker.inference.Generate(generate("later", max_tokens=1))
        await eventually(lambda: worker.engine.load.waiting == 1, within=5)
        urgent = worker.inference.Generate(
            generate("urgent", max_tokens=1), metadata=(("x-tokenloom-priority", text),) if text else ()
        )
        await eventually(lambda: worker.engine.load.waiting == 2, within=5)
        busy.cancel()
        ended: list[str] = []

        async def until_ended(name: str, call: Any) -> None:
            await rest(call)
            ended.append(name)

        await asyncio.gather(until_ended("later", later), until_ended("urgent", urgent))
        modest = worker.inference.Generate(generate(max_tokens=1), metadata=(("x-priority", "first"),))
        assert (await failure(modest)).field == "x-priority"
    assert ended == (["urgent", "later"] if text else ["later", "urgent"])
