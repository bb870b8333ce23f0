"""The configuration of guardrails: what prompts and answers must not have, by tenant."""

from typing import Annotated, Literal

import msgspec
import regex
from msgspec import Meta

from services.common.settings import Positive

__all__ = [
    "FilterSettings",
    "GuardSettings",
    "GuardrailSettings",
    "ModerationFilter",
    "PatternsFilter",
    "PersonalDataFilter",
    "SizeFilter",
]


class PatternsFilter(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag="patterns", tag_field="kind"
):
    """Regular expressions: a text that one of them matches is refused, or what it matches is masked."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    """What a refusal calls it."""
    patterns: dict[str, str] | list[str]
    """By the label that stands in their place, or without: then it is the filter's name."""
    action: Literal["refuse", "mask"] = "refuse"

    def __post_init__(self) -> None:
        """Raises ValueError: one is no regular expression, or matches the empty text."""
        for pattern in self.patterns.values() if isinstance(self.patterns, dict) else self.patterns:
            try:
                matches_nothing = regex.compile(pattern).match("")
            except regex.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
            if matches_nothing is not None:
                raise ValueError(f"{pattern!r} matches the empty text")


class PersonalDataFilter(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag="personal_data", tag_field="kind"
):
    """Personal data that can be told by its form and check digits."""

    entities: list[Literal["EMAIL_ADDRESS", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS", "US_SSN", "PHONE_NUMBER"]] = (
        msgspec.field(
            default_factory=lambda: [
                "EMAIL_ADDRESS",
                "CREDIT_CARD",
                "IBAN_CODE",
                "IP_ADDRESS",
                "US_SSN",
                "PHONE_NUMBER",
            ]
        )
    )
    phone_region: Annotated[str, Meta(min_length=2, max_length=2)] | None = None
    """The country, such as DE, whose phone numbers are known without a country code; null: none."""
    action: Literal["refuse", "mask"] = "mask"


class SizeFilter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag="size", tag_field="kind"):
    """A bound on the whole prompt."""

    max_characters: Annotated[int, Meta(ge=1)]


class ModerationFilter(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag="moderation", tag_field="kind"
):
    """A service that answers as OpenAI's POST /v1/moderations does. Answers are held back until it was asked."""

    url: str
    model: str | None = None
    api_key_variable: str | None = None
    """The environment variable that has the service's key."""
    timeout_seconds: Positive = 2.0
    when_away: Literal["refuse", "pass"] = "refuse"


FilterSettings = PatternsFilter | PersonalDataFilter | SizeFilter | ModerationFilter


class GuardSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What prompts and answers go through."""

    input: list[FilterSettings] = []
    output: list[FilterSettings] = []
    log_content: bool = False
    """Write prompts and answers to the log. Nothing else ever does."""


class GuardrailSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Filters by tenant; one that is listed has its own only."""

    default: GuardSettings = GuardSettings()
    tenants: dict[str, GuardSettings] = {}
