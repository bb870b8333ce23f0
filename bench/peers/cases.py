"""What is played over which engines, and the texts that make up a trace."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from bench.routing.cases import EQUAL, UNEQUAL
from bench.routing.engine import BLOCK_TOKENS, EngineSpec
from bench.routing.runs import capacity
from bench.routing.traces import Arrival, Lengths, conversations, poisson

__all__ = ["CASES", "Case", "prompts"]

_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Engines, and what arrives when."""

    specs: Sequence[EngineSpec]
    trace: Sequence[Arrival]
    slo_class: str = ""
    """How long clients may wait, for routers that ask."""


class _Natural(Lengths):
    """Answers as long as simulated engines make them."""

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """A prompt and an answer."""
        prompt, _ = super().draw(rng)
        return prompt, rng.randint(16, 256)


def _mixed(specs: Sequence[EngineSpec], load: float, seconds: float, seed: int) -> Case:
    lengths = _Natural()
    rate = load * capacity(specs, lengths=lengths, seconds=60)
    return Case(specs=specs, trace=poisson(rate, seconds, seed=seed, lengths=lengths))


def unequal(seconds: float, seed: int) -> Case:
    """Two large cards and a fast one with little memory, at 80 % of what they can do; mixed lengths, nothing shared."""
    return _mixed(UNEQUAL, 0.8, seconds, seed)


def shared(seconds: float, seed: int) -> Case:
    """Four equal cards; conversations of several turns that begin with one of twelve system prompts."""
    return Case(specs=EQUAL[:4], trace=conversations(12.0, seconds, seed=seed))


def idle(seconds: float, seed: int) -> Case:
    """Four equal cards with little to do: it makes no difference who gets a request."""
    return _mixed(EQUAL[:4], 0.1, seconds, seed)


def overload(seconds: float, seed: int) -> Case:
    """The unequal cards at twice what they can do, and clients who do not wait long."""
    return replace(_mixed(UNEQUAL, 2.0, seconds, seed), slo_class="interactive")


CASES: Final[dict[str, Callable[[float, int], Case]]] = {
    "unequal": unequal,
    "shared": shared,
    "idle": idle,
    "overload": overload,
}


def prompts(trace: Sequence[Arrival]) -> list[str]:
    """Texts of as many tokens as the trace says, alike where its hashes are: each word is a token."""
    return [_prompt(number, arrival) for number, arrival in enumerate(trace)]


def _prompt(number: int, arrival: Arrival) -> str:
    blocks = arrival.hashes[: arrival.prompt_tokens // BLOCK_TOKENS]
    rest = arrival.prompt_tokens - BLOCK_TOKENS * len(blocks)
    return "".join([*(_words(block, BLOCK_TOKENS) for block in blocks), _words(f"rest {number}", rest)])


def _words(seed: int | str, count: int) -> str:
    rng = random.Random(seed)
    return "".join(" " + "".join(rng.choices(_LETTERS, k=4)) for _ in range(count))
