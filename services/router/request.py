"""A request for a worker, the same from both lanes."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from services.common.policy import SloClass

__all__ = ["LONGEST_MODEL_NAME", "Request"]

LONGEST_MODEL_NAME: Final = 256


class Request(NamedTuple):
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
        excluded: ids of workers not to pick, unless they became ready after the request was made.
        subset: endpoints to pick from; None allows all.
        timeout_seconds: time until the request is not worth starting; None leaves it to the router.
        prefix_hashes: what the prompt begins with, as services.common.prefix hashes its text; none where not known.
        prompt_token_ids: the prompt's tokens, where they are known.
        slo_class: what its client may wait for, by name; empty leaves it to the policy.
        attempt: which try of the same request it is, from 1.
        emitted_tokens: tokens that its client has already.
        needs: what the model must be able to do, as the worker's card names it.
        occupies_slot: whether it runs in the engine; one that does not is never kept waiting for a slot.
        task: what is to be done: "generate", "embed", "score" or "tokenize".
        allow_degrade: whether a smaller model may answer when this one has no room.
        pools: pools to pick from, once the policy has chosen them; None allows all.
        slo: what it may wait for, once the policy has said so; None where that makes no difference.
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
    prefix_hashes: Sequence[int] = ()
    prompt_token_ids: Sequence[int] = ()
    slo_class: str = ""
    attempt: int = 1
    emitted_tokens: int = 0
    needs: frozenset[str] = frozenset()
    occupies_slot: bool = True
    task: str = "generate"
    allow_degrade: bool = False
    pools: frozenset[str] | None = None
    slo: SloClass | None = None

    def with_slo(self, slo: SloClass | None) -> "Request":
        """The same request, with what it may wait for."""
        # It is the last field: _replace() takes eight times as long.
        return tuple.__new__(Request, (*self[:-1], slo))
