"""Plain values as protobuf messages, and back where a hub hears of other machines."""

from collections.abc import Sequence
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from tokenloom.telemetry.v1 import telemetry_pb2 as pb

from services.telemetry.gpu import (
    PLAIN_FIELDS,
    Change,
    Driver,
    DriverState,
    Event,
    EventKind,
    Gpu,
    Health,
    MigInstance,
    Node,
    Process,
    Reading,
    Sample,
)

__all__ = ["gpu_from", "list_response", "nodes_from", "watch_response"]

_DRIVER_STATES: Final = {
    DriverState.READY: pb.DRIVER_STATE_READY,
    DriverState.ABSENT: pb.DRIVER_STATE_ABSENT,
    DriverState.FAILED: pb.DRIVER_STATE_FAILED,
}
_HEALTH: Final = {
    Health.HEALTHY: pb.GPU_HEALTH_HEALTHY,
    Health.DEGRADED: pb.GPU_HEALTH_DEGRADED,
    Health.LOST: pb.GPU_HEALTH_LOST,
    Health.FAILED: pb.GPU_HEALTH_FAILED,
}
_EVENTS: Final = {
    EventKind.XID: pb.GPU_EVENT_KIND_XID,
    EventKind.UNCORRECTED_ECC_ERROR: pb.GPU_EVENT_KIND_UNCORRECTED_ECC_ERROR,
    EventKind.MIG_CHANGED: pb.GPU_EVENT_KIND_MIG_CHANGED,
    EventKind.LOST: pb.GPU_EVENT_KIND_LOST,
    EventKind.RETURNED: pb.GPU_EVENT_KIND_RETURNED,
}
_STATE_FROM: Final = {value: key for key, value in _DRIVER_STATES.items()}
_HEALTH_FROM: Final = {value: key for key, value in _HEALTH.items()}
_EVENT_FROM: Final = {value: key for key, value in _EVENTS.items()}


def list_response(sample: Sample) -> pb.ListGpusResponse:
    """A whole sample."""
    return pb.ListGpusResponse(
        driver=_driver(sample.driver), gpus=[_gpu(gpu) for gpu in sample.gpus], nodes=_nodes(sample.nodes)
    )


def watch_response(change: Change) -> pb.WatchGpusResponse:
    """What has changed."""
    return pb.WatchGpusResponse(
        driver=_driver(change.driver),
        gpus=[_gpu(gpu) for gpu in change.gpus],
        removed_uuids=change.removed_uuids,
        nodes=_nodes(change.nodes),
    )


def nodes_from(nodes: Sequence[pb.Node]) -> tuple[Node, ...]:
    """The machines of a message."""
    return tuple(Node(name=each.name, driver=_driver_from(each.driver), away=each.away) for each in nodes)


def gpu_from(gpu: pb.Gpu) -> Gpu:
    """A GPU of a message. What this version has no name for counts as what is harmless and nearest to it."""
    values = {name: _present(gpu, name) for name in PLAIN_FIELDS}
    return Gpu(
        uuid=gpu.uuid,
        index=gpu.index,
        name=gpu.name,
        node=gpu.node,
        sample_time=gpu.sample_time.ToMicroseconds() / 1e6,
        health=_HEALTH_FROM.get(gpu.health, Health.DEGRADED),
        health_reason=gpu.health_reason,
        reading=Reading(
            **values,
            throttle_reasons=tuple(gpu.throttle_reasons),
            processes=_processes_from(gpu.processes),
            mig_instances=tuple(map(_instance_from, gpu.mig_instances)),
        ),
        events=tuple(_event_from(each) for each in gpu.recent_events if each.kind in _EVENT_FROM),
    )


def _nodes(nodes: Sequence[Node]) -> list[pb.Node]:
    return [pb.Node(name=node.name, driver=_driver(node.driver), away=node.away) for node in nodes]


def _driver(driver: Driver) -> pb.Driver:
    return pb.Driver(state=_DRIVER_STATES[driver.state], message=driver.message, version=driver.version)


def _gpu(gpu: Gpu) -> pb.Gpu:
    reading = gpu.reading
    return pb.Gpu(
        uuid=gpu.uuid,
        index=gpu.index,
        name=gpu.name,
        node=gpu.node,
        sample_time=_timestamp(gpu.sample_time),
        health=_HEALTH[gpu.health],
        health_reason=gpu.health_reason,
        throttle_reasons=reading.throttle_reasons,
        processes=_processes(reading.processes),
        mig_instances=[_instance(each) for each in reading.mig_instances],
        recent_events=[_event(each) for each in gpu.events],
        **{name: getattr(reading, name) for name in PLAIN_FIELDS},
    )


def _processes(processes: Sequence[Process]) -> list[pb.GpuProcess]:
    return [
        pb.GpuProcess(pid=each.pid, memory_used_bytes=each.memory_used_bytes, worker=each.worker) for each in processes
    ]


def _processes_from(processes: Sequence[pb.GpuProcess]) -> tuple[Process, ...]:
    return tuple(
        Process(pid=each.pid, memory_used_bytes=_present(each, "memory_used_bytes"), worker=each.worker)
        for each in processes
    )


def _instance(instance: MigInstance) -> pb.MigInstance:
    return pb.MigInstance(
        uuid=instance.uuid,
        name=instance.name,
        gpu_instance_id=instance.gpu_instance_id,
        compute_instance_id=instance.compute_instance_id,
        memory_used_bytes=instance.memory_used_bytes,
        memory_total_bytes=instance.memory_total_bytes,
        processes=_processes(instance.processes),
    )


def _instance_from(instance: pb.MigInstance) -> MigInstance:
    return MigInstance(
        uuid=instance.uuid,
        name=instance.name,
        gpu_instance_id=_present(instance, "gpu_instance_id"),
        compute_instance_id=_present(instance, "compute_instance_id"),
        memory_used_bytes=_present(instance, "memory_used_bytes"),
        memory_total_bytes=_present(instance, "memory_total_bytes"),
        processes=_processes_from(instance.processes),
    )


def _event(event: Event) -> pb.GpuEvent:
    return pb.GpuEvent(time=_timestamp(event.time), kind=_EVENTS[event.kind], xid=event.xid, message=event.message)


def _event_from(event: pb.GpuEvent) -> Event:
    return Event(
        time=event.time.ToMicroseconds() / 1e6,
        kind=_EVENT_FROM[event.kind],
        xid=_present(event, "xid"),
        message=event.message,
    )


def _driver_from(driver: pb.Driver) -> Driver:
    state = _STATE_FROM.get(driver.state, DriverState.FAILED)
    return Driver(state=state, message=driver.message, version=driver.version)


def _present(message: Any, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMicroseconds(int(seconds * 1e6))
    return timestamp
