"""The latest sample as Prometheus metrics. What a card doesn't report is not exposed."""

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
    ("healthy", "1 when nothing is wrong.", lambda gpu: float(gpu.health is Health.HEALTHY)),
    ("lost", "1 when it does not answer.", lambda gpu: float(gpu.health is Health.LOST)),
)


class TelemetryCollector(Collector):
    """Reads the sampler when Prometheus asks, in Prometheus' own thread."""

    def __init__(self, sampler: Sampler, *, publish_failures: Callable[[], int]) -> None:
        """`publish_failures` counts the samples that Redis didn't get."""
        self._sampler = sampler
        self._publish_failures = publish_failures

    def collect(self) -> Iterator[Metric]:
        """Every metric of this process."""
        sample = self._sampler.latest
        yield self._driver_up()
        yield self._samples()
        yield CounterMetricFamily(
            f"{_PREFIX}_publish_failures", "Samples that could not be written to Redis.", self._publish_failures()
        )
        yield from _gpu_metrics(() if sample is None else sample.gpus)

    def _driver_up(self) -> Metric:
        sample = self._sampler.latest
        is_up = sample is not None and sample.driver.state is DriverState.READY
        version = sample.driver.version if sample is not None else ""
        up = GaugeMetricFamily(f"{_PREFIX}_driver_up", "1 when NVML answers.", labels=("version",))
        up.add_metric((version,), float(is_up))
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
    yield _throttled(gpus)
    yield _ecc_errors(gpus)


def _throttled(gpus: Iterable[Gpu]) -> Metric:
    throttled = GaugeMetricFamily(
        f"{_PREFIX}_gpu_throttled", "1 for each reason that holds the clocks down.", labels=(*_LABELS, "reason")
    )
    for gpu in gpus:
        for reason in gpu.reading.throttle_reasons:
            throttled.add_metric((*_labels(gpu), reason), 1.0)
    return throttled


def _ecc_errors(gpus: Iterable[Gpu]) -> Metric:
    errors = CounterMetricFamily(
        f"{_PREFIX}_gpu_uncorrected_ecc_errors",
        "Uncorrected ECC errors since the driver was loaded.",
        labels=_LABELS,
    )
    for gpu in gpus:
        count = gpu.reading.uncorrected_ecc_error_count
        if count is not None:
            errors.add_metric(_labels(gpu), count)
    return errors


def _labels(gpu: Gpu) -> tuple[str, str, str, str]:
    return gpu.uuid, str(gpu.index), gpu.name, gpu.node
