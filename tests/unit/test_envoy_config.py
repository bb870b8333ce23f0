"""The edge's configuration, as the real Envoy reads it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.config import ConfigError
from services.mesh.config_file import load_mesh
from services.mesh.containers import edge_of
from services.mesh.envoy import Edge, bootstrap
from services.mesh.envoy_binary import find_envoy
from services.mesh.envoy_routes import OPENAI_PATHS
from services.mesh.rest import INFERENCE, ROUTER_ADMIN, TELEMETRY, rest_methods

ROOT = Path(__file__).parents[2]
LOCAL = Edge(
    listen="127.0.0.1:8080",
    admin="127.0.0.1:9901",
    gateways=("127.0.0.1:8000",),
    router="127.0.0.1:8002",
    picker="127.0.0.1:8004",
    telemetry="127.0.0.1:8003",
)


def routes(edge: Edge = LOCAL) -> list[dict[str, Any]]:
    listener = bootstrap(edge)["static_resources"]["listeners"][0]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    listed: list[dict[str, Any]] = manager["route_config"]["virtual_hosts"][0]["routes"]
    return listed


def traced(otlp: str) -> Edge:
    return Edge(
        listen=LOCAL.listen,
        admin=LOCAL.admin,
        gateways=LOCAL.gateways,
        router=LOCAL.router,
        picker=LOCAL.picker,
        telemetry=LOCAL.telemetry,
        otlp=otlp,
    )


@pytest.mark.parametrize(
    "edge",
    [LOCAL, traced("127.0.0.1:4317"), traced("collector:4317"), edge_of(load_mesh(ROOT / "deploy/compose/mesh.yaml"))],
    ids=["local", "traced", "traced by name", "containers"],
)
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_envoy_accepts_it(tmp_path: Path, edge: Edge, suffix: str) -> None:
    file = tmp_path / f"envoy{suffix}"
    config = bootstrap(edge)
    file.write_text(json.dumps(config) if suffix == ".json" else yaml.safe_dump(config))
    ran = subprocess.run(
        [find_envoy(), "--mode", "validate", "-c", file], capture_output=True, text=True, check=False, timeout=30
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "warning" not in ran.stderr, ran.stderr


def test_every_openai_path_is_routed_to_the_gateway() -> None:
    routed = {route["match"].get("path_separated_prefix") for route in routes() if route["name"] == "openai"}
    assert routed == set(OPENAI_PATHS)


@pytest.mark.parametrize(
    ("service", "right", "cluster"),
    [(INFERENCE, "inference", "workers"), (TELEMETRY, "telemetry", "telemetry"), (ROUTER_ADMIN, "admin", "router")],
)
def test_every_route_of_a_service_asks_for_its_right(service: Any, right: str, cluster: str) -> None:
    own = [route for route in routes() if route["name"] == service.name]
    assert len(own) == 1 + len([method for method in rest_methods(service) if method.name != "ListModels"])
    for route in own:
        filters = route["typed_per_filter_config"]
        assert "envoy.filters.http.ext_authz" in filters
        form = "grpc" if route is own[0] else "rest"
        assert route["metadata"]["filter_metadata"] == {"tokenloom": {"right": right, "form": form}}
        assert route["route"]["cluster"] == cluster
        assert ("envoy.filters.http.ext_proc" in filters) == (cluster == "workers")


def test_models_are_listed_by_the_gateways_for_any_key() -> None:
    names = [route["name"] for route in routes()]
    own = [route for route in routes() if route["name"] == "models"]
    assert names.index("models") < names.index(INFERENCE.name)
    assert [route["match"]["path"] for route in own] == [f"/{INFERENCE.full_name}/ListModels", "/api/v1/models"]
    for route, form in zip(own, ("grpc", "rest"), strict=True):
        assert route["metadata"]["filter_metadata"] == {"tokenloom": {"right": "models", "form": form}}
        assert route["route"]["cluster"] == "gateway-grpc"
        assert "envoy.filters.http.ext_authz" in route["typed_per_filter_config"]
        assert "envoy.filters.http.ext_proc" not in route["typed_per_filter_config"]


def test_only_these_clusters_can_be_reached() -> None:
    reachable = {route["route"]["cluster"] for route in routes() if "route" in route}
    assert reachable == {"gateway", "gateway-grpc", "workers", "telemetry", "router"}


def test_a_rest_path_with_a_variable_matches_one_segment() -> None:
    [drain] = [method for method in rest_methods(ROUTER_ADMIN) if method.template.endswith(":drain")]
    assert drain.verb == "POST"
    assert drain.pattern == r"/api/v1/workers/[^/]+:drain"


def test_the_admin_interface_listens_on_the_loopback_address_alone() -> None:
    container = edge_of(load_mesh(ROOT / "deploy/compose/mesh.yaml"))
    for edge in (LOCAL, container):
        address = bootstrap(edge)["admin"]["address"]["socket_address"]["address"]
        assert address == "127.0.0.1"


def test_an_envoy_that_is_named_and_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENLOOM_ENVOY", "/nowhere/envoy")
    with pytest.raises(ConfigError, match=r"TOKENLOOM_ENVOY.*/nowhere/envoy"):
        find_envoy()
