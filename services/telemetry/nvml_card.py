"""What one card says of itself through NVML. What it doesn't report is None, and never zero."""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import pynvml

from services.telemetry.gpu import MigInstance, Process, Reading
from services.telemetry.nvml_questions import Questions

__all__ = ["CardReader", "throttle_reasons"]

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
# nvmlGpuRecoveryAction, as nvml.h has it.
_ACTIONS: Final = (
    "none",
    "gpu_reset",
    "node_reboot",
    "drain_p2p",
    "drain_and_reset",
    "recover_imex_domain",
    "bus_reset",
    "system_reboot",
)
_FIELDS: Final = (
    pynvml.NVML_FI_DEV_MEMORY_TEMP,
    pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES,
    pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES,
    pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION,
)
_VALUES: Final = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
_UNKNOWN_PERFORMANCE_STATE: Final = 32


def throttle_reasons(mask: int) -> tuple[str, ...]:
    """The names of NVML's clock event reasons in a mask. Bits that nobody has named yet are left out."""
    return tuple(name for bit, name in _REASONS.items() if mask & bit)


class CardReader:
    """Reads one card again and again; remembers what never changes, and the counters that rates are made of."""

    def __init__(self) -> None:
        self._facts: dict[str, int | None] | None = None
        self._counters: tuple[float, int, int] | None = None
        self._rates: tuple[int | None, int | None] = (None, None)

    def read(self, handle: Any, *, slowly: bool) -> Reading:
        """Everything. Cards that don't count what goes over PCI Express are watched for 40 ms, if it may be `slowly`.

        Raises:
            NVMLError: the card is lost, or the whole session is.
        """
        card = Questions(handle)
        if self._facts is None:
            self._facts = _facts(card)
        # Version 1 counts what the driver keeps for itself as used, so that the rest is what a process can still get.
        memory = card.ask(pynvml.nvmlDeviceGetMemoryInfo)
        fields = card.ask(_field_values) or {}
        remapped = card.ask(pynvml.nvmlDeviceGetRemappedRows)
        instances = card.ask(_mig_instances)
        sent, received = self._pcie_rates(card, fields, slowly=slowly)
        reading = Reading(
            **_load(card),
            **_power(card),
            **_link(card),
            **self._facts,
            memory_used_bytes=None if memory is None else memory.used,
            memory_total_bytes=None if memory is None else memory.total,
            temperature_celsius=_not_negative(card.ask(_temperature, _temperature_of_old_driver)),
            memory_temperature_celsius=_positive(fields.get(pynvml.NVML_FI_DEV_MEMORY_TEMP)),
            throttle_reasons=throttle_reasons(card.ask(_event_reasons, _throttle_reasons_of_old_driver) or 0),
            uncorrected_ecc_error_count=card.ask(_uncorrected_ecc_errors),
            corrected_ecc_error_count=card.ask(_corrected_ecc_errors),
            uncorrectable_remapped_row_count=None if remapped is None else int(remapped[1]),
            row_remap_pending=None if remapped is None else bool(remapped[2]),
            row_remap_failed=None if remapped is None else bool(remapped[3]),
            recovery_action=_action(fields.get(pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION)),
            pcie_transmit_bytes_per_second=sent,
            pcie_receive_bytes_per_second=received,
            mig_enabled=None if instances is None else instances[0],
            mig_instances=() if instances is None else instances[1],
            processes=_processes(card),
        )
        card.check()
        return reading

    def _pcie_rates(self, card: Questions, fields: dict[int, int], *, slowly: bool) -> tuple[int | None, int | None]:
        sent = fields.get(pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES)
        received = fields.get(pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES)
        if sent is not None and received is not None:
            self._rates = self._rates_of(time.monotonic(), sent, received)
        elif slowly:
            self._rates = (card.ask(_pcie_transmitted), card.ask(_pcie_received))
        return self._rates

    def _rates_of(self, now: float, sent: int, received: int) -> tuple[int | None, int | None]:
        before, self._counters = self._counters, (now, sent, received)
        # Counters wrap; then there is no rate for one sample.
        if before is None or now <= before[0] or sent < before[1] or received < before[2]:
            return (None, None)
        seconds = now - before[0]
        return round((sent - before[1]) / seconds), round((received - before[2]) / seconds)


def _facts(card: Questions) -> dict[str, int | None]:
    return {
        "slowdown_temperature_celsius": _positive(card.ask(_slowdown_temperature)),
        "max_sm_clock_mhz": card.ask(_max_sm_clock),
        "max_pcie_link_generation": card.ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration),
        "max_pcie_link_width": card.ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth),
    }


def _load(card: Questions) -> dict[str, int | None]:
    load = card.ask(pynvml.nvmlDeviceGetUtilizationRates)
    state = card.ask(pynvml.nvmlDeviceGetPerformanceState)
    return {
        "utilization_percent": None if load is None else load.gpu,
        "memory_utilization_percent": None if load is None else load.memory,
        "sm_clock_mhz": card.ask(_sm_clock),
        "memory_clock_mhz": card.ask(_memory_clock),
        "fan_speed_percent": card.ask(pynvml.nvmlDeviceGetFanSpeed),
        "performance_state": None if state == _UNKNOWN_PERFORMANCE_STATE else state,
    }


def _power(card: Questions) -> dict[str, Any]:
    power = card.ask(pynvml.nvmlDeviceGetPowerUsage)
    limit = card.ask(pynvml.nvmlDeviceGetEnforcedPowerLimit)
    energy = card.ask(pynvml.nvmlDeviceGetTotalEnergyConsumption)
    return {
        "power_watts": None if power is None else power / 1000,
        "power_limit_watts": None if limit is None else limit / 1000,
        "energy_joules": None if energy is None else energy / 1000,
    }


def _link(card: Questions) -> dict[str, int | None]:
    return {
        "pcie_link_generation": card.ask(pynvml.nvmlDeviceGetCurrPcieLinkGeneration),
        "pcie_link_width": card.ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth),
        "pcie_replay_count": card.ask(pynvml.nvmlDeviceGetPcieReplayCounter),
    }


def _action(number: int | None) -> str | None:
    if number is None:
        return None
    return _ACTIONS[number] if 0 <= number < len(_ACTIONS) else f"action_{number}"


def _not_negative(value: int | None) -> int | None:
    return None if value is None or value < 0 else value


def _positive(value: int | None) -> int | None:
    # Cards without that sensor, or that threshold, answer with zero.
    return None if value is None or value <= 0 else value


def _processes(card: Questions) -> tuple[Process, ...]:
    computing = card.ask(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, pynvml.nvmlDeviceGetComputeRunningProcesses_v2)
    drawing = card.ask(pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3, pynvml.nvmlDeviceGetGraphicsRunningProcesses_v2)
    # A process that does both is in both lists. NVML gives them in no particular order, which would look like a change.
    held: dict[int, int | None] = {}
    for each in (*(drawing or ()), *(computing or ())):
        if held.get(each.pid) is None or each.usedGpuMemory is not None:
            held[each.pid] = each.usedGpuMemory
    return tuple(Process(pid=pid, memory_used_bytes=held[pid]) for pid in sorted(held))


def _mig_instances(handle: Any) -> tuple[bool, tuple[MigInstance, ...]]:
    """Whether the card is split, and into what."""
    if pynvml.nvmlDeviceGetMigMode(handle)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return False, ()
    return True, tuple(sorted(_instances(handle), key=lambda instance: instance.uuid))


def _instances(handle: Any) -> Iterator[MigInstance]:
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        # Places may be empty, and an instance may be taken apart while it is looked at.
        with suppress(pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
            yield _instance(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))


def _instance(handle: Any) -> MigInstance:
    part = Questions(handle)
    memory = part.ask(pynvml.nvmlDeviceGetMemoryInfo)
    return MigInstance(
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        name=str(part.ask(pynvml.nvmlDeviceGetName) or ""),
        gpu_instance_id=part.ask(pynvml.nvmlDeviceGetGpuInstanceId),
        compute_instance_id=part.ask(pynvml.nvmlDeviceGetComputeInstanceId),
        memory_used_bytes=None if memory is None else memory.used,
        memory_total_bytes=None if memory is None else memory.total,
        processes=_processes(part),
    )


def _field_values(handle: Any) -> dict[int, int]:
    values = pynvml.nvmlDeviceGetFieldValues(handle, list(_FIELDS))
    return {
        each.fieldId: int(getattr(each.value, _VALUES[each.valueType]))
        for each in values
        if each.nvmlReturn == pynvml.NVML_SUCCESS and each.valueType < len(_VALUES)
    }


# Where there are two functions, old drivers have only the second, and the next major version of NVML only the first.


def _temperature(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetTemperatureV(handle, pynvml.NVML_TEMPERATURE_GPU))


def _temperature_of_old_driver(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))


def _slowdown_temperature(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetTemperatureThreshold(handle, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN))


def _sm_clock(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))


def _max_sm_clock(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM))


def _memory_clock(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM))


def _pcie_transmitted(handle: Any) -> int:
    return 1000 * int(pynvml.nvmlDeviceGetPcieThroughput(handle, pynvml.NVML_PCIE_UTIL_TX_BYTES))


def _pcie_received(handle: Any) -> int:
    return 1000 * int(pynvml.nvmlDeviceGetPcieThroughput(handle, pynvml.NVML_PCIE_UTIL_RX_BYTES))


def _event_reasons(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))


def _throttle_reasons_of_old_driver(handle: Any) -> int:
    return int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))


def _uncorrected_ecc_errors(handle: Any) -> int:
    uncorrected, since_driver_load = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    return int(pynvml.nvmlDeviceGetTotalEccErrors(handle, uncorrected, since_driver_load))


def _corrected_ecc_errors(handle: Any) -> int:
    corrected, since_driver_load = pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, pynvml.NVML_VOLATILE_ECC
    return int(pynvml.nvmlDeviceGetTotalEccErrors(handle, corrected, since_driver_load))
