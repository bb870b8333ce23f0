"""The layer of compose.yaml that shows what a mesh does: Jaeger, Prometheus and Grafana, provisioned."""

import json
from typing import Any, Final

import msgspec

from services.mesh.compose import compose_file
from services.mesh.config import MeshConfig
from services.mesh.containers import containers
from services.mesh.scrape import container_targets

__all__ = ["observed_compose_file"]

_JAEGER_IMAGE: Final = "jaegertracing/jaeger:2.6.0"
_PROMETHEUS_IMAGE: Final = "prom/prometheus:v3.4.0"
_GRAFANA_IMAGE: Final = "grafana/grafana:12.0.0"
_OTLP: Final = "jaeger:4317"
_PROMETHEUS_FOLDER: Final = "/etc/prometheus"
_TARGETS: Final = "prometheus-targets"


def observed_compose_file(mesh: MeshConfig) -> dict[str, Any]:
    """A mesh that is looked at; the file belongs into deploy/observability, whose files it mounts."""
    if mesh.otlp_endpoint is None:
        mesh = msgspec.structs.replace(mesh, otlp_endpoint=_OTLP)
    file = compose_file(mesh)
    file["services"] |= {"jaeger": _jaeger(), "prometheus": _prometheus(), "grafana": _grafana()}
    # Compose would take a $ for a variable.
    targets = json.dumps(container_targets(containers(mesh)), indent=2).replace("$", "$$")
    file["configs"][_TARGETS] = {"content": targets}
    file["volumes"] |= {"metrics": {}, "dashboards": {}}
    return file


def _jaeger() -> dict[str, Any]:
    return _service(_JAEGER_IMAGE, "127.0.0.1:16686:16686")


def _prometheus() -> dict[str, Any]:
    return {
        **_service(_PROMETHEUS_IMAGE, "127.0.0.1:9090:9090"),
        "command": [
            f"--config.file={_PROMETHEUS_FOLDER}/prometheus.yaml",
            "--storage.tsdb.path=/prometheus",
            "--enable-feature=exemplar-storage",
        ],
        "configs": [{"source": _TARGETS, "target": f"{_PROMETHEUS_FOLDER}/targets/mesh.json"}],
        "volumes": [
            f"./prometheus.yaml:{_PROMETHEUS_FOLDER}/prometheus.yaml:ro",
            f"./rules.yaml:{_PROMETHEUS_FOLDER}/rules.yaml:ro",
            "metrics:/prometheus",
        ],
    }


def _grafana() -> dict[str, Any]:
    return {
        **_service(_GRAFANA_IMAGE, "127.0.0.1:3000:3000"),
        "environment": {"GF_AUTH_ANONYMOUS_ENABLED": "true", "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer"},
        "volumes": [
            "./grafana/provisioning:/etc/grafana/provisioning:ro",
            "./grafana/dashboards:/etc/grafana/dashboards:ro",
            "dashboards:/var/lib/grafana",
        ],
        "depends_on": ["prometheus"],
    }


def _service(image: str, port: str) -> dict[str, Any]:
    return {"image": image, "ports": [port], "networks": ["mesh"], "restart": "unless-stopped"}
