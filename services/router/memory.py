"""What earlier requests taught of a model: how long its answers are."""

from collections import OrderedDict
from typing import Final

from services.router.cost import PRIOR_OUTPUT_TOKENS
from services.router.request import Request

__all__ = ["AnswerLengths"]

_MODELS: Final = 1024
_WEIGHT: Final = 0.05


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
