"""Who gets a request: tokenloom's own code, and what others do instead."""

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from bench.routing.engine import BLOCK_TOKENS, Engine
from bench.routing.traces import Arrival

__all__ = ["CHOICES", "Choice", "prefix_blocks"]

_BLOCKS_PER_TEXT_BLOCK = 4
"""A text block of 256 bytes is 64 tokens, at four bytes a token."""


class Choice(Protocol):
    """Picks an engine the moment a request arrives, as routers without a queue of their own do."""

    def __call__(self, arrival: Arrival, engines: Sequence[Engine], /) -> int:
        """The place of the engine in the list."""


def prefix_blocks(arrival: Arrival) -> list[int]:
    """What a router sees of a prompt's beginning: the hash of each 64 tokens and all before them."""
    blocks = arrival.prompt_tokens // BLOCK_TOKENS
    return list(arrival.hashes[_BLOCKS_PER_TEXT_BLOCK - 1 : blocks : _BLOCKS_PER_TEXT_BLOCK])


def _random(seed: int) -> Choice:
    rng = random.Random(seed)
    return lambda _, engines: rng.randrange(len(engines))


def _round_robin(seed: int) -> Choice:
    del seed
    turn = -1

    def choose(_: Arrival, engines: Sequence[Engine]) -> int:
        nonlocal turn
        turn = (turn + 1) % len(engines)
        return turn

    return choose


def _least_requests(seed: int) -> Choice:
    rng = random.Random(seed)

    def choose(_: Arrival, engines: Sequence[Engine]) -> int:
        least = min(engine.in_flight for engine in engines)
        return rng.choice([place for place, engine in enumerate(engines) if engine.in_flight == least])

    return choose


def _power_of_two(seed: int) -> Choice:
    rng = random.Random(seed)

    def choose(_: Arrival, engines: Sequence[Engine]) -> int:
        one, two = rng.sample(range(len(engines)), 2)
        return one if engines[one].in_flight <= engines[two].in_flight else two

    return choose


class _PrefixOnly:
    """Goes where most of the prompt was sent before, whatever the load; to the least loaded where nothing was."""

    def __init__(self, seed: int, blocks: int = 20_000) -> None:
        self._least = _least_requests(seed)
        self._sent: dict[int, OrderedDict[int, None]] = {}
        self._blocks = blocks

    def __call__(self, arrival: Arrival, engines: Sequence[Engine]) -> int:
        hashes = prefix_blocks(arrival)
        known = [self._matched(place, hashes) for place in range(len(engines))]
        best = max(known)
        place = known.index(best) if best else self._least(arrival, engines)
        sent = self._sent[place]
        for block in hashes:
            sent[block] = None
            sent.move_to_end(block)
        while len(sent) > self._blocks:
            sent.popitem(last=False)
        return place

    def _matched(self, place: int, hashes: Sequence[int]) -> int:
        sent = self._sent.setdefault(place, OrderedDict())
        return next((count for count, block in enumerate(hashes) if block not in sent), len(hashes))


CHOICES: dict[str, Callable[[int], Choice]] = {
    "random": _random,
    "round robin": _round_robin,
    "least requests": _least_requests,
    "power of two": _power_of_two,
    "prefix only": _PrefixOnly,
}
"""How each is made, from a seed."""
