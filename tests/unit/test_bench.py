"""What `tokenloom bench` sends, and what it makes of the answers."""

import asyncio
from array import array
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.common.config import ConfigError
from services.mesh.__main__ import main
from services.mesh.bench_client import openai_client
from services.mesh.bench_load import Load, Result, Shape, prompts_of, random_prompts, run
from services.mesh.bench_report import Objective, as_json, as_text, percentile
from services.mesh.bench_sample import Prompt, Sample
from services.mesh.edge_client import Door
from tests.support.far_server import far_server, plain, streamed

SHAPE = Shape(prompt_tokens=20, output_tokens=10)


def sample(*, ttft: float | None = 0.1, tokens: int = 11, step: float = 0.01, error: str | None = None) -> Sample:
    made = Sample(10.0, error=error, output_tokens=tokens, prompt_tokens=40, cached_tokens=10)
    if ttft is not None:
        made.first_at = 10.0 + ttft
        made.last_at = made.first_at + step * (tokens - 1)
        made.gaps = array("d", [step] * (tokens - 1))
    made.ended = (made.last_at or 10.0) + 0.001
    return made


def result(*samples: Sample, seconds: float = 2.0) -> Result:
    return Result(samples=list(samples), seconds=seconds)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([1], 50, 1), ([1, 2], 50, 1), ([1, 2], 51, 2), (list(range(1, 101)), 99, 99), (list(range(1, 101)), 100, 100)],
)
def test_a_percentile_is_a_value_that_was_measured(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_the_report_counts_what_was_answered_and_what_was_good() -> None:
    report = as_json(
        result(sample(), sample(ttft=3.0), sample(step=0.5), sample(tokens=1), sample(ttft=None, error="timeout")),
        Objective(ttft=1.0, tpot=0.1),
    )
    assert report["requests"] == {"sent": 5, "ok": 4, "not_sent": 0}
    assert report["errors"] == {"timeout": 1}
    assert report["throughput"] == {"requests": 2.0, "prompt_tokens": 80.0, "output_tokens": 17.0}
    assert (report["goodput"]["requests"], report["goodput"]["share"]) == (1.0, 0.4)
    assert report["cached_share"] == 0.25
    assert (report["ttft_ms"]["p50"], report["ttft_ms"]["max"]) == (100.0, 3000.0)
    assert report["tpot_ms"] == {"mean": 173.333, "p50": 10.0, "p90": 500.0, "p95": 500.0, "p99": 500.0, "max": 500.0}


def test_a_report_without_answers_says_why_and_shows_no_table() -> None:
    lines = list(as_text(as_json(result(sample(ttft=None, error="HTTP 502")), Objective(ttft=1.0, tpot=0.1))))
    assert lines[0] == "requests    0 of 1 answered in 2 s; failed: 1 HTTP 502"
    assert len(lines) == 3


def test_prompts_are_the_same_for_the_same_seed_and_share_what_they_are_to_share() -> None:
    shape = Shape(prompt_tokens=20, output_tokens=10, spread=0.5, shared_prefix_tokens=5)
    prompts = list(islice(random_prompts(shape, 1), 50))
    assert prompts == list(islice(random_prompts(shape, 1), 50))
    assert prompts != list(islice(random_prompts(shape, 2), 50))
    assert len({" ".join(prompt.text.split()[:5]) for prompt in prompts}) == 1
    assert len({" ".join(prompt.text.split()[:6]) for prompt in prompts}) == 50
    lengths = {len(prompt.text.split()) - 5 for prompt in prompts}
    assert min(lengths) >= 10
    assert max(lengths) <= 30
    assert len(lengths) > 5
    assert {5 <= prompt.max_tokens <= 15 for prompt in prompts} == {True}


def test_prompts_of_a_file_are_taken_again_and_again(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"one"\n\n{"prompt": "two", "max_tokens": 3}\n')
    assert list(islice(prompts_of(file, SHAPE), 3)) == [Prompt("one", 10), Prompt("two", 3), Prompt("one", 10)]


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "expected 1 to 100000 lines"), ("{", "line 1 of"), ('"a"\n{"text": "b"}', "line 2 of"), ("3", "line 1 of")],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        prompts_of(file, SHAPE)


class Slow:
    """A client that takes its time, and knows how many requests were under way at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._now = 0
        self.most = 0

    async def ask(self, prompt: Prompt) -> Sample:
        del prompt
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.sleep(self._seconds)
        self._now -= 1
        return sample()


@pytest.mark.parametrize(("requests", "concurrency"), [(10, 3), (2, 8)])
async def test_so_many_are_under_way_at_a_time(requests: int, concurrency: int) -> None:
    client, said = Slow(0.01), Result()
    await run(client, random_prompts(SHAPE, 0), Load(requests=requests, concurrency=concurrency), said)
    assert (len(said.samples), client.most) == (requests, min(requests, concurrency))


async def test_a_rate_is_kept_whatever_is_answered() -> None:
    client, said = Slow(0.5), Result()
    await run(client, random_prompts(SHAPE, 0), Load(requests=100, rate=400), said)
    assert len(said.samples) == 100
    assert client.most > 50


async def test_none_is_sent_when_the_time_is_over() -> None:
    said = Result()
    await run(Slow(0.01), random_prompts(SHAPE, 0), Load(requests=1000, seconds=0.1, concurrency=1), said)
    assert 2 <= len(said.samples) <= 11


EVENTS = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "a"}}]},
    {"choices": [{"delta": {"reasoning": "b"}}]},
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": None}},
]


@pytest.mark.parametrize(
    ("status", "events", "done", "expected"),
    [
        (200, EVENTS, True, (None, 5, 7)),
        (200, EVENTS[:2], True, (None, 1, 0)),
        (200, EVENTS[:2], False, ("incomplete", 1, 0)),
        (200, [{"error": {"message": "lost", "code": "engine_failed"}}], False, ("engine_failed", 0, 0)),
        (429, [], False, ("rate_limit_exceeded", 0, 0)),
    ],
)
async def test_answers_of_openais_api_are_understood(
    status: int, events: list[dict[str, Any]], done: bool, expected: tuple[str | None, int, int]
) -> None:
    refused = plain({"error": {"message": "no", "code": "rate_limit_exceeded"}}, status)
    answer = streamed(*events, done=done) if status == 200 else refused
    async with (
        far_server({"/v1/chat/completions": answer}) as far,
        openai_client(Door(far.url, ""), model="m", endpoint="chat", ignore_eos=False, timeout=5) as client,
    ):
        got = await client.ask(Prompt("hi", 5))
    assert (got.error, got.output_tokens, got.prompt_tokens) == expected


async def test_a_server_that_is_not_there_is_an_error_of_each_request() -> None:
    async with openai_client(
        Door("http://127.0.0.1:9", ""), model="m", endpoint="completions", ignore_eos=True, timeout=5
    ) as client:
        assert (await client.ask(Prompt("hi", 5))).error == httpx.ConnectError.__name__


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rate", "0"], "--rate"),
        (["--spread", "2"], "--spread"),
        (["--output-tokens", "0"], "--output-tokens"),
        (["--api", "soap"], "--api"),
        (["--rate", "1", "--concurrency", "2"], "--rate, --concurrency"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["bench", *options])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert said in capsys.readouterr().err
