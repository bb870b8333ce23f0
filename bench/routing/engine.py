"""A simulated engine in virtual time, with the rules and formulas of services/inference/sim_scheduler.py.

Continuous batching: a step decodes one token of every running sequence and prefills up to 512 tokens of those whose
prompt is not done. A step with `b` sequences decoding takes `decode_step + (b - 1) * per_sequence`, plus the prefilled
tokens at the prefill rate. Steps in which nothing happens but decoding are run many at a time, which changes nothing
but the time that the simulation takes.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from bench.routing.timeline import Timeline
from services.inference.calibration import DecodeModel, PrefillMeter
from services.inference.sim_cache import BlockPool

__all__ = ["BLOCK_TOKENS", "Engine", "EngineSpec", "Job", "Report"]

BLOCK_TOKENS: Final = 16
_CHUNK_TOKENS: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """How fast and how large an engine is.

    Attributes:
        name: of its worker.
        prefill_tokens_per_second: speed of prefill.
        decode_step_seconds: a decode step with one sequence.
        per_sequence_seconds: what each further sequence adds.
        max_running: sequences that run at the same time.
        kv_tokens: tokens of KV cache.
    """

    name: str
    prefill_tokens_per_second: float = 8_000.0
    decode_step_seconds: float = 0.022
    per_sequence_seconds: float = 0.0004
    max_running: int = 64
    kv_tokens: int = 160_000


@dataclass(slots=True, eq=False)
class Job:
    """One request in an engine.

    Attributes:
        prompt_tokens: length of its prompt.
        output_tokens: length of its answer.
        hashes: of the blocks of prompt and answer, where they may be shared; or none.
        done: called with the job once it is complete.
    """

    prompt_tokens: int
    output_tokens: int
    hashes: Sequence[int]
    done: "Callable[[Job], None]"
    submitted_at: float = 0.0
    first_token_at: float | None = None
    ended_at: float | None = None
    cached_tokens: int = 0
    failed: bool = False
    made: int = field(default=0)
    pending: int = field(default=0)
    shared: int = field(default=0)
    alone: int = field(default=0)
    begun_at: float = field(default=0.0)
    to_prefill: int = field(default=0)

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.prompt_tokens + self.made


class Report(NamedTuple):
    """What an engine says of itself."""

    running: int
    waiting: int
    kv_usage: float
    pending_prefill_tokens: int
    prefill_tokens_per_second: float | None
    decode_step_seconds: float | None
    decode_step_per_sequence_seconds: float | None


class Engine:
    """One engine. `slowdown` may be changed while it runs: a card that throttles."""

    def __init__(self, spec: EngineSpec, timeline: Timeline) -> None:
        self.spec = spec
        self.slowdown = 1.0
        self.busy_seconds = 0.0
        self._timeline = timeline
        self._waiting: deque[Job] = deque()
        self._prefilling: dict[Job, None] = {}
        self._decoding: dict[Job, None] = {}
        self._pool = BlockPool(spec.kv_tokens // BLOCK_TOKENS)
        self._pending = 0
        self._decode_model = DecodeModel()
        self._prefill_meter = PrefillMeter()
        self._jump: _Jump | None = None

    @property
    def now(self) -> float:
        """The time that it is."""
        return self._timeline.now

    @property
    def in_flight(self) -> int:
        """Requests that it has."""
        return len(self._waiting) + len(self._prefilling) + len(self._decoding)

    def report(self) -> Report:
        """How it is, this moment."""
        return Report(
            running=len(self._prefilling) + len(self._decoding),
            waiting=len(self._waiting),
            kv_usage=self._pool.usage,
            pending_prefill_tokens=self._pending,
            prefill_tokens_per_second=self._prefill_meter.tokens_per_second,
            decode_step_seconds=self._decode_model.base_seconds,
            decode_step_per_sequence_seconds=self._decode_model.seconds_per_sequence,
        )

    def submit(self, job: Job) -> None:
        """Takes a request."""
        job.submitted_at = self._timeline.now
        job.pending = job.length
        self._pending += job.pending
        self._waiting.append(job)
        if self._jump is None:
            self._step()
        else:
            self._cut_short(self._jump)

    def lose_all(self) -> list[Job]:
        """The process dies: everything it had is lost."""
        lost = [*self._waiting, *self._prefilling, *self._decoding]
        self.__init__(self.spec, self._timeline)  # type: ignore[misc]  # a new process
        return lost

    def _cut_short(self, jump: "_Jump") -> None:
        # Whoever comes is looked at when the step that runs is over.
        passed = self._timeline.now - jump.begun
        steps = min(jump.steps, max(1, math.ceil(passed / jump.step_seconds - 1e-9)))
        if steps < jump.steps:
            self._begin(_Jump(jump.begun, steps, jump.chunk, jump.step_seconds))

    def _begin(self, jump: "_Jump") -> None:
        self._jump = jump
        self._timeline.at(jump.begun + jump.steps * jump.step_seconds, lambda: self._end(jump))

    def _step(self) -> None:
        self._admit()
        chunk = min(_CHUNK_TOKENS, sum(job.pending for job in self._prefilling))
        batch = len(self._decoding)
        if not chunk and not batch:
            self._jump = None
            return
        seconds = self._step_seconds(batch, chunk)
        steps = 1 if chunk or self._fresh() else self._quiet_steps(batch)
        self._begin(_Jump(self._timeline.now, steps, chunk, seconds))

    def _fresh(self) -> bool:
        # A sequence in its first decode step; the newest is the last.
        newest = next(reversed(self._decoding), None)
        return newest is not None and newest.first_token_at is None

    def _quiet_steps(self, batch: int) -> int:
        least = min(job.output_tokens - job.made for job in self._decoding)
        # Growing by a block a sequence is safe while there is one for each.
        room = self._pool.available // batch * BLOCK_TOKENS
        return max(1, min(least, room))

    def _step_seconds(self, batch: int, chunk: int) -> float:
        spec = self.spec
        decode = spec.decode_step_seconds + (batch - 1) * spec.per_sequence_seconds if batch else 0.0
        return (decode + chunk / spec.prefill_tokens_per_second) * self.slowdown

    def _end(self, jump: "_Jump") -> None:
        if jump is not self._jump:
            return
        now = self._timeline.now
        self.busy_seconds += jump.steps * jump.step_seconds
        batch = len(self._decoding)
        if batch and not jump.chunk:
            for _ in range(min(jump.steps, 32)):
                self._decode_model.observe(batch, jump.step_seconds)
        self._decode(jump, now)
        self._prefill(jump.chunk, now)
        self._step()

    def _decode(self, jump: "_Jump", now: float) -> None:
        for job in tuple(self._decoding):
            if job not in self._decoding:
                continue
            if job.first_token_at is None:
                job.first_token_at = jump.begun + jump.step_seconds
            job.made += jump.steps
            if job.made >= job.output_tokens:
                self._complete(job, now)
            else:
                self._grow(job)

    def _grow(self, job: Job) -> None:
        needed = job.length // BLOCK_TOKENS + 1 - job.shared - job.alone
        for _ in range(needed):
            while not self._pool.grow():
                victim = next(reversed(self._prefilling or self._decoding))
                self._preempt(victim)
                if victim is job:
                    return
            job.alone += 1

    def _preempt(self, job: Job) -> None:
        self._stop(job)
        job.pending = job.length
        self._pending += job.pending
        self._waiting.appendleft(job)

    def _stop(self, job: Job) -> None:
        self._prefilling.pop(job, None)
        self._decoding.pop(job, None)
        self._pending -= job.pending
        job.pending = 0
        self._pool.release(job.hashes[: job.shared], job.alone)
        job.shared = job.alone = 0

    def _complete(self, job: Job, now: float) -> None:
        self._share(job, job.length)
        self._stop(job)
        job.ended_at = now
        job.done(job)

    def _share(self, job: Job, tokens: int) -> None:
        full = min(tokens // BLOCK_TOKENS, len(job.hashes), job.shared + job.alone)
        for block in job.hashes[job.shared : full]:
            self._pool.share(block)
            job.shared += 1
            job.alone -= 1

    def _admit(self) -> None:
        while self._waiting and len(self._prefilling) + len(self._decoding) < self.spec.max_running:
            job = self._waiting[0]
            blocks = job.length // BLOCK_TOKENS
            known = job.hashes[:blocks]
            found = min(self._pool.lookup(known), (job.length - 1) // BLOCK_TOKENS)
            if not self._pool.admit(known[:found], blocks + 1 - found):
                return
            self._waiting.popleft()
            job.shared, job.alone = found, blocks + 1 - found
            cached = found * BLOCK_TOKENS
            self._pending -= cached
            job.pending -= cached
            job.begun_at, job.to_prefill = self._timeline.now, job.pending
            if job.first_token_at is None and not job.made:
                job.cached_tokens = min(cached, job.prompt_tokens)
            self._prefilling[job] = None

    def _prefill(self, chunk: int, now: float) -> None:
        for job in tuple(self._prefilling):
            part = min(chunk, job.pending)
            job.pending -= part
            chunk -= part
            self._pending -= part
            if job.pending:
                return
            self._prefill_meter.observe(job.to_prefill, job.begun_at, now)
            del self._prefilling[job]
            self._share(job, job.length)
            self._decoding[job] = None


class _Jump(NamedTuple):
    """Steps that are alike, from `begun` on."""

    begun: float
    steps: int
    chunk: int
    step_seconds: float
