"""A request for a worker, the same from both lanes."""

from dataclasses import dataclass

__all__ = ["Request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request for a worker.

    Attributes:
        model: the model wanted; None takes any worker.
        request_id: the mesh's id of the client's request.
        prompt_tokens: tokens of the prompt.
        exact: whether prompt_tokens was counted, not estimated.
        max_output_tokens: most tokens of output; 0 where the client sets no limit.
        tenant: whose request it is.
        priority: scheduling class, lower first.
        session: groups requests that share a prefix; may be empty.
        excluded: ids of workers not to pick, as they were registered when the request was made.
        subset: endpoints to pick from; None allows all.
        timeout_seconds: time until the request is not worth starting; None leaves it to the router.
        occupies_slot: whether it runs in the engine; one that does not is never kept waiting for a slot.
    """

    model: str | None
    request_id: str = ""
    prompt_tokens: int = 0
    exact: bool = False
    max_output_tokens: int = 0
    tenant: str = ""
    priority: int = 0
    session: str = ""
    excluded: frozenset[str] = frozenset()
    subset: frozenset[str] | None = None
    timeout_seconds: float | None = None
    occupies_slot: bool = True
