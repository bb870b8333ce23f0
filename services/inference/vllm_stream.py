"""One generation inside vLLM: what its outputs become for its sink."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from services.common.errors import MeshError, Reason
from services.inference.engine import Delta, FinishReason, Generation, Sink, Timings, TokenLogprob, TokenLogprobs, Usage
from services.inference.vllm_params import Plan

if TYPE_CHECKING:
    # It imports vLLM.
    from services.inference.vllm_replay import Replay

__all__ = ["Stream"]

_REASONS: Final = {"stop": FinishReason.STOP, "repetition": FinishReason.STOP, "length": FinishReason.LENGTH}


class Stream:
    """A generation from its submission to its end. Its sink hears nothing before `accept()` and after `close()`."""

    def __init__(self, generation: Generation, sink: Sink, token_text: Callable[[int], str]) -> None:
        """`token_text` gives the text of one token on its own."""
        self.generation = generation
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the engine has taken it; fails when it doesn't."""
        self.task: asyncio.Task[None] | None = None
        self.closed = False
        self.pending_prefill_tokens = 0
        """Prompt tokens, until the first output."""
        self._sink = sink
        self._token_text = token_text
        self._cached = 0
        self._output_tokens = len(generation.emitted_token_ids)

    def accept(self) -> None:
        """The engine has taken it."""
        if not self.accepted.done():
            self.accepted.set_result(None)

    def fail(self, error: MeshError) -> None:
        """Tells whoever is to know: the submitter as long as it waits, then the sink."""
        if not self.accepted.done():
            self.accepted.set_exception(error)
        elif not self.closed:
            self._sink.failed(error)
        self.closed = True

    def close(self) -> None:
        """Its sink is to hear nothing more."""
        self.closed = True
        if self.task is not None:
            self.task.cancel()

    def start(self, plan: Plan, cached_tokens: int) -> None:
        """The first token is there, and with it how much of the prompt was cached."""
        prompt = len(plan.prompt_token_ids)
        self.pending_prefill_tokens = 0
        # Emitted tokens can be cached too, and aren't prompt for the client.
        self._cached = min(cached_tokens, prompt)
        self._sink.started(prompt, self._cached)

    def take(self, output: Any, plan: Plan, replay: "Replay | None") -> bool:
        """Passes one of vLLM's outputs on; true when it was the last."""
        completion = output.outputs[0]
        text, ids, reason = completion.text, completion.token_ids, completion.finish_reason
        if replay is not None:
            text, ids, reason = replay.feed(ids, reason)
        if text or ids:
            self._output_tokens += len(ids)
            if completion.logprobs:
                logprobs = self._logprobs(ids, completion.logprobs)
                self._sink.rich_delta(Delta(text=text, token_ids=ids, logprobs=logprobs))
            else:
                self._sink.delta(text, ids)
        if reason is None:
            return False
        if reason in _REASONS:
            self.complete(_REASONS[reason], plan, _timings(output.metrics))
        else:
            self.fail(MeshError(Reason.ENGINE_FAILED, "the engine ended the generation"))
        return True

    def complete(self, reason: FinishReason, plan: Plan, timings: Timings) -> None:
        """The output is complete."""
        usage = Usage(prompt=len(plan.prompt_token_ids), cached=self._cached, output=self._output_tokens)
        self._sink.completed(reason, usage, timings)
        self.closed = True

    def _logprobs(self, ids: Sequence[int], found: Sequence[Mapping[int, Any]]) -> Sequence[TokenLogprobs]:
        return [self._token_logprobs(token, by_token) for token, by_token in zip(ids, found, strict=True)]

    def _token_logprobs(self, token: int, by_token: Mapping[int, Any]) -> TokenLogprobs:
        # vLLM adds the chosen token to the likeliest ones when it isn't among them.
        count = self.generation.sampling.logprob_count or 0
        ranked = sorted((found.rank, other) for other, found in by_token.items() if found.rank <= count)
        return TokenLogprobs(
            chosen=self._token_logprob(token, by_token[token]),
            alternatives=[self._token_logprob(other, by_token[other]) for _, other in ranked],
        )

    def _token_logprob(self, token: int, found: Any) -> TokenLogprob:
        return TokenLogprob(token_id=token, token=self._token_text(token), logprob=found.logprob, rank=found.rank)


def _timings(metrics: Any) -> Timings:
    """From what vLLM noted of a request, on its engine's monotonic clock."""
    return Timings(
        queue=max(0.0, metrics.scheduled_ts - metrics.queued_ts),
        prefill=max(0.0, metrics.first_token_ts - metrics.scheduled_ts),
        decode=max(0.0, metrics.last_token_ts - metrics.first_token_ts),
    )
