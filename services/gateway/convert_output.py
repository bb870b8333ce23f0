"""What workers send, as the pieces that answers are made of."""

from typing import Final

from tokenloom.inference.v1 import generation_pb2 as pb

from services.gateway.pieces import CallPiece, Ending, FinishReason, Piece, Prompt, TokenScore

__all__ = ["ending", "finished_choice", "piece", "prompt"]

# An unknown reason would have to be invented; something cut the text, so "length" is the honest one.
_UNKNOWN: Final[FinishReason] = "length"
_FINISH_REASONS: Final[dict[int, FinishReason]] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


def piece(delta: pb.Delta) -> Piece:
    """A delta that carries more than text and tokens."""
    return Piece(
        text=delta.text,
        choice=delta.choice_index,
        token_ids=list(delta.token_ids),
        scores=[_score(entry) for entry in delta.logprobs],
        reasoning=delta.reasoning,
        calls=[
            CallPiece(index=call.index, arguments=call.arguments_json, id=call.id, name=call.name)
            for call in delta.tool_calls
        ],
    )


def finished_choice(ended: pb.ChoiceEnded) -> Piece:
    """The end of one of several choices."""
    return Piece(
        choice=ended.choice_index,
        finish_reason=_FINISH_REASONS.get(ended.finish_reason, _UNKNOWN),
        stop=_stop(ended.stop_cause),
    )


def prompt(started: pb.Started) -> Prompt | None:
    """The prompt, where the worker was asked for it."""
    if not (started.prompt_token_ids or started.prompt_text or started.prompt_logprobs):
        return None
    return Prompt(
        text=started.prompt_text,
        token_ids=list(started.prompt_token_ids),
        scores=[_score(entry) for entry in started.prompt_logprobs],
    )


def ending(completed: pb.Completed) -> Ending:
    """The end of a generation."""
    usage = completed.usage
    return Ending(
        finish_reason=_FINISH_REASONS.get(completed.finish_reason, _UNKNOWN),
        prompt_tokens=usage.prompt_token_count,
        cached_tokens=usage.cached_token_count,
        output_tokens=usage.output_token_count,
        reasoning_tokens=usage.reasoning_token_count,
        queue_seconds=completed.timings.queue_duration.ToNanoseconds() / 1e9,
        prefill_seconds=completed.timings.prefill_duration.ToNanoseconds() / 1e9,
        gpu_seconds=completed.timings.gpu_duration.ToNanoseconds() / 1e9,
        stop=_stop(completed.stop_cause),
    )


def _stop(cause: pb.StopCause) -> str | int | None:
    match cause.WhichOneof("cause"):
        case "text":
            return cause.text
        case "token_id":
            return cause.token_id
    return None


def _score(entry: pb.TokenLogprobs) -> TokenScore:
    chosen = entry.chosen
    return TokenScore(
        token=chosen.token,
        logprob=chosen.logprob,
        token_id=chosen.token_id,
        rank=chosen.rank,
        alternatives=[
            TokenScore(token=other.token, logprob=other.logprob, token_id=other.token_id, rank=other.rank)
            for other in entry.alternatives
        ],
    )
