"""Reads the driver and every GPU through NVML. The only module that knows pynvml."""

import ctypes
from _ctypes import dlclose  # ctypes opens libraries and has no public way to close them
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import pynvml

from services.telemetry.gpu import Card, Driver, DriverState, Process, Reading, Scan

__all__ = ["Nvml", "throttle_reasons"]

T = TypeVar("T")

# A card that was reset answers only to a new session, and one session sees cards fail but never return.
_RENEW_AFTER_LOSSES: Final = 10
_SESSION_ERRORS: Final = (
    pynvml.NVMLError_Uninitialized,
    pynvml.NVMLError_DriverNotLoaded,
    pynvml.NVMLError_LibRmVersionMismatch,
)
_LOSSES: Final = (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired, pynvml.NVMLError_GpuNotFound)
_REFUSALS: Final = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_NoPermission,
    pynvml.NVMLError_NoData,
    pynvml.NVMLError_VgpuEccNotSupported,
)
_WORDS: Final = {
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA library and the loaded driver have different versions",
    pynvml.NVML_ERROR_NO_PERMISSION: "this process may not talk to the NVIDIA driver",
}
_LIBRARY: Final = "libnvidia-ml.so.1"
# nvmlClocksEventReason*, as nvml.h has them. gpu_idle (bit 0) is left out: nothing holds an idle card down.
_REASONS: Final = {
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}


def throttle_reasons(mask: int) -> tuple[str, ...]:
    """The names of NVML's clock event reasons in a mask. Bits that nobody has named yet are left out."""
    return tuple(name for bit, name in _REASONS.items() if mask & bit)


class Nvml:
    """One NVML session at a time, opened when it is needed and again after it broke.

    NVML keeps its state in the library, so there is to be one of these in a process, used from one thread at a time.
    """

    def __init__(self) -> None:
        self._version: str | None = None
        self._losses = 0

    def read(self) -> Scan:
        """Asks the driver for everything. Takes as long as the driver takes; never raises NVMLError."""
        try:
            if self._version is None:
                self._version = _open()
            driver = Driver(state=DriverState.READY, version=self._version)
            cards = tuple(_card(index) for index in range(pynvml.nvmlDeviceGetCount()))
        except pynvml.NVMLError as error:
            failure = _failure(error)
            self.close()
            return Scan(driver=failure)
        self._renew_after_losses(cards)
        return Scan(driver=driver, cards=cards)

    def close(self) -> None:
        """Ends the session and lets go of the library: a driver that was replaced comes with another one."""
        self._version = None
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        _unload()

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


def _card(index: int) -> Card:
    uuid = name = ""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid, name = str(pynvml.nvmlDeviceGetUUID(handle)), str(pynvml.nvmlDeviceGetName(handle))
        reading = _read(handle)
    except _SESSION_ERRORS:
        raise
    except (pynvml.NVMLError, UnicodeError) as error:
        return Card(index=index, uuid=uuid, name=name, problem=f"it does not answer: {error}")
    return Card(index=index, uuid=uuid, name=name, reading=reading)


class _Questions:
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
            except (*_SESSION_ERRORS, *_LOSSES):
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


def _read(handle: Any) -> Reading:
    card = _Questions(handle)
    # Version 1 counts what the driver keeps for itself as used, so that the rest is what a process can still get.
    memory = card.ask(pynvml.nvmlDeviceGetMemoryInfo)
    load = card.ask(pynvml.nvmlDeviceGetUtilizationRates)
    power = card.ask(pynvml.nvmlDeviceGetPowerUsage)
    power_limit = card.ask(pynvml.nvmlDeviceGetEnforcedPowerLimit)
    reading = Reading(
        utilization_percent=None if load is None else load.gpu,
        memory_utilization_percent=None if load is None else load.memory,
        memory_used_bytes=None if memory is None else memory.used,
        memory_total_bytes=None if memory is None else memory.total,
        temperature_celsius=_not_negative(card.ask(_temperature, _temperature_of_old_driver)),
        power_watts=None if power is None else power / 1000,
        power_limit_watts=None if power_limit is None else power_limit / 1000,
        sm_clock_mhz=card.ask(_sm_clock),
        memory_clock_mhz=card.ask(_memory_clock),
        throttle_reasons=throttle_reasons(card.ask(_event_reasons, _throttle_reasons_of_old_driver) or 0),
        uncorrected_ecc_error_count=card.ask(_uncorrected_ecc_errors),
        processes=_processes(card),
    )
    card.check()
    return reading


def _not_negative(value: int | None) -> int | None:
    return None if value is None or value < 0 else value


def _processes(card: _Questions) -> tuple[Process, ...]:
    found = card.ask(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, pynvml.nvmlDeviceGetComputeRunningProcesses_v2)
    processes = (Process(pid=each.pid, memory_used_bytes=each.usedGpuMemory) for each in found or ())
    # NVML gives them in no particular order, which would look like a change.
    return tuple(sorted(processes, key=lambda process: process.pid))


# Where there are two functions, old drivers have only the second, and the next major version of NVML only the first.


def _temperature(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetTemperatureV(handle, pynvml.NVML_TEMPERATURE_GPU))


def _temperature_of_old_driver(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))


def _sm_clock(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))


def _memory_clock(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM))


def _event_reasons(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))


def _throttle_reasons_of_old_driver(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))


def _uncorrected_ecc_errors(handle: Any) -> int:
    uncorrected, since_driver_load = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    return int(pynvml.nvmlDeviceGetTotalEccErrors(handle, uncorrected, since_driver_load))
