"""What a GPU and its driver are, in plain values: neither NVML nor gRPC is known here."""

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Final

__all__ = [
    "PLAIN_FIELDS",
    "Card",
    "Change",
    "Driver",
    "DriverState",
    "Event",
    "EventKind",
    "Gpu",
    "Health",
    "Incident",
    "MigInstance",
    "Node",
    "Process",
    "Reading",
    "Sample",
    "Scan",
]


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
    FAILED = "failed"


class EventKind(Enum):
    """What can happen to a GPU."""

    XID = "xid"
    UNCORRECTED_ECC_ERROR = "uncorrected_ecc_error"
    MIG_CHANGED = "mig_changed"
    LOST = "lost"
    RETURNED = "returned"


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
    """A process on a GPU.

    Attributes:
        memory_used_bytes: None where the driver doesn't tell.
        worker: the process of the mesh that it belongs to; empty when it is none, or may not be looked at.
    """

    pid: int
    memory_used_bytes: int | None
    worker: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigInstance:
    """A part of a GPU that is split; None: not reported."""

    uuid: str
    name: str = ""
    gpu_instance_id: int | None = None
    compute_instance_id: int | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    processes: tuple[Process, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """What the driver tells of its own accord; `xid` is NVIDIA's number of the error, None of other kinds."""

    kind: EventKind
    xid: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a GPU, noticed at `time` (seconds since the epoch)."""

    time: float
    kind: EventKind
    xid: int | None = None
    message: str = ""


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
    memory_temperature_celsius: int | None = None
    slowdown_temperature_celsius: int | None = None
    fan_speed_percent: int | None = None
    performance_state: int | None = None
    max_sm_clock_mhz: int | None = None
    energy_joules: float | None = None
    pcie_transmit_bytes_per_second: int | None = None
    pcie_receive_bytes_per_second: int | None = None
    pcie_link_generation: int | None = None
    pcie_link_width: int | None = None
    max_pcie_link_generation: int | None = None
    max_pcie_link_width: int | None = None
    pcie_replay_count: int | None = None
    corrected_ecc_error_count: int | None = None
    uncorrectable_remapped_row_count: int | None = None
    row_remap_pending: bool | None = None
    row_remap_failed: bool | None = None
    recovery_action: str | None = None
    mig_enabled: bool | None = None
    mig_instances: tuple[MigInstance, ...] = ()
    processes: tuple[Process, ...] = ()


PLAIN_FIELDS: Final = tuple(each.name for each in fields(Reading) if each.default is None)
"""The fields of a reading that are one value each, or None where a card doesn't report it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One card as the driver lists it.

    Attributes:
        index: NVML's, on this node.
        uuid: NVML's; empty when the card doesn't even say that.
        reading: None when the card doesn't answer.
        problem: why it doesn't, in words.
        incidents: what the driver has told of it since the scan before.
    """

    index: int
    uuid: str = ""
    name: str = ""
    reading: Reading | None = None
    problem: str = ""
    incidents: tuple[Incident, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What the driver answers when it is asked once for everything."""

    driver: Driver
    cards: tuple[Card, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU with its latest reading and how it is.

    Attributes:
        sample_time: seconds since the epoch. Two GPUs that differ in nothing else are equal.
        health_reason: why it isn't healthy.
        reading: empty when it is lost.
        events: what happened to it lately, the oldest first.
        xid_counts: how often it had which XID since this agent started, by XID; known of this node's own GPUs only.
    """

    uuid: str
    index: int
    name: str
    node: str
    sample_time: float = field(compare=False)
    health: Health
    health_reason: str
    reading: Reading
    events: tuple[Event, ...] = ()
    xid_counts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine; `away`: its agent doesn't answer."""

    name: str
    driver: Driver
    away: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What is different between two samples."""

    driver: Driver
    gpus: tuple[Gpu, ...]
    removed_uuids: tuple[str, ...] = ()
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The driver and every GPU at one moment, by node and index.

    Attributes:
        nodes: the machines that they are in.
    """

    driver: Driver
    gpus: tuple[Gpu, ...] = ()
    nodes: tuple[Node, ...] = ()

    def since(self, before: "Sample | None") -> Change | None:
        """What a watcher that knows `before` has yet to be told; None when that is nothing."""
        if before is None:
            return Change(driver=self.driver, gpus=self.gpus, nodes=self.nodes)
        known = {gpu.uuid: gpu for gpu in before.gpus}
        changed = tuple(gpu for gpu in self.gpus if known.get(gpu.uuid) != gpu)
        removed = tuple(sorted(known.keys() - {gpu.uuid for gpu in self.gpus}))
        same = self.driver == before.driver and self.nodes == before.nodes
        if not changed and not removed and same:
            return None
        return Change(driver=self.driver, gpus=changed, removed_uuids=removed, nodes=self.nodes)
