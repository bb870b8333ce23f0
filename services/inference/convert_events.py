"""What a generation produces, as the protos say it."""

from typing import Final

from google.protobuf.duration_pb2 import Duration
from tokenloom.inference.v1 import generation_pb2 as pb

from services.inference.output import (
    Delta,
    FinishReason,
    PromptEcho,
    StopCause,
    Timings,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)

__all__ = ["choice_ended_to_proto", "completed_to_proto", "delta_to_proto", "duration_to_proto", "started_to_proto"]

_FINISH_REASONS: Final = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}


def started_to_proto(model: str, prompt_tokens: int, cached_tokens: int, echo: PromptEcho | None = None) -> pb.Started:
    """The first event of a generation."""
    started = pb.Started(model=model, prompt_token_count=prompt_tokens, cached_token_count=cached_tokens)
    if echo is not None:
        started.prompt_token_ids.extend(echo.token_ids)
        started.prompt_text = echo.text
        started.prompt_logprobs.extend(map(_logprobs_to_proto, echo.logprobs))
    return started


def delta_to_proto(delta: Delta) -> pb.Delta:
    """More output."""
    proto = pb.Delta(text=delta.text, token_ids=delta.token_ids, choice_index=delta.choice, reasoning=delta.reasoning)
    if delta.logprobs:
        proto.logprobs.extend(map(_logprobs_to_proto, delta.logprobs))
    for call in delta.tool_calls:
        proto.tool_calls.add(index=call.index, id=call.id, name=call.name, arguments_json=call.arguments_json)
    return proto


def choice_ended_to_proto(choice: int, reason: FinishReason, cause: StopCause | None) -> pb.ChoiceEnded:
    """The end of one of several choices."""
    return pb.ChoiceEnded(
        choice_index=choice, finish_reason=_FINISH_REASONS[reason], stop_cause=_stop_cause_to_proto(cause)
    )


def completed_to_proto(
    reason: FinishReason, usage: Usage, timings: Timings, cause: StopCause | None = None
) -> pb.Completed:
    """The last event of a generation."""
    return pb.Completed(
        finish_reason=_FINISH_REASONS[reason],
        usage=pb.Usage(
            prompt_token_count=usage.prompt,
            cached_token_count=usage.cached,
            output_token_count=usage.output,
            reasoning_token_count=usage.reasoning,
        ),
        timings=pb.Timings(
            queue_duration=duration_to_proto(timings.queue),
            prefill_duration=duration_to_proto(timings.prefill),
            decode_duration=duration_to_proto(timings.decode),
            gpu_duration=duration_to_proto(timings.gpu),
        ),
        stop_cause=_stop_cause_to_proto(cause),
    )


def duration_to_proto(seconds: float) -> Duration:
    """A duration; what rounding made negative is zero."""
    whole, fraction = divmod(max(0.0, seconds), 1)
    return Duration(seconds=int(whole), nanos=int(fraction * 1e9))


def _stop_cause_to_proto(cause: StopCause | None) -> pb.StopCause | None:
    if cause is None:
        return None
    return pb.StopCause(text=cause) if isinstance(cause, str) else pb.StopCause(token_id=cause)


def _logprobs_to_proto(logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        chosen=_logprob_to_proto(logprobs.chosen), alternatives=map(_logprob_to_proto, logprobs.alternatives)
    )


def _logprob_to_proto(logprob: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=logprob.token_id, token=logprob.token, logprob=logprob.logprob, rank=logprob.rank)
