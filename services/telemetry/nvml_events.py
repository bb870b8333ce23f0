"""What the driver tells of its own accord: XIDs and other events, through one of NVML's event sets."""

import ctypes
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import pynvml

from services.telemetry.gpu import EventKind, Incident

__all__ = ["EventSet", "address_of"]

_KINDS: Final = {
    pynvml.nvmlEventTypeXidCriticalError: EventKind.XID,
    pynvml.nvmlEventTypeDoubleBitEccError: EventKind.UNCORRECTED_ECC_ERROR,
    pynvml.nvmlEventMigConfigChange: EventKind.MIG_CHANGED,
}
_WANTED: Final = sum(_KINDS)
# A card that floods the driver with errors doesn't keep the others from being read.
_MOST_AT_ONCE: Final = 256


class EventSet:
    """One event set of one NVML session. Cards that have no events cost nothing."""

    def __init__(self) -> None:
        self._set: Any = None
        self._registered: set[int] = set()

    def follow(self, handle: Any) -> None:
        """Wants to hear of a card, from now on."""
        address = address_of(handle)
        if address in self._registered:
            return
        self._registered.add(address)
        # A card that has none, or is being lost at this moment: its reading tells the rest.
        with suppress(pynvml.NVMLError):
            wanted = _WANTED & int(pynvml.nvmlDeviceGetSupportedEventTypes(handle))
            if not wanted:
                return
            if self._set is None:
                self._set = pynvml.nvmlEventSetCreate()
            pynvml.nvmlDeviceRegisterEvents(handle, wanted, self._set)

    def take(self) -> dict[int, list[Incident]]:
        """What has happened since it was asked last, by the address of the card's handle. Does not wait."""
        happened: dict[int, list[Incident]] = defaultdict(list)
        # Timeout is how NVML says that there is nothing more; that a card is lost is seen where it is read.
        with suppress(pynvml.NVMLError):
            for address, incident in self._waiting():
                happened[address].append(incident)
        return happened

    def close(self) -> None:
        """Frees it; to be done while the session is open."""
        if self._set is not None:
            with suppress(pynvml.NVMLError):
                pynvml.nvmlEventSetFree(self._set)
        self._set = None
        self._registered.clear()

    def _waiting(self) -> Iterator[tuple[int, Incident]]:
        if self._set is None:
            return
        for _ in range(_MOST_AT_ONCE):
            event = pynvml.nvmlEventSetWait_v2(self._set, 0)
            kind = _KINDS.get(event.eventType)
            if kind is not None:
                xid = int(event.eventData) if kind is EventKind.XID else None
                yield address_of(event.device), Incident(kind=kind, xid=xid)


def address_of(handle: Any) -> int:
    """What tells a card's handle from another one; the same card has the same one for a whole session."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0
