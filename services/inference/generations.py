"""Every generation of a worker from its submission to its end: watched, counted, traced, and stopped in time."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Final, Protocol

from services.common.errors import MeshError, Reason
from services.inference.engine import Engine
from services.inference.metrics import WorkerMetrics
from services.inference.output import Delta, EngineLostError, FinishReason, PromptEcho, Sink, StopCause, Timings, Usage
from services.inference.quarantine import Quarantine
from services.inference.request import Generation
from services.inference.spans import GenerationSpan, Spans

__all__ = ["Generations", "Run"]

_log = logging.getLogger(__name__)
_MAX_REQUEST_ID_CHARACTERS: Final = 128
# The first one comes of the prompt, the second one of a step that decodes.
_PROOF_DELTAS: Final = 2


class _PlainDelta(Protocol):
    def __call__(self, text: str, token_ids: Sequence[int]) -> None: ...


class Run:
    """One generation between its engine and the sink of whoever asked for it.

    It ends exactly once: the sink hears of that as completed() or failed(), or, after cancel(), not at all.
    """

    __slots__ = (
        "_begun", "_engine", "_generation", "_owner", "_share_at", "_sink", "_span", "_task", "_timer", "_to_prove",
        "choice_ended", "delta", "over", "rich_delta",
    )  # fmt: skip  # one name a line would be longer than the class

    def __init__(
        self, owner: "Generations", engine: Engine, generation: Generation, sink: Sink, span: GenerationSpan | None
    ) -> None:
        self._owner = owner
        self._engine = engine
        self._generation = generation
        self._sink = sink
        self._span = span
        self._begun = owner.clock()
        self._share_at = owner.share()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._to_prove = 0
        self.over = False
        # The engine calls these for each token, so nothing stands between it and the sink.
        self.delta: _PlainDelta = sink.delta
        self.rich_delta: Callable[[Delta], None] = sink.rich_delta
        self.choice_ended: Callable[[int, FinishReason, StopCause | None], None] = sink.choice_ended

    @property
    def id(self) -> str:
        """The generation's id."""
        return self._generation.id

    async def submit(self) -> None:
        """Hands the generation to the engine; what goes wrong is told to the sink."""
        try:
            if await self._owner.quarantine.enter(self._generation):
                self._to_prove = _PROOF_DELTAS
                self.delta, self.rich_delta = self._proving_delta, self._proving_rich_delta
            if self.over:
                # It ended while it waited for its turn.
                self._owner.quarantine.leave(self._generation, completed=False)
                return
            await self._engine.submit(self._generation, self)
        except MeshError as error:
            self._refuse(error)
        except Exception:  # noqa: BLE001  # whatever an engine does to one generation, the others go on
            _log.exception("the engine failed to take a generation")
            self._refuse(MeshError(Reason.INTERNAL, "internal error"))

    def submit_soon(self, tasks: asyncio.TaskGroup) -> None:
        """Does submit() in a task of its own, so that a prompt that takes long to render holds nobody else up."""
        self._task = tasks.create_task(self.submit())

    def expire_after(self, seconds: float) -> None:
        """Fails with DEADLINE_EXCEEDED unless it is over by then."""
        error = MeshError(Reason.DEADLINE_EXCEEDED, "the deadline passed before the output was complete")
        self._timer = asyncio.get_running_loop().call_later(seconds, self.fail, error)

    def cancel(self) -> None:
        """Stops it at once and silently; nothing happens when it is over."""
        if self.over:
            return
        self._stop_engine()
        self._end("cancelled")
        if self._span is not None:
            self._span.cancelled()

    def fail(self, error: MeshError) -> None:
        """Stops it at once and tells the sink why; nothing happens when it is over."""
        if self.over:
            return
        self._stop_engine()
        self.failed(error)

    def started(self, prompt_tokens: int, cached_tokens: int, echo: PromptEcho | None = None) -> None:
        """From the engine."""
        waited = self._owner.clock() - self._begun
        self._owner.metrics.first_token(waited, prompt_tokens, cached_tokens, exemplar=self._exemplar)
        if self._span is not None:
            self._span.first_token()
        self._sink.started(prompt_tokens, cached_tokens, echo)

    def completed(
        self, reason: FinishReason, usage: Usage, timings: Timings, stop_cause: StopCause | None = None
    ) -> None:
        """From the engine."""
        timings = replace(timings, gpu=self._owner.share() - self._share_at)
        self._end(reason.value, completed=True)
        took = self._owner.clock() - self._begun
        self._owner.metrics.completed(took, timings, usage.output, exemplar=self._exemplar)
        if self._span is not None:
            self._span.completed(reason, usage, timings)
        self._sink.completed(reason, usage, timings, stop_cause)

    def failed(self, error: MeshError) -> None:
        """From the engine."""
        if isinstance(error, EngineLostError):
            error = self._owner.quarantine.lost(self._generation)
        self._end(error.reason.value.lower())
        if self._span is not None:
            self._span.failed(error)
        self._sink.failed(error)

    @property
    def _exemplar(self) -> dict[str, str] | None:
        return None if self._span is None else self._span.exemplar

    def _refuse(self, error: MeshError) -> None:
        if not self.over:
            self.failed(error)

    def _stop_engine(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._engine.abort(self._generation.id)

    def _proving_delta(self, text: str, token_ids: Sequence[int]) -> None:
        self._prove()
        self._sink.delta(text, token_ids)

    def _proving_rich_delta(self, delta: Delta) -> None:
        self._prove()
        self._sink.rich_delta(delta)

    def _prove(self) -> None:
        self._to_prove -= 1
        if self._to_prove == 0:
            self._owner.quarantine.prove(self.id)
            self.delta, self.rich_delta = self._sink.delta, self._sink.rich_delta

    def _end(self, outcome: str, *, completed: bool = False) -> None:
        self.over = True
        self._owner.quarantine.leave(self._generation, completed=completed)
        if self._timer is not None:
            self._timer.cancel()
        self._owner.forget(self, outcome)


class Generations:
    """The generations that run."""

    def __init__(
        self,
        spans: Spans,
        metrics: WorkerMetrics,
        clock: Callable[[], float] = time.monotonic,
        *,
        isolates_tenants: bool = False,
    ) -> None:
        """`clock` gives seconds. `isolates_tenants`: what one leaves in caches is for its tenant alone."""
        self._isolates_tenants = isolates_tenants
        self.metrics = metrics
        self.clock = clock
        self.quarantine = Quarantine(clock)
        self.spans = spans
        self._running: dict[str, Run] = {}
        self._share, self._shared_until = 0.0, clock()
        self._numbers = count(1)
        self._idle = asyncio.Event()
        self._idle.set()

    def new_id(self, request_id: str) -> str:
        """An id for a generation that tells which request it serves."""
        return f"{request_id[:_MAX_REQUEST_ID_CHARACTERS] or 'request'}-{next(self._numbers)}"

    def share(self) -> float:
        """A clock that runs 1/n as fast while n generations run: what passes on it is one generation's part."""
        now = self.clock()
        self._share += (now - self._shared_until) / max(1, len(self._running))
        self._shared_until = now
        return self._share

    def cache_tenant(self, tenant: str) -> str:
        """Whom what a tenant leaves in caches serves; empty: everybody."""
        return tenant if self._isolates_tenants else ""

    def start(self, engine: Engine, generation: Generation, sink: Sink, request_id: str) -> Run:
        """A run that is to be submitted next."""
        generation = replace(generation, cache_tenant=self.cache_tenant(generation.tenant))
        span = self.spans.start(generation, request_id)
        if span is not None:
            generation = replace(generation, traceparent=span.traceparent)
        run = Run(self, engine, generation, sink, span)
        self._running[run.id] = run
        self._idle.clear()
        return run

    def refused(self, error: MeshError) -> None:
        """Counts a request that never became a generation."""
        self.metrics.ended(error.reason.value.lower())

    def forget(self, run: Run, outcome: str) -> None:
        """A run is over."""
        self.metrics.ended(outcome)
        self.share()
        del self._running[run.id]
        if not self._running:
            self._idle.set()

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs."""
        return not self._running

    async def finish(self, seconds: float, error: MeshError) -> None:
        """Waits that long for what runs to end, then fails the rest."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("drained for long enough; what still runs moves elsewhere")
        self.fail_all(error)

    def fail_all(self, error: MeshError) -> None:
        """Stops whatever runs and tells why."""
        for run in tuple(self._running.values()):
            run.fail(error)
