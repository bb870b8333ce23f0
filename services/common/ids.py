"""Random ids, from the system's randomness, which is asked for many at a time."""

import os
from typing import Final

__all__ = ["random_hex"]

_STOCK_BYTES: Final = 4096


class _Stock:
    """What is not used yet. Not for use from several threads."""

    def __init__(self) -> None:
        self._hex = ""
        self._at = 0

    def take(self, digits: int) -> str:
        """So many hexadecimal digits."""
        at, end = self._at, self._at + digits
        if end > len(self._hex):
            self._hex = os.urandom(_STOCK_BYTES).hex()
            at, end = 0, digits
        self._at = end
        return self._hex[at:end]


_stock: Final = _Stock()
os.register_at_fork(after_in_child=_stock.__init__)  # type: ignore[misc]  # two processes must not use the same


def random_hex(digits: int) -> str:
    """An id that nobody guesses and nobody else has. Only for the event loop's thread.

    A system call for each one would take longer than all else that is done for it.
    """
    return _stock.take(digits)
