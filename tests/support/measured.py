"""Tests that measure how long something takes."""

import functools
import inspect
import logging
from collections.abc import Callable
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
            for attempt in range(1, _TRIES + 1):
                try:
                    await test(*args, **kwargs)
                except Exception as error:  # noqa: BLE001  # task groups put what failed into groups
                    _again(attempt, error)
                else:
                    return
    else:

        @functools.wraps(test)
        def tried(*args: Any, **kwargs: Any) -> None:
            for attempt in range(1, _TRIES + 1):
                try:
                    test(*args, **kwargs)
                except Exception as error:  # noqa: BLE001  # task groups put what failed into groups
                    _again(attempt, error)
                else:
                    return

    return cast("Test", tried)


def _again(attempt: int, error: Exception) -> None:
    if attempt == _TRIES:
        raise error
    _log.warning("try %d of %d: %r", attempt, _TRIES, error)
