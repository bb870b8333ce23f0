"""TLS at the edge as mesh.yaml has it: what is wrong with its files, and what deploy files make of it."""

from pathlib import Path
from typing import Any

import pytest

from services.common.config import ConfigError
from services.mesh.compose import compose_file
from services.mesh.config import MeshConfig
from services.mesh.config_file import load_mesh
from services.mesh.config_rules import check_folders
from services.mesh.containers import TLS_FILES, edge_of
from services.mesh.envoy import bootstrap
from services.mesh.k8s import manifests
from services.mesh.k8s_pods import Wishes
from tests.support.certificates import Authority

MESH = "models: [{name: sim}]\npools: [{name: p, serves: [sim], workers: [{name: w, engine: sim}]}]\n"
FILES = "certificate: edge.crt, key: edge.key"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    authority = Authority(tmp_path, "ca")
    authority.signed("edge")
    authority.signed("other")
    authority.signed("locked", password=b"secret")
    (tmp_path / "nonsense").write_text("nonsense")
    return tmp_path


def load(folder: Path, tls: str) -> MeshConfig:
    file = folder / "mesh.yaml"
    file.write_text(f"{MESH}edge: {{tls: {{{tls}}}}}\n")
    return check_folders(load_mesh(file), "mesh.yaml")


def test_files_are_looked_for_beside_the_configuration(folder: Path) -> None:
    tls = load(folder, f"{FILES}, client_ca: ca.crt").edge.tls
    assert tls is not None
    assert tls.files == {
        "certificate": str(folder / "edge.crt"),
        "key": str(folder / "edge.key"),
        "client_ca": str(folder / "ca.crt"),
    }


@pytest.mark.parametrize(
    ("tls", "said"),
    [
        ("certificate: edge.crt", ["edge.tls", "key"]),
        ("certificate: '', key: edge.key", ["edge.tls.certificate"]),
        (f"{FILES}, minimum: '1.1'", ["edge.tls.minimum", "1.1"]),
        (f"{FILES}, port: 1", ["edge.tls", "port"]),
        ("certificate: missing.crt, key: edge.key", ["edge.tls.certificate", "missing.crt"]),
        ("certificate: edge.crt, key: missing.key", ["edge.tls.key", "missing.key"]),
        ("certificate: nonsense, key: edge.key", ["edge.tls", "nonsense"]),
        ("certificate: edge.crt, key: nonsense", ["edge.tls", "nonsense"]),
        ("certificate: edge.crt, key: other.key", ["edge.tls", "other.key", "mismatch"]),
        ("certificate: locked.crt, key: locked.key", ["edge.tls", "locked.key"]),
        (f"{FILES}, client_ca: missing.crt", ["edge.tls.client_ca", "missing.crt"]),
        (f"{FILES}, client_ca: nonsense", ["edge.tls.client_ca", "nonsense"]),
    ],
)
def test_what_is_wrong_with_them_is_told_in_one_line_by_key_and_file(folder: Path, tls: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, tls)
    message = str(caught.value)
    assert all(word in message for word in said), message
    assert "\n" not in message


def test_containers_get_them_as_secrets_where_the_edge_looks_for_them(folder: Path) -> None:
    mesh = load(folder, f"{FILES}, client_ca: ca.crt, minimum: '1.3'")
    composed = compose_file(mesh)
    assert composed["secrets"]["edge-key"] == {"file": str(folder / "edge.key")}
    targets = {each["source"]: each["target"] for each in composed["services"]["envoy"]["secrets"]}
    assert targets == {f"edge-{name}": path for name, path in TLS_FILES.items()}
    (listener,) = (one for one in bootstrap(edge_of(mesh))["static_resources"]["listeners"] if one["name"] == "edge")
    config = listener["filter_chains"][0]["transport_socket"]["typed_config"]
    assert config["require_client_certificate"]
    shared = config["common_tls_context"]
    assert shared["tls_params"] == {"tls_minimum_protocol_version": "TLSv1_3"}
    assert shared["tls_certificates"][0]["private_key"]["filename"] == TLS_FILES["key"]


@pytest.mark.parametrize("needs_client", [False, True])
def test_kubernetes_mounts_them_and_probes_the_edge_as_it_can(folder: Path, needs_client: bool) -> None:
    made = manifests(load(folder, FILES + (", client_ca: ca.crt" if needs_client else "")), Wishes())
    pod: dict[str, Any] = next(
        each["spec"]["template"]["spec"]
        for each in made
        if (each["kind"], each["metadata"]["name"]) == ("Deployment", "edge")
    )
    assert {"name": "edge-tls", "secret": {"secretName": "edge-tls"}} in pod["volumes"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert {str(Path(path).parent) for path in TLS_FILES.values()} == {mounts["edge-tls"]}
    probe = pod["containers"][0]["readinessProbe"]
    assert ("tcpSocket" in probe) == needs_client
    assert needs_client or probe["httpGet"]["scheme"] == "HTTPS"
