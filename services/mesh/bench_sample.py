"""What became of one request of a load."""

from array import array
from dataclasses import dataclass, field

__all__ = ["Prompt", "Sample"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of a load."""

    text: str
    max_tokens: int


@dataclass(slots=True)
class Sample:
    """How one request went. Times are seconds, moments are of `time.perf_counter()`."""

    began: float
    ended: float = 0.0
    first_at: float | None = None
    """When the first token came."""
    last_at: float = 0.0
    gaps: "array[float]" = field(default_factory=lambda: array("d"))
    """Between one event with output and the next."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    """Why it failed: the error's code, or what the connection did."""

    def heard(self, now: float) -> None:
        """Output came."""
        if self.first_at is None:
            self.first_at = now
        else:
            self.gaps.append(now - self.last_at)
        self.last_at = now

    @property
    def ok(self) -> bool:
        """Whether it was answered to the end."""
        return self.error is None

    @property
    def seconds(self) -> float:
        """From its beginning to its end."""
        return self.ended - self.began

    @property
    def ttft(self) -> float | None:
        """Time to first token; None where none came."""
        return None if self.first_at is None else self.first_at - self.began

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None where there was no second."""
        if self.first_at is None or self.output_tokens < 2:
            return None
        return (self.last_at - self.first_at) / (self.output_tokens - 1)
