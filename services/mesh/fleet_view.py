"""The fleet as people look at it: workers and their GPUs joined, and in words what is wrong."""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, Literal

import msgspec
from google.protobuf.duration_pb2 import Duration
from tokenloom.router.v1 import admin_pb2, router_pb2
from tokenloom.telemetry.v1 import telemetry_pb2

__all__ = ["FleetView", "GpuView", "MigView", "TenantView", "Trouble", "WorkerView", "plain", "view_of"]

_LONGEST: Final = 128


class MigView(msgspec.Struct, kw_only=True, frozen=True):
    """An instance of a GPU that is split."""

    uuid: str
    name: str
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    workers: list[str]


class GpuView(msgspec.Struct, kw_only=True, frozen=True):
    """A GPU; None where the card does not report it."""

    uuid: str
    node: str
    index: int
    name: str
    health: str
    """ "healthy", "degraded", "lost", …"""
    reason: str
    utilization_percent: int | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    temperature_celsius: int | None
    power_watts: float | None
    power_limit_watts: float | None
    throttle_reasons: list[str]
    workers: list[str]
    """Those that run on it, or on an instance of it."""
    instances: list[MigView]
    events: list[str]
    """What happened to it lately, in words, the latest last."""


class WorkerView(msgspec.Struct, kw_only=True, frozen=True):
    """A worker; None where it has not measured that yet."""

    name: str
    pool: str
    engine: str
    models: list[str]
    state: str
    """ "ready", or why it takes no work."""
    is_ready: bool
    running: int
    waiting: int
    """In its engine."""
    slots: int
    leases: int
    kv_percent: float
    tokens_per_second: float
    decode_step_ms: float | None
    prefill_tokens_per_second: float | None
    prefix_hit_percent: float | None
    report_age_ms: int
    gpus: list[str]
    slow_reasons: list[str]


class TenantView(msgspec.Struct, kw_only=True, frozen=True):
    """What a tenant has under way."""

    tenant: str
    running: int
    waiting: int


class Trouble(msgspec.Struct, frozen=True):
    """Something that is wrong."""

    kind: Literal["no_workers", "degraded", "waiting", "worker_out", "worker_slow", "machine", "driver", "gpu"]
    subject: str
    what: str


class FleetView(msgspec.Struct, kw_only=True, frozen=True):
    """Everything at one moment."""

    time: str
    """When the router said it, ISO 8601, UTC."""
    edge: str
    driver: str
    """ "ready", "absent", "failed", or empty while telemetry has said nothing."""
    gpus: list[GpuView]
    workers: list[WorkerView]
    tenants: list[TenantView]
    waiting: int
    """Requests that wait in the router."""
    degradation: str
    """ "none", "short_outputs" or "refusing"."""
    troubles: list[Trouble]

    @property
    def streams(self) -> int:
        """Requests that run on a worker."""
        return sum(worker.leases for worker in self.workers)

    @property
    def tokens_per_second(self) -> float:
        """Of all workers."""
        return sum(worker.tokens_per_second for worker in self.workers)


def view_of(
    edge: str,
    fleet: admin_pb2.WatchFleetResponse,
    gpus: Mapping[str, telemetry_pb2.Gpu],
    driver: telemetry_pb2.Driver | None,
    *,
    nodes: Sequence[telemetry_pb2.Node] = (),
    heard_at: datetime | None = None,
) -> FleetView:
    """Joins what the router and telemetry said; `gpus` are by UUID. `heard_at`: when the router said it; None: now."""
    workers = [_worker(worker) for worker in fleet.workers]
    cards = [_gpu(gpu, workers) for gpu in sorted(gpus.values(), key=lambda gpu: (gpu.node, gpu.index))]
    return FleetView(
        time=(heard_at or datetime.now(UTC)).isoformat(timespec="milliseconds"),
        edge=edge,
        driver="" if driver is None else _name(telemetry_pb2.DriverState, driver.state, "DRIVER_STATE_"),
        gpus=cards,
        workers=workers,
        tenants=[
            TenantView(tenant=plain(one.tenant_id), running=one.running_count, waiting=one.waiting_count)
            for one in fleet.tenants
        ],
        waiting=fleet.waiting_count,
        degradation=_name(admin_pb2.DegradationLevel, fleet.degradation_level, "DEGRADATION_LEVEL_"),
        troubles=[*_of_fleet(fleet, workers), *_of_workers(workers, cards), *_of_gpus(cards, driver, nodes)],
    )


def plain(text: str) -> str:
    """A name that others chose, without what a terminal would obey."""
    shown = "".join("?" if unicodedata.category(character).startswith("C") else character for character in text)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"


def _worker(worker: admin_pb2.Worker) -> WorkerView:
    said, load = worker.registration, worker.load
    queried = load.prefix_query_token_count
    return WorkerView(
        name=plain(said.worker_id),
        pool=plain(said.pool),
        engine=plain(said.engine),
        models=[plain(card.name) for card in load.models or said.models],
        state=plain(_state(worker)),
        is_ready=not worker.excluded_reason,
        running=load.running_count,
        waiting=load.waiting_count,
        slots=said.max_running_count,
        leases=worker.lease_count,
        kv_percent=round(100 * load.kv_usage_ratio, 1),
        tokens_per_second=round(load.output_tokens_per_second, 1),
        decode_step_ms=_milliseconds(load.decode_step_duration) if load.HasField("decode_step_duration") else None,
        prefill_tokens_per_second=round(load.prefill_tokens_per_second, 1) or None,
        prefix_hit_percent=round(100 * load.prefix_hit_token_count / queried, 1) if queried else None,
        report_age_ms=worker.report_age_duration.ToMilliseconds(),
        gpus=list(said.gpu_uuids),
        slow_reasons=[plain(reason) for reason in worker.slow_reasons],
    )


def _state(worker: admin_pb2.Worker) -> str:
    if not worker.excluded_reason:
        return "ready"
    if worker.load.state == router_pb2.WORKER_STATE_ASLEEP:
        return "asleep"
    why = worker.load.state_reason
    return f"{worker.excluded_reason}: {why}" if why else worker.excluded_reason


def _gpu(gpu: telemetry_pb2.Gpu, workers: Iterable[WorkerView]) -> GpuView:
    return GpuView(
        uuid=gpu.uuid,
        node=plain(gpu.node),
        index=gpu.index,
        name=plain(gpu.name),
        health=_name(telemetry_pb2.GpuHealth, gpu.health, "GPU_HEALTH_"),
        reason=plain(gpu.health_reason),
        utilization_percent=gpu.utilization_percent if gpu.HasField("utilization_percent") else None,
        memory_used_bytes=gpu.memory_used_bytes if gpu.HasField("memory_used_bytes") else None,
        memory_total_bytes=gpu.memory_total_bytes if gpu.HasField("memory_total_bytes") else None,
        temperature_celsius=gpu.temperature_celsius if gpu.HasField("temperature_celsius") else None,
        power_watts=gpu.power_watts if gpu.HasField("power_watts") else None,
        power_limit_watts=gpu.power_limit_watts if gpu.HasField("power_limit_watts") else None,
        throttle_reasons=[plain(reason) for reason in gpu.throttle_reasons],
        workers=_users(workers, gpu.uuid, *(instance.uuid for instance in gpu.mig_instances)),
        instances=[
            MigView(
                uuid=one.uuid,
                name=plain(one.name),
                memory_used_bytes=one.memory_used_bytes if one.HasField("memory_used_bytes") else None,
                memory_total_bytes=one.memory_total_bytes if one.HasField("memory_total_bytes") else None,
                workers=_users(workers, one.uuid),
            )
            for one in gpu.mig_instances
        ],
        events=[_event(event) for event in gpu.recent_events],
    )


def _users(workers: Iterable[WorkerView], *uuids: str) -> list[str]:
    return [worker.name for worker in workers if not set(uuids).isdisjoint(worker.gpus)]


def _event(event: telemetry_pb2.GpuEvent) -> str:
    at = event.time.ToDatetime().strftime("%H:%M:%S")
    what = plain(event.message) or _name(telemetry_pb2.GpuEventKind, event.kind, "GPU_EVENT_KIND_")
    return f"{at} UTC: {what}"


def _of_fleet(fleet: admin_pb2.WatchFleetResponse, workers: Sequence[WorkerView]) -> Iterator[Trouble]:
    if not workers:
        yield Trouble("no_workers", "workers", "none is registered")
    if fleet.degradation_reason:
        yield Trouble("degraded", "mesh", f"degraded: {plain(fleet.degradation_reason)}")
    if fleet.waiting_count:
        yield Trouble("waiting", "queue", f"{fleet.waiting_count} requests wait for a worker with room")


def _of_workers(workers: Iterable[WorkerView], gpus: Sequence[GpuView]) -> Iterator[Trouble]:
    for worker in workers:
        own = [gpu for gpu in gpus if worker.name in gpu.workers]
        causes = {gpu.reason or ", ".join(gpu.throttle_reasons) for gpu in own} - {""}
        of_gpu = f"; its GPU: {'; '.join(sorted(causes))}" if causes else ""
        if not worker.is_ready:
            yield Trouble("worker_out", worker.name, f"takes no work: {worker.state}{of_gpu}")
            continue
        for reason in worker.slow_reasons:
            yield Trouble("worker_slow", worker.name, f"slow: {reason}{of_gpu}")


def _of_gpus(
    gpus: Iterable[GpuView], driver: telemetry_pb2.Driver | None, nodes: Sequence[telemetry_pb2.Node]
) -> Iterator[Trouble]:
    drivers = [("NVIDIA driver", driver)] if driver is not None and not nodes else []
    for node in nodes:
        if node.away:
            yield Trouble("machine", f"machine {plain(node.name)}", "its telemetry does not answer")
        drivers.append((f"NVIDIA driver of {plain(node.name)}", node.driver))
    for subject, one in drivers:
        if one.state == telemetry_pb2.DRIVER_STATE_FAILED:
            yield Trouble("driver", subject, plain(one.message))
    for gpu in gpus:
        if gpu.health != "healthy":
            yield Trouble("gpu", f"GPU {gpu.node}/{gpu.index}", f"{gpu.health}: {gpu.reason or 'for no known reason'}")


def _name(enum: object, value: int, prefix: str) -> str:
    # One that a later version added has no name here.
    descriptor = enum.DESCRIPTOR.values_by_number  # type: ignore[attr-defined]  # every generated enum has it
    found = descriptor.get(value)
    return found.name.removeprefix(prefix).lower() if found is not None else str(value)


def _milliseconds(duration: Duration) -> float:
    return round(duration.ToNanoseconds() / 1e6, 2)
