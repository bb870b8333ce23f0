"""WorkerService.Session over a simulated engine and real gRPC."""

import asyncio
import json
import sys
import urllib.request
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import worker_pb2

from services.common import rpc
from services.common.errors import MeshError, Reason
from services.common.settings_worker import SimSettings
from services.common.status import error_from_call, error_from_status
from services.inference import sim_text
from services.inference.output import Sink
from services.inference.request import Generation
from services.inference.sim_engine import SimEngine
from tests.support.waiting import eventually
from tests.support.workers import WorkerSessionClient, open_session, sim_worker, worker_config, worker_process

SLOW = SimSettings(decode_step_ms=20.0)
UNPACED = SimSettings(
    decode_step_ms=0.001,
    decode_step_ms_per_sequence=0,
    prefill_tokens_per_second=1e9,
    max_num_seqs=256,
    max_model_len=1_000_000,
    kv_blocks=2_000_000,
)
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def submission(handle: int, text: str = "", *, emitted: Sequence[int] = (), **sampling: Any) -> worker_pb2.Submission:
    request = pb.GenerateRequest(
        model="sim",
        text=text or f"prompt {handle}",
        sampling=pb.SamplingParameters(**({"temperature": 0, "max_tokens": 20} | sampling)),
        emitted_token_ids=emitted,
    )
    return worker_pb2.Submission(handle=handle, request_id=f"req-{handle}", request=request)


def error_of(client: WorkerSessionClient, handle: int) -> MeshError:
    return error_from_status(client.ends[handle].failed)


async def test_a_session_carries_many_generations_in_few_messages() -> None:
    async with sim_worker(SimSettings(decode_step_ms=5)) as worker, open_session(worker.channel) as session:
        await session.send(*(submission(handle, max_tokens=30) for handle in range(1, 33)))
        await session.read_until_ended(*range(1, 33))
    for handle in range(1, 33):
        prompt = sim_text.tokenize(f"prompt {handle}")
        assert session.token_ids[handle] == sim_text.expected_output(prompt, 30)
        assert session.texts[handle] == sim_text.expected_text(prompt, 30)
        assert session.started[handle].prompt_token_count == len(prompt)
        assert session.ends[handle].completed.usage.output_token_count == 30
    assert session.messages < 50


async def test_log_probabilities_come_as_deltas_in_order() -> None:
    async with sim_worker() as worker, open_session(worker.channel) as session:
        text = sim_text.expected_text(sim_text.tokenize("prompt 1"), 20)
        stop = [text[-2:] + "never"]
        await session.send(submission(1, logprob_count=2, stop=stop), submission(2, logprob_count=0))
        await session.read_until_ended(1, 2)
    assert session.texts[1] == text
    assert [entry.chosen.token_id for entry in session.logprobs[1]] == session.token_ids[1]
    assert len(session.logprobs[2]) == 20


async def test_a_continuation_sends_only_what_is_new() -> None:
    prompt = sim_text.tokenize("prompt 1")
    whole = sim_text.expected_output(prompt, 20)
    async with sim_worker() as worker, open_session(worker.channel) as session:
        await session.send(submission(1, emitted=whole[:8]))
        await session.read_until_ended(1)
    assert session.token_ids[1] == whole[8:]
    assert session.texts[1] == sim_text.expected_text(prompt, 12, start=8)
    assert session.ends[1].completed.usage.output_token_count == 20


async def test_an_aborted_generation_is_heard_of_no_more() -> None:
    async with sim_worker(SLOW) as worker, open_session(worker.channel) as session:
        await session.send(submission(1, max_tokens=4000), submission(2, max_tokens=10))
        await session.read()
        await session.send(aborted=[1, 99])
        await eventually(lambda: worker.engine.load.running <= 1, within=0.5)
        heard = len(session.token_ids.get(1, ()))
        await session.read_until_ended(2)
        assert len(session.token_ids.get(1, ())) <= heard + 3
        assert 1 not in session.ends
        assert worker.metric("tokenloom_inference_requests_total", outcome="cancelled") == 1


@pytest.mark.parametrize("how", ["cancelled", "half closed", "connection lost"])
async def test_a_lost_session_stops_all_its_generations_at_once(how: str) -> None:
    async with sim_worker(SLOW) as worker, grpc.aio.insecure_channel(worker.address) as channel:
        async with open_session(worker.channel) as bystander, open_session(channel) as session:
            await session.send(*(submission(handle, max_tokens=4000) for handle in range(1, 20)))
            await bystander.send(submission(1, max_tokens=20))
            await session.read()
            if how == "cancelled":
                session.call.cancel()
            elif how == "half closed":
                await session.call.done_writing()
            else:
                await channel.close()
            await eventually(lambda: worker.engine.load.running + worker.engine.load.waiting <= 1, within=0.5)
            await bystander.read_until_ended(1)
        assert bystander.texts[1] == sim_text.expected_text(sim_text.tokenize("prompt 1"), 20)


async def test_a_failed_submission_says_why_and_the_others_go_on() -> None:
    async with sim_worker() as worker, open_session(worker.channel) as session:
        other_model = submission(2)
        other_model.request.model = "other"
        await session.send(submission(1), other_model, submission(3, temperature=5), submission(4, "word " * 50_000))
        await session.read_until_ended(1, 2, 3, 4)
    assert session.ends[1].HasField("completed")
    assert error_of(session, 2).reason == Reason.MODEL_NOT_FOUND
    assert (error_of(session, 3).reason, error_of(session, 3).field) == (Reason.INVALID_REQUEST, "sampling.temperature")
    assert error_of(session, 4).reason == Reason.CONTEXT_LENGTH_EXCEEDED


async def test_a_handle_that_is_in_use_fails() -> None:
    async with sim_worker(SLOW) as worker, open_session(worker.channel) as session:
        await session.send(submission(1, max_tokens=4000))
        await session.read()
        await session.send(submission(1))
        await session.read_until_ended(1)
        assert (error_of(session, 1).reason, error_of(session, 1).field) == (Reason.INVALID_REQUEST, "handle")
        assert worker.is_idle


@pytest.mark.parametrize("nanos", [0, 100_000_000])
async def test_a_timeout_fails_the_generation_and_frees_the_engine(nanos: int) -> None:
    async with sim_worker(SLOW) as worker, open_session(worker.channel) as session:
        timed = submission(1, max_tokens=4000)
        timed.timeout.CopyFrom(Duration(nanos=nanos))
        await session.send(timed)
        await session.read_until_ended(1)
        assert error_of(session, 1).reason == Reason.DEADLINE_EXCEEDED
        assert worker.is_idle


async def test_a_timeout_that_is_not_reached_changes_nothing() -> None:
    async with sim_worker() as worker, open_session(worker.channel) as session:
        timed = submission(1)
        timed.timeout.CopyFrom(Duration(seconds=300))
        await session.send(timed)
        await session.read_until_ended(1)
    assert session.ends[1].HasField("completed")


async def test_a_slow_prompt_holds_nobody_up() -> None:
    class Hesitating(SimEngine):
        async def submit(self, generation: Generation, sink: Sink) -> None:
            if generation.prompt == "slow":
                await asyncio.sleep(30)
            await super().submit(generation, sink)

    async with sim_worker(make_engine=Hesitating) as worker, open_session(worker.channel) as session:
        await session.send(submission(1, "slow"), submission(2), submission(3, "slow"))
        await session.read_until_ended(2)
        await session.send(aborted=[1])
        await eventually(
            lambda: worker.metric("tokenloom_inference_requests_total", outcome="cancelled") == 1, within=1
        )
    assert set(session.ends) == {2}


async def test_priority_reaches_the_engine() -> None:
    sim = SimSettings(decode_step_ms=1, max_num_seqs=1)
    async with sim_worker(sim) as worker, open_session(worker.channel) as session:
        urgent = submission(3)
        urgent.priority = -1
        await session.send(submission(1), submission(2), urgent)
        await session.read_until_ended(1, 2, 3)
    assert list(session.ends) == [3, 1, 2]


async def test_a_gateway_that_does_not_read_loses_its_session() -> None:
    async with sim_worker(UNPACED) as worker, open_session(worker.channel) as session:
        await session.send(*(submission(handle, max_tokens=900_000) for handle in range(1, 257)))
        await session.read()
        await eventually(
            lambda: worker.metric("tokenloom_inference_requests_total", outcome="cancelled") == 256, within=9
        )
        assert worker.is_idle
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await session.read_until_ended(1)
    assert error_from_call(raised.value).reason == Reason.NO_CAPACITY


async def test_a_draining_worker_refuses_and_finishes() -> None:
    async with sim_worker() as worker, open_session(worker.channel) as session:
        await session.send(submission(1, max_tokens=100))
        await session.read()
        worker.gate.drain()
        await session.send(submission(2))
        await session.read_until_ended(1, 2)
        worker.gate.undrain()
        await session.send(submission(3))
        await session.read_until_ended(3)
    assert session.ends[1].HasField("completed")
    assert error_of(session, 2).reason == Reason.NO_READY_WORKER
    assert session.ends[3].HasField("completed")


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


async def test_each_generation_has_one_span_below_its_gateways() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with sim_worker(tracer=provider.get_tracer("test")) as worker, open_session(worker.channel) as session:
        good, bad = submission(1), submission(2, "a " * 8190, max_tokens=100)
        good.traceparent = TRACEPARENT
        await session.send(good, bad, submission(3, max_tokens=4000))
        await session.read_until_ended(1, 2)
        await session.send(aborted=[3])
        await eventually(lambda: len(named(exporter, "generate")) == 3, within=5)
    spans = {str((span.attributes or {})["tokenloom.request_id"]): span for span in named(exporter, "generate")}
    attributes = dict(spans["req-1"].attributes or {})
    parent = spans["req-1"].parent
    assert parent is not None
    assert f"{parent.trace_id:032x}-{parent.span_id:016x}" == TRACEPARENT[3:-3]
    assert (spans["req-1"].name, spans["req-1"].kind) == ("generate", SpanKind.SERVER)
    assert [event.name for event in spans["req-1"].events] == ["first token"]
    assert attributes["gen_ai.request.model"] == "sim"
    assert attributes["gen_ai.usage.output_tokens"] == 20
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes["tokenloom.worker"] == "sim-0"
    assert spans["req-2"].status.status_code is StatusCode.ERROR
    assert dict(spans["req-2"].attributes or {})["error.type"] == "CONTEXT_LENGTH_EXCEEDED"
    assert dict(spans["req-3"].attributes or {})["tokenloom.cancelled"] is True
    # Where the time of the one that is complete went: one after the other, within it.
    phases = [span for name in ("queue", "prefill", "decode") for span in named(exporter, name)]
    whole = spans["req-1"]
    assert [phase.parent for phase in phases] == [whole.context] * 3
    times = [moment for phase in phases for moment in (phase.start_time, phase.end_time)]
    moments = [moment or 0 for moment in (whole.start_time, *times, whole.end_time)]
    assert moments == sorted(moments)
    assert (phases[2].end_time or 0) - (phases[2].start_time or 0) >= 15e6


async def test_without_tracing_the_trace_context_is_passed_on_as_it_came() -> None:
    seen: list[str] = []

    class Watched(SimEngine):
        async def submit(self, generation: Generation, sink: Sink) -> None:
            seen.append(generation.traceparent)
            await super().submit(generation, sink)

    async with sim_worker(make_engine=Watched) as worker, open_session(worker.channel) as session:
        traced = submission(1)
        traced.traceparent = TRACEPARENT
        await session.send(traced)
        await session.read_until_ended(1)
    assert seen == [TRACEPARENT]


async def test_a_worker_process_drains_on_sigterm_and_loses_nothing(tmp_path: Path) -> None:
    config = worker_config(sim=SimSettings(decode_step_ms=10))
    async with worker_process(config, tmp_path) as process, rpc.channel(process.address) as channel:
        async with open_session(channel) as session:
            await session.send(*(submission(handle, max_tokens=150) for handle in range(1, 9)))
            await session.read()
            process.terminate()
            await process.wait_for_health("NOT_SERVING", within=5)
            await session.send(submission(9))
            await session.read_until_ended(*range(1, 10))
            assert not await session.read()
        assert await process.exit_code(within=5) == 0
    for handle in range(1, 9):
        assert session.texts[handle] == sim_text.expected_text(sim_text.tokenize(f"prompt {handle}"), 150)
    assert error_of(session, 9).reason == Reason.NO_READY_WORKER
    lines = [json.loads(line) for line in process.log.read_text(encoding="utf-8").splitlines()]
    assert [line["message"] for line in lines if line["level"] in ("warning", "error")] == []


async def test_what_outlasts_the_drain_is_handed_back(tmp_path: Path) -> None:
    config = worker_config(sim=SLOW, drain_seconds=0.3)
    async with worker_process(config, tmp_path) as process, rpc.channel(process.address) as channel:
        async with open_session(channel) as session:
            await session.send(submission(1, max_tokens=4000))
            await session.read()
            process.terminate()
            await session.read_until_ended(1)
            assert error_of(session, 1).reason == Reason.NO_READY_WORKER
        assert await process.exit_code(within=3) == 0


async def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    async with worker_process(worker_config(), tmp_path) as process:
        path = tmp_path / "second.json"
        path.write_text(json.dumps(worker_config("second") | {"listen": process.address}), encoding="utf-8")
        second = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.inference", "--config", str(path), stdout=PIPE, stderr=DEVNULL
        )
        output, _ = await second.communicate()
    assert second.returncode == 1
    assert f"can't listen on {process.address}" in json.loads(output)["cause"]


async def test_a_worker_process_serves_its_metrics(tmp_path: Path) -> None:
    async with worker_process(worker_config(), tmp_path) as process, rpc.channel(process.address) as channel:
        async with open_session(channel) as session:
            await session.send(submission(1))
            await session.read_until_ended(1)
        text = await asyncio.to_thread(_get, f"http://{process.metrics}/metrics")
    assert 'tokenloom_inference_requests_total{outcome="length"} 1.0' in text
    assert "tokenloom_inference_kv_usage_ratio 0.0" in text
    assert "tokenloom_inference_requests_running 0.0" in text


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


async def test_choices_of_a_session_end_one_by_one_and_then_together() -> None:
    several = submission(1, temperature=1, max_tokens=30)
    several.request.choice_count, several.request.echo = 3, True
    async with sim_worker() as worker, open_session(worker.channel) as session:
        await session.send(several, submission(2))
        await session.read_until_ended(1, 2)
    assert sorted(session.choice_ends[1]) == [0, 1, 2]
    assert session.choice_token_counts == {1: dict.fromkeys(range(3), 30)}
    assert session.started[1].prompt_text == "prompt 1"
    assert session.ends[1].completed.usage.output_token_count == 90
    assert session.texts[2] == sim_text.expected_text(sim_text.tokenize("prompt 2"), 20)
