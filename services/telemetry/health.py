"""How a GPU is, judged from its readings, slow to take a complaint back."""

from dataclasses import dataclass
from typing import Final

from services.telemetry.gpu import Health, Reading

__all__ = ["HARMFUL_REASONS", "HEALTHY", "Condition"]

# A sample between the two thresholds keeps the verdict that was there before, so that a card at the edge doesn't flap.
_MEMORY_FULL_ABOVE: Final = 98.0
_MEMORY_FREE_BELOW: Final = 95.0
_HOT_ABOVE: Final = 90
_COOL_BELOW: Final = 85
_CLEAN_SAMPLES: Final = 3

# A power cap or clocks that somebody has set are how cards are run; these are not.
HARMFUL_REASONS: Final = frozenset(
    {"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A GPU's complaints. The next one is a pure function of this one and a reading.

    Attributes:
        lost: why it doesn't answer, in words; empty when it does.
        memory_percent: memory in use, while that is too much.
        hot_celsius: its temperature, while that is too high.
        throttled: harmful reasons that held its clocks down, until three samples in a row were without any.
        clean_samples: samples without one so far.
    """

    lost: str = ""
    memory_percent: float | None = None
    hot_celsius: int | None = None
    throttled: tuple[str, ...] = ()
    clean_samples: int = 0

    @property
    def health(self) -> Health:
        """The verdict."""
        if self.lost:
            return Health.LOST
        return Health.DEGRADED if self.reason else Health.HEALTHY

    @property
    def reason(self) -> str:
        """Every complaint in words; empty when there is none."""
        if self.lost:
            return self.lost
        complaints = []
        if self.memory_percent is not None:
            complaints.append(f"memory {self.memory_percent:.1f} % used")
        if self.hot_celsius is not None:
            complaints.append(f"{self.hot_celsius} °C hot")
        if self.throttled:
            complaints.append(f"throttled by {', '.join(self.throttled)}")
        return "; ".join(complaints)

    def after(self, reading: Reading) -> "Condition":
        """The condition once the card has answered with `reading`. What it doesn't report is no complaint."""
        throttled, clean_samples = self._throttled_after(reading)
        return Condition(
            memory_percent=self._memory_after(reading),
            hot_celsius=self._heat_after(reading),
            throttled=throttled,
            clean_samples=clean_samples,
        )

    def after_silence(self, problem: str) -> "Condition":
        """The condition once the card hasn't answered."""
        return Condition(lost=problem or "it does not answer")

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


HEALTHY: Final = Condition()
