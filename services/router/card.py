"""What a worker says of itself: who it is once, how it is all the time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

__all__ = ["Card", "Load", "WorkerState", "believable"]

# Beyond these no engine is; a worker that says so is mistaken.
_PREFILL_TOKENS_PER_SECOND: Final = (1.0, 10_000_000.0)
_DECODE_STEP_SECONDS: Final = (0.000_05, 10.0)
_PER_SEQUENCE_SECONDS: Final = (0.0, 1.0)


class WorkerState(Enum):
    """Whether a worker takes work."""

    UNKNOWN = "has not reported"
    READY = "ready"
    DRAINING = "draining"
    UNAVAILABLE = "unavailable"
    ASLEEP = "asleep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Who a worker is.

    Attributes:
        worker_id: its name, unique in the fleet.
        endpoint: its gRPC address, `ip:port`.
        models: the models it serves, with the longest sequence each takes, in tokens.
        abilities: what each model can do ("generate", "embed", ...); one that is not named is taken to do everything.
        block_tokens: tokens of one block of its prefix cache; 0 when it tells nothing of that.
        pool: the pool it belongs to.
        gpu_uuids: the GPUs that it runs on.
        max_running: sequences that it runs at the same time, at least 1.
        kv_tokens: tokens of KV cache; 0 where it is not known.
        said: the registration as it came, for those who show it.
        headroom: requests that may wait in its engine, so that a slot is taken again the moment it is free.
    """

    worker_id: str
    endpoint: str
    models: Mapping[str, int]
    abilities: Mapping[str, frozenset[str]] = field(default_factory=dict)
    block_tokens: int = 0
    pool: str = ""
    gpu_uuids: tuple[str, ...] = ()
    max_running: int = 1
    kv_tokens: int = 0
    said: Any = field(default=None, repr=False)
    headroom: int = field(init=False)

    def can(self, model: str | None, needs: frozenset[str]) -> bool:
        """Whether the model can do all of that; a model whose card names nothing is taken to."""
        able = self.abilities.get(model or "")
        return not able or needs <= able

    def __post_init__(self) -> None:
        # Asked for at every decision.
        object.__setattr__(self, "headroom", max(1, self.max_running // 16))

    @property
    def most_prompt_tokens(self) -> int:
        """More than this can't possibly wait for prefill."""
        return 2 * (self.max_running + self.headroom) * max(self.models.values(), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How a worker says it is. Gauges of one moment.

    Attributes:
        running: sequences that run.
        waiting: sequences that wait inside the engine.
        kv_usage: used share of the KV cache, 0 to 1.
        pending_prefill_tokens: prompt tokens accepted and not prefilled; None where it is not to be believed.
        prefill_tokens_per_second: measured prefill speed; None while unknown.
        decode_step_seconds: measured decode step with one sequence; None while unknown.
        decode_step_per_sequence_seconds: what each further sequence adds; None while unknown.
        state: whether it takes work.
        card: who it is from now on, when what it serves has changed; None: nothing has.
        said: the report as it came, for those who show it.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    pending_prefill_tokens: int | None = 0
    prefill_tokens_per_second: float | None = None
    decode_step_seconds: float | None = None
    decode_step_per_sequence_seconds: float | None = None
    state: WorkerState = WorkerState.UNKNOWN
    card: Card | None = None
    said: Any = field(default=None, repr=False)


def believable(load: Load, card: Card) -> Load:
    """The load without what can't be true: a worker's lie costs it, or gains it, no more than saying nothing would."""
    total = load.running + load.waiting
    counts = 0 <= load.running <= 4 * card.max_running and load.waiting >= 0 and total <= 4 * card.max_running + 1024
    pending = load.pending_prefill_tokens
    return Load(
        running=load.running if counts else 0,
        waiting=load.waiting if counts else 0,
        kv_usage=min(1.0, max(0.0, load.kv_usage)) if math.isfinite(load.kv_usage) else 0.0,
        pending_prefill_tokens=pending if pending is not None and 0 <= pending <= card.most_prompt_tokens else None,
        prefill_tokens_per_second=_within(load.prefill_tokens_per_second, _PREFILL_TOKENS_PER_SECOND),
        decode_step_seconds=_within(load.decode_step_seconds, _DECODE_STEP_SECONDS),
        decode_step_per_sequence_seconds=_within(load.decode_step_per_sequence_seconds, _PER_SEQUENCE_SECONDS),
        state=load.state,
        card=load.card,
        said=load.said,
    )


def _within(value: float | None, bounds: tuple[float, float]) -> float | None:
    # NaN compares false with everything.
    return value if value is not None and bounds[0] <= value <= bounds[1] else None
