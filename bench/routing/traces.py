"""What arrives when: seeded traces of requests."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from bench.routing.engine import BLOCK_TOKENS

__all__ = ["Arrival", "Lengths", "bursts", "conversations", "noisy_tenant", "poisson"]

Arrivals = list["Arrival"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request that arrives.

    Attributes:
        at: seconds after the beginning.
        prompt_tokens: length of its prompt.
        output_tokens: length of its answer, which nobody knows beforehand.
        tenant: whose it is.
        session: the conversation that it belongs to; or empty.
        hashes: of the blocks of prompt and answer, 16 tokens each; none where nothing is shared with anybody.
        slo_class: how long its client may wait; empty for the default.
        priority: its class, lower first.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = "t"
    session: str = ""
    hashes: Sequence[int] = ()
    slo_class: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Log-normal lengths of prompts and answers, in tokens."""

    prompt_median: float = 600.0
    prompt_sigma: float = 1.0
    most_prompt: int = 6_000
    output_median: float = 150.0
    output_sigma: float = 0.8
    most_output: int = 1_000

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """A prompt and an answer."""
        prompt = rng.lognormvariate(math.log(self.prompt_median), self.prompt_sigma)
        output = rng.lognormvariate(math.log(self.output_median), self.output_sigma)
        return max(16, min(self.most_prompt, int(prompt))), max(2, min(self.most_output, int(output)))


def poisson(
    rate: float, seconds: float, *, seed: int, lengths: Lengths = Lengths(), tenants: int = 1
) -> Arrivals:  # immutable
    """Independent requests, `rate` a second, of equally busy tenants."""
    rng = random.Random(seed)
    return [
        _one(rng, at, lengths, tenant=f"t{rng.randrange(tenants)}") for at in _times(rng, lambda _: rate, rate, seconds)
    ]


def bursts(
    rate: float, seconds: float, *, seed: int, every: float = 20.0, share: float = 0.2, factor: float = 3.0
) -> Arrivals:
    """As `poisson`, but for a share of the time `factor` times as many arrive, and fewer in the rest."""
    rng = random.Random(seed)
    calm = rate * (1 - share * factor) / (1 - share)

    def now(at: float) -> float:
        return rate * factor if at % every < share * every else calm

    return [_one(rng, at, Lengths()) for at in _times(rng, now, rate * factor, seconds)]


def noisy_tenant(rate: float, seconds: float, *, seed: int, normal: int = 9, factor: float = 50.0) -> Arrivals:
    """`normal` tenants who send `rate` requests a second together, and one who sends `factor` times what each does."""
    quiet = poisson(rate, seconds, seed=seed, tenants=normal)
    noise = poisson(factor * rate / normal, seconds, seed=seed + 1)
    return sorted([*quiet, *(replace(one, tenant="noisy") for one in noise)], key=lambda arrival: arrival.at)


def conversations(
    rate: float,
    seconds: float,
    *,
    seed: int,
    apps: int = 12,
    system_tokens: int = 1_200,
    turns: float = 5.0,
    think_seconds: float = 12.0,
) -> Arrivals:
    """Conversations of several turns, each of which begins with one of `apps` system prompts; `rate` requests a second.

    Applications are of unequal popularity (Zipf). Each turn's prompt is all that was said before, and a new message.
    """
    rng = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(apps)]
    found: Arrivals = []
    # Those that began before the trace does are in the middle of their conversation.
    before = turns * think_seconds
    for number, began in enumerate(_times(rng, lambda _: rate / turns, rate / turns, seconds + before)):
        app = rng.choices(range(apps), weights)[0]
        found += _conversation(rng, _Talk(app, number, began - before, system_tokens, turns, think_seconds))
    return sorted((one for one in found if 0 <= one.at < seconds), key=lambda arrival: arrival.at)


class _Talk(NamedTuple):
    app: int
    number: int
    began: float
    system_tokens: int
    turns: float
    think_seconds: float


def _conversation(rng: random.Random, talk: _Talk) -> Iterator[Arrival]:
    app, number, at, system_tokens, turns, think_seconds = talk
    said = system_tokens
    system = _blocks((1, app), system_tokens)
    while True:
        prompt = said + int(20 + rng.expovariate(1 / 80))
        output = max(4, min(600, int(rng.lognormvariate(math.log(120), 0.7))))
        # Up to the system prompt's last whole block alike for the application, then for this conversation alone.
        hashes = _blocks((2, number), prompt + output, after=system)
        yield Arrival(
            at=at,
            prompt_tokens=prompt,
            output_tokens=output,
            tenant=f"app-{app}",
            session=f"chat-{number}",
            hashes=hashes,
        )
        said = prompt + output
        at += 3.0 + rng.expovariate(1 / think_seconds)
        if rng.random() < 1 / turns:
            return


def _blocks(name: tuple[int, int], tokens: int, *, after: Sequence[int] = ()) -> list[int]:
    # Distinct numbers do for hashes here: 20 bits for the place, the rest for whose block it is.
    first, second = name
    base = (first << 52) ^ (second << 20)
    return [*after, *(base + place for place in range(len(after), tokens // BLOCK_TOKENS))]


def _one(rng: random.Random, at: float, lengths: Lengths, *, tenant: str = "t") -> Arrival:
    prompt, output = lengths.draw(rng)
    return Arrival(at=at, prompt_tokens=prompt, output_tokens=output, tenant=tenant)


def _times(rng: random.Random, now: Callable[[float], float], most: float, seconds: float) -> Iterator[float]:
    at = 0.0
    while (at := at + rng.expovariate(most)) < seconds:
        # Thinning: arrivals of a rate that changes.
        if rng.random() * most < now(at):
            yield at
