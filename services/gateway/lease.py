"""A lease on a worker: the right to run one generation there, and what the router is told of it at its end."""

from dataclasses import dataclass, field
from time import monotonic

from tokenloom.router.v1 import router_pb2

__all__ = ["Lease", "unwanted"]


@dataclass(slots=True)
class Lease:
    """The right to run one generation on one worker, and how that went.

    Attributes:
        model: the model to ask that worker for.
        degraded: whether that is a smaller one than was asked for.
        output_token_limit: most tokens of output that the mesh allows; 0 where it does not limit them.
        outcome: how it went.
        output_tokens: tokens that were produced.
        first_token_seconds: from the grant to the first token; None when there was none.
        prompt_tokens: tokens of the prompt as the worker counted them; 0 until it has.
        cached_tokens: how many of them it had cached.
        handle: the router's name for it; 0: no router knows of it.
    """

    worker_id: str
    endpoint: str
    reason: str
    queue_seconds: float = 0.0
    model: str = ""
    degraded: bool = False
    output_token_limit: int = 0
    outcome: router_pb2.Outcome.ValueType = router_pb2.OUTCOME_CANCELLED
    output_tokens: int = 0
    granted_at: float = field(default_factory=monotonic)
    first_token_seconds: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    handle: int = 0

    def release(self) -> router_pb2.Release:
        """What the router is told at its end."""
        release = router_pb2.Release(
            handle=self.handle,
            outcome=self.outcome,
            output_token_count=self.output_tokens,
            prompt_token_count=self.prompt_tokens,
            cached_token_count=self.cached_tokens,
        )
        if self.first_token_seconds is not None:
            release.time_to_first_token_duration.FromNanoseconds(int(self.first_token_seconds * 1e9))
        return release


def unwanted(handle: int) -> router_pb2.Release:
    """What the router is told of a lease that nobody waits for."""
    return router_pb2.Release(handle=handle, outcome=router_pb2.OUTCOME_CANCELLED)
