"""What of a mesh.yaml is in the settings of each process, wherever it runs: beside the launcher or in a container."""

from typing import Any

from services.common.settings_worker import SimSettings
from services.mesh.config import MeshConfig, PoolConfig, WorkerConfig

__all__ = ["every_process", "gateway", "router", "telemetry", "worker"]


def every_process(mesh: MeshConfig) -> dict[str, Any]:
    """Those of ProcessSettings."""
    return {
        "otlp_endpoint": mesh.otlp_endpoint,
        "tracing": mesh.tracing,
        "metrics_push": mesh.metrics_push,
        "log_level": mesh.log_level,
    }


def telemetry(mesh: MeshConfig) -> dict[str, Any]:
    """Those of TelemetrySettings, besides."""
    return {"sample_seconds": mesh.sample_seconds}


def router(mesh: MeshConfig) -> dict[str, Any]:
    """Those of RouterSettings, besides."""
    return {
        "routing": mesh.routing,
        "pools": mesh.pool_names,
        "models": mesh.model_names,
        "expected_workers": mesh.worker_count,
        "max_waiting": mesh.max_waiting,
        "max_wait_seconds": mesh.max_wait_seconds,
        "picker_fallbacks": mesh.picker_fallbacks,
        "isolate_tenants": mesh.isolate_tenants,
    }


def gateway(mesh: MeshConfig) -> dict[str, Any]:
    """Those of GatewaySettings, besides."""
    return {
        "replicas": mesh.gateways,
        "jwt": mesh.jwt,
        "ledger": mesh.ledger,
        "guardrails": mesh.guardrails,
        "batches": mesh.batches,
        "request_timeout_seconds": mesh.request_timeout_seconds,
        "fleet_memory_seconds": mesh.fleet_memory_seconds,
        "drain_seconds": mesh.drain_seconds,
        "client_timeout_seconds": mesh.edge.client_timeout_seconds,
    }


def worker(mesh: MeshConfig, pool: PoolConfig, worker: WorkerConfig) -> dict[str, Any]:
    """Those of WorkerSettings, besides."""
    return {
        "pool": pool.name,
        "engine": worker.engine,
        "gpu_memory_utilization": worker.gpu_memory_utilization,
        "engine_args": worker.engine_args,
        "sim": worker.sim or SimSettings(),
        "upstream": worker.upstream,
        "watchdog": worker.watchdog,
        "max_queued": worker.max_queued,
        "new_forms_per_minute": mesh.new_forms_per_minute,
        "isolate_tenants": mesh.isolate_tenants,
        "drain_seconds": mesh.drain_seconds,
        "client_timeout_seconds": mesh.edge.client_timeout_seconds,
    }
