"""Kubernetes manifests from a mesh.yaml."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from services.common.config import ConfigError, load
from services.common.object_store import ENVIRONMENT
from services.common.policy import parse_policy
from services.common.settings import ProcessSettings, RouterSettings, TelemetrySettings
from services.common.settings_gateway import GatewaySettings
from services.common.settings_worker import WorkerSettings
from services.mesh.__main__ import main
from services.mesh.books import SETTINGS_VARIABLE
from services.mesh.compose import compose_file
from services.mesh.config_file import load_mesh
from services.mesh.k8s import manifests
from services.mesh.k8s_growth import Growth
from services.mesh.k8s_pods import Wishes, slug

MESH = """\
models: [{name: big, path: /models/big}, {name: fetched, path: Qwen/Qwen3-0.6B}, {name: demo}, {name: sim}]
routers: 2
pools:
  - name: large
    serves: [big]
    workers:
      - {name: l40_0, engine: vllm, gpu: 0}
      - {name: l40-tp, engine: vllm, gpu: "1,2", engine_args: {tensor_parallel_size: 2}}
  - name: small
    serves: [fetched]
    workers:
      - {name: half-a, engine: vllm, gpu: 3, gpu_memory_utilization: 0.4}
      - {name: half-b, engine: vllm, gpu: 3, gpu_memory_utilization: 0.4}
  - {name: slow, serves: [demo], workers: [{name: cpu-0, engine: vllm}]}
  - {name: simulated, serves: [sim], workers: [{name: sim-0, engine: sim}]}
edge: {host: 0.0.0.0, port: 8080}
"""
PLAIN = "models: [{name: sim}]\npools: [{name: p, serves: [sim], workers: [{name: w, engine: sim}]}]\n"
SHAPES: dict[str, type[ProcessSettings]] = {
    "telemetry": TelemetrySettings,
    "router": RouterSettings,
    "gateway": GatewaySettings,
    "inference": WorkerSettings,
}
WORKERS = ["cpu-0", "half-a", "half-b", "l40-0", "l40-tp", "sim-0"]

Objects = dict[tuple[str, str], dict[str, Any]]


def rendered(folder: Path, text: str = MESH, wishes: Wishes | None = None, **more: Any) -> Objects:
    file = folder / "mesh.yaml"
    file.write_text(text)
    made = manifests(load_mesh(file), wishes or Wishes(), **more)
    assert json.loads(json.dumps(made)) == made
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in made}
    assert len(by_name) == len(made)
    return by_name


def containers_of(objects: Objects) -> dict[str, dict[str, Any]]:
    return {
        name: container
        for (_, name), each in objects.items()
        if "template" in each.get("spec", {})
        for container in each["spec"]["template"]["spec"]["containers"]
    }


def test_there_is_a_workload_for_each_process(tmp_path: Path) -> None:
    objects = rendered(tmp_path)
    stateful = sorted(name for kind, name in objects if kind == "StatefulSet")
    assert stateful == sorted(["gateway", *WORKERS])
    deployed = sorted(name for kind, name in objects if kind == "Deployment")
    assert deployed == ["edge", "redis", "router", "router-1", "telemetry"]
    assert [name for kind, name in objects if kind == "DaemonSet"] == ["telemetry-agents"]
    assert {each["metadata"].get("namespace", "tokenloom") for each in objects.values()} == {"tokenloom"}


def test_what_a_pod_is_started_with_are_settings_that_its_service_takes(tmp_path: Path) -> None:
    objects = rendered(tmp_path)
    files = {**objects["Secret", "settings"]["stringData"], **objects["Secret", "telemetry-agents"]["stringData"]}
    places = {"$(POD_NAME)": "pod-7", "$(POD_IP)": "10.1.2.3", "$(NODE_NAME)": "node-1"}
    read: dict[str, ProcessSettings] = {}
    for name, container in containers_of(objects).items():
        if (command := container.get("command")) is None:
            continue
        _, _, service, _, path, *rest = command
        over = [text for text in rest if text != "--set"]
        for place, value in places.items():
            over = [text.replace(place, value) for text in over]
        file = tmp_path / Path(path).name
        file.write_text(files[file.name])
        read[name] = load(file, SHAPES[service.removeprefix("services.")], over=over)
    assert set(WORKERS) < set(read)
    worker, agent, hub = read["l40-tp"], read["telemetry-agents"], read["telemetry"]
    assert isinstance(worker, WorkerSettings)
    assert (worker.name, worker.advertise, worker.gpu) == ("pod-7", "10.1.2.3:50051", "0,1")
    assert worker.routers == ["router:50051", "router-1:50051"]
    assert isinstance(agent, TelemetrySettings)
    assert (agent.node, agent.own_gpus, agent.agents) == ("node-1", True, [])
    assert isinstance(hub, TelemetrySettings)
    assert (hub.own_gpus, hub.agents) == (False, ["telemetry-agents:50051"])


@pytest.mark.parametrize(
    ("worker", "limits"),
    [
        ("l40-0", {"nvidia.com/gpu": 1}),
        ("l40-tp", {"nvidia.com/gpu": 2}),
        ("half-a", {"nvidia.com/gpu.shared": 1}),
        ("half-b", {"nvidia.com/mig-3g.20gb": 1}),
        ("cpu-0", None),
    ],
)
def test_a_worker_asks_for_its_cards(tmp_path: Path, worker: str, limits: dict[str, int] | None) -> None:
    objects = rendered(tmp_path, wishes=Wishes(resources={"half-b": "nvidia.com/mig-3g.20gb"}))
    assert containers_of(objects)[worker].get("resources", {}).get("limits") == limits


def test_the_device_plugin_is_told_how_to_slice_what_is_shared(tmp_path: Path) -> None:
    slicing = yaml.safe_load(rendered(tmp_path)["ConfigMap", "nvidia-device-plugin-time-slicing"]["data"]["shared"])
    assert slicing["sharing"]["timeSlicing"]["resources"] == [{"name": "nvidia.com/gpu", "replicas": 2}]
    assert ("ConfigMap", "nvidia-device-plugin-time-slicing") not in rendered(tmp_path, PLAIN)


def test_models_are_where_they_are_looked_for(tmp_path: Path) -> None:
    objects = rendered(tmp_path)
    local = objects["StatefulSet", "l40-0"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "model", "hostPath": {"path": "/models/big", "type": "Directory"}} in local
    fetched = objects["StatefulSet", "half-a"]["spec"]
    assert [claim["metadata"]["name"] for claim in fetched["volumeClaimTemplates"]] == ["model"]
    made = objects["StatefulSet", "cpu-0"]["spec"]["template"]["spec"]
    assert made["initContainers"][0]["command"][-1] == "/models/demo"


def test_a_model_in_s3_has_a_volume_and_the_variables_that_its_worker_asks_with(tmp_path: Path) -> None:
    text = "models: [{name: m, path: 's3://models/m'}]\npools: [{name: p, serves: [m], workers: [{name: w}]}]\n"
    worker = rendered(tmp_path, text)["StatefulSet", "w"]["spec"]
    assert [claim["metadata"]["name"] for claim in worker["volumeClaimTemplates"]] == ["model"]
    (container,) = worker["template"]["spec"]["containers"]
    assert {"name": "model", "mountPath": "/models/fetched"} in container["volumeMounts"]
    assert "AWS_ENDPOINT_URL" in [entry["name"] for entry in container["env"]]
    composed = compose_file(load_mesh(tmp_path / "mesh.yaml"))
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"} <= set(
        composed["services"]["w"]["environment"]
    )
    assert composed["services"]["w"]["volumes"] == ["models:/models/fetched"]
    settings = json.loads(composed["configs"]["w"]["content"])
    assert settings["model_cache"] == "/models/fetched"
    assert composed["services"]["gateway"]["environment"] == [f"{SETTINGS_VARIABLE}=/etc/tokenloom/gateway.json"]


def test_selectors_fit_the_pods_they_are_for(tmp_path: Path) -> None:
    objects = rendered(tmp_path)
    pods = {
        name: each["spec"]["template"]["metadata"]["labels"]
        for (_, name), each in objects.items()
        if "template" in each.get("spec", {})
    }

    def selected(selector: dict[str, str]) -> list[str]:
        return sorted(name for name, mine in pods.items() if selector.items() <= mine.items())

    for (kind, name), each in objects.items():
        if kind == "Service" and name != "workers":
            assert selected(each["spec"]["selector"]) == [name]
    assert selected(objects["Service", "workers"]["spec"]["selector"]) == WORKERS
    budget = objects["PodDisruptionBudget", "workers"]["spec"]["selector"]["matchLabels"]
    assert selected(budget) == WORKERS
    assert ("PodDisruptionBudget", "gateways") not in objects


def test_only_the_edge_is_open_and_only_where_the_file_says_so(tmp_path: Path) -> None:
    objects = rendered(tmp_path)
    open_to_all = [rule for rule in objects["NetworkPolicy", "inside"]["spec"]["ingress"] if "from" not in rule]
    assert open_to_all == [{"ports": [{"protocol": "TCP", "port": 8080}]}]
    assert objects["Service", "edge"]["spec"]["type"] == "LoadBalancer"
    assert rendered(tmp_path, PLAIN)["Service", "edge"]["spec"]["type"] == "ClusterIP"
    exposed = [name for (kind, name), each in objects.items() if kind == "Service" and "type" in each["spec"]]
    assert exposed == ["edge"]


def test_other_settings_start_the_pods_again(tmp_path: Path) -> None:
    def annotated(text: str) -> dict[str, str]:
        objects = rendered(tmp_path, text)
        found: dict[str, str] = objects["StatefulSet", "w"]["spec"]["template"]["metadata"]["annotations"]
        return found

    assert annotated(PLAIN) == annotated(PLAIN)
    assert annotated(PLAIN) != annotated(PLAIN.replace("engine: sim", "engine: sim, sim: {decode_step_ms: 7}"))


def test_workers_grow_with_the_queue_and_by_the_clock(tmp_path: Path) -> None:
    growth = Growth(most=3, prometheus="http://prom:9090", hours=(7, 19), timezone="Europe/Berlin")
    objects = rendered(tmp_path, PLAIN, growth=growth)
    spec = objects["ScaledObject", "w"]["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (1, 3)
    queue, clock = spec["triggers"]
    assert queue["metadata"]["query"] == 'sum(tokenloom_router_pool_waiting_requests{pool="p", model="sim"})'
    assert clock["metadata"] == {
        "timezone": "Europe/Berlin",
        "start": "0 7 * * 1-5",
        "end": "0 19 * * 1-5",
        "desiredReplicas": "3",
    }


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        ("{name: Qwen/Q.6B}", 'pool="p", model="Qwen/Q.6B"'),
        ("{name: m, adapters_dir: /adapters}", 'pool="p"'),
    ],
)
def test_a_worker_grows_with_what_it_can_serve(tmp_path: Path, model: str, labels: str) -> None:
    name = model.split("name: ")[1].partition(",")[0].rstrip("}")
    text = f"models: [{model}]\npools: [{{name: p, serves: [{name}], workers: [{{name: w, engine: vllm}}]}}]\n"
    text = text.replace("{name: " + name, "{path: /models/m, name: " + name, 1)
    objects = rendered(tmp_path, text, growth=Growth(most=2, prometheus="http://prom:9090"))
    (queue,) = objects["ScaledObject", "w"]["spec"]["triggers"]
    assert queue["metadata"]["query"] == f"sum(tokenloom_router_pool_waiting_requests{{{labels}}})"


def test_prometheus_finds_every_process_with_the_labels_that_the_rules_go_by(tmp_path: Path) -> None:
    objects = rendered(tmp_path, has_pod_monitor=True)
    spec = objects["PodMonitor", "tokenloom"]["spec"]
    (endpoint,) = spec["podMetricsEndpoints"]
    assert endpoint["honorLabels"] is True
    found = {}
    for (kind, name), each in objects.items():
        if "template" not in each.get("spec", {}):
            continue
        template = each["spec"]["template"]
        own = template["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= own.items()
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        annotated = "prometheus.io/scrape" in template["metadata"].get("annotations", {})
        assert annotated == ("metrics" in ports)
        if annotated:
            assert template["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])
            pod_name = f"{name}-0" if kind == "StatefulSet" else f"{name}-abc"
            found[name] = relabeled(endpoint["relabelings"], own, pod_name)
    assert {labels["job"] for labels in found.values()} == {"tokenloom"}
    assert found["router-1"] == {"job": "tokenloom", "process": "router-1", "service": "router"}
    assert found["l40-tp"] == {"job": "tokenloom", "process": "l40-tp-0", "service": "inference"}
    assert found["telemetry-agents"] == {"job": "tokenloom", "process": "telemetry-agents-abc", "service": "telemetry"}
    assert found["gateway"]["process"] == "gateway"
    assert ("PodMonitor", "tokenloom") not in rendered(tmp_path)


def relabeled(rules: list[dict[str, Any]], labels: dict[str, str], pod: str) -> dict[str, str]:
    """What Prometheus makes of a pod by these rules: `replace`, with its defaults."""
    meta = {"__meta_kubernetes_pod_name": pod}
    for name, value in labels.items():
        meta["__meta_kubernetes_pod_label_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)] = value
    made: dict[str, str] = {}
    for rule in rules:
        source = ";".join(meta.get(name, "") for name in rule.get("sourceLabels", ()))
        if match := re.fullmatch(rule.get("regex", "(.*)"), source):
            made[rule["targetLabel"]] = match.expand(rule.get("replacement", "$1").replace("$", "\\"))
    return made


KEYS = """\
models: [{name: far}, {name: fetched, path: Qwen/Qwen3-0.6B}, {name: bucket, path: "s3://models/m"}, {name: sim}]
otlp_endpoint: collector:4317
guardrails:
  tenants: {acme: {input: [{kind: moderation, url: "https://m.example/v1", api_key_variable: MODERATION_KEY}]}}
jwt: {jwks: keys.json, issuer: https://idp.example, audience: mesh}
pools:
  - name: p
    serves: [far, fetched, bucket, sim]
    workers:
      - {name: up, engine: openai, model: far, upstream: {url: "https://o.example/v1", api_key_variable: FAR_KEY}}
      - {name: hf, engine: vllm, model: fetched}
      - {name: s3, engine: vllm, model: bucket}
      - {name: sim-0, engine: sim, model: sim}
"""
OTLP = {f"OTEL_EXPORTER_OTLP_{name}" for name in ("HEADERS", "TRACES_HEADERS", "METRICS_HEADERS", "COMPRESSION")}
VARIABLES = {
    "up": {"FAR_KEY"},
    "hf": {"HF_TOKEN", "HF_ENDPOINT"},
    "s3": set(ENVIRONMENT),
    "sim-0": set(),
    "gateway": {"MODERATION_KEY"},
    "router": set(),
    "telemetry": set(),
}


def test_containers_get_the_variables_that_the_file_names_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('{"keys": []}')
    objects = rendered(tmp_path, KEYS)
    pods = {
        name: each["spec"]["template"]["spec"]["containers"][0]
        for (kind, name), each in objects.items()
        if kind in ("StatefulSet", "Deployment")
    }
    services = compose_file(load_mesh(tmp_path / "mesh.yaml"))["services"]
    for name, expected in VARIABLES.items():
        refs = {
            entry["name"]: entry["valueFrom"]["secretKeyRef"]
            for entry in pods[name]["env"]
            if "secretKeyRef" in entry.get("valueFrom", {})
        }
        assert refs.keys() == expected | OTLP, name
        for variable, ref in refs.items():
            assert ref == {"name": "environment", "key": variable, "optional": True}
        # Without values: they are of whoever runs it.
        named = {variable for variable in services[name]["environment"] if "=" not in variable}
        assert named == expected | OTLP, name
    plain = rendered(tmp_path, PLAIN)
    assert len(containers_of(plain)["w"]["env"]) == 3
    assert "environment" not in compose_file(load_mesh(tmp_path / "mesh.yaml"))["services"]["w"]


def test_a_file_of_a_providers_keys_is_looked_for_beside_the_mesh_and_mounted(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('{"keys": []}')
    objects = rendered(tmp_path, KEYS)
    assert objects["ConfigMap", "jwks"]["data"] == {"jwks.json": '{"keys": []}'}
    settings = msgspec.json.decode(objects["Secret", "settings"]["stringData"]["gateway.json"])
    assert settings["jwt"]["jwks"] == "/run/jwks/jwks.json"
    spec = objects["StatefulSet", "gateway"]["spec"]["template"]["spec"]
    assert {"name": "jwks", "configMap": {"name": "jwks"}} in spec["volumes"]
    mounted = {"name": "jwks", "mountPath": "/run/jwks", "readOnly": True}
    assert mounted in spec["containers"][0]["volumeMounts"]
    composed = compose_file(load_mesh(tmp_path / "mesh.yaml"))
    assert composed["configs"]["jwks"] == {"file": str(tmp_path / "keys.json")}
    assert {"source": "jwks", "target": "/run/jwks/jwks.json"} in composed["services"]["gateway"]["configs"]
    remote = KEYS.replace("keys.json", "https://idp.example/keys")
    assert ("ConfigMap", "jwks") not in rendered(tmp_path, remote)
    with pytest.raises(ConfigError, match=r"jwt.jwks: there is no file .*none.json"):
        rendered(tmp_path, KEYS.replace("keys.json", "none.json"))


def test_the_routing_policy_is_a_file_that_routers_follow_without_being_started_again(tmp_path: Path) -> None:
    other = PLAIN + "routing: {aliases: {fast: sim}}\n"
    first, second = rendered(tmp_path, PLAIN + "routers: 2\n"), rendered(tmp_path, other + "routers: 2\n")
    for router in ("router", "router-1"):
        assert first["Deployment", router] == second["Deployment", router]
        pod = first["Deployment", router]["spec"]["template"]["spec"]
        assert {"name": "policy", "configMap": {"name": "policy"}} in pod["volumes"]
        assert {"name": "policy", "mountPath": "/run/policy", "readOnly": True} in pod["containers"][0]["volumeMounts"]
        settings = msgspec.json.decode(first["Secret", "settings"]["stringData"][f"{router}.json"], type=RouterSettings)
        assert settings.policy_path == "/run/policy/policy.json"
    policy = parse_policy(second["ConfigMap", "policy"]["data"]["policy.json"], where="routing")
    assert policy.aliases == {"fast": "sim"}
    services = compose_file(load_mesh(tmp_path / "mesh.yaml"))["services"]
    assert services["router-1"]["volumes"] == services["policy"]["volumes"] == ["policy:/run/policy"]
    assert services["router"]["depends_on"] == {"policy": {"condition": "service_completed_successfully"}}
    output = tmp_path / "policy.json"
    assert services["policy"]["command"][1:4] == ["render", "policy", "--config"]
    assert main(["render", "policy", "--config", str(tmp_path / "mesh.yaml"), "--output", str(output)]) == 0
    assert parse_policy(output.read_bytes(), where="routing") == policy


@pytest.mark.parametrize(
    ("host", "kind", "published"),
    [
        ("llm.example", "LoadBalancer", "8080:8080"),
        ("localhost", "ClusterIP", "127.0.0.1:8080:8080"),
        ("127.0.0.1", "ClusterIP", "127.0.0.1:8080:8080"),
        ("0.0.0.0", "LoadBalancer", "0.0.0.0:8080:8080"),
    ],
)
def test_the_edge_may_be_named_by_a_name(tmp_path: Path, host: str, kind: str, published: str) -> None:
    objects = rendered(tmp_path, PLAIN + f"edge: {{host: {host}}}\n")
    assert objects["Service", "edge"]["spec"]["type"] == kind
    assert compose_file(load_mesh(tmp_path / "mesh.yaml"))["services"]["envoy"]["ports"] == [published]


def test_there_may_be_several_edges_which_start_again_for_another_configuration(tmp_path: Path) -> None:
    def edges(more: str) -> Any:
        return rendered(tmp_path, PLAIN + f"edge: {{replicas: 3{more}}}\n")

    objects = edges("")
    spec = objects["Deployment", "edge"]["spec"]
    assert spec["replicas"] == 3
    assert (
        objects["PodDisruptionBudget", "edges"]["spec"]["selector"]["matchLabels"].items()
        <= spec["template"]["metadata"]["labels"].items()
    )
    assert edges("")["Deployment", "edge"] == objects["Deployment", "edge"]
    other = edges(", client_timeout_seconds: 7")
    assert other["ConfigMap", "edge"] != objects["ConfigMap", "edge"]
    assert other["Deployment", "edge"]["spec"]["template"]["metadata"] != spec["template"]["metadata"]
    assert rendered(tmp_path, PLAIN)["Deployment", "edge"]["spec"]["replicas"] == 1


def test_a_gateway_of_others_gets_a_pool_of_the_workers_a_route_and_its_way_in(tmp_path: Path) -> None:
    text = PLAIN + "routers: 2\ninference_gateway: {name: front, namespace: gateways}\npicker_fallbacks: 2\n"
    objects = rendered(tmp_path, text)
    pool = objects["InferencePool", "workers"]["spec"]
    worker = objects["StatefulSet", "w"]["spec"]["template"]
    assert pool["selector"]["matchLabels"].items() <= worker["metadata"]["labels"].items()
    (port,) = pool["targetPorts"]
    assert port["number"] in [each["containerPort"] for each in worker["spec"]["containers"][0]["ports"]]
    picker = pool["endpointPickerRef"]
    door = objects[picker["kind"], picker["name"]]["spec"]["ports"]
    assert picker["port"]["number"] in [each["port"] for each in door]
    route = objects["HTTPRoute", "workers"]["spec"]
    assert route["parentRefs"] == [{"name": "front", "namespace": "gateways"}]
    (rule,) = route["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/tokenloom.inference.v1.InferenceService"}}]
    (backend,) = rule["backendRefs"]
    assert (backend["kind"], backend["name"]) in objects
    way_in = objects["NetworkPolicy", "inference-gateway"]["spec"]
    assert way_in["podSelector"]["matchExpressions"][0]["values"] == ["router", "worker"]
    (rule,) = way_in["ingress"]
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateways"}}}]
    assert rule["ports"] == [{"protocol": "TCP", "port": 50051}]
    for router in ("router", "router-1"):
        settings = msgspec.json.decode(objects["Secret", "settings"]["stringData"][f"{router}.json"])
        assert settings["picker_fallbacks"] == 2
    beside = rendered(tmp_path, PLAIN + "inference_gateway: {name: front}\n")
    assert beside["HTTPRoute", "workers"]["spec"]["parentRefs"] == [{"name": "front"}]
    assert ("NetworkPolicy", "inference-gateway") not in beside
    assert ("InferencePool", "workers") not in rendered(tmp_path, PLAIN)


def test_the_example_is_rendered_with_one_of_everything(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "deploy" / "kubernetes" / "mesh.yaml"
    kinds = {kind for kind, _ in rendered(tmp_path, example.read_text())}
    assert {"StatefulSet", "DaemonSet", "Deployment", "PodDisruptionBudget", "InferencePool", "ConfigMap"} <= kinds


def test_workers_may_run_on_spot_nodes(tmp_path: Path) -> None:
    objects = rendered(tmp_path, wishes=Wishes(tolerate=["spot=yes", "cheap"]))
    wanted = [
        {"key": "spot", "operator": "Equal", "value": "yes"},
        {"key": "cheap", "operator": "Exists"},
    ]
    assert objects["StatefulSet", "l40-0"]["spec"]["template"]["spec"]["tolerations"] == wanted
    assert "tolerations" not in objects["StatefulSet", "gateway"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PLAIN + "gateways: 2\n", "set database_url"),
        (PLAIN.replace("name: w,", "name: edge,"), "'edge'"),
        (PLAIN.replace("{name: w, engine: sim}", "{name: a_b, engine: sim}, {name: A-B, engine: sim}"), "'a-b'"),
        (MESH.replace("gpu: 0}", "gpu: MIG-1}"), "say --gpu-resource l40_0=nvidia.com/mig-"),
    ],
)
def test_what_kubernetes_cannot_run_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rendered(tmp_path, text)


@pytest.mark.parametrize(("name", "expected"), [("l40_0", "l40-0"), ("A.b", "a-b"), ("w", "w"), ("x-", "x")])
def test_names_are_made_fit(name: str, expected: str) -> None:
    assert slug(name) == expected


def test_the_command_writes_one_file_of_all_objects(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(MESH)
    output = tmp_path / "k8s.yaml"
    options = ("--image", "registry.example/tokenloom:1", "--namespace", "llm", "--max-replicas", "2")
    assert main(["render", "k8s", "--config", str(tmp_path / "mesh.yaml"), "--output", str(output), *options]) == 0
    documents = list(yaml.safe_load_all(output.read_text()))
    assert documents[0] == {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "llm"}}
    assert {each["metadata"]["namespace"] for each in documents[1:]} == {"llm"}
    assert sum(each["kind"] == "ScaledObject" for each in documents) == len(WORKERS)
    assert "registry.example/tokenloom:1" in output.read_text()
    assert msgspec.json.decode(documents[1]["stringData"]["gateway.json"], type=GatewaySettings).name == "gateway"


@pytest.mark.parametrize(
    "options", [("--namespace", "Not_One"), ("--gpu-resource", "a"), ("--busy-hours", "19-7"), ("--busy-hours", "1")]
)
def test_options_that_make_no_sense_are_refused(options: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["render", "k8s", "--config", "mesh.yaml", *options])
    assert options[0] in capsys.readouterr().err
