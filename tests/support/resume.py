"""Generations that go on elsewhere, cut wherever they can be, next to the same generations in one piece."""

import asyncio
from dataclasses import dataclass, replace

from services.inference.engine import Engine
from services.inference.output import TokenLogprobs
from services.inference.request import Generation
from tests.support.sinks import Kept

__all__ = ["Resumed", "resume_everywhere"]

# A prompt is computed by other kernels than a single token is: the last digits may differ.
_LOGPROB_DIGITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What came of resuming one generation at every cut."""

    cuts: int
    whole: Kept
    differences: list[str]
    """One line for each cut at which the two were not the same."""
    farthest_logprob: float
    """Largest difference of a log-probability."""


async def resume_everywhere(engine: Engine, generation: Generation) -> Resumed:
    """Runs a generation whole, then from every cut that a client can have seen, all at once."""
    whole = await _run(engine, generation)
    cuts = {0: "", **whole.text_after}
    parts = [replace(generation, id=f"{generation.id}-{cut}", emitted_token_ids=whole.token_ids[:cut]) for cut in cuts]
    rests = await asyncio.gather(*[_run(engine, part) for part in parts])
    found = [_differences(whole, cut, text, rest) for (cut, text), rest in zip(cuts.items(), rests, strict=True)]
    return Resumed(
        cuts=len(cuts),
        whole=whole,
        differences=[f"{generation.id} cut at {cut}: {found}" for cut, found in zip(cuts, found, strict=True) if found],
        farthest_logprob=max((_farthest(whole, cut, rest) for cut, rest in zip(cuts, rests, strict=True)), default=0.0),
    )


async def _run(engine: Engine, generation: Generation) -> Kept:
    sink = Kept()
    await engine.submit(generation, sink)
    await sink.ended.wait()
    return sink


def _differences(whole: Kept, cut: int, text: str, rest: Kept) -> str:
    assert whole.usage is not None
    if rest.error is not None:
        return f"failed: {rest.error}"
    usage = (rest.usage.prompt, rest.usage.output) if rest.usage else None
    same = {
        f"text {text + rest.text!r}, not {whole.text!r}": text + rest.text == whole.text,
        f"tokens {rest.token_ids}, not {whole.token_ids[cut:]}": rest.token_ids == whole.token_ids[cut:],
        f"usage {usage}": usage == (whole.usage.prompt, whole.usage.output),
        f"reason {rest.reason}": rest.reason is whole.reason,
        f"stop cause {rest.stop_cause!r}": rest.stop_cause == whole.stop_cause,
        "the tokens of log-probabilities": len(rest.logprobs) == len(whole.logprobs[cut:])
        and all(map(_same_texts, rest.logprobs, whole.logprobs[cut:])),
        "log-probabilities": round(_farthest(whole, cut, rest), _LOGPROB_DIGITS) == 0,
    }
    return "; ".join(what for what, is_same in same.items() if not is_same)


def _farthest(whole: Kept, cut: int, rest: Kept) -> float:
    pairs = zip(whole.logprobs[cut:], rest.logprobs, strict=False)
    return max((abs(one.chosen.logprob - other.chosen.logprob) for one, other in pairs), default=0.0)


def _same_texts(one: TokenLogprobs, other: TokenLogprobs) -> bool:
    if (one.chosen.token_id, one.chosen.token) != (other.chosen.token_id, other.chosen.token):
        return False
    # Which alternatives there are may be a matter of the last bit.
    texts = {each.token_id: each.token for each in one.alternatives}
    return all(texts.get(each.token_id, each.token) == each.token for each in other.alternatives)
