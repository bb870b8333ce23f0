"""tokenloom render: deploy files from a mesh.yaml."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, Final

import yaml

from services.common.policy import policy_json
from services.mesh.compose import compose_file
from services.mesh.compose_observed import observed_compose_file
from services.mesh.config_file import load_mesh
from services.mesh.containers import edge_of
from services.mesh.envoy import bootstrap
from services.mesh.k8s import manifests
from services.mesh.k8s_growth import Growth
from services.mesh.k8s_pods import Wishes

__all__ = ["compose", "envoy", "k8s", "observed", "policy"]

_WRITTEN_BY: Final = "# Written by `tokenloom render {what}`: change mesh.yaml and render again.\n"


def compose(arguments: Namespace) -> int:
    """A compose.yaml."""
    _write("compose", compose_file(load_mesh(arguments.config)), arguments.output)
    return 0


def observed(arguments: Namespace) -> int:
    """A compose.yaml with Jaeger, Prometheus and Grafana."""
    _write("observed", observed_compose_file(load_mesh(arguments.config)), arguments.output)
    return 0


def envoy(arguments: Namespace) -> int:
    """An Envoy bootstrap for the edge's container."""
    _write("envoy", bootstrap(edge_of(load_mesh(arguments.config))), arguments.output)
    return 0


def policy(arguments: Namespace) -> int:
    """The routing policy as the routers' containers follow it."""
    text = policy_json(load_mesh(arguments.config).routing) + "\n"
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        # Routers may be reading it.
        scratch = arguments.output.with_name(f".{arguments.output.name}.new")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(arguments.output)
    return 0


def k8s(arguments: Namespace) -> int:
    """Kubernetes manifests."""
    growth = None
    if arguments.max_replicas > 1:
        hours, timezone = arguments.busy_hours, arguments.timezone
        growth = Growth(most=arguments.max_replicas, prometheus=arguments.prometheus, hours=hours, timezone=timezone)
    wishes = Wishes(image=arguments.image, resources=dict(arguments.gpu_resource), tolerate=arguments.tolerate)
    mesh = load_mesh(arguments.config)
    rendered = manifests(
        mesh, wishes, namespace=arguments.namespace, growth=growth, has_pod_monitor=arguments.pod_monitor
    )
    _write("k8s", rendered, arguments.output)
    return 0


def _write(what: str, data: dict[str, Any] | list[dict[str, Any]], output: Path | None) -> None:
    documents = data if isinstance(data, list) else [data]
    text = _WRITTEN_BY.format(what=what) + yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True
    )
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and everything in full where it is used."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  # as the base class has it
        """Never refers to what was written before."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
