"""The workers that a decision looked at: kept as it went through them, and spelled out for those who ask."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, Self, overload

from services.router.cost import NO_PREDICTION, Prediction

__all__ = ["Look", "Looks", "Step"]

Look = tuple[str, str, Prediction]
"""A worker that was looked at: its name, why it was out of the question (or nothing), and what was predicted."""


class Named(Protocol):
    """A worker, as far as it is told of."""

    @property
    def worker_id(self) -> str: ...


Step = tuple[Sequence[Named], Sequence[Named], str]
"""Some workers, those of them that were left, in the same order, and why the others were not."""


class _Name(NamedTuple):
    worker_id: str


class Looks(Sequence[Look]):
    """First the workers that were out of the question, by name and reason, then the others, with what was predicted.

    Nearly nobody asks, so that names are put to lists only then: what is kept are the lists that the decision made.
    """

    __slots__ = ("_count", "_left", "_names", "_predictions", "_reasons", "_steps")

    def __init__(
        self,
        names: Sequence[str],
        reasons: Sequence[str],
        steps: Sequence[Step],
        left: Sequence[Named],
        predictions: Sequence[Prediction],
        *,
        count: int,
    ) -> None:
        """`names` were out for a reason of their own, each; those that a step took out come after them.

        `left`: those that were compared, with a prediction each. Whoever gives a list leaves it as it is.
        `count`: how many there are in all.
        """
        self._count = count
        self._names = names
        self._reasons = reasons
        self._steps = steps
        self._left = left
        self._predictions = predictions

    @classmethod
    def of(cls, looks: Iterable[Look]) -> Self:
        """From a tuple for each."""
        ordered = sorted(looks, key=lambda look: not look[1])
        names, reasons = [name for name, why, _ in ordered if why], [why for _, why, _ in ordered if why]
        left = [(_Name(name), one) for name, why, one in ordered if not why]
        return cls(names, reasons, (), [name for name, _ in left], [one for _, one in left], count=len(ordered))

    @property
    def compared(self) -> int:
        """How many were not out of the question."""
        return len(self._left)

    @property
    def out(self) -> dict[str, int]:
        """How many were out of the question, by reason."""
        counts = dict(Counter(self._reasons)) if self._reasons else {}
        for before, after, why in self._steps:
            if len(after) < len(before):
                counts[why] = counts.get(why, 0) + len(before) - len(after)
        return counts

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Look: ...
    @overload
    def __getitem__(self, place: slice) -> list[Look]: ...
    def __getitem__(self, place: int | slice) -> Look | list[Look]:
        return list(self)[place]

    def __iter__(self) -> Iterator[Look]:
        for name, reason in zip(self._names, self._reasons, strict=True):
            yield name, reason, NO_PREDICTION
        for before, after, reason in self._steps:
            kept = {one.worker_id for one in after}
            for one in before:
                if one.worker_id not in kept:
                    yield one.worker_id, reason, NO_PREDICTION
        for one, prediction in zip(self._left, self._predictions, strict=True):
            yield one.worker_id, "", prediction
