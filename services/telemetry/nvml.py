"""Reads the driver and every GPU through NVML. Only the modules nvml*.py know pynvml."""

import ctypes
from _ctypes import dlclose  # ctypes opens libraries and has no public way to close them
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

import pynvml

from services.telemetry.gpu import Card, Driver, DriverState, Incident, Scan
from services.telemetry.nvml_card import CardReader
from services.telemetry.nvml_events import EventSet, address_of
from services.telemetry.nvml_questions import SESSION_ERRORS

__all__ = ["Nvml"]

# A card that was reset answers only to a new session, and one session sees cards fail but never return.
_RENEW_AFTER_LOSSES: Final = 10
_WORDS: Final = {
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA library and the loaded driver have different versions",
    pynvml.NVML_ERROR_NO_PERMISSION: "this process may not talk to the NVIDIA driver",
}
_LIBRARY: Final = "libnvidia-ml.so.1"


class Nvml:
    """One NVML session at a time, opened when it is needed and again after it broke.

    NVML keeps its state in the library, so there is to be one of these in a process, used from one thread at a time.
    """

    def __init__(self) -> None:
        self._version: str | None = None
        self._losses = 0
        self._scans = 0
        self._events = EventSet()
        self._readers: dict[str, CardReader] = {}
        self._addresses: dict[int, int] = {}

    def read(self) -> Scan:
        """Asks the driver for everything. Takes as long as the driver takes; never raises NVMLError."""
        try:
            if self._version is None:
                self._version = _open()
            driver = Driver(state=DriverState.READY, version=self._version)
            cards = self._cards()
        except pynvml.NVMLError as error:
            failure = _failure(error)
            self.close()
            return Scan(driver=failure)
        self._renew_after_losses(cards)
        return Scan(driver=driver, cards=cards)

    def close(self) -> None:
        """Ends the session and lets go of the library: a driver that was replaced comes with another one."""
        self._version = None
        self._readers.clear()
        self._addresses.clear()
        self._events.close()
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        _unload()

    def _cards(self) -> tuple[Card, ...]:
        count = pynvml.nvmlDeviceGetCount()
        self._scans += 1
        happened = self._events.take()
        cards = tuple(self._card(index, happened, slowly=self._scans % count == index) for index in range(count))
        listed = {card.uuid for card in cards}
        self._readers = {uuid: reader for uuid, reader in self._readers.items() if uuid in listed}
        return cards

    def _card(self, index: int, happened: Mapping[int, Sequence[Incident]], *, slowly: bool) -> Card:
        uuid = name = ""
        # A card that has just been lost has told why, and has no handle any more.
        incidents = tuple(happened.get(self._addresses.get(index, 0), ()))
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            self._addresses[index] = address_of(handle)
            uuid, name = str(pynvml.nvmlDeviceGetUUID(handle)), str(pynvml.nvmlDeviceGetName(handle))
            self._events.follow(handle)
            reading = self._readers.setdefault(uuid, CardReader()).read(handle, slowly=slowly)
        except SESSION_ERRORS:
            raise
        except (pynvml.NVMLError, UnicodeError) as error:
            problem = f"it does not answer: {error}"
            return Card(index=index, uuid=uuid, name=name, problem=problem, incidents=incidents)
        return Card(index=index, uuid=uuid, name=name, reading=reading, incidents=incidents)

    def _renew_after_losses(self, cards: tuple[Card, ...]) -> None:
        lost = any(card.reading is None for card in cards)
        self._losses = self._losses + 1 if lost else 0
        if self._losses >= _RENEW_AFTER_LOSSES:
            self._losses = 0
            self.close()


def _open() -> str:
    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


def _unload() -> None:
    # pynvml keeps the library and its functions for the life of the process.
    library, pynvml.nvmlLib = pynvml.nvmlLib, None
    pynvml._nvmlGetFunctionPointer_cache.clear()
    if library is not None:
        dlclose(library._handle)


def _failure(error: pynvml.NVMLError) -> Driver:
    if error.value != pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        words = _WORDS.get(error.value, f"the NVIDIA driver does not work: {error}")
        return Driver(state=DriverState.FAILED, message=words)
    problem = _load_problem()
    if problem is None:
        return Driver(state=DriverState.ABSENT, message="no NVIDIA driver on this machine")
    return Driver(state=DriverState.FAILED, message=f"the NVIDIA library can't be loaded: {problem}")


def _load_problem() -> str | None:
    # pynvml says "not found" whatever the loader says.
    try:
        dlclose(ctypes.CDLL(_LIBRARY)._handle)
    except OSError as error:
        missing = str(error).startswith(f"{_LIBRARY}: cannot open shared object file")
        return None if missing else str(error)
    # It has only just appeared; the next sample opens it.
    return None
