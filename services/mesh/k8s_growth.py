"""How workers become more and fewer in Kubernetes, by KEDA."""

import json
from typing import Any

import msgspec

from services.common.settings import ProcessSettings
from services.common.settings_worker import WorkerSettings
from services.mesh.containers import Container
from services.mesh.k8s_pods import slug

__all__ = ["Growth", "scaler"]


class Growth(msgspec.Struct, kw_only=True, frozen=True):
    """When there are more of them."""

    most: int
    """Replicas of each worker."""
    prometheus: str
    """The URL of the Prometheus that scrapes the routers."""
    waiting: int = 4
    """Requests that wait in the router for workers of a pool, for each replica."""
    hours: tuple[int, int] | None = None
    """From which to which hour of working days all replicas run, whatever waits."""
    timezone: str = "UTC"


def _whose(settings: ProcessSettings) -> str:
    """The labels of the requests that a worker can serve."""
    assert isinstance(settings, WorkerSettings)
    pool, model = f'pool="{settings.pool}"', settings.model
    if model.adapters_dir is not None:
        # Its adapters are asked for by names of their own, and come while it runs.
        return pool
    # PromQL's strings have JSON's escapes.
    return f"{pool}, model={json.dumps(model.name, ensure_ascii=False)}"


def scaler(container: Container, growth: Growth) -> dict[str, Any]:
    """What has KEDA change the replicas of one worker."""
    name = slug(container.name)
    queue = {
        "serverAddress": growth.prometheus,
        "query": f"sum(tokenloom_router_pool_waiting_requests{{{_whose(container.settings)}}})",
        "threshold": str(growth.waiting),
    }
    triggers: list[dict[str, Any]] = [{"type": "prometheus", "metadata": queue}]
    if growth.hours is not None:
        first, last = growth.hours
        times = {"timezone": growth.timezone, "start": f"0 {first} * * 1-5", "end": f"0 {last} * * 1-5"}
        triggers.append({"type": "cron", "metadata": {**times, "desiredReplicas": str(growth.most)}})
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": name},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": name},
            "minReplicaCount": 1,
            "maxReplicaCount": growth.most,
            "cooldownPeriod": 300,
            "triggers": triggers,
        },
    }
