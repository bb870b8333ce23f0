"""What guardrails look for in a text: patterns of the operator's, and personal data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, Protocol

import phonenumbers
import regex
from stdnum import iban, luhn

__all__ = ["PII_KINDS", "Filter", "Found", "PatternFilter", "PiiFilter"]

_HOLD_PII: Final = 128
"""Longer than any personal data that is looked for, but for absurd e-mail addresses."""
_HOLD_PATTERN: Final = 4096
_PATTERN_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True)
class Found:
    """Something that was looked for."""

    start: int
    end: int
    label: str
    """What it is, in capitals: what a masked text has in its place."""


class Filter(Protocol):
    """Looks for something in a text that may still grow at its end."""

    name: str

    def find(self, text: str, start: int) -> list[Found]:
        """All that is in the text from `start` on; what is before `start` is looked at, but no longer searched."""
        ...

    def settled(self, text: str, start: int) -> int:
        """Up to where the text is decided: what comes next changes nothing about what is found before."""
        ...


class PatternFilter:
    """Regular expressions."""

    def __init__(self, name: str, patterns: Mapping[str, str] | Sequence[str]) -> None:
        """`patterns`: by the label of what they find, or without: then it is the filter's name."""
        self.name = name
        labelled = patterns.items() if isinstance(patterns, Mapping) else [(name, each) for each in patterns]
        self._patterns = [(_label(label), regex.compile(pattern)) for label, pattern in labelled]

    def find(self, text: str, start: int) -> list[Found]:
        """Every match.

        Raises:
            TimeoutError: a pattern took longer than a quarter of a second.
        """
        return [
            Found(match.start(), match.end(), label)
            for label, pattern in self._patterns
            for match in pattern.finditer(text, start, timeout=_PATTERN_SECONDS)
        ]

    def settled(self, text: str, start: int) -> int:
        """Up to the first match that the end of the text cuts, or that could go on there."""
        settled = len(text)
        for _, pattern in self._patterns:
            for match in pattern.finditer(text, start, partial=True, timeout=_PATTERN_SECONDS):
                if match.partial or match.end() == len(text):
                    settled = min(settled, match.start())
        return max(settled, len(text) - _HOLD_PATTERN, start)


class PiiFilter:
    """Personal data that can be told by its form and its check digits.

    Numbers that follow each other with nothing between may be taken for one, or for others, than they were meant as.
    """

    name = "pii"

    def __init__(self, kinds: Sequence[str], *, region: str | None = None) -> None:
        """`kinds`: of PII_KINDS. `region`: the country, such as "DE", whose phone numbers need no prefix."""
        self._finders = [_PHONES(region) if kind == "PHONE_NUMBER" else _FINDERS[kind] for kind in kinds]

    def find(self, text: str, start: int) -> list[Found]:
        """Every piece of data; of those that overlap the first and longest."""
        found = sorted(
            (each for finder in self._finders for each in finder(text, start)), key=lambda each: (each.start, -each.end)
        )
        kept: list[Found] = []
        for each in found:
            if not kept or each.start >= kept[-1].end:
                kept.append(each)
        return kept

    def settled(self, text: str, start: int) -> int:
        """All but the end."""
        return max(start, len(text) - _HOLD_PII)


_Finder = Callable[[str, int], Iterator[Found]]
_EMAIL: Final = regex.compile(r"(?<![\w.+-])[\w.+-]{1,64}+@(?:[\w-]{1,63}\.){1,8}\p{L}{2,24}(?![\w-])")
_CARD: Final = regex.compile(r"(?<![\d-])\d(?:[ -]?\d){11,18}(?![\d-])")
_IBAN: Final = regex.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")
_IP: Final = regex.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7})(?![\w:]|\.\d)"
)
_SSN: Final = regex.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")


def _emails(text: str, start: int) -> Iterator[Found]:
    for match in _EMAIL.finditer(text, start):
        yield Found(match.start(), match.end(), "EMAIL_ADDRESS")


def _cards(text: str, start: int) -> Iterator[Found]:
    for match in _CARD.finditer(text, start):
        digits = "".join(filter(str.isdigit, match[0]))
        if luhn.is_valid(digits) and len(set(digits)) > 1:
            yield Found(match.start(), match.end(), "CREDIT_CARD")


def _ibans(text: str, start: int) -> Iterator[Found]:
    for match in _IBAN.finditer(text, start):
        # What follows an account number looks like more of it: drop words until the check digits are right.
        candidate = match[0]
        while len(candidate) >= 15:
            if iban.is_valid(candidate):
                yield Found(match.start(), match.start() + len(candidate), "IBAN_CODE")
                break
            candidate = candidate.rpartition(" ")[0]


def _ips(text: str, start: int) -> Iterator[Found]:
    for match in _IP.finditer(text, start):
        try:
            ip_address(match[0])
        except ValueError:
            continue
        yield Found(match.start(), match.end(), "IP_ADDRESS")


def _ssns(text: str, start: int) -> Iterator[Found]:
    for match in _SSN.finditer(text, start):
        yield Found(match.start(), match.end(), "US_SSN")


def _PHONES(region: str | None) -> _Finder:  # one of a table of finders that needs an argument
    def find(text: str, start: int) -> Iterator[Found]:
        for match in phonenumbers.PhoneNumberMatcher(text[start:], region):
            yield Found(start + match.start, start + match.end, "PHONE_NUMBER")

    return find


_FINDERS: Final[dict[str, _Finder]] = {
    "EMAIL_ADDRESS": _emails,
    "CREDIT_CARD": _cards,
    "IBAN_CODE": _ibans,
    "IP_ADDRESS": _ips,
    "US_SSN": _ssns,
}
PII_KINDS: Final = (*_FINDERS, "PHONE_NUMBER")


def _label(name: str) -> str:
    return name.upper().replace("-", "_").replace(" ", "_")
