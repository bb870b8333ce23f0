"""One generation inside vLLM: what its outputs become for its sink."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from services.common.errors import MeshError, Reason
from services.inference.output import (
    Delta,
    FinishReason,
    PromptEcho,
    Sink,
    StopCause,
    Timings,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from services.inference.request import Generation
from services.inference.vllm_params import Plan

if TYPE_CHECKING:
    # It imports vLLM.
    from services.inference.vllm_parsing import Reading
    from services.inference.vllm_reader import Reader
    from services.inference.vllm_replay import Replay
    from services.inference.vllm_token_text import TokenTexts

__all__ = ["Stream"]

_REASONS: Final = {
    "stop": FinishReason.STOP,
    "repetition": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
}
# JSON has no infinity, so vLLM's server says this too.
_RULED_OUT: Final = -9999.0
_MOST_OF_A_CHARACTER: Final = 4
_NO_TIME: Final = Timings(queue=0.0, prefill=0.0, decode=0.0)


class Stream:
    """A generation from its submission to its end. Its sink hears nothing before `accept()` and after `close()`."""

    def __init__(self, generation: Generation, sink: Sink, texts: "TokenTexts") -> None:
        """`texts` are those of the engine's tokens."""
        self.generation = generation
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the engine has taken it; fails when it doesn't."""
        self.task: asyncio.Task[None] | None = None
        self.closed = False
        self.pending_prefill_tokens = 0
        """Prompt tokens, until the first output."""
        self._sink = sink
        self._texts = texts
        self._past = generation.emitted_token_ids[-_MOST_OF_A_CHARACTER:]
        """The last tokens of the output, where vLLM does not keep them: it has one choice then."""
        self._cached = 0
        self._output_tokens = len(generation.emitted_token_ids)
        self.reading: Reading | None = None
        """How calls and thinking are read out of the output; None reads it as text."""
        self.readers: Sequence[Reader] = ()
        """What reads them, one for each choice; none where nothing does."""
        self._open_choices = generation.choices
        self._first: Any = None

    @property
    def sequences(self) -> int:
        """How many sequences it is in the engine."""
        return self._open_choices

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

    def start(self, plan: Plan, output: Any = None) -> None:
        """The first token is there, in vLLM's first output; without one, the generation is over already."""
        prompt = len(plan.prompt_token_ids)
        self.pending_prefill_tokens = 0
        if output is not None:
            self._first = output.metrics
            # Emitted tokens can be cached too, and aren't prompt for the client.
            self._cached = min(output.num_cached_tokens or 0, prompt)
        self._sink.started(prompt, self._cached, self._echo(plan, output))

    def _echo(self, plan: Plan, output: Any) -> PromptEcho | None:
        generation = self.generation
        count = generation.sampling.prompt_logprob_count
        if not generation.echo and count is None:
            return None
        logprobs: Sequence[TokenLogprobs] = ()
        if count is not None and output is not None:
            # The first token has none.
            found = output.prompt_logprobs[1:]
            tokens = plan.prompt_token_ids[1:]
            logprobs = [self._token_logprobs(*pair, count) for pair in zip(tokens, found, strict=True)]
        if not generation.echo:
            return PromptEcho(logprobs=logprobs)
        return PromptEcho(token_ids=plan.prompt_token_ids, text=plan.prompt_text, logprobs=logprobs)

    def take(self, output: Any, plan: Plan, replay: "Replay | None") -> bool:
        """Passes one of vLLM's outputs on; true when it was the last."""
        for completion in output.outputs:
            if self.readers:
                self._read(completion, self.readers[completion.index], plan, output.metrics)
                continue
            text, ids, reason = completion.text, completion.token_ids, completion.finish_reason
            cause = completion.stop_reason
            if replay is not None:
                text, ids, reason = replay.feed(ids, reason)
                cause = replay.stop_string or cause
            if text or ids:
                self._deliver(completion, text, ids)
            if reason is not None:
                self._end(completion.index, reason, cause, plan, output.metrics)
        return self.closed

    def _read(self, completion: Any, reader: "Reader", plan: Plan, metrics: Any) -> None:
        reason, cause = completion.finish_reason, completion.stop_reason
        # The reader finds a stop string itself; vLLM's reason would have it take the last token for a stop token.
        stopped = isinstance(cause, str)
        delta, reason = reader.feed(completion.token_ids, None if stopped else reason)
        self._output_tokens += len(delta.token_ids)
        logprobs = self._logprobs(delta.token_ids, completion.logprobs or ())
        if delta.reasoning or delta.tool_calls or logprobs or self.generation.choices > 1:
            self._sink.rich_delta(replace(delta, logprobs=logprobs, choice=completion.index))
        elif delta.text or delta.token_ids:
            self._sink.delta(delta.text, delta.token_ids)
        if reason is not None:
            self._end(completion.index, reason, reader.stop_string or cause, plan, metrics)

    def _deliver(self, completion: Any, text: str, ids: Sequence[int]) -> None:
        self._output_tokens += len(ids)
        if completion.logprobs or self.generation.choices > 1:
            logprobs = self._logprobs(ids, completion.logprobs or ())
            self._sink.rich_delta(Delta(text=text, token_ids=ids, logprobs=logprobs, choice=completion.index))
        else:
            self._sink.delta(text, ids)

    def _end(self, choice: int, reason: str, cause: StopCause | None, plan: Plan, metrics: Any) -> None:
        if reason not in _REASONS:
            self.fail(MeshError(Reason.ENGINE_FAILED, "the engine ended the generation"))
            return
        ended, cause = _REASONS[reason], None if reason == "repetition" else cause
        self._open_choices -= 1
        if self.generation.choices > 1:
            self._sink.choice_ended(choice, ended, cause)
        if not self._open_choices:
            self.complete(ended, plan, cause, _timings(self._first, metrics))

    def complete(
        self, reason: FinishReason, plan: Plan, stop_cause: StopCause | None, timings: Timings = _NO_TIME
    ) -> None:
        """The output is complete."""
        thought = sum(reader.reasoning_tokens for reader in self.readers)
        usage = Usage(
            prompt=len(plan.prompt_token_ids), cached=self._cached, output=self._output_tokens, reasoning=thought
        )
        self._sink.completed(reason, usage, timings, stop_cause)
        self.closed = True

    def _logprobs(self, ids: Sequence[int], found: Sequence[Mapping[int, Any]]) -> Sequence[TokenLogprobs]:
        # A stop string that only the replay sees leaves tokens of the last output out.
        count = self.generation.sampling.logprob_count or 0
        logprobs = []
        for token, by_token in zip(ids, found, strict=False):
            logprobs.append(self._token_logprobs(token, by_token, count))
            self._past = [*self._past, token][-_MOST_OF_A_CHARACTER:]
        return logprobs

    def _token_logprobs(self, token: int, by_token: Mapping[int, Any], count: int) -> TokenLogprobs:
        # vLLM adds the token itself to the likeliest ones when it isn't among them.
        ranked = sorted((found.rank, other) for other, found in by_token.items() if found.rank <= count)[:count]
        return TokenLogprobs(
            chosen=self._token_logprob(token, by_token[token]),
            alternatives=[self._token_logprob(other, by_token[other]) for _, other in ranked],
        )

    def _token_logprob(self, token: int, found: Any) -> TokenLogprob:
        logprob = max(found.logprob, _RULED_OUT)
        # vLLM knows it unless it makes no text of this output.
        text = found.decoded_token
        if text is None:
            text = self._texts.after(token, self._past)
        return TokenLogprob(token_id=token, token=text, logprob=logprob, rank=found.rank)


def _timings(first: Any, last: Any) -> Timings:
    """From what vLLM noted of a request's first choice and of its last, on its engine's monotonic clock."""
    return Timings(
        queue=max(0.0, first.scheduled_ts - first.queued_ts),
        prefill=max(0.0, first.first_token_ts - first.scheduled_ts),
        decode=max(0.0, last.last_token_ts - first.first_token_ts),
    )
