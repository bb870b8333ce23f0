"""What earlier requests taught: where a session's prefix is cached, and how long a model's answers are."""

from collections import OrderedDict
from typing import Final

from services.router.cost import PRIOR_OUTPUT_TOKENS
from services.router.request import Request

__all__ = ["AnswerLengths", "Prefixes"]

_SESSIONS: Final = 65_536
_MODELS: Final = 1024
_WEIGHT: Final = 0.05

_Key = tuple[str, str, str]


class Prefixes:
    """Which worker served a session last, and how many tokens of it are cached there. Forgets the oldest sessions."""

    def __init__(self, *, max_sessions: int = _SESSIONS) -> None:
        self._max_sessions = max_sessions
        self._held: OrderedDict[_Key, tuple[str, int]] = OrderedDict()

    def holder(self, request: Request) -> tuple[str, int]:
        """The worker that has the request's prefix, and how much of the prompt that is, in tokens."""
        if not request.session:
            return "", 0
        worker_id, tokens = self._held.get(_key(request), ("", 0))
        return worker_id, min(tokens, request.prompt_tokens)

    def note(self, request: Request, worker_id: str) -> None:
        """The request's prompt is on its way into that worker's cache."""
        if not request.session:
            return
        self._held[_key(request)] = (worker_id, request.prompt_tokens)
        self._held.move_to_end(_key(request))
        if len(self._held) > self._max_sessions:
            self._held.popitem(last=False)


def _key(request: Request) -> _Key:
    return request.tenant, request.model or "", request.session


class AnswerLengths:
    """How many tokens the answers of a model have, as a moving mean."""

    def __init__(self) -> None:
        self._means: OrderedDict[str, float] = OrderedDict()

    def expected(self, request: Request) -> float:
        """Tokens of output to expect of a request."""
        if not request.occupies_slot:
            return 0.0
        mean = self._means.get(request.model or "", PRIOR_OUTPUT_TOKENS)
        return min(mean, float(request.max_output_tokens)) if request.max_output_tokens else mean

    def note(self, request: Request, output_tokens: int) -> None:
        """A request is complete; one that was cut short by its own limit tells little, and counts as what it is."""
        if output_tokens <= 0 or request.model is None:
            return
        mean = self._means.get(request.model, PRIOR_OUTPUT_TOKENS)
        self._means[request.model] = mean + _WEIGHT * (output_tokens - mean)
        if len(self._means) > _MODELS:
            self._means.popitem(last=False)
