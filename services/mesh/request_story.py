"""What became of one request: where its time went, and in words why it took that long."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from tokenloom.router.v1 import admin_pb2

from services.mesh.fleet_view import plain

__all__ = ["Phase", "Story", "seconds_of", "told"]

# What takes a smaller part of a request is not why it was slow.
_LARGE_SHARE: Final = 0.25
_LONG_SECONDS: Final = 0.5
_NOTICED_SECONDS: Final = 0.05
_MUCH: Final = 1.5
_MOST_NAMES: Final = 4
_LEAST_SHOWN_SECONDS: Final = 0.0005


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a request's time."""

    name: str
    seconds: float
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What is known of a request."""

    row: Mapping[str, Any] | None
    """As the ledger has it, once the request has ended."""
    decisions: Sequence[admin_pb2.Decision]
    """As the router remembers them, oldest first."""
    slow_workers: Mapping[str, Sequence[str]]
    """Workers that are slow at present, and why."""

    @property
    def phases(self) -> list[Phase]:
        """Its time in order; empty while it has not ended."""
        return list(_phases(self.row, self._router_seconds)) if self.row is not None else []

    @property
    def causes(self) -> list[str]:
        """Why it took as long as it did, in whole sentences, the most important one first."""
        return [*self._of_ending(), *self._of_moves(), *self._of_queue(), *self._of_prefill(), *self._of_decoding()]

    @property
    def _router_seconds(self) -> float:
        return seconds_of(self.decisions[-1].queue_duration) if self.decisions else 0.0

    @property
    def _total(self) -> float:
        return float((self.row or {}).get("duration_seconds") or 0.0)

    def _is_large(self, seconds: float) -> bool:
        return seconds >= _LONG_SECONDS or seconds >= max(_NOTICED_SECONDS, _LARGE_SHARE * self._total)

    def _of_ending(self) -> Iterator[str]:
        outcome = (self.row or {}).get("outcome", "ok")
        if outcome == "client_left":
            yield "Its client left before the answer was complete."
        elif outcome == "lost":
            yield "Its gateway ended before the request did: what it took is not known."
        elif outcome != "ok":
            yield f"It ended with the error {outcome}."

    def _of_moves(self) -> Iterator[str]:
        for move in (self.row or {}).get("moves", ()):
            yield (
                f"It was moved away from {plain(move['worker'])} {told(move['at_seconds'])} after it began, "
                f"with {move['emitted_tokens']} tokens written: {plain(move['cause'])}."
            )

    def _of_queue(self) -> Iterator[str]:
        waited = self._router_seconds
        if self.decisions and self._is_large(waited):
            yield f"It waited {told(waited)} in the router, since no worker for {plain(self._model)} had room."
        queued = (self.row or {}).get("queue_seconds") or 0.0
        if self._is_large(queued - waited):
            yield f"It waited {told(queued - waited)} in the queue of {plain(self._worker)}'s engine."

    def _of_prefill(self) -> Iterator[str]:
        row = self.row or {}
        prefill = row.get("prefill_seconds") or 0.0
        if self._is_large(prefill):
            fresh = row["prompt_tokens"] - row["cached_tokens"]
            cached = f", {row['cached_tokens']} were cached" if row["cached_tokens"] else ""
            yield f"Its prompt took {told(prefill)}: {fresh} tokens had to be computed{cached}."

    def _of_decoding(self) -> Iterator[str]:
        row, worker = self.row or {}, self._worker
        tpot = row.get("tpot_seconds")
        slow = self.slow_workers.get(worker, ())
        if tpot and (best := self._best_token_seconds) and tpot > _MUCH * best[1]:
            yield (
                f"{plain(worker)} wrote a token every {told(tpot)}; {plain(best[0])} would have written one every "
                f"{told(best[1])}{self._why_not(best[0])}."
            )
        if slow and (others := self._others_out):
            yield f"The others were out of the question: {others}."
        for reason in slow:
            yield f"{plain(worker)} is slow at present: {plain(reason)}."

    @property
    def _others_out(self) -> str:
        """Who was not to be had, and why, where somebody was."""
        looked = self.decisions[-1].candidates if self.decisions else ()
        out = [f"{plain(one.worker_id)} ({plain(one.excluded_reason)})" for one in looked if one.excluded_reason]
        more = f" and {len(out) - _MOST_NAMES} more" if len(out) > _MOST_NAMES else ""
        return ", ".join(out[:_MOST_NAMES]) + more

    @property
    def _best_token_seconds(self) -> tuple[str, float] | None:
        """The worker of those looked at that was predicted to write fastest; None: it is the one that was chosen."""
        if not self.decisions:
            return None
        last = self.decisions[-1]
        rates = {
            candidate.worker_id: seconds_of(candidate.predicted_time_per_output_token_duration)
            for candidate in last.candidates
            if not candidate.excluded_reason
        }
        best = min(rates, key=rates.__getitem__, default=last.worker_id)
        return None if best == last.worker_id else (best, rates[best])

    def _why_not(self, worker: str) -> str:
        costs = {one.worker_id: seconds_of(one.cost_duration) for one in self.decisions[-1].candidates}
        chosen, other = costs.get(self._worker), costs.get(worker)
        if chosen is None or other is None or other <= chosen:
            return ""
        return f", but the whole answer was expected there in {told(other)} instead of {told(chosen)}"

    @property
    def _worker(self) -> str:
        if self.decisions and self.decisions[-1].worker_id:
            return self.decisions[-1].worker_id
        return str((self.row or {}).get("worker", ""))

    @property
    def _model(self) -> str:
        return self.decisions[-1].model if self.decisions else str((self.row or {}).get("model", ""))


def _phases(row: Mapping[str, Any], router_seconds: float) -> Iterator[Phase]:
    total = float(row["duration_seconds"] or 0.0)
    if row["moves"] and row["ttft_seconds"] is not None:
        # What is known of queue and prefill is that of the last worker, which came in between.
        yield Phase("until the first token", row["ttft_seconds"], f"{_tokens(row['prompt_tokens'])} of the prompt")
        yield Phase("decode, moving included", max(0.0, total - row["ttft_seconds"]), _written(row))
        return
    queued, prefill = float(row["queue_seconds"] or 0.0), float(row["prefill_seconds"] or 0.0)
    in_router = min(router_seconds, queued)
    first = row["ttft_seconds"]
    yield Phase("in the router's queue", in_router)
    yield Phase("in the engine's queue", queued - in_router)
    cached = f", {row['cached_tokens']} of them cached" if row["cached_tokens"] else ""
    yield Phase("prefill", prefill, f"{_tokens(row['prompt_tokens'])} of the prompt{cached}")
    if first is None:
        yield Phase("the rest", max(0.0, total - queued - prefill))
        return
    yield Phase("else, until the first token", max(0.0, first - queued - prefill), "checks, transport, a decode step")
    yield Phase("decode", max(0.0, total - first), _written(row))


def _written(row: Mapping[str, Any]) -> str:
    pace = f", one every {told(row['tpot_seconds'])}" if row["tpot_seconds"] else ""
    return f"{_tokens(row['output_tokens'])}{pace}"


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def seconds_of(duration: Duration) -> float:
    """A proto's duration in seconds."""
    return duration.ToNanoseconds() / 1e9


def told(seconds: float) -> str:
    """Seconds for people."""
    if seconds < _LEAST_SHOWN_SECONDS:
        return "0 ms" if seconds <= 0 else f"{1000 * seconds:.2f} ms"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
