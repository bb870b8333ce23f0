"""One generation from acquire to release, also across the loss of its worker."""

import logging
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Final

import msgspec
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import worker_pb2
from tokenloom.router.v1 import router_pb2

from services.common.errors import RETRY_BUDGET_EXHAUSTED, MeshError, Reason
from services.common.prompt_prefix import prompt_hashes
from services.common.trace_sampling import FAILOVER
from services.common.tracing import FIRST_OUTPUT
from services.gateway.attempt import Attempt
from services.gateway.caller import Caller
from services.gateway.demand import needed_capabilities
from services.gateway.guard_output import OutputGuard
from services.gateway.guardrails import log_content
from services.gateway.lease import Lease
from services.gateway.pieces import Ending, Move, Piece, Prompt, Spent, left_lately
from services.gateway.quarantine import Losses
from services.gateway.stream import Loss, Stream, WorkerLostError

if TYPE_CHECKING:
    from services.gateway.generator import Generator

__all__ = ["Generation"]

_log = logging.getLogger(__name__)
# Workers and engines are lost for many reasons; but a request that was in so many of them may well be the reason.
_MAX_VICTIMS: Final = 3
# What has brought so many from a worker that vanished was running there, and not what it died of.
_PROOF_TOKENS: Final = 2
# Workers that turn it away are well; but where each of so many does, another one would, too.
_MAX_MOVES: Final = 8


class Generation:
    """A running generation. Read it with `take()` until it returns nothing, or with `take_whole()` once; then `ending`
    tells how it ended.
    """

    def __init__(
        self,
        generator: "Generator",
        request: pb.GenerateRequest,
        caller: Caller,
        *,
        prompt_tokens: int,
        keep_ids: bool = False,
    ) -> None:
        """`prompt_tokens` may be an estimate."""
        self._prompt_tokens = prompt_tokens
        self._routers = generator.routers
        self._workers = generator.workers
        self._quarantine = generator.quarantine
        self._request = request
        self.caller = caller
        self._stream = Stream(keep_ids=keep_ids)
        self._shown = False
        self._output = caller.guard.output() if caller.guard is not None else None
        self._said: list[str | Piece] | None = [] if caller.guard is not None and caller.guard.log_content else None
        self._attempt: Attempt | None = None
        self._lease: Lease | None = None
        self._moves: list[Move] = []
        self._victims = 0
        self._brought = 0
        """Tokens that it had when it came to its worker."""
        # Also of earlier attempts by the same client or others: it is no reason to refuse it, but to be careful.
        self._losses = generator.quarantine.check(request)
        self._output_limit = 0
        self.started_at = monotonic()
        self.first_token_at: float | None = None

    @property
    def ending(self) -> Ending | None:
        """How it ended; None while it runs."""
        return self._stream.ending

    @property
    def worker_id(self) -> str:
        """The worker that runs it; empty before the first grant."""
        return self._lease.worker_id if self._lease else ""

    @property
    def route(self) -> str:
        """Why the router chose that worker."""
        return self._lease.reason if self._lease else ""

    @property
    def model(self) -> str:
        """The model that answers, by its own name."""
        return (self._lease.model if self._lease else "") or self._request.model

    @property
    def degraded(self) -> bool:
        """Whether that is a smaller one than was asked for."""
        return self._lease is not None and self._lease.degraded

    @property
    def moves(self) -> int:
        """How many workers it had to leave."""
        return len(self._moves)

    @property
    def prompt(self) -> Prompt | None:
        """The prompt as the worker saw it, as far as it was asked for; known with the first output."""
        return self._stream.prompt

    def write_to(self, writer: Callable[[str], bool]) -> None:
        """Has plain text written at once where `writer` can; what it returns False for waits for `take()`."""
        if self._output is None and self._said is None:
            self._stream.writer = writer

    async def take(self) -> list[str | Piece]:
        """Waits for output and takes it; an empty list once the output is complete.

        Plain text may be empty: a token that adds none yet. A worker that is lost is replaced by another one, which
        continues from the tokens emitted so far.

        Raises:
            MeshError: the generation failed.
        """
        while True:
            taken = await self._take()
            let_out = taken if self._output is None else await self._let_out(self._output, taken)
            if let_out or not taken:
                self._shown = self._shown or bool(let_out)
                return self._noted(let_out)

    async def _take(self) -> list[str | Piece]:
        while True:
            try:
                taken = await self._stream.take()
            except WorkerLostError as lost:
                await self._move(lost)
                continue
            if taken:
                self._note_first_token()
            return taken

    async def take_whole(self) -> list[str | Piece]:
        """Waits for the output to be complete and takes all of it.

        A worker that is lost is replaced by another one, which continues from the tokens emitted so far, or, where it
        can't, begins anew: nobody has seen anything yet.

        Raises:
            MeshError: the generation failed.
        """
        while True:
            try:
                await self._stream.begun()
                self._note_first_token()
                taken = await self._stream.take_whole()
            except WorkerLostError as lost:
                await self._move(lost)
                continue
            if (output := self._output) is not None:
                taken = [*await self._let_out(output, taken), *await self._let_out(output, [])]
            return self._noted(taken)

    def _note_first_token(self) -> None:
        if self.first_token_at is None:
            self.first_token_at = monotonic()
            self.caller.span.add_event(FIRST_OUTPUT)

    def _noted(self, pieces: list[str | Piece]) -> list[str | Piece]:
        if self._said is not None:
            self._said += pieces
        return pieces

    async def _let_out(self, output: OutputGuard, taken: list[str | Piece]) -> list[str | Piece]:
        """What may be seen of a piece of output; of none, which is the end, what was held back."""
        if self._output is None:
            return []
        let_out = output.feed(taken) if taken else await output.finish()
        if output.blocked_by is not None:
            self._block(output.blocked_by)
        elif not taken:
            self._output = None
        return let_out

    def _block(self, rule: str) -> None:
        _log.info("an answer was refused", extra={"request": self.caller.request_id, "rule": rule})
        stream, self._output = self._stream, None
        if stream.ending is not None:
            stream.ending = msgspec.structs.replace(stream.ending, finish_reason="content_filter")
            return
        self._leave()
        stream.pieces.clear()
        stream.ending = Ending(
            finish_reason="content_filter",
            prompt_tokens=stream.prompt_tokens,
            cached_tokens=stream.cached_tokens,
            output_tokens=len(stream.token_ids) + stream.other_tokens,
            gpu_seconds=None,
        )

    async def start(self) -> None:
        """Acquires a worker and submits the prompt and the tokens emitted so far to it."""
        attempt = self._attempt = await self._acquire()
        self._lease = attempt.lease
        submission = worker_pb2.Submission(
            request_id=self.caller.request_id,
            request=self._request,
            priority=self.caller.priority,
            tenant_id=self.caller.tenant,
            lost_engine_count=self._losses.suspicion,
        )
        # A prompt plus the tokens emitted so far is all that a generation is.
        submission.request.emitted_token_ids.extend(self._stream.token_ids)
        self._brought = self._emitted
        submission.request.model = self.model
        _shorten(submission.request.sampling, self._output_limit)
        try:
            attempt.submit(self._workers, submission, self._stream, number=self.moves + 1)
        except WorkerLostError as lost:
            self._stream.fail(lost)

    async def _acquire(self) -> Attempt:
        caller, emitted = self.caller, len(self._stream.token_ids)
        acquire = router_pb2.Acquire(
            request_id=caller.request_id,
            # What one model has begun, the same model goes on with.
            model=self.model if emitted else self._request.model,
            prompt_token_count=self._prompt_tokens + emitted,
            max_output_token_count=self._request.sampling.max_tokens,
            tenant_id=caller.tenant,
            priority=caller.priority,
            session_id=caller.session_id,
            excluded_worker_ids=left_lately(self._moves, monotonic() - self.started_at),
            task=router_pb2.TASK_GENERATE,
            slo_class=caller.slo_class,
            allow_degrade=caller.allow_degrade and not emitted,
            attempt=self._victims + 1,
            emitted_token_count=emitted,
        )
        self._describe(acquire)
        if caller.wait_seconds is not None and not emitted:
            # No time at all would be a deadline that has passed; with this little, who can't begin at once is refused.
            acquire.timeout.FromMilliseconds(max(1, int(1000 * caller.wait_seconds)))
        try:
            attempt = await Attempt.begin(self._routers, acquire, caller.span, self._request, caller.on_queued)
        except MeshError as error:
            if error.reason is Reason.DEADLINE_EXCEEDED and acquire.HasField("timeout"):
                message = f"no worker was free within the {caller.wait_seconds:g} s that the request may wait"
                raise MeshError(Reason.NO_CAPACITY, message, retry_after_seconds=error.retry_after_seconds) from error
            raise
        if not emitted:
            # What has begun may end as it was promised.
            self._output_limit = attempt.lease.output_token_limit
        return attempt

    def _leave(self) -> None:
        """Stops what still runs there, and gives the worker back."""
        if self._attempt is not None:
            self._attempt.close()

    def _describe(self, acquire: router_pb2.Acquire) -> None:
        """Says what the prompt begins with, so that it may go where that is cached, and what its parts need."""
        acquire.required_capabilities.extend(needed_capabilities(self._request.chat))
        if self._request.HasField("token_ids") and not self._request.cache_salt:
            acquire.prompt_token_ids.extend(self._request.token_ids.ids)
        else:
            acquire.prefix_hashes.extend(prompt_hashes(self._request))

    async def _move(self, lost: WorkerLostError) -> None:
        lease = self._lease
        assert lease is not None
        lease.outcome = router_pb2.OUTCOME_FAILED if lost.refusal is None else router_pb2.OUTCOME_REFUSED
        emitted = len(self._stream.token_ids)
        _log.warning(
            "worker left",
            extra={
                "worker": lease.worker_id,
                "request": self.caller.request_id,
                "emitted": emitted,
                "cause": str(lost),
            },
        )
        self.caller.span.add_event(
            FAILOVER,
            {"tokenloom.worker": lease.worker_id, "tokenloom.emitted_tokens": emitted, "tokenloom.cause": str(lost)},
        )
        self._leave()
        at_seconds = monotonic() - self.started_at
        self._moves.append(Move(worker=lease.worker_id, at_seconds=at_seconds, emitted_tokens=emitted, cause=str(lost)))
        self._victims += lost.loss is not Loss.NOTHING
        self._check_movable(lost)
        if self._resumes and not self._begins_anew(lost):
            self._stream.recover()
        else:
            self._stream.restart()
        try:
            await self.start()
        except MeshError as error:
            if error.code != RETRY_BUDGET_EXHAUSTED:
                raise
            # Too much fails to try everything again: the client hears of what failed, not of the budget.
            raise (lost.refusal or _engine_failed()) from lost

    def _check_movable(self, lost: WorkerLostError) -> None:
        if lost.loss is Loss.NOTHING:
            if len(self._moves) >= _MAX_MOVES:
                raise (lost.refusal or _engine_failed()) from lost
        else:
            vanished = lost.loss is Loss.WORKER and self._emitted - self._brought < _PROOF_TOKENS
            losses = Losses(engines=lost.loss is Loss.ENGINE, workers=vanished)
            self._losses += losses
            self._quarantine.note(self._request, losses, fatal=lost.fatal)
        if lost.fatal or self._victims >= _MAX_VICTIMS or (self._shown and not self._resumes):
            raise _engine_failed() from lost

    def _begins_anew(self, lost: WorkerLostError) -> bool:
        # Not every worker can go on with everything, but all of them can begin what nobody has seen anything of.
        return not self._shown and lost.refusal is not None and lost.refusal.field == "emitted_token_ids"

    @property
    def _emitted(self) -> int:
        """How many tokens it has, those included of which only the text is known."""
        return len(self._stream.token_ids) + self._stream.other_tokens

    @property
    def _resumes(self) -> bool:
        """Whether another worker goes on as this one would have, or might have where tokens are drawn."""
        request, sampling = self._request, self._request.sampling
        silent = not sampling.HasField("prompt_logprob_count")
        return silent and request.choice_count <= 1 and not self._stream.lacks_ids

    def finish(self, outcome: router_pb2.Outcome.ValueType) -> None:
        """Stops what still runs and gives the worker back."""
        if self._said is not None:
            log_content(self.caller.request_id, self._request, self._said)
        lease, ending = self._lease, self.ending
        if lease is not None:
            lease.outcome = outcome
            lease.output_tokens = ending.output_tokens if ending else len(self._stream.token_ids)
            if ending and not self._moves:
                # What a second worker does with a prompt and half an answer says little about others.
                lease.prompt_tokens, lease.cached_tokens = ending.prompt_tokens, ending.cached_tokens
            if self.first_token_at is not None and not self._moves:
                lease.first_token_seconds = self.first_token_at - lease.granted_at
        self._leave()
        if self.caller.account is not None and self._lease is not None:
            self.caller.account.add(self._spent(self._lease), is_complete=self.ending is not None)

    def _spent(self, lease: Lease) -> Spent:
        now, first_at, ending, stream = monotonic(), self.first_token_at, self.ending, self._stream
        spent = Spent(
            worker=lease.worker_id,
            prompt_tokens=stream.prompt_tokens,
            cached_tokens=stream.cached_tokens,
            output_tokens=len(stream.token_ids) + stream.other_tokens,
            ttft_seconds=None if first_at is None else first_at - self.started_at,
            queue_seconds=lease.queue_seconds,
            running_seconds=now - lease.granted_at,
            moves=self._moves,
        )
        if ending is not None:
            spent.prompt_tokens, spent.cached_tokens = ending.prompt_tokens, ending.cached_tokens
            spent.output_tokens, spent.gpu_seconds = ending.output_tokens, ending.gpu_seconds
            spent.queue_seconds += ending.queue_seconds
            spent.prefill_seconds = ending.prefill_seconds
        if first_at is not None and spent.output_tokens > 1:
            spent.tpot_seconds = (now - first_at) / (spent.output_tokens - 1)
        return spent


def _shorten(sampling: pb.SamplingParameters, limit: int) -> None:
    if limit and (not sampling.HasField("max_tokens") or sampling.max_tokens > limit):
        sampling.max_tokens = limit
        sampling.min_tokens = min(sampling.min_tokens, limit)


def _engine_failed() -> MeshError:
    return MeshError(Reason.ENGINE_FAILED, "the worker that ran this request was lost")
