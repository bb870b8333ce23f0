"""Plain values as protobuf messages."""

from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from tokenloom.telemetry.v1 import telemetry_pb2 as pb

from services.telemetry.gpu import Change, Driver, DriverState, Gpu, Health, Sample

__all__ = ["list_response", "watch_response"]

_DRIVER_STATES: Final = {
    DriverState.READY: pb.DRIVER_STATE_READY,
    DriverState.ABSENT: pb.DRIVER_STATE_ABSENT,
    DriverState.FAILED: pb.DRIVER_STATE_FAILED,
}
_HEALTH: Final = {
    Health.HEALTHY: pb.GPU_HEALTH_HEALTHY,
    Health.DEGRADED: pb.GPU_HEALTH_DEGRADED,
    Health.LOST: pb.GPU_HEALTH_LOST,
}


def list_response(sample: Sample) -> pb.ListGpusResponse:
    """A whole sample."""
    return pb.ListGpusResponse(driver=_driver(sample.driver), gpus=[_gpu(gpu) for gpu in sample.gpus])


def watch_response(change: Change) -> pb.WatchGpusResponse:
    """What has changed."""
    return pb.WatchGpusResponse(
        driver=_driver(change.driver),
        gpus=[_gpu(gpu) for gpu in change.gpus],
        removed_uuids=change.removed_uuids,
    )


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
        utilization_percent=reading.utilization_percent,
        memory_utilization_percent=reading.memory_utilization_percent,
        memory_used_bytes=reading.memory_used_bytes,
        memory_total_bytes=reading.memory_total_bytes,
        temperature_celsius=reading.temperature_celsius,
        power_watts=reading.power_watts,
        power_limit_watts=reading.power_limit_watts,
        sm_clock_mhz=reading.sm_clock_mhz,
        memory_clock_mhz=reading.memory_clock_mhz,
        throttle_reasons=reading.throttle_reasons,
        uncorrected_ecc_error_count=reading.uncorrected_ecc_error_count,
        processes=[pb.GpuProcess(pid=each.pid, memory_used_bytes=each.memory_used_bytes) for each in reading.processes],
    )


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMicroseconds(int(seconds * 1e6))
    return timestamp
