"""The configuration of each process, as `python -m services.NAME --config FILE` reads it and the launcher writes it.

What all processes have, and the small ones; settings_worker.py and settings_gateway.py have the rest.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from services.common.policy import Policy

__all__ = [
    "Address",
    "Count",
    "Fallbacks",
    "LogLevel",
    "MetricsPushSettings",
    "Name",
    "Positive",
    "ProcessSettings",
    "RouterSettings",
    "SampleSeconds",
    "TelemetrySettings",
    "TracingSettings",
    "Waiting",
]

Address = Annotated[str, Meta(pattern=r"^.+:\d{1,5}$", description="host:port; port 0 takes any free one")]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


LogLevel = Literal["debug", "info", "warning", "error"]
SampleSeconds = Annotated[float, Meta(ge=0.1, le=60)]
Waiting = Annotated[int, Meta(ge=0, le=1_000_000)]
Fallbacks = Annotated[int, Meta(ge=0, le=8)]


class TracingSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Which traces are kept, where spans go anywhere."""

    sample_ratio: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Share of the requests whose trace is kept whatever comes of them, unless a client has decided it already."""
    slow_seconds: Positive = 10.0
    """Of the others, each process keeps its part of those that failed, moved to another worker, or took so long."""


class MetricsPushSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Where metrics are pushed beside being served, and how often."""

    endpoint: Address
    """A backend that takes metrics over OTLP gRPC."""
    seconds: Annotated[float, Meta(ge=0.5, le=3600)] = 15.0
    """Between two pushes."""


class ProcessSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What every process has."""

    name: Name
    """The process's name, for example "worker-0"; a worker is known to the router by it."""
    listen: Address
    """Where it serves gRPC."""
    metrics: Address
    """Where it serves Prometheus metrics over HTTP."""
    otlp_endpoint: Address | None = None
    """Where spans go, over OTLP gRPC; null exports none."""
    tracing: TracingSettings = TracingSettings()
    """Which ones."""
    metrics_push: MetricsPushSettings | None = None
    """Where metrics go, over OTLP gRPC; null: they wait for scrapes only."""
    log_level: LogLevel = "info"


class TelemetrySettings(ProcessSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """services.telemetry"""

    node: str = ""
    """The name of this machine in readings; empty: its host name."""
    sample_seconds: SampleSeconds = 1.0
    own_gpus: bool = True
    """Whether this machine's GPUs are sampled; a hub on a machine without any needs not."""
    agents: list[Address] = []
    """Agents of other machines, whose GPUs are joined to this one's own: then this is the hub to watch."""
    redis_url: str | None = None
    """Where this machine's readings are published besides gRPC and Prometheus, for example redis://127.0.0.1:6379/0."""


class RouterSettings(ProcessSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """services.router"""

    picker: Address | None = None
    """Where it serves the endpoint picker for our own edge, and sessions of gateways, over a leaner server than that of
    `listen`, which serves both for anybody else; null does without."""
    picker_fallbacks: Fallbacks = 0
    """How many further endpoints other gateways are named after the one picked, for those that can try one after the
    other (Envoy's override_host policy). An ORIGINAL_DST cluster takes none."""
    telemetry: list[Address] = []
    """Telemetry agents whose GPU readings are joined to the workers."""
    isolate_tenants: bool = True
    """Whether workers keep what tenants' prompts leave in caches apart."""
    max_waiting: Waiting = 1024
    """Requests that may wait for a worker; the next one is refused with NO_CAPACITY."""
    max_wait_seconds: Positive = 60.0
    """Longest that a request waits before it is refused."""
    ready_grace_seconds: Annotated[float, Meta(ge=0)] = 5.0
    """How long a request waits for a worker to register when there is none at all."""
    routing: Policy = Policy()
    """The policy in force at the start, unless `policy_path` has one."""
    policy_path: str | None = None
    """The file that keeps the policy: read at the start and whenever it changes, written when an operator sets another
    one; null: what is set lasts as long as the process."""
    pools: list[Name] | None = None
    """The pools that a policy may name; null: any."""
    models: list[str] | None = None
    """The models that a policy may name, beside those that workers serve; null: any."""
    expected_workers: Annotated[int, Meta(ge=0)] = 0
    """Workers that there are when all is well; 0: as many as were seen lately."""
