"""mesh.yaml and the options of `tokenloom up`: what they mean, and how what they can't mean is told."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from services.common.config import ConfigError
from services.common.settings import RouterSettings
from services.common.settings_worker import WorkerSettings
from services.mesh.__main__ import main
from services.mesh.compose import compose_file
from services.mesh.compose_observed import observed_compose_file
from services.mesh.config import EdgeConfig, MeshConfig, PoolConfig, WorkerConfig
from services.mesh.config_checks import config_findings
from services.mesh.config_file import load_mesh, parse_engine_args, parse_sim
from services.mesh.config_rules import check_folders, check_mesh
from services.mesh.containers import containers
from services.mesh.defaults import default_mesh, otlp_endpoint_of
from services.mesh.finding import Level
from services.mesh.plan import plan_processes
from services.mesh.policy_watch import PolicyWatch
from services.mesh.state import State
from tests.support.mesh_reference import reference

ROOT = Path(__file__).parents[2]
EXAMPLE = """
models:
  - {name: demo, path: ./models/demo}
  - {name: demo-small}
pools:
  - name: large
    serves: [demo]
    workers:
      - {name: l40-0, engine: vllm, gpu: 0, gpu_memory_utilization: 0.8, engine_args: {max_model_len: 8192}}
  - name: small
    serves: [demo-small]
    workers:
      - {name: sim-0, engine: sim, sim: {prefill_tokens_per_second: 20000, decode_step_ms: 10,
         decode_step_ms_per_sequence: 0.05, max_num_seqs: 64, kv_blocks: 4096, block_size: 16}}
"""


def load(tmp_path: Path, text: str) -> MeshConfig:
    file = tmp_path / "mesh.yaml"
    file.write_text(text)
    return load_mesh(file)


def test_the_documented_example_is_understood(tmp_path: Path) -> None:
    mesh = load(tmp_path, EXAMPLE)
    assert [pool.name for pool in mesh.pools] == ["large", "small"]
    # A relative path counts from the file.
    assert mesh.model("demo").path == str(tmp_path / "models" / "demo")
    worker = mesh.pools[1].workers[0]
    assert worker.sim is not None
    assert worker.sim.decode_step_ms == 10
    assert mesh.edge.port == 8080


WRONG: list[tuple[str, str, list[str]]] = [
    ("name: large", "name: 7", ["pools[0].name", "7"]),
    ("models:", "routing: {aliases: {chat: 7}}\nmodels:", ["routing.aliases.chat", "7"]),
    ("models:", "routing: {aliases: {chat: nope}}\nmodels:", ["routing.aliases.chat", "nope", "demo-small"]),
    (
        "models:",
        "routing: {rules: [{name: r, pools: [huge]}]}\nmodels:",
        ["routing.rules[0].pools[0]", "huge", "large"],
    ),
    ("engine: vllm", "engine: tgi", ["pools[0].workers[0].engine", "tgi"]),
    ("serves: [demo]", "serves: [nope]", ["pools[0].serves", "nope", "demo"]),
    ("serves: [demo]", "serves: [demo, demo-small]", ["pools[0].workers[0].model", "demo-small"]),
    ("serves: [demo]", "serves: []", ["pools[0].serves"]),
    ("{name: demo-small}", "{name: demo-small, max_adapters: 0}", ["models[1].max_adapters", "0"]),
    ("{name: demo-small}", "{name: demo-small, tool_call_parser: 1}", ["models[1].tool_call_parser", "1"]),
    ("{name: demo-small}", "{name: demo-small, adapters: [{name: a, path: a}]}", ["models[1]", "adapters_dir"]),
    ("{name: demo-small}", "{name: demo-small, adapters_dir: .}", ["simulated", "demo-small", "adapters_dir"]),
    (
        "./models/demo}",
        "./models/demo, adapters_dir: a, adapters: [{name: a b, path: a}]}",
        ["adapters[0].name", "a b"],
    ),
    ("./models/demo}", "./models/demo, adapters_dir: a, adapters: [{name: demo, path: a}]}", ["models[0]", "demo"]),
    ("./models/demo}", "./models/demo, adapters_dir: a, adapters: [{name: demo-small, path: a}]}", ["demo-small"]),
    ("name: sim-0", "name: l40-0", ["l40-0", "twice"]),
    ("name: sim-0", "name: router", ["router"]),
    ("name: small", "name: large", ["large", "twice"]),
    ("name: demo-small}", "name: demo}", ["demo", "twice"]),
    ("path: ./models/demo", "path: 5", ["models[0].path", "5"]),
    ("gpu_memory_utilization: 0.8", "gpu_memory_utilization: 8", ["gpu_memory_utilization", "8"]),
    ("gpu_memory_utilization: 0.8", "gpu_memory: 8", ["gpu_memory"]),
    ("kv_blocks: 4096", "kv_blocks: many", ["pools[1].workers[0].sim.kv_blocks", "many"]),
    ("engine: sim, sim:", "engine: vllm, sim:", ["pools[1].workers[0]", "sim", "vllm"]),
    ("engine: sim, sim: {", "engine: sim, engine_args: {", ["engine_args", "sim"]),
    ("engine: sim, sim:", "engine: openai, sim:", ["pools[1].workers[0].sim", "'openai'"]),
    ("engine: sim, sim: {", "engine: openai, upstream: {url: http://far/v1, ", ["pools[1].workers[0].upstream"]),
    ("engine: sim, sim: {", "engine: openai, upstream: {url: far, ", ["pools[1].workers[0].upstream"]),
    ("engine_args: {max_model_len: 8192}", "upstream: {url: http://far/v1}", ["pools[0].workers[0].upstream", "vllm"]),
    (
        "engine: vllm, gpu: 0, gpu_memory_utilization: 0.8, engine_args: {max_model_len: 8192}",
        "engine: openai",
        ["pools[0].workers[0].upstream: missing", "url"],
    ),
    ("engine: vllm, gpu: 0", "engine: openai, gpu: 0", ["pools[0].workers[0].engine_args", "OpenAI"]),
    ("{max_model_len: 8192}", "{max_model_length: 1}", ["pools[0].workers[0].engine_args.max_model_length", "did you"]),
    ("{max_model_len: 8192}", "{kv_cache_dtype: fp9}", ["engine_args.kv_cache_dtype", "fp9", "'fp8_e4m3'"]),
    (
        "{max_model_len: 8192}",
        "{tensor_parallel_size: 2}",
        ["pools[0].workers[0].gpu", "expected 2", "got the value 0"],
    ),
    (
        "{max_model_len: 8192}}",
        "{}}\n      - {name: l40-1, gpu: 0, gpu_memory_utilization: 0.3}",
        ["gpu_memory_utilization", "'l40-0', 'l40-1'", "share gpu 0", "1.10", "0.98"],
    ),
    ("{name: demo-small}", "{name: demo-small}\nedge: {port: 99999}", ["edge.port", "99999"]),
    ("{name: demo-small}", "{name: demo-small}\nport: 1", ["port"]),
    ("{name: demo-small}", "{name: demo-small}\notlp_endpoint: nowhere", ["otlp_endpoint", "nowhere"]),
]


@pytest.mark.parametrize(("old", "new", "said"), WRONG, ids=[new for _, new, _ in WRONG])
def test_what_is_wrong_is_told_in_one_line_with_key_and_value(
    tmp_path: Path, old: str, new: str, said: list[str]
) -> None:
    assert old in EXAMPLE
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, EXAMPLE.replace(old, new, 1))
    message = str(caught.value)
    assert "\n" not in message
    for part in (*said, "mesh.yaml"):
        assert part in message, message


def test_what_is_said_of_a_model_reaches_its_workers(tmp_path: Path) -> None:
    said = "tool_call_parser: hermes, reasoning_parser: qwen3, adapters_dir: ./a, adapters: [{name: poet, path: p}]"
    mesh = load(tmp_path, EXAMPLE.replace("./models/demo}", f"./models/demo, {said}}}"))
    with pytest.raises(ConfigError, match=r"models\[0\]\.path"):
        check_folders(mesh, "mesh.yaml")
    (tmp_path / "models" / "demo").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"models\[0\]\.adapters_dir: there is no folder"):
        check_folders(mesh, "mesh.yaml")
    (plan,) = (plan for plan in plan_processes(mesh, State(tmp_path / "state")) if plan.name == "l40-0")
    model = msgspec.json.decode(plan.config, type=WorkerSettings).model
    assert (model.tool_call_parser, model.reasoning_parser) == ("hermes", "qwen3")
    assert (model.adapters_dir, model.adapters[0].name) == (str(tmp_path / "a"), "poet")
    volumes = compose_file(mesh)["services"]["l40-0"]["volumes"]
    assert f"{tmp_path / 'a'}:{tmp_path / 'a'}:ro" in volumes


def test_a_worker_before_somebody_elses_server_is_told_of_it(tmp_path: Path) -> None:
    far = "engine: openai, upstream: {url: 'http://far:8000/v1', model: llama, flavour: vllm}}"
    start = EXAMPLE.index("engine: sim")
    mesh = load(tmp_path, EXAMPLE[:start] + far)
    (plan,) = (plan for plan in plan_processes(mesh, State(tmp_path / "state")) if plan.name == "sim-0")
    upstream = msgspec.json.decode(plan.config, type=WorkerSettings).upstream
    assert upstream is not None
    assert (upstream.url, upstream.model, upstream.flavour) == ("http://far:8000/v1", "llama", "vllm")


def test_vllm_needs_the_path_of_its_model(tmp_path: Path) -> None:
    text = EXAMPLE.replace("{name: demo-small}", "{name: other}").replace("[demo-small]", "[other]")
    with pytest.raises(ConfigError, match="needs the path"):
        load(tmp_path, text.replace("engine: sim, sim: {", "engine: vllm, engine_args: {"))


def test_a_pool_of_several_models_has_a_worker_for_each(tmp_path: Path) -> None:
    text = EXAMPLE.replace("serves: [demo]", "serves: [demo, demo-small]").replace(
        "name: l40-0,", "name: a, model: demo,"
    )
    with pytest.raises(ConfigError, match=r"no worker of the pool runs 'demo-small'"):
        load(tmp_path, text)


def test_sim_options_are_numbers_by_their_keys() -> None:
    sim = parse_sim("decode_step_ms=2.5,max_num_seqs=8")
    assert (sim.decode_step_ms, sim.max_num_seqs, sim.kv_blocks) == (2.5, 8, 4096)


@pytest.mark.parametrize(
    ("text", "said"),
    [("kv_blocks", "kv_blocks"), ("foo=1", "foo"), ("kv_blocks=x", "'x'"), ("max_num_seqs=0", "max_num_seqs.*0")],
)
def test_a_wrong_sim_option_is_told(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--sim.*{said}"):
        parse_sim(text)


def test_the_default_is_one_vllm_worker_on_the_demo_model() -> None:
    mesh = default_mesh(engine="vllm", workers=1, model=None, sim=None, gpus=0)
    [pool] = mesh.pools
    [worker] = pool.workers
    assert (pool.name, pool.serves, worker.engine, worker.gpu) == ("default", ["demo"], "vllm", None)
    assert mesh.model("demo").path is None


def test_simulated_workers_serve_a_model_named_sim() -> None:
    mesh = default_mesh(engine="sim", workers=4, model=None, sim=parse_sim("kv_blocks=8"), gpus=0)
    assert mesh.pools[0].serves == ["sim"]
    assert [worker.name for worker in mesh.pools[0].workers] == ["worker-0", "worker-1", "worker-2", "worker-3"]
    assert all(worker.sim and worker.sim.kv_blocks == 8 for worker in mesh.pools[0].workers)


def test_workers_take_turns_on_the_gpus_and_share_their_memory() -> None:
    mesh = default_mesh(engine="vllm", workers=3, model=None, sim=None, gpus=2)
    assert [worker.gpu for worker in mesh.pools[0].workers] == [0, 1, 0]
    assert {worker.gpu_memory_utilization for worker in mesh.pools[0].workers} == {0.4}


def test_up_takes_arguments_of_the_engine_and_names_those_that_are_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    given = parse_engine_args("max_model_len=8192,dtype=bfloat16,enforce_eager=true")
    assert given == {"max_model_len": 8192, "dtype": "bfloat16", "enforce_eager": True}
    mesh = default_mesh(engine="vllm", workers=1, model=None, sim=None, gpus=0, engine_args=given)
    assert mesh.pools[0].workers[0].engine_args == given
    for option, said in (
        ("max_model_length=1", "did you mean max_model_len"),
        ("max_model_len=many", "--engine-args.max_model_len"),
        ("max_model_len", "expected key=value"),
        ("dtype={", "--engine-args"),
    ):
        assert main(["up", "--engine-args", option]) == 2
        assert said in capsys.readouterr().err
    assert main(["up", "--engine", "sim", "--engine-args", "dtype=half"]) == 2
    assert "--engine vllm alone" in capsys.readouterr().err


def test_a_model_is_named_after_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    mesh = default_mesh(engine="vllm", workers=1, model=str(folder), sim=None, gpus=0)
    assert mesh.models[0] == msgspec.convert({"name": "llama", "path": str(folder)}, type(mesh.models[0]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["up", "--nope"], "--nope"),
        (["up", "--engine", "tgi"], "tgi"),
        (["up", "--edge-port", "99999"], "99999"),
        (["up", "--workers", "0"], "0"),
        (["up", "--engine", "sim", "--sim", "kv_blocks=x"], "'x'"),
        (["up", "--engine", "sim", "--model", "m"], "'m'"),
        (["up", "--sim", "kv_blocks=1"], "--sim"),
        (["up", "--model", "./nope"], "./nope"),
        (["up", "--config", "/nope/mesh.yaml"], "/nope/mesh.yaml"),
        (["up", "--config", "/nope/mesh.yaml", "--workers", "2"], "--workers"),
        (["up", "--otlp-endpoint", "nowhere"], "nowhere"),
        (["keys", "create"], "--name"),
        (["keys", "create", "--name", "a", "--models", "a,,b"], "a,,b"),
        (["fly"], "fly"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("**/mesh.json"))


@pytest.mark.parametrize("arguments", [["workers"], ["explain", "x"], ["top", "--once"], ["policy", "show"]])
def test_a_mesh_that_is_still_starting_is_told_from_one_that_does_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    state = State(tmp_path)
    state.make()
    with state.lock():
        assert main([*arguments, "--state-dir", str(tmp_path)]) == 1
        assert "is starting or stopping" in capsys.readouterr().err
    # A launcher that was killed leaves its file behind.
    state.write_mesh({"operators": "http://127.0.0.1:1", "admin_key": "k"})
    assert main([*arguments, "--state-dir", str(tmp_path)]) == 1
    assert f"no mesh runs in {tmp_path}" in capsys.readouterr().err


def test_keys_are_made_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state-dir", str(tmp_path)]
    State(tmp_path).write_database(str(tmp_path / "keys.db"))
    assert main(["keys", "create", "--name", "ada", "--models", "demo, sim", "--priority", "-1", "--json", *state]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["key"].startswith("tl-")
    assert main(["keys", "list", "--json", *state]) == 0
    [listed] = json.loads(capsys.readouterr().out)
    assert (listed["id"], listed["name"], listed["models"]) == (made["id"], "ada", ["demo", "sim"])
    assert made["key"] not in str(listed)
    assert main(["keys", "revoke", made["id"], *state]) == 0
    assert main(["keys", "revoke", made["id"], *state]) == 1


def test_processes_have_ports_of_their_own_and_know_each_other(tmp_path: Path) -> None:
    state = State(tmp_path)
    plans = {plan.name: plan for plan in plan_processes(load(tmp_path, EXAMPLE), state)}
    assert list(plans) == ["telemetry", "router", "l40-0", "sim-0", "gateway", "envoy"]
    ports = [port for plan in plans.values() for port in plan.ports.values()]
    assert len(ports) == len(set(ports))
    configs: dict[str, dict[str, Any]] = {name: json.loads(plan.config) for name, plan in plans.items()}
    router = f"127.0.0.1:{plans['router'].ports['grpc']}"
    assert configs["gateway"]["routers"] == configs["sim-0"]["routers"] == [router]
    assert configs["router"]["telemetry"] == [f"127.0.0.1:{plans['telemetry'].ports['grpc']}"]
    worker = msgspec.convert(configs["l40-0"], WorkerSettings)
    assert worker.advertise == f"127.0.0.1:{plans['l40-0'].ports['grpc']}"
    assert (worker.gpu, worker.engine_args, worker.pool) == (0, {"max_model_len": 8192}, "large")


def test_the_router_is_told_the_policy_and_what_it_may_name(tmp_path: Path) -> None:
    text = "routing: {aliases: {chat: demo}}" + EXAMPLE
    plans = {plan.name: plan for plan in plan_processes(load(tmp_path, text), State(tmp_path))}
    router = msgspec.convert(json.loads(plans["router"].config), RouterSettings)
    assert router.routing.aliases == {"chat": "demo"}
    assert (router.pools, router.models, router.expected_workers) == (["large", "small"], ["demo", "demo-small"], 2)
    assert router.policy_path == str(tmp_path / "policy.json")


def test_a_policy_that_changes_in_the_file_is_handed_on_and_a_wrong_one_is_told_of(tmp_path: Path) -> None:
    file, state, said = tmp_path / "mesh.yaml", State(tmp_path / "state"), list[str]()
    state.make()
    watch = PolicyWatch(file, load(tmp_path, EXAMPLE), state, say=said.append)
    watch.look()
    assert not said
    file.write_text("routing: {aliases: {chat: nope}}" + EXAMPLE)
    watch.look()
    watch.look()
    assert len(said) == 1
    assert "routing.aliases.chat" in said[0]
    assert not state.policy.exists()
    file.write_text("routing: {aliases: {chat: demo}}" + EXAMPLE)
    watch.look()
    assert json.loads(state.policy.read_text()) == {"aliases": {"chat": "demo"}}


def test_every_replica_of_the_router_is_known_to_workers_gateway_and_edge(tmp_path: Path) -> None:
    mesh = load(tmp_path, "routers: 2" + EXAMPLE)
    plans = {plan.name: plan for plan in plan_processes(mesh, State(tmp_path))}
    configs: dict[str, dict[str, Any]] = {name: json.loads(plan.config) for name, plan in plans.items()}
    addresses = [f"127.0.0.1:{plans[name].ports['grpc']}" for name in ("router", "router-1")]
    assert configs["gateway"]["routers"] == configs["sim-0"]["routers"] == addresses
    clusters = {cluster["name"]: cluster for cluster in configs["envoy"]["static_resources"]["clusters"]}
    for name, port in (("router", "grpc"), ("picker", "picker")):
        levels = clusters[name]["load_assignment"]["endpoints"]
        ports = [
            level["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["port_value"]
            for level in sorted(levels, key=lambda level: level["priority"])
        ]
        assert ports == [plans[router].ports[port] for router in ("router", "router-1")]
    services = compose_file(mesh)["services"]
    assert {"router", "router-1"} <= services.keys()
    gateway = json.loads(compose_file(mesh)["configs"]["gateway"]["content"].replace("$$", "$"))
    assert gateway["routers"] == ["router:50051", "router-1:50051"]
    assert gateway["router_sessions"] == ["router:50052", "router-1:50052"]


def test_the_committed_compose_file_is_what_its_mesh_yaml_gives() -> None:
    folder = ROOT / "deploy" / "compose"
    mesh = load_mesh(folder / "mesh.yaml")
    assert yaml.safe_load((folder / "compose.yaml").read_text()) == compose_file(mesh)
    observed = yaml.safe_load((ROOT / "deploy" / "observability" / "compose.yaml").read_text())
    assert observed == observed_compose_file(mesh)


def test_the_observed_mesh_sends_its_traces_and_has_every_process_scraped() -> None:
    rendered = observed_compose_file(load_mesh(ROOT / "deploy" / "compose" / "mesh.yaml"))
    configs = {
        name: json.loads(each["content"].replace("$$", "$"))
        for name, each in rendered["configs"].items()
        if name != "mesh"
    }
    targets = configs.pop("prometheus-targets")
    assert {each["labels"]["process"]: each["targets"] for each in targets} == {
        name: [f"{name}:9100"] for name in configs
    }
    assert {config["otlp_endpoint"] for config in configs.values()} == {"jaeger:4317"}
    folder = ROOT / "deploy" / "observability"
    mounted = [
        volume.partition(":")[0]
        for name in ("prometheus", "grafana")
        for volume in rendered["services"][name]["volumes"]
    ]
    assert all((folder / path).exists() for path in mounted if path.startswith("./"))


def test_every_container_has_its_configuration_and_workers_have_the_address_that_they_tell(tmp_path: Path) -> None:
    text = EXAMPLE.replace("path: ./models/demo", "path: org/some-model")
    rendered = compose_file(load(tmp_path, text))
    services, configs = rendered["services"], rendered["configs"]
    assert set(services) == {
        "telemetry",
        "router",
        "gateway",
        "l40-0",
        "sim-0",
        "redis",
        "policy",
        "edge-config",
        "envoy",
    }
    for service in services.values():
        for used in service.get("configs", []):
            assert used["source"] in configs
    for name in ("l40-0", "sim-0"):
        told = yaml.safe_load(configs[name]["content"])["advertise"]
        assert told.partition(":")[0] == services[name]["networks"]["mesh"]["ipv4_address"]
    [card] = services["l40-0"]["deploy"]["resources"]["reservations"]["devices"]
    assert card["device_ids"] == ["0"]
    check_mesh(msgspec.convert(yaml.safe_load(configs["mesh"]["content"]), MeshConfig), "again")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", None),
        ("http://jaeger:4317", "jaeger:4317"),
        ("http://jaeger", "jaeger:4317"),
        ("127.0.0.1:5000", "127.0.0.1:5000"),
    ],
)
def test_spans_go_where_opentelemetrys_variable_says(url: str, expected: str | None) -> None:
    assert otlp_endpoint_of({"OTEL_EXPORTER_OTLP_ENDPOINT": url}) == expected


@pytest.mark.parametrize("url", ["https://x", "http://", "http://x:port", "http://x:70000"])
def test_a_variable_that_names_no_plain_endpoint_is_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigError, match=rf"OTEL_EXPORTER_OTLP_ENDPOINT: .* got the value '{url}'"):
        otlp_endpoint_of({"OTEL_EXPORTER_OTLP_ENDPOINT": url})


def test_the_reference_of_mesh_yaml_has_every_key_as_the_code_has_it() -> None:
    written = (ROOT / "docs" / "mesh-yaml.md").read_text()
    assert written == reference(), "python -m tests.support.mesh_reference > docs/mesh-yaml.md"
    keys = {field for shape in (MeshConfig, PoolConfig, WorkerConfig, EdgeConfig) for field in shape.__struct_fields__}
    assert not [key for key in keys if f"| `{key}` |" not in written]


BOUNDS: dict[str, tuple[Any, Any]] = {
    "max_waiting": (7, -1),
    "max_wait_seconds": (9.5, 0),
    "request_timeout_seconds": (99.0, 0),
    "fleet_memory_seconds": (5.0, -1),
    "new_forms_per_minute": (11, 0),
    "picker_fallbacks": (2, 9),
    "sample_seconds": (0.5, 0.01),
    "log_level": ("warning", "loud"),
}


@pytest.mark.parametrize("key", BOUNDS)
def test_a_bound_reaches_the_processes_it_is_for_here_and_in_containers(tmp_path: Path, key: str) -> None:
    right, wrong = BOUNDS[key]
    mesh = load(tmp_path, f"{key}: {right}{EXAMPLE}")
    for configs in (
        [json.loads(plan.config) for plan in plan_processes(mesh, State(tmp_path)) if plan.service != "envoy"],
        [json.loads(msgspec.json.encode(container.settings)) for container in containers(mesh)],
    ):
        said = [config[key] for config in configs if key in config]
        assert said
        assert set(said) == {right}
    with pytest.raises(ConfigError, match=rf"{key}: .*, got the value {wrong!r}"):
        load(tmp_path, f"{key}: {wrong}{EXAMPLE}")


def test_the_queue_of_an_engine_is_its_workers(tmp_path: Path) -> None:
    mesh = load(tmp_path, EXAMPLE.replace("engine: sim,", "engine: sim, max_queued: 3,"))
    queues = {plan.name: json.loads(plan.config).get("max_queued") for plan in plan_processes(mesh, State(tmp_path))}
    assert (queues["sim-0"], queues["l40-0"]) == (3, 64)


def test_gateways_that_share_nothing_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mesh.yaml"
    config.write_text(
        "gateways: 2\nmodels: [{name: s}]\npools: [{name: p, serves: [s], workers: [{name: w, engine: sim}]}]\n"
    )
    assert main(["plan", "--config", str(config)]) == 0
    assert "note: gateways: 2 of them without redis_url" in capsys.readouterr().out
    found = {one.subject: one for one in config_findings(config, runs=True)}
    assert found["gateways"].level is Level.NOTE
    assert "previous_response_id gets 404" in found["gateways"].said
    config.write_text(config.read_text() + "redis_url: redis://127.0.0.1:1/0\n")
    assert main(["plan", "--config", str(config)]) == 0
    assert "note:" not in capsys.readouterr().out


def test_what_the_readmes_say_of_mesh_yaml_is_taken(tmp_path: Path) -> None:
    """Whole files as they are; other blocks beside a fleet of their own."""
    fleet = yaml.safe_load("models: [{name: llama}, {name: llama-small}, {name: llama-next}]\npools:\n" + PARTS)
    blocks = [
        block.partition("```")[0]
        for name in ("README.md", "examples/README.md")
        for block in (ROOT / name).read_text().split("```yaml\n")[1:]
    ]
    assert len(blocks) >= 7
    for block in blocks:
        said = yaml.safe_load(block)
        if isinstance(said, dict) and said.keys() != {"models"}:
            load(tmp_path, yaml.safe_dump(said if "pools" in said else {**fleet, **said}))


PARTS = """\
  - {name: large, serves: [llama, llama-next], workers: [{name: a, engine: sim, model: llama},
     {name: b, engine: sim, model: llama-next}]}
  - {name: small, serves: [llama-small], workers: [{name: c, engine: sim}]}
"""
