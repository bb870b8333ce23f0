"""NVIDIA's XID numbers: what they are called, and whether a card can still be trusted after one."""

from enum import Enum
from typing import Final

__all__ = ["Gravity", "gravity", "words"]


class Gravity(Enum):
    """What an XID means for the card."""

    APPLICATION = "application"
    """A process's own fault, or the echo of its end; the card is well."""
    RECOVERED = "recovered"
    """The card had a fault and went on; worth a look."""
    FATAL = "fatal"
    """The card has to be reset or exchanged before it can be trusted with work."""


# After NVIDIA's catalogue of XIDs. One that isn't listed is taken to be recovered from.
_WORDS: Final = {
    13: "graphics engine exception",
    31: "memory page fault",
    32: "invalid or corrupted push buffer",
    38: "driver firmware error",
    43: "a process stopped the GPU",
    45: "channels of a process were cleaned up",
    48: "double bit ECC error",
    61: "internal micro-controller breakpoint",
    62: "internal micro-controller halt",
    63: "a row of memory was remapped",
    64: "a row of memory could not be remapped",
    68: "video decoder exception",
    69: "graphics engine class error",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    92: "high rate of single bit ECC errors",
    94: "contained memory error",
    95: "uncontained memory error",
    109: "context switch timeout",
    110: "security fault",
    119: "GSP remote procedure call timeout",
    120: "GSP error",
    121: "C2C link error",
    140: "unrecovered ECC error",
    143: "GPU initialization failure",
    154: "recovery action changed",
}
_OF_APPLICATIONS: Final = frozenset({13, 31, 32, 43, 45, 68, 69, 94, 109})
_FATAL: Final = frozenset({48, 62, 64, 79, 95, 110, 119, 120, 140, 143})


def gravity(xid: int) -> Gravity:
    """What that XID means for the card."""
    if xid in _OF_APPLICATIONS:
        return Gravity.APPLICATION
    return Gravity.FATAL if xid in _FATAL else Gravity.RECOVERED


def words(xid: int) -> str:
    """Its number, and what it is where that is known."""
    known = _WORDS.get(xid)
    return f"XID {xid}" if known is None else f"XID {xid}, {known}"
