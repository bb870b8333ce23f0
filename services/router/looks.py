"""The workers that a decision looked at, kept as columns: a tuple for each would be most of what a router allocates."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Self, overload

from services.router.cost import Prediction

__all__ = ["NO_PREDICTION", "Look", "Looks"]

Look = tuple[str, str, Prediction]
"""A worker that was looked at: its name, why it was out of the question (or nothing), and what was predicted."""

NO_PREDICTION: Prediction = (0.0, 0.0, 0.0, 0.0, 0.0)


class Looks(Sequence[Look]):
    """First the workers that were out of the question, by name and reason, then the others, with what was predicted."""

    __slots__ = ("_names", "_predictions", "_reasons")

    def __init__(self, names: list[str], reasons: list[str], predictions: Sequence[Prediction]) -> None:
        """`names` has those with a reason first."""
        self._names = names
        self._reasons = reasons
        self._predictions = predictions

    @classmethod
    def of(cls, looks: Iterable[Look]) -> Self:
        """From a tuple for each."""
        ordered = sorted(looks, key=lambda look: not look[1])
        reasons = [why for _, why, _ in ordered if why]
        return cls([name for name, _, _ in ordered], reasons, [one for _, why, one in ordered if not why])

    @property
    def reasons(self) -> list[str]:
        """Why those were out of the question that were."""
        return self._reasons

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, place: int) -> Look: ...
    @overload
    def __getitem__(self, place: slice) -> list[Look]: ...
    def __getitem__(self, place: int | slice) -> Look | list[Look]:
        return list(self)[place]

    def __iter__(self) -> Iterator[Look]:
        out = len(self._reasons)
        for name, reason in zip(self._names, self._reasons, strict=False):
            yield name, reason, NO_PREDICTION
        for name, prediction in zip(self._names[out:], self._predictions, strict=True):
            yield name, "", prediction
