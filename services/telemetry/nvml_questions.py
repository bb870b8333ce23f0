"""How NVML is asked about a card: what its refusals mean, and when the card, or the whole session, is lost."""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import pynvml

__all__ = ["SESSION_ERRORS", "Questions"]

T = TypeVar("T")

SESSION_ERRORS: Final = (
    pynvml.NVMLError_Uninitialized,
    pynvml.NVMLError_DriverNotLoaded,
    pynvml.NVMLError_LibRmVersionMismatch,
)
"""After these nothing is to be had from any card until the library is opened again."""
_LOSSES: Final = (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired, pynvml.NVMLError_GpuNotFound)
_REFUSALS: Final = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_NoPermission,
    pynvml.NVMLError_NoData,
    pynvml.NVMLError_VgpuEccNotSupported,
)


class Questions:
    """Asks one card for one thing after another."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._answers = 0
        self._problem: pynvml.NVMLError | None = None

    def ask(self, *functions: Callable[[Any], T]) -> T | None:
        """What the first function says that this driver has; None when the card doesn't report it.

        Raises:
            NVMLError: the card is lost, or the whole session is.
        """
        for function in functions:
            try:
                answer = function(self._handle)
            except pynvml.NVMLError_FunctionNotFound:
                continue
            except _REFUSALS:
                self._answers += 1
                return None
            except (*SESSION_ERRORS, *_LOSSES):
                raise
            except pynvml.NVMLError as error:
                self._problem = error
                return None
            self._answers += 1
            return answer
        return None

    def check(self) -> None:
        """Raises the NVMLError that was there instead of any answer."""
        # Single calls fail with "unknown error" on cards that work; a card where every call fails doesn't.
        if self._problem is not None and not self._answers:
            raise self._problem
