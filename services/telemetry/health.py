"""How a GPU is, judged from its readings, slow to take a complaint back."""

from dataclasses import dataclass
from typing import Final

from services.telemetry.gpu import EventKind, Health, Incident, Reading
from services.telemetry.xid import Gravity, gravity, words

__all__ = ["HARMFUL_REASONS", "HEALTHY", "Condition"]

# A sample between the two thresholds keeps the verdict that was there before, so that a card at the edge doesn't flap.
_MEMORY_FULL_ABOVE: Final = 98.0
_MEMORY_FREE_BELOW: Final = 95.0
_HOT_ABOVE: Final = 90
_COOL_BELOW: Final = 85
_CLEAN_SAMPLES: Final = 3
# An error that the card has recovered from is worth a look for this many samples.
_NOTED_SAMPLES: Final = 60
_NO_ACTION: Final = "none"
# What the driver may want done while the card goes on working.
_MILD_ACTIONS: Final = frozenset({"drain_p2p", "recover_imex_domain"})

# A power cap or clocks that somebody has set are how cards are run; these are not.
HARMFUL_REASONS: Final = frozenset(
    {"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A GPU's complaints. The next one is a pure function of this one, a reading, and what the driver told meanwhile.

    Attributes:
        lost: why it doesn't answer, in words; empty when it does.
        failed: the error after which it can't be trusted. Only a reset ends it, which shows as a card that was lost
            for a while; or the driver's word, three samples in a row, that nothing has to be done.
        well_samples: samples so far of such a word.
        needs: what its latest reading says that has to be done to it at once; empty: nothing.
        memory_percent: memory in use, while that is too much.
        hot_celsius: its temperature, while that is too high.
        throttled: harmful reasons that held its clocks down, until three samples in a row were without any.
        clean_samples: samples without one so far.
        noted: an error that it has recovered from, for sixty samples.
        noted_samples: how many of these are over.
        awaits: what its latest reading says that has to be done to it some time; empty: nothing.
    """

    lost: str = ""
    failed: str = ""
    well_samples: int = 0
    needs: str = ""
    memory_percent: float | None = None
    hot_celsius: int | None = None
    throttled: tuple[str, ...] = ()
    clean_samples: int = 0
    noted: str = ""
    noted_samples: int = 0
    awaits: str = ""

    @property
    def health(self) -> Health:
        """The verdict."""
        if self.lost:
            return Health.LOST
        if self.failed or self.needs:
            return Health.FAILED
        return Health.DEGRADED if self.reason else Health.HEALTHY

    @property
    def reason(self) -> str:
        """Every complaint in words; empty when there is none."""
        if self.lost:
            return self.lost
        complaints = [self.failed, self.needs]
        if self.memory_percent is not None:
            complaints.append(f"memory {self.memory_percent:.1f} % used")
        if self.hot_celsius is not None:
            complaints.append(f"{self.hot_celsius} °C hot")
        if self.throttled:
            complaints.append(f"throttled by {', '.join(self.throttled)}")
        complaints += [self.noted, self.awaits]
        return "; ".join(filter(None, complaints))

    def after(self, reading: Reading, incidents: tuple[Incident, ...] = ()) -> "Condition":
        """The condition once the card has answered with `reading`. What it doesn't report is no complaint."""
        throttled, clean_samples = self._throttled_after(reading)
        failed, well_samples = self._failed_after(reading, incidents)
        noted, noted_samples = self._noted_after(incidents)
        return Condition(
            failed=failed,
            well_samples=well_samples,
            needs=_needs(reading),
            memory_percent=self._memory_after(reading),
            hot_celsius=self._heat_after(reading),
            throttled=throttled,
            clean_samples=clean_samples,
            noted=noted,
            noted_samples=noted_samples,
            awaits=_awaits(reading),
        )

    def after_silence(self, problem: str) -> "Condition":
        """The condition once the card hasn't answered. One that comes back from that was reset, or is another one."""
        return Condition(lost=problem or "it does not answer")

    def _failed_after(self, reading: Reading, incidents: tuple[Incident, ...]) -> tuple[str, int]:
        fatal = [each.xid for each in incidents if each.xid is not None and gravity(each.xid) is Gravity.FATAL]
        if fatal:
            return words(fatal[-1]), 0
        well_samples = self.well_samples + 1 if reading.recovery_action == _NO_ACTION else 0
        if self.failed and well_samples < _CLEAN_SAMPLES:
            return self.failed, well_samples
        return "", 0

    def _noted_after(self, incidents: tuple[Incident, ...]) -> tuple[str, int]:
        notes = list(filter(None, map(_note, incidents)))
        if notes:
            return notes[-1], 0
        if self.noted and self.noted_samples + 1 < _NOTED_SAMPLES:
            return self.noted, self.noted_samples + 1
        return "", 0

    def _memory_after(self, reading: Reading) -> float | None:
        if reading.memory_used_bytes is None or not reading.memory_total_bytes:
            return None
        percent = 100.0 * reading.memory_used_bytes / reading.memory_total_bytes
        limit = _MEMORY_FULL_ABOVE if self.memory_percent is None else _MEMORY_FREE_BELOW
        return percent if percent > limit else None

    def _heat_after(self, reading: Reading) -> int | None:
        if reading.temperature_celsius is None:
            return None
        limit = _HOT_ABOVE if self.hot_celsius is None else _COOL_BELOW
        return reading.temperature_celsius if reading.temperature_celsius > limit else None

    def _throttled_after(self, reading: Reading) -> tuple[tuple[str, ...], int]:
        reasons = tuple(reason for reason in reading.throttle_reasons if reason in HARMFUL_REASONS)
        if reasons:
            return reasons, 0
        clean_samples = self.clean_samples + 1
        if self.throttled and clean_samples < _CLEAN_SAMPLES:
            return self.throttled, clean_samples
        return (), 0


def _note(incident: Incident) -> str:
    if incident.kind is EventKind.UNCORRECTED_ECC_ERROR:
        return "an ECC error could not be corrected"
    if incident.xid is not None and gravity(incident.xid) is Gravity.RECOVERED:
        return words(incident.xid)
    return ""


def _needs(reading: Reading) -> str:
    action = reading.recovery_action
    if action is not None and action != _NO_ACTION and action not in _MILD_ACTIONS:
        return f"the driver asks for {action}"
    return "a row of memory could not be remapped" if reading.row_remap_failed else ""


def _awaits(reading: Reading) -> str:
    if reading.recovery_action in _MILD_ACTIONS:
        return f"the driver asks for {reading.recovery_action}"
    return "a row of memory waits for a reset to be remapped" if reading.row_remap_pending else ""


HEALTHY: Final = Condition()
