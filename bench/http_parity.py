"""Whether the OpenAI API answers as `vllm serve` does: `python -m bench.http_parity`.

The same requests go to vLLM's own server and to a mesh, both on a CPU with the demo model, whole and as streams, field
by field (`http_parity_cases.py`; of /v1/responses `http_parity_responses.py`, which also says what is compared there).
Compared are texts, thoughts, calls, log-probabilities, token ids, ends and usage,
and of refusals the status and, where vLLM names one, the field. A field of vLLM's that no request here has, and that is
not among those with a reason to differ, is a difference, too. Exits with 1 when there is any.

What errors have otherwise is OpenAI's and not vLLM's: `type`, and a `code` that is a word and no number.
"""

import argparse
import asyncio
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import uvloop

from bench import http_parity_responses
from bench.http_parity_cases import BAD, GOOD, NAMES, ONLY_OURS, OTHERWISE, STRICTER, UNSERVED, Body
from tests.support.demo_model import demo_model
from tests.support.mesh import running_mesh
from tests.support.vllm_server import vllm_server

_CONFIG: Final = """\
models: [{{name: demo, path: {model}, tool_call_parser: hermes, reasoning_parser: deepseek_v3}}]
pools:
  - name: talk
    serves: [demo]
    workers: [{{name: talk-0, engine_args: {{structured_outputs_config: {{enable_in_reasoning: true}}}}}}]
"""
_FORMS: Final = '{"backend": "guidance", "disable_any_whitespace": true, "enable_in_reasoning": true}'
_OPTIONS: Final = (
    *("--structured-outputs-config", _FORMS, "--enable-prompt-tokens-details", "--max-num-seqs", "64"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "deepseek_v3"),
)
_DONE: Final = "[DONE]"
_SLACK: Final = 5e-4
_UNSERVED: Final = {**UNSERVED, http_parity_responses.PATH: http_parity_responses.UNSERVED}
_BASES: Final[dict[str, Body]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "How is the weather?"}]},
    "/v1/completions": {"prompt": "How is the weather?"},
}


@dataclass(slots=True, kw_only=True)
class Choice:
    """One of the answers, put together."""

    text: str = ""
    reasoning: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    """Name and arguments."""
    tokens: list[str] = field(default_factory=list)
    token_bytes: list[list[int] | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    tops: list[dict[str, float]] = field(default_factory=list)
    """The likeliest tokens, position by position."""
    token_ids: list[int] = field(default_factory=list)
    finish: str | None = None
    stop: str | int | None = None


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came of a request."""

    status: int = 200
    error: dict[str, Any] = field(default_factory=dict)
    choices: dict[int, Choice] = field(default_factory=dict)
    prompt_ids: list[int] | None = None
    prompt_scores: list[Any] = field(default_factory=list)
    usage: tuple[int, ...] = ()
    is_echo: bool = False
    """Whether the prompt was to be echoed."""

    def take(self, body: Body) -> None:
        """Adds a whole answer, or an event of a stream."""
        for entry in body["choices"]:
            choice = self.choices.setdefault(entry["index"], Choice())
            message = entry.get("message") or entry.get("delta") or {}
            choice.text += message.get("content") or entry.get("text") or ""
            choice.reasoning += message.get("reasoning") or ""
            for number, call in enumerate(message.get("tool_calls") or ()):
                made = choice.calls.setdefault(call.get("index", number), ["", ""])
                made[0] += call["function"].get("name") or ""
                made[1] += call["function"].get("arguments") or ""
            self._take_scores(choice, entry.get("logprobs") or {})
            choice.token_ids += entry.get("token_ids") or ()
            choice.finish = choice.finish or entry.get("finish_reason")
            choice.stop = entry.get("stop_reason") if choice.stop is None else choice.stop
            self.prompt_ids = self.prompt_ids or entry.get("prompt_token_ids")
            self.prompt_scores = self.prompt_scores or _ranked(entry.get("prompt_logprobs"))
        self.prompt_ids = self.prompt_ids or body.get("prompt_token_ids")
        self.prompt_scores = self.prompt_scores or _ranked(body.get("prompt_logprobs"))
        if usage := body.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            counts = usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]
            self.usage = (*counts, details.get("cached_tokens") or 0)

    @staticmethod
    def _take_scores(choice: Choice, scores: dict[str, Any]) -> None:
        for entry in scores.get("content") or ():
            others = _others(entry)
            each = [entry, *others]
            choice.tokens += [one["token"] for one in each]
            # vLLM's of others than the chosen one are those of token_id:N, where that is asked for.
            choice.token_bytes += [one["bytes"] for one in each if not one["token"].startswith("token_id:")]
            choice.logprobs.append(entry["logprob"])
            choice.tops.append({other["token"]: other["logprob"] for other in others})
        choice.tokens += scores.get("tokens") or ()
        choice.offsets += scores.get("text_offset") or ()
        choice.logprobs += scores.get("token_logprobs") or ()
        choice.tops += [top or {} for top in scores.get("top_logprobs") or ()]


def _others(entry: Body) -> list[Body]:
    """The alternatives but the chosen one, which takes a place among vLLM's even when it is not among the likeliest."""
    tops: list[Body] = entry["top_logprobs"]
    same = [(top["token"], top["logprob"]) == (entry["token"], entry["logprob"]) for top in tops]
    drop = same.index(True) if True in same else len(tops) - 1
    return tops[:drop] + tops[drop + 1 :]


def _ranked(entries: Iterable[dict[str, Any] | None] | None) -> list[Any]:
    return [sorted((token, entry["rank"]) for token, entry in (each or {}).items()) for each in entries or ()]


async def ask(client: httpx.AsyncClient, path: str, body: Body) -> Answer:
    """Asks, and puts the answer together."""
    response = await client.post(path, json=body, timeout=60)
    if response.status_code != 200:
        said = response.json()
        return Answer(status=response.status_code, error=said.get("error", said))
    answer = Answer(is_echo=bool(body.get("echo")))
    if not body.get("stream"):
        answer.take(response.json())
        return answer
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    for event in events:
        if event == _DONE:
            continue
        parsed = json.loads(event)
        if "error" in parsed:
            return Answer(status=parsed["error"].get("code", 0), error=parsed["error"])
        answer.take(parsed)
    return answer


def differences(ours: Answer, theirs: Answer) -> list[str]:
    """What is not the same."""
    if ours.status != theirs.status:
        return [f"status: ours {ours.status} {ours.error}, theirs {theirs.status} {theirs.error}"]
    if ours.status != 200:
        return _other_field(ours, theirs)
    found = _unequal("", ours, theirs, ("usage",))
    # vLLM shows these, too, where only an echo was asked for.
    found += _unequal("", ours, theirs, ("prompt_ids",)) if ours.prompt_ids or not theirs.is_echo else []
    found += _unequal("", ours, theirs, ("prompt_scores",)) if ours.prompt_scores or not theirs.is_echo else []
    if ours.choices.keys() != theirs.choices.keys():
        return [*found, f"choices: {sorted(ours.choices)}, not {sorted(theirs.choices)}"]
    for index, choice in sorted(ours.choices.items()):
        where, other = f"choices[{index}].", theirs.choices[index]
        found += _unequal(where, choice, other, ("text", "reasoning", "calls", "token_ids", "finish", "stop"))
        found += _unequal(where, choice, other, ("tokens", "token_bytes"))
        if not any(token.startswith("token_id:") for token in other.tokens):
            # vLLM counts the tokens as it writes them.
            found += _unequal(where, choice, other, ("offsets",))
        if not _near(choice.logprobs, other.logprobs):
            found.append(f"{where}logprobs: {choice.logprobs}, not {other.logprobs}")
        if len(choice.tops) != len(other.tops) or not all(map(_same_top, choice.tops, other.tops)):
            found.append(f"{where}tops: {choice.tops}, not {other.tops}")
    return found


def _other_field(ours: Answer, theirs: Answer) -> list[str]:
    named = theirs.error.get("param")
    if named is None:
        return []
    # Without what pydantic puts around it: body.tools.0.function, body.stop.list[str].0.
    name = re.sub(r"\.(\d+)", r"[\1]", str(named).removeprefix("body."))
    mine = str(ours.error["param"])
    same = mine.startswith(name) or name.startswith(mine) or mine in NAMES.get(name, ())
    return [] if same else [f"field: ours {ours.error}, theirs {theirs.error}"]


def _same_top(ours: dict[str, float], theirs: dict[str, float]) -> bool:
    return ours.keys() == theirs.keys() and _near(list(ours.values()), [theirs[token] for token in ours])


def _unequal(where: str, ours: object, theirs: object, names: Sequence[str]) -> list[str]:
    pairs = ((name, getattr(ours, name), getattr(theirs, name)) for name in names)
    return [f"{where}{name}: {mine!r}, not {other!r}" for name, mine, other in pairs if mine != other]


def _near(ours: Sequence[float | None], theirs: Sequence[float | None]) -> bool:
    return len(ours) == len(theirs) and all(
        a == b or (a is not None and b is not None and abs(a - b) < _SLACK) for a, b in zip(ours, theirs, strict=True)
    )


def requests(path: str) -> Iterable[tuple[Body, bool]]:
    """The requests of a path, and whether each is a good one; good ones twice, once as a stream."""
    base = {"model": "demo", "max_tokens": 12, "temperature": 0, **_BASES[path]}
    for changes in GOOD[path]:
        body = {name: value for name, value in {**base, **changes}.items() if value is not ...}
        yield body, True
        if "stream" not in changes and "prompt_logprobs" not in changes:
            yield {**body, "stream": True, "stream_options": {"include_usage": True}}, True
    for changes in BAD[path]:
        yield {name: value for name, value in {**base, **changes}.items() if value is not ...}, False


async def compare(path: str, ours: httpx.AsyncClient, theirs: httpx.AsyncClient) -> int:
    """Sends a path's requests to both; prints what differs, and returns at how many."""
    bad = count = 0
    for number, (body, is_good) in enumerate(requests(path)):
        # A prefix that only one of them has cached would be a difference in usage.
        salted = {"cache_salt": f"parity-{number}", **body} if is_good else body
        mine, other = await asyncio.gather(ask(ours, path, salted), ask(theirs, path, salted))
        found = differences(mine, other)
        if not found and (mine.status == 200) != is_good:
            found = [f"both say {mine.status}: {mine.error}"]
        if any(changes.items() <= body.items() for changes in (ONLY_OURS if mine.status == 200 else STRICTER)[path]):
            # The reason is there; without the difference it would be there for nothing.
            found = [] if mine.status != other.status else ["does not differ any more"]
        count += 1
        bad += bool(found)
        if found:
            print(f"{path} {json.dumps(body)[:400]}\n  " + "\n  ".join(text[:600] for text in found), flush=True)
    print(f"{path}: {count} requests, {bad} differ", flush=True)
    return bad


async def unexplained(path: str, ours: httpx.AsyncClient, theirs: httpx.AsyncClient) -> int:
    """Prints vLLM's fields that are neither compared nor excused, and excuses for fields that we do take."""
    known, wanted = await fields(ours, path), await fields(theirs, path)
    asked = http_parity_responses.requests() if path == http_parity_responses.PATH else requests(path)
    tried = {name for body, _ in asked for name in body}
    bad = 0
    for name in sorted(wanted - tried - _UNSERVED[path].keys()):
        bad += 1
        print(f"{path}: vLLM's field {name} is not tried")
    for name in sorted(_UNSERVED[path].keys() & known | (tried & wanted) - known):
        bad += 1
        print(f"{path}: {name} is {'taken, and excused' if name in known else 'compared, and not taken'}")
    for name in sorted(_UNSERVED[path]):
        base = _BASES.get(path) or {"input": "How?"}
        answer = await ask(ours, path, {"model": "demo", **base, name: None})
        if answer.error.get("code") != "unknown_parameter" or answer.error["param"] != name:
            bad += 1
            print(f"{path}: {name} is not refused by its name: {answer.status} {answer.error}")
    return bad


async def fields(client: httpx.AsyncClient, path: str) -> set[str]:
    """The fields of a body, as a server describes them."""
    document = (await client.get("/openapi.json", timeout=30)).json()
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return set(document["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"])


async def compare_all(edge: str, headers: dict[str, str], server: str, only: Sequence[str]) -> int:
    """Compares these paths; returns the number of differences."""
    async with (
        httpx.AsyncClient(base_url=edge, headers=headers) as ours,
        httpx.AsyncClient(base_url=server) as theirs,
    ):
        found = [await compare(path, ours, theirs) for path in only if path in _BASES]
        if http_parity_responses.PATH in only:
            found.append(await http_parity_responses.compare(ours, theirs))
        return sum([*found, *[await unexplained(path, ours, theirs) for path in only]])


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reasons", action="store_true", help="only print what differs on purpose, and why")
    parser.add_argument("--only", choices=(*_BASES, http_parity_responses.PATH), help="one path; default: all")
    options = parser.parse_args()
    only = [options.only] if options.only else [*_BASES, http_parity_responses.PATH]
    if options.reasons:
        for path, reasons in _UNSERVED.items():
            for name, reason in reasons.items():
                print(f"{path} {name}: {reason}")
        print("\n".join([*OTHERWISE, *http_parity_responses.OTHERWISE]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "mesh.yaml"
        config.write_text(_CONFIG.format(model=demo_model()))
        with (
            vllm_server(folder, *_OPTIONS) as server,
            running_mesh(folder / "state", "--config", str(config), within=200) as mesh,
        ):
            server.wait(within=120)
            sys.exit(bool(uvloop.run(compare_all(mesh.edge, mesh.headers, server.url, only))))


if __name__ == "__main__":
    main()
