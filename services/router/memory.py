"""What earlier requests taught of a model: how long its answers are, and the prompts of those that wait."""

from collections import OrderedDict
from typing import Final

from services.router.cost import PRIOR_OUTPUT_TOKENS
from services.router.request import Request

__all__ = ["AnswerLengths", "PromptLengths"]

_MODELS: Final = 1024
_WEIGHT: Final = 0.05


class _Means:
    """A moving mean for each model, of so many models at most."""

    def __init__(self) -> None:
        self._by_model: OrderedDict[str, float] = OrderedDict()

    def get(self, model: str | None, default: float) -> float:
        """The mean; `default` while nothing was noted."""
        return self._by_model.get(model or "", default)

    def note(self, model: str | None, value: float, default: float) -> None:
        """One more value; the first one moves `default`."""
        model = model or ""
        mean = self._by_model.get(model, default)
        self._by_model[model] = mean + _WEIGHT * (value - mean)
        if len(self._by_model) > _MODELS:
            self._by_model.popitem(last=False)


class AnswerLengths:
    """How many tokens the answers of a model have, as a moving mean."""

    def __init__(self) -> None:
        self._means = _Means()

    def expected(self, request: Request) -> float:
        """Tokens of output to expect of a request."""
        if not request.occupies_slot:
            return 0.0
        mean = self._means.get(request.model, PRIOR_OUTPUT_TOKENS)
        return min(mean, float(request.max_output_tokens)) if request.max_output_tokens else mean

    def note(self, request: Request, output_tokens: int) -> None:
        """A request is complete; one that was cut short by its own limit tells little, and counts as what it is."""
        if output_tokens <= 0 or request.model is None:
            return
        self._means.note(request.model, output_tokens, PRIOR_OUTPUT_TOKENS)


class PromptLengths:
    """How many tokens the prompts of a model's requests have that wait, as a moving mean."""

    def __init__(self) -> None:
        self._means = _Means()

    def expected(self, request: Request) -> float:
        """Tokens of prompt to expect of those that wait with a request; 0 while none has waited."""
        return self._means.get(request.model, 0.0)

    def note(self, request: Request) -> None:
        """A request waits."""
        self._means.note(request.model, request.prompt_tokens, request.prompt_tokens)
