"""What a GPU reading means for the workers on it."""

from dataclasses import dataclass
from typing import Final

__all__ = ["HEALTHY", "Condition", "GpuReading", "condition_of", "worst"]

# The driver halves clocks or worse when the hardware protects itself; a power cap is everyday life on a busy card.
_SLOWDOWNS: Final[dict[str, float]] = {
    "hw_slowdown": 1.5,
    "hw_thermal_slowdown": 1.5,
    "hw_power_brake_slowdown": 1.5,
    "sw_thermal_slowdown": 1.25,
    "sw_power_cap": 1.05,
}
_DEGRADED: Final = 1.1
_HOT_CELSIUS: Final = 85
_HOT: Final = 1.1
_FULL_MEMORY: Final = 0.98
_CRAMPED: Final = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """The latest reading of a GPU; None where the card does not report it.

    Attributes:
        failed: it answers, and can't be trusted: a critical XID, or the driver wants it reset.
    """

    lost: bool = False
    failed: bool = False
    degraded: bool = False
    temperature_celsius: float | None = None
    memory_used_share: float | None = None
    throttle_reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Condition:
    """What the state of its GPUs means for a worker: whether it can work, and a factor on every duration."""

    lost: bool = False
    slowdown: float = 1.0


HEALTHY: Final = Condition()


def condition_of(reading: GpuReading) -> Condition:
    """What one GPU means for a worker. Heat that has slowed it already counts once."""
    slowdown = max((_SLOWDOWNS.get(reason, 1.0) for reason in reading.throttle_reasons), default=1.0)
    if reading.degraded:
        slowdown = max(slowdown, _DEGRADED)
    if reading.temperature_celsius is not None and reading.temperature_celsius >= _HOT_CELSIUS:
        slowdown = max(slowdown, _HOT)
    if reading.memory_used_share is not None and reading.memory_used_share >= _FULL_MEMORY:
        slowdown *= _CRAMPED
    return Condition(lost=reading.lost or reading.failed, slowdown=slowdown)


def worst(conditions: list[Condition]) -> Condition:
    """What several GPUs mean for a worker that spans them: it is as slow as the slowest."""
    if not conditions:
        return HEALTHY
    return Condition(
        lost=any(condition.lost for condition in conditions),
        slowdown=max(condition.slowdown for condition in conditions),
    )
