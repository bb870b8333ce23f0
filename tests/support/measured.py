"""Tests that measure how long something takes."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar, cast

__all__ = ["measured"]

Test = TypeVar("Test", bound=Callable[..., Any])
_TRIES: Final = 3
_log = logging.getLogger(__name__)


def measured(test: Test) -> Test:
    """A test of how soon something happens passes when one of three tries does.

    A processor that has something else to do makes things late, and nothing makes them early. The test must leave
    things as it found them, also when it fails.
    """
    if inspect.iscoroutinefunction(test):

        @functools.wraps(test)
        async def tried(*args: Any, **kwargs: Any) -> None:
            for attempt in _attempts():
                with attempt:
                    await test(*args, **kwargs)
    else:

        @functools.wraps(test)
        def tried(*args: Any, **kwargs: Any) -> None:
            for attempt in _attempts():
                with attempt:
                    test(*args, **kwargs)

    return cast("Test", tried)


class _Attempt:
    """A block that may fail, unless it is the last of the tries."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.has_passed = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.has_passed = error is None
        # Task groups put what failed into groups, so it may be any exception.
        if not isinstance(error, Exception) or self._number == _TRIES:
            return False
        _log.warning("try %d of %d: %r", self._number, _TRIES, error)
        return True


def _attempts() -> Iterator[_Attempt]:
    """One after the other, until one has passed."""
    for number in range(1, _TRIES + 1):
        attempt = _Attempt(number)
        yield attempt
        if attempt.has_passed:
            return
