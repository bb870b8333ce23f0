"""The latest sample as Prometheus metrics. What a card doesn't report is not exposed."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from services.telemetry.gpu import DriverState, Gpu, Health
from services.telemetry.sampler import Sampler

__all__ = ["TelemetryCollector"]

_PREFIX: Final = "tokenloom_telemetry"
_LABELS: Final = ("uuid", "index", "name", "node")
_MHZ: Final = 1e6


def _scaled(field: str, scale: float = 1.0) -> Callable[[Gpu], float | None]:
    def value(gpu: Gpu) -> float | None:
        number = getattr(gpu.reading, field)
        return None if number is None else number * scale

    return value


# (name, help, value of a GPU)
_GAUGES: Final[tuple[tuple[str, str, Callable[[Gpu], float | None]], ...]] = (
    ("utilization_ratio", "Share of time in which a kernel ran.", _scaled("utilization_percent", 0.01)),
    (
        "memory_utilization_ratio",
        "Share of time in which memory was read or written.",
        _scaled("memory_utilization_percent", 0.01),
    ),
    ("memory_used_bytes", "Memory in use.", _scaled("memory_used_bytes")),
    ("memory_total_bytes", "Memory that the card has.", _scaled("memory_total_bytes")),
    ("temperature_celsius", "Core temperature.", _scaled("temperature_celsius")),
    ("power_watts", "Power drawn.", _scaled("power_watts")),
    ("power_limit_watts", "Power limit in force.", _scaled("power_limit_watts")),
    ("sm_clock_hertz", "Clock of the multiprocessors.", _scaled("sm_clock_mhz", _MHZ)),
    ("memory_clock_hertz", "Clock of the memory.", _scaled("memory_clock_mhz", _MHZ)),
    ("memory_temperature_celsius", "Temperature of the memory.", _scaled("memory_temperature_celsius")),
    (
        "slowdown_temperature_celsius",
        "Core temperature at which it slows down.",
        _scaled("slowdown_temperature_celsius"),
    ),
    ("fan_speed_ratio", "Fan speed intended, of the fastest.", _scaled("fan_speed_percent", 0.01)),
    ("performance_state", "P-state: 0 is the fastest, 15 the slowest.", _scaled("performance_state")),
    ("max_sm_clock_hertz", "The fastest clock of the multiprocessors.", _scaled("max_sm_clock_mhz", _MHZ)),
    (
        "pcie_transmit_bytes_per_second",
        "Sent over PCI Express.",
        _scaled("pcie_transmit_bytes_per_second"),
    ),
    (
        "pcie_receive_bytes_per_second",
        "Received over PCI Express.",
        _scaled("pcie_receive_bytes_per_second"),
    ),
    ("pcie_link_generation", "Generation of the PCI Express link.", _scaled("pcie_link_generation")),
    ("pcie_link_width", "Lanes of the PCI Express link.", _scaled("pcie_link_width")),
    ("row_remap_pending", "1 when a row of memory waits for a reset.", _scaled("row_remap_pending")),
    ("row_remap_failed", "1 when a row of memory could not be remapped.", _scaled("row_remap_failed")),
    ("failed", "1 when it can't be trusted with work.", lambda gpu: float(gpu.health is Health.FAILED)),
    ("healthy", "1 when nothing is wrong.", lambda gpu: float(gpu.health is Health.HEALTHY)),
    ("lost", "1 when it does not answer.", lambda gpu: float(gpu.health is Health.LOST)),
)

# The same, of what only grows.
_COUNTERS: Final[tuple[tuple[str, str, Callable[[Gpu], float | None]], ...]] = (
    (
        "uncorrected_ecc_errors",
        "Uncorrected ECC errors since the driver was loaded.",
        _scaled("uncorrected_ecc_error_count"),
    ),
    ("corrected_ecc_errors", "Corrected ECC errors since the driver was loaded.", _scaled("corrected_ecc_error_count")),
    (
        "remapped_rows",
        "Rows of memory remapped after uncorrectable errors.",
        _scaled("uncorrectable_remapped_row_count"),
    ),
    ("pcie_replays", "PCI Express packets that were sent again.", _scaled("pcie_replay_count")),
    ("energy_joules", "Energy since the driver was loaded.", _scaled("energy_joules")),
)


class TelemetryCollector(Collector):
    """Reads the sampler when Prometheus asks, in Prometheus' own thread."""

    def __init__(
        self,
        sampler: Sampler,
        *,
        publish_failures: Callable[[], int],
        agents: Callable[[], dict[str, bool]] = dict,
    ) -> None:
        """`publish_failures` counts the samples that Redis didn't get; `agents` says which agents answer a hub."""
        self._sampler = sampler
        self._publish_failures = publish_failures
        self._agents = agents

    def collect(self) -> Iterator[Metric]:
        """Every metric of this process."""
        sample = self._sampler.latest
        yield self._driver_up()
        yield self._samples()
        yield CounterMetricFamily(
            f"{_PREFIX}_publish_failures", "Samples that could not be written to Redis.", self._publish_failures()
        )
        yield self._agents_up()
        yield from _gpu_metrics(() if sample is None else sample.gpus)

    def _driver_up(self) -> Metric:
        sample = self._sampler.latest
        is_up = sample is not None and sample.driver.state is DriverState.READY
        version = sample.driver.version if sample is not None else ""
        up = GaugeMetricFamily(f"{_PREFIX}_driver_up", "1 when NVML answers.", labels=("version",))
        up.add_metric((version,), float(is_up))
        return up

    def _agents_up(self) -> Metric:
        up = GaugeMetricFamily(f"{_PREFIX}_agent_up", "1 when an agent answers this hub.", labels=("agent",))
        for address, here in self._agents().items():
            up.add_metric((address,), float(here))
        return up

    def _samples(self) -> Metric:
        samples = CounterMetricFamily(
            f"{_PREFIX}_samples", "Samples taken, by how the driver was found.", labels=("driver",)
        )
        for state, count in self._sampler.counts.items():
            samples.add_metric((state.value,), count)
        return samples


def _gpu_metrics(gpus: Iterable[Gpu]) -> Iterator[Metric]:
    for name, explanation, value_of in _GAUGES:
        gauge = GaugeMetricFamily(f"{_PREFIX}_gpu_{name}", explanation, labels=_LABELS)
        for gpu in gpus:
            value = value_of(gpu)
            if value is not None:
                gauge.add_metric(_labels(gpu), value)
        yield gauge
    for name, explanation, value_of in _COUNTERS:
        counter = CounterMetricFamily(f"{_PREFIX}_gpu_{name}", explanation, labels=_LABELS)
        for gpu in gpus:
            value = value_of(gpu)
            if value is not None:
                counter.add_metric(_labels(gpu), value)
        yield counter
    yield _throttled(gpus)
    yield _xids(gpus)
    yield _worker_memory(gpus)
    yield _instance_memory(gpus)


def _throttled(gpus: Iterable[Gpu]) -> Metric:
    throttled = GaugeMetricFamily(
        f"{_PREFIX}_gpu_throttled", "1 for each reason that holds the clocks down.", labels=(*_LABELS, "reason")
    )
    for gpu in gpus:
        for reason in gpu.reading.throttle_reasons:
            throttled.add_metric((*_labels(gpu), reason), 1.0)
    return throttled


def _xids(gpus: Iterable[Gpu]) -> Metric:
    xids = CounterMetricFamily(
        f"{_PREFIX}_gpu_xid_errors", "Errors that the driver reported, by XID.", labels=(*_LABELS, "xid")
    )
    for gpu in gpus:
        for xid, count in gpu.xid_counts:
            xids.add_metric((*_labels(gpu), str(xid)), count)
    return xids


def _worker_memory(gpus: Iterable[Gpu]) -> Metric:
    # By worker and not by process: process ids are without number.
    memory = GaugeMetricFamily(
        f"{_PREFIX}_gpu_worker_memory_bytes",
        "Memory held by each process of the mesh; worker is empty for what others hold.",
        labels=(*_LABELS, "worker"),
    )
    for gpu in gpus:
        held: Counter[str] = Counter()
        instances = (each for instance in gpu.reading.mig_instances for each in instance.processes)
        by_pid = {each.pid: each for each in (*instances, *gpu.reading.processes)}
        for process in by_pid.values():
            if process.memory_used_bytes is not None:
                held[process.worker] += process.memory_used_bytes
        for worker, used in sorted(held.items()):
            memory.add_metric((*_labels(gpu), worker), used)
    return memory


def _instance_memory(gpus: Iterable[Gpu]) -> Metric:
    memory = GaugeMetricFamily(
        f"{_PREFIX}_gpu_mig_memory_used_bytes",
        "Memory in use of each instance of a GPU that is split.",
        labels=(*_LABELS, "mig_uuid", "profile"),
    )
    for gpu in gpus:
        for each in gpu.reading.mig_instances:
            if each.memory_used_bytes is not None:
                memory.add_metric((*_labels(gpu), each.uuid, each.name), each.memory_used_bytes)
    return memory


def _labels(gpu: Gpu) -> tuple[str, str, str, str]:
    return gpu.uuid, str(gpu.index), gpu.name, gpu.node
