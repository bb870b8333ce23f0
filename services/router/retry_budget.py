"""How many requests may be tried again: a tenth of all, so that failures do not multiply the load.

What does not draw from it: a request that a worker turned away, being full or about to stop, since that costs nothing;
and a stream that has begun, since its client would lose an answer that is half there. Both are bounded otherwise, by
the workers that there are and by how many may be lost to one request. Nothing is ever sent to two workers at the same
time to see who is faster: on a GPU the second copy takes as much as the first, and the queue it would dodge is known
beforehand.
"""

from typing import Final

__all__ = ["RetryBudget"]

_SHARE: Final = 0.1
_FIRST: Final = 20.0
_MOST: Final = 100.0


class RetryBudget:
    """A bucket that each request fills by a tenth, and each retry empties by one."""

    def __init__(self) -> None:
        self._left = _FIRST

    def earn(self) -> None:
        """A request came for the first time."""
        self._left = min(_MOST, self._left + _SHARE)

    def draw(self) -> bool:
        """Takes one retry out of the budget; False when it is empty."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
