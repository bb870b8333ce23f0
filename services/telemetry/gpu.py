"""What a GPU and its driver are, in plain values: neither NVML nor gRPC is known here."""

from dataclasses import dataclass, field
from enum import Enum

__all__ = ["Card", "Change", "Driver", "DriverState", "Gpu", "Health", "Process", "Reading", "Sample", "Scan"]


class DriverState(Enum):
    """How the driver is."""

    READY = "ready"
    ABSENT = "absent"
    FAILED = "failed"


class Health(Enum):
    """How a GPU is."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """Whether there is a driver to ask.

    Attributes:
        message: in words, when it isn't ready.
        version: when it is.
    """

    state: DriverState
    message: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A compute process on a GPU; its memory is None where the driver doesn't tell."""

    pid: int
    memory_used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a card said of itself at one moment. None: this card doesn't report it."""

    utilization_percent: int | None = None
    memory_utilization_percent: int | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_celsius: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttle_reasons: tuple[str, ...] = ()
    uncorrected_ecc_error_count: int | None = None
    processes: tuple[Process, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One card as the driver lists it.

    Attributes:
        index: NVML's, on this node.
        uuid: NVML's; empty when the card doesn't even say that.
        reading: None when the card doesn't answer.
        problem: why it doesn't, in words.
    """

    index: int
    uuid: str = ""
    name: str = ""
    reading: Reading | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What the driver answers when it is asked once for everything."""

    driver: Driver
    cards: tuple[Card, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU of this node with its latest reading and how it is.

    Attributes:
        sample_time: seconds since the epoch. Two GPUs that differ in nothing else are equal.
        health_reason: why it isn't healthy.
        reading: empty when it is lost.
    """

    uuid: str
    index: int
    name: str
    node: str
    sample_time: float = field(compare=False)
    health: Health
    health_reason: str
    reading: Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What is different between two samples."""

    driver: Driver
    gpus: tuple[Gpu, ...]
    removed_uuids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The driver and every GPU of this node at one moment, by index."""

    driver: Driver
    gpus: tuple[Gpu, ...] = ()

    def since(self, before: "Sample | None") -> Change | None:
        """What a watcher that knows `before` has yet to be told; None when that is nothing."""
        if before is None:
            return Change(driver=self.driver, gpus=self.gpus)
        known = {gpu.uuid: gpu for gpu in before.gpus}
        changed = tuple(gpu for gpu in self.gpus if known.get(gpu.uuid) != gpu)
        removed = tuple(sorted(known.keys() - {gpu.uuid for gpu in self.gpus}))
        if not changed and not removed and self.driver == before.driver:
            return None
        return Change(driver=self.driver, gpus=changed, removed_uuids=removed)
