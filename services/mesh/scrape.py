"""Where Prometheus finds the processes of a mesh, in the form of its file_sd_configs."""

from collections.abc import Iterable
from typing import Any, Final

from services.mesh.containers import METRICS_PORT, Container
from services.mesh.plan import ProcessPlan

__all__ = ["container_targets", "local_targets"]

_HOST: Final = "127.0.0.1"
_ENVOY_PATH: Final = "/stats/prometheus"


def local_targets(plans: Iterable[ProcessPlan]) -> list[dict[str, Any]]:
    """The processes on this machine, the edge included."""
    return [_local(plan) for plan in plans]


def container_targets(containers: Iterable[Container]) -> list[dict[str, Any]]:
    """The containers of a mesh, for a Prometheus in their network. The edge keeps its admin interface to itself."""
    return [_target(each.name, each.service, f"{each.name}:{METRICS_PORT}") for each in containers]


def _local(plan: ProcessPlan) -> dict[str, Any]:
    if plan.service != "envoy":
        return _target(plan.name, plan.service, f"{_HOST}:{plan.ports['metrics']}")
    return _target(plan.name, plan.service, f"{_HOST}:{plan.ports['admin']}", __metrics_path__=_ENVOY_PATH)


def _target(process: str, service: str, address: str, **labels: str) -> dict[str, Any]:
    return {"targets": [address], "labels": {"process": process, "service": service, **labels}}
