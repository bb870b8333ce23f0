"""Texts on their way through filters: whole ones, and ones that come bit by bit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from services.gateway.guard_filters import Filter, Found

__all__ = ["BlockedError", "Rule", "TextStream", "filtered"]

_CONTEXT = 256
"""What is remembered of the text before, for patterns that look back."""


class BlockedError(Exception):
    """A text has what it must not have."""

    def __init__(self, rule: str, before: str) -> None:
        """`before`: the text before that, filtered."""
        super().__init__(rule)
        self.rule = rule
        self.before = before


@dataclass(frozen=True, slots=True)
class Rule:
    """A filter, and what is done about what it finds."""

    filter: Filter
    action: Literal["refuse", "mask"]


def filtered(text: str, rules: Sequence[Rule]) -> str:
    """A whole text with everything masked that is to be.

    Raises:
        BlockedError: a rule refuses it.
    """
    stream = TextStream(rules)
    return stream.feed(text) + stream.finish()


class TextStream:
    """A text that comes bit by bit; what is let out never has to be taken back."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._context = ""
        self._held = ""

    def feed(self, text: str) -> str:
        """Takes more of the text; returns what is decided by now, filtered.

        Raises:
            BlockedError: a rule refuses it.
        """
        self._held += text
        whole, start = self._context + self._held, len(self._context)
        cut = min((rule.filter.settled(whole, start) for rule in self._rules), default=len(whole))
        return self._release(whole, start, cut)

    def finish(self) -> str:
        """What was held back, filtered; nothing more comes.

        Raises:
            BlockedError: a rule refuses it.
        """
        whole = self._context + self._held
        return self._release(whole, len(self._context), len(whole))

    def _release(self, whole: str, start: int, cut: int) -> str:
        found = [(each, rule) for rule in self._rules for each in rule.filter.find(whole, start)]
        # What is cut is not decided: it stays until it is there as a whole.
        for each, _ in sorted(found, key=lambda pair: pair[0].start, reverse=True):
            if each.start < cut < each.end:
                cut = each.start
        refused = [pair for pair in found if pair[1].action == "refuse" and pair[0].end <= cut]
        masked = [each for each, rule in found if rule.action == "mask" and each.end <= cut]
        if refused:
            first, rule = min(refused, key=lambda pair: pair[0].start)
            raise BlockedError(rule.filter.name, _masked(whole, start, first.start, masked))
        released = _masked(whole, start, cut, masked)
        self._context, self._held = whole[max(0, cut - _CONTEXT) : cut], whole[cut:]
        return released


def _masked(text: str, start: int, end: int, found: Iterable[Found]) -> str:
    parts = []
    for each in sorted(found, key=lambda each: (each.start, -each.end)):
        if each.start < start or each.end > end:
            continue
        parts += [text[start : each.start], f"<{each.label}>"]
        start = each.end
    return "".join([*parts, text[start:end]])
