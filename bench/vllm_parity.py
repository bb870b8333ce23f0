"""Whether we answer as vLLM's own server does: `python -m bench.vllm_parity [--requests 200] [--mesh]`.

The same random requests, over all parameters, go to `vllm serve`'s `/v1/completions` and to a worker's `Generate`, or
to `/v1/completions` of a whole mesh, each on a CPU with the demo model. Compared are text, tokens, log-probabilities,
ends and what caused them, usage with cached tokens, the prompt's own log-probabilities, and error for error.

What differs on purpose, and is not asked for here:
- A prompt and `max_tokens` beyond the context, or a value beyond a bound of generation.proto, are refused by the worker
  where vLLM clips or knows no bound: `logit_bias` beyond 100, more than 16 stops, `min_tokens` without `max_tokens`.
- A seed of -1 is a seed; vLLM takes it for none.
- With several choices, the cached tokens are those that the first of them found; vLLM's server tells of the last one,
  which finds what the first has just computed.
- Log-probabilities come with tokens and ranks of their own, not as a mapping by text in which equal texts are lost.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import uvloop
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from services.common import rpc
from tests.support.demo_model import demo_model
from tests.support.mesh import running_mesh
from tests.support.vllm_server import vllm_server
from tests.support.workers import worker_config, worker_process

_VOCABULARY = 2048
_SLACK = 2e-4
_WORDS = [
    "the",
    "river",
    "was",
    "bright",
    "in",
    "morning",
    "and",
    "people",
    "wrote",
    "letters",
    "about",
    "music",
    "slept",
]
_FORMS: list[dict[str, Any]] = [
    {"regex": "[0-9]{3}-(yes|no)"},
    {"choice": ["one", "two words", "drei"]},
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
    {"json_object": True},
    {"grammar": 'root ::= ("ab" | "cd")+ "!"'},
]
# Each of them is refused by both.
_BAD: list[dict[str, Any]] = [
    {"temperature": -0.1}, {"temperature": 2.1}, {"top_p": 1.1}, {"top_p": 0.0}, {"min_p": 1.5}, {"max_tokens": 0},
    {"min_tokens": 30, "max_tokens": 20}, {"n": 3, "temperature": 0.0}, {"presence_penalty": 2.5}, {"stop": [""]},
    {"frequency_penalty": -2.5}, {"repetition_penalty": 0.0}, {"stop_token_ids": [2048]}, {"logprobs": 21},
    {"allowed_token_ids": [5, 4096]}, {"logit_bias": {"9999": 1.0}}, {"prompt_logprobs": 25}, {"bad_words": [""]},
    {"prompt": [5, 5000]}, {"prompt": []}, {"max_tokens": 3000}, {"prompt": [5] * 2050},
    {"structured_outputs": {"regex": "(unclosed"}}, {"structured_outputs": {"json": {"type": "nothing"}}},
    {"structured_outputs": {"grammar": "no grammar"}}, {"n": 100_000, "temperature": 1.0},
]  # fmt: skip  # a table


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came of a request."""

    failed: bool = False
    message: str = ""
    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, tuple[str, str | int | None]] = field(default_factory=dict)
    logprobs: dict[int, list[tuple[float, list[float]]]] = field(default_factory=dict)
    """By choice and position: the token's own, and those of the likeliest tokens."""
    prompt_logprobs: list[tuple[float, int]] = field(default_factory=list)
    usage: tuple[int, int, int] = (0, 0, 0)


def random_request(draw: random.Random) -> dict[str, Any]:
    """A body for vLLM's server that it takes."""
    words = " ".join(draw.choices(_WORDS, k=draw.randint(1, 30)))
    ids = [draw.randrange(3, _VOCABULARY) for _ in range(draw.randint(1, 60))]
    sampled = draw.random() < 0.5
    body: dict[str, Any] = {
        "prompt": words if draw.random() < 0.5 else ids,
        "max_tokens": draw.randint(1, 30),
        "temperature": draw.choice([0.3, 0.7, 1.0, 1.5]) if sampled else 0.0,
    }
    some: dict[str, tuple[float, Callable[[], Any]]] = {
        "seed": (1.0 if sampled else 0.3, lambda: draw.randrange(2**40)),
        "n": (0.3 if sampled else 0, lambda: draw.randint(2, 4)),
        "top_p": (0.3, lambda: draw.choice([0.5, 0.9, 1.0])),
        "top_k": (0.3, lambda: draw.choice([1, 5, 50, 5000])),
        "min_p": (0.2, lambda: draw.choice([0.0, 0.05, 0.3])),
        "presence_penalty": (0.2, lambda: draw.uniform(-2, 2)),
        "frequency_penalty": (0.2, lambda: draw.uniform(-2, 2)),
        "repetition_penalty": (0.2, lambda: draw.uniform(0.7, 1.8)),
        "min_tokens": (0.2, lambda: draw.randint(0, body["max_tokens"])),
        "stop": (0.3, lambda: draw.choices(["e", "th", "er", " a", "zz", "\n"], k=draw.randint(1, 3))),
        "stop_token_ids": (0.2, lambda: draw.sample(range(3, _VOCABULARY), 60)),
        "ignore_eos": (0.3, lambda: True),
        "logit_bias": (0.2, lambda: {str(draw.randrange(_VOCABULARY)): draw.uniform(-50, 50) for _ in range(20)}),
        "logprobs": (0.4, lambda: draw.randint(0, 5)),
        "prompt_logprobs": (0.2, lambda: draw.randint(0, 5)),
        "bad_words": (0.2, lambda: draw.sample(_WORDS, 5)),
        "allowed_token_ids": (0.1, lambda: draw.sample(range(3, _VOCABULARY), 40)),
        "skip_special_tokens": (0.2, lambda: False),
        "include_stop_str_in_output": (0.2, lambda: True),
        "truncate_prompt_tokens": (0.1, lambda: draw.randint(1, 20)),
        "add_special_tokens": (0.2 if isinstance(body["prompt"], str) else 0, lambda: False),
        "cache_salt": (0.1, lambda: draw.choice(["a", "b"])),
        "priority": (0.1, lambda: draw.randint(-3, 3)),
        "structured_outputs": (0.15, lambda: draw.choice(_FORMS)),
    }
    body |= {name: value() for name, (share, value) in some.items() if draw.random() < share}
    if "structured_outputs" in body:
        # They can forbid all that the form allows, which no two engines need to agree on.
        for name in ("allowed_token_ids", "bad_words", "min_tokens", "stop_token_ids", "ignore_eos"):
            body.pop(name, None)
    return body


def to_proto(body: dict[str, Any]) -> pb.GenerateRequest:
    """The same request as the worker takes it."""
    same = (
        "max_tokens", "temperature", "seed", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "bad_words", "allowed_token_ids",
    )  # fmt: skip  # a table
    sampling: dict[str, Any] = {name: body[name] for name in same if name in body}
    for ours, theirs in (("logprob_count", "logprobs"), ("prompt_logprob_count", "prompt_logprobs")):
        if theirs in body:
            sampling[ours] = body[theirs]
    sampling["logit_bias"] = {int(token): bias for token, bias in body.get("logit_bias", {}).items()}
    sampling["keep_special_tokens"] = not body.get("skip_special_tokens", True)
    sampling["include_stop_string"] = body.get("include_stop_str_in_output", False)
    request = pb.GenerateRequest(
        model="demo",
        sampling=pb.SamplingParameters(**sampling),
        choice_count=body.get("n", 1),
        cache_salt=body.get("cache_salt", ""),
        prompt_token_limit=body.get("truncate_prompt_tokens"),
        without_special_tokens=not body.get("add_special_tokens", True),
        structured_output=_form(body["structured_outputs"]) if "structured_outputs" in body else None,
    )
    if isinstance(body["prompt"], str):
        request.text = body["prompt"]
    else:
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(body["prompt"])
    return request


def _form(form: dict[str, Any]) -> pb.StructuredOutput:
    ((kind, value),) = form.items()
    match kind:
        case "json":
            return pb.StructuredOutput(json_schema=json.dumps(value))
        case "json_object":
            return pb.StructuredOutput(json_object=pb.JsonObject())
        case "choice":
            return pb.StructuredOutput(choices=pb.Choices(texts=value))
        case _:
            return pb.StructuredOutput(**{kind: value})


async def ask_worker(stub: Any, body: dict[str, Any]) -> Answer:
    """From the worker."""
    answer = Answer()
    metadata = (("x-tokenloom-priority", str(body.get("priority", 0))),)
    try:
        async for event in stub.Generate(to_proto(body), metadata=metadata):
            _take(answer, event, several=body.get("n", 1) > 1)
    except grpc.aio.AioRpcError as error:
        return Answer(failed=True, message=f"{error.code().name}: {error.details()}")
    return answer


def _take(answer: Answer, event: pb.GenerateResponse, *, several: bool) -> None:
    for entry in event.started.prompt_logprobs:
        answer.prompt_logprobs.append((entry.chosen.logprob, entry.chosen.rank))
    if event.HasField("delta"):
        delta, index = event.delta, event.delta.choice_index
        answer.texts[index] = answer.texts.get(index, "") + delta.text
        answer.tokens.setdefault(index, []).extend(delta.token_ids)
        for entry in delta.logprobs:
            alternatives = [other.logprob for other in entry.alternatives]
            answer.logprobs.setdefault(index, []).append((entry.chosen.logprob, alternatives))
    elif event.HasField("choice_ended"):
        answer.ends[event.choice_ended.choice_index] = _end(event.choice_ended)
    elif event.HasField("completed"):
        if not several:
            answer.ends[0] = _end(event.completed)
        usage = event.completed.usage
        cached = -1 if several else usage.cached_token_count
        answer.usage = (usage.prompt_token_count, cached, usage.output_token_count)


def _end(ended: pb.ChoiceEnded | pb.Completed) -> tuple[str, str | int | None]:
    reason = "stop" if ended.finish_reason == pb.FINISH_REASON_STOP else "length"
    kind = ended.stop_cause.WhichOneof("cause")
    return reason, None if kind is None else getattr(ended.stop_cause, kind)


async def ask_server(client: httpx.AsyncClient, body: dict[str, Any], model: str = "demo") -> Answer:
    """From a server with vLLM's API."""
    extra = {"model": model, "return_token_ids": True, "return_tokens_as_token_ids": True}
    response = await client.post("/v1/completions", json=body | extra, timeout=60)
    if response.status_code != 200:
        return Answer(failed=True, message=f"{response.status_code}: {response.text[:300]}")
    found = response.json()
    answer = Answer()
    for choice in found["choices"]:
        index = choice["index"]
        answer.texts[index], answer.tokens[index] = choice["text"], choice["token_ids"]
        answer.ends[index] = (choice["finish_reason"], choice.get("stop_reason"))
        if logprobs := choice["logprobs"]:
            own, top = logprobs["token_logprobs"], logprobs["top_logprobs"]
            count = body["logprobs"]
            answer.logprobs[index] = [
                (mine, sorted((likely or {}).values(), reverse=True)[:count])
                for mine, likely in zip(own, top, strict=True)
            ]
    prompt = found["choices"][0].get("prompt_logprobs") or []
    tokens = found["choices"][0].get("prompt_token_ids") or []
    for token, entry in zip(tokens[1:], prompt[1:], strict=False):
        answer.prompt_logprobs.append((entry[str(token)]["logprob"], entry[str(token)]["rank"]))
    usage = found["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    answer.usage = (usage["prompt_tokens"], cached if len(answer.texts) == 1 else -1, usage["completion_tokens"])
    return answer


def differences(ours: Answer, theirs: Answer) -> list[str]:
    """What is not the same."""
    if ours.failed or theirs.failed:
        return [] if ours.failed == theirs.failed else [f"ours {ours.message!r}, theirs {theirs.message!r}"]
    names = ("texts", "tokens", "ends", "usage")
    found = [
        f"{n}: {getattr(ours, n)}, not {getattr(theirs, n)}" for n in names if getattr(ours, n) != getattr(theirs, n)
    ]
    if not _near(_flat(ours), _flat(theirs)):
        found.append(f"logprobs: {ours.logprobs}, not {theirs.logprobs}")
    if [rank for _, rank in ours.prompt_logprobs] != [rank for _, rank in theirs.prompt_logprobs]:
        found.append(f"prompt ranks: {ours.prompt_logprobs}, not {theirs.prompt_logprobs}")
    return found


def _flat(answer: Answer) -> list[float]:
    entries = [entry for _, entries in sorted(answer.logprobs.items()) for entry in entries]
    return [value for own, top in entries for value in (own, *top)] + [own for own, _ in answer.prompt_logprobs]


def _near(ours: list[float], theirs: list[float]) -> bool:
    return len(ours) == len(theirs) and all(abs(a - b) < _SLACK for a, b in zip(ours, theirs, strict=True))


Ask = Callable[[dict[str, Any]], Awaitable[Answer]]


@asynccontextmanager
async def a_worker(folder: Path) -> AsyncIterator[Ask]:
    """Asks a worker process."""
    config = worker_config("vllm-0", engine="vllm", model={"name": "demo", "path": str(demo_model())})
    async with worker_process(config, folder, within=120) as worker, rpc.channel(worker.address) as channel:
        yield partial(ask_worker, inference_pb2_grpc.InferenceServiceStub(channel))


@asynccontextmanager
async def a_mesh(folder: Path) -> AsyncIterator[Ask]:
    """Asks a whole mesh, edge and gateway included."""
    with running_mesh(folder / "state", "--model", str(demo_model()), within=180) as mesh:
        async with httpx.AsyncClient(base_url=mesh.edge, headers=mesh.headers) as client:
            name = str((await client.get("/v1/models")).json()["data"][0]["id"])

            async def ask(body: dict[str, Any]) -> Answer:
                # Who goes first is the router's affair there.
                return await ask_server(client, {each: body[each] for each in body if each != "priority"}, name)

            yield ask


async def compare(requests: int, seed: int, folder: Path, *, mesh: bool) -> int:
    """Prints what differs; returns at how many requests."""
    draw = random.Random(seed)
    forms = '{"backend": "guidance", "disable_any_whitespace": true}'
    options = ("--structured-outputs-config", forms, "--enable-prompt-tokens-details", "--max-num-seqs", "64")
    with vllm_server(folder, *options, "--scheduling-policy", "priority") as server:
        async with (a_mesh if mesh else a_worker)(folder) as ask:
            server.wait(within=120)
            async with httpx.AsyncClient(base_url=server.url) as client:
                bad = refused = 0
                for number in range(requests):
                    body = random_request(draw)
                    if draw.random() < 0.2:
                        body |= draw.choice(_BAD)
                    ours, theirs = await asyncio.gather(ask(body), ask_server(client, body))
                    refused += ours.failed and theirs.failed
                    if found := differences(ours, theirs):
                        bad += 1
                        print(f"request {number}: {body}\n  " + "\n  ".join(found))
    print(f"{requests} requests, {refused} refused by both: {bad} differ")
    return bad


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mesh", action="store_true", help="ask a whole mesh, not a worker alone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(bool(uvloop.run(compare(given.requests, given.seed, Path(folder), mesh=given.mesh))))


if __name__ == "__main__":
    main()
