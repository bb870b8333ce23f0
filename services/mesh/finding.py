"""What a check has found: whether something is wrong, and what to do about it."""

from dataclasses import dataclass
from enum import Enum

__all__ = ["Finding", "Level"]


class Level(Enum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; everything works."""
    TROUBLE = "trouble"
    """Something does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    subject: str
    said: str
    """How it is, in words."""
    advice: str = ""
    """What to do; empty where nothing is to be done."""
