"""Finds stop strings in text that arrives in pieces, and holds back what may be the beginning of one."""

from collections.abc import Sequence

__all__ = ["StopMatcher"]


class StopMatcher:
    """Passes text on up to the first stop string."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """With `include`, the stop string is passed on too."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be passed on, and the stop string that ended it."""
        text = self._held + text
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            at, _, stop = min(found)
            return text[: at + len(stop) if self._include else at], stop
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """What is held back, when nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
