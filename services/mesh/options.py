"""The commands of `tokenloom`, and their options."""

from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from pathlib import Path
from typing import Any, NoReturn

from services.common.endpoints import ENDPOINTS
from services.mesh import bench, doctor, explain, keys, plan_command, policies, render, top, up, usage
from services.mesh import option_values as values
from services.mesh.edge_client import KEY_VARIABLE
from services.mesh.option_parts import add_command, add_door, add_listing, add_state
from services.mesh.options_workers import add_adapters, add_workers

__all__ = ["command_line"]


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line; the usage is a `--help` away."""
        self.exit(2, f"{self.prog}: {message}\n")


def command_line() -> ArgumentParser:
    """What reads the arguments; what it returns has the command to run as `run`."""
    parser = _Parser(prog="tokenloom", description="An LLM serving mesh.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_up(commands)
    for name, run, about in (("status", up.status, "what runs"), ("down", up.down, "stop it, draining first")):
        command = add_command(commands, name, run, about)
        add_state(command)
        if name == "status":
            command.add_argument("--json", action="store_true")
    _add_keys(commands)
    _add_usage(commands)
    add_workers(commands)
    add_adapters(commands)
    _add_policy(commands)
    _add_explain(commands)
    _add_top(commands)
    _add_doctor(commands)
    _add_render(commands)
    _add_plan(commands)
    _add_bench(commands)
    return parser


def _add_up(commands: Any) -> None:
    command = add_command(commands, "up", up.up, "run the whole mesh on this machine")
    command.add_argument("--config", type=Path, metavar="FILE", help="a mesh.yaml; without one, the options say it")
    command.add_argument("--engine", choices=("vllm", "sim"), help="default: vllm")
    command.add_argument(
        "--model", metavar="PATH", help="a folder, a Hugging Face id or s3://BUCKET/PATH; default: a small demo model"
    )
    command.add_argument("--workers", type=int, metavar="N", help="default: 1")
    command.add_argument("--sim", metavar="KEY=VALUE,…", help="how fast and large the simulated engine is")
    command.add_argument("--engine-args", metavar="KEY=VALUE,…", help="vLLM's own, such as max_model_len=8192")
    command.add_argument("--edge-port", type=values.port, metavar="P", help="default: 8080, or what mesh.yaml says")
    command.add_argument(
        "--otlp-endpoint", metavar="HOST:PORT", type=values.address, help="where spans go, over OTLP gRPC"
    )
    command.add_argument("--detach", action="store_true", help="return once everything is ready")
    command.add_argument(
        "--restart", action=BooleanOptionalAction, default=True, help="start what dies again (default: yes)"
    )
    add_state(command)


def _add_keys(commands: Any) -> None:
    actions = add_listing(commands, "keys", keys.list_keys, "API keys; a list of them")
    create = add_command(actions, "create", keys.create, "make a key; it is shown once")
    _add_key_options(create)
    revoke = add_command(actions, "revoke", keys.revoke, "end a key")
    rotate = add_command(actions, "rotate", keys.rotate, "give a key a new secret; it is shown once")
    rotate.add_argument(
        "--grace", type=values.duration, metavar="TIME", help="how long the old one works on; default: 0"
    )
    for action in (revoke, rotate):
        action.add_argument("id")
    for action in (create, rotate):
        action.add_argument("--json", action="store_true", default=SUPPRESS)
    for action in (create, revoke, rotate):
        add_door(action, inherits=True)


def _add_key_options(create: ArgumentParser) -> None:
    create.add_argument("--name", required=True, type=values.key_name)
    create.add_argument("--tenant", type=values.key_name, help="whose requests these are; default: the name")
    create.add_argument("--models", metavar="A,B", help="the models it may use; default: all")
    create.add_argument(
        "--endpoints", metavar="A,B", help=f"what it may ask for; default: all of {', '.join(ENDPOINTS)}"
    )
    create.add_argument("--rpm", type=values.at_least_one, metavar="N", help="requests a minute; default: no limit")
    create.add_argument("--tpm", type=values.at_least_one, metavar="N", help="tokens a minute; default: no limit")
    create.add_argument(
        "--concurrency", type=values.at_least_one, metavar="N", help="requests at a time; default: no limit"
    )
    create.add_argument("--budget", type=values.amount, metavar="X", help="cost of a calendar month; default: no limit")
    create.add_argument("--priority", type=values.priority, default=0, metavar="N", help="lower goes first; default: 0")
    create.add_argument("--allow-degrade", action="store_true", help="a smaller model may answer when there is no room")
    create.add_argument("--admin", action="store_true", help="it may operate the mesh")
    create.add_argument("--debug", action="store_true", help="its answers say which worker made them")
    create.add_argument("--rights", metavar="A,B", help=f"the same rights by name: {', '.join(keys.RIGHTS)}")
    create.add_argument("--expires", type=values.duration, metavar="TIME", help="how long it works: 90s, 15m, 12h, 30d")


def _add_policy(commands: Any) -> None:
    actions = add_command(commands, "policy", None, "the routing policy").add_subparsers(
        required=True, metavar="ACTION"
    )
    add_door(add_command(actions, "show", policies.show, "the one in force, as JSON"))
    applying = add_command(
        actions, "apply", policies.apply, "put another one in force, until the mesh is started again"
    )
    applying.add_argument("file", type=Path, metavar="FILE", help="a mesh.yaml, or a file with its `routing` alone")
    add_door(applying)


def _add_explain(commands: Any) -> None:
    about = "why a request went where it went, and where its time went"
    command = add_command(commands, "explain", explain.explain, about)
    command.add_argument("request_id", metavar="REQUEST_ID", help="from the answer's x-request-id")
    command.add_argument("--json", action="store_true")
    add_door(command)


def _add_top(commands: Any) -> None:
    command = add_command(commands, "top", top.top, "GPUs, workers, queues and tenants, live")
    command.add_argument("--once", action="store_true", help="show it once, as a script or a pipe gets it")
    command.add_argument("--json", action="store_true", help="one JSON object for each time that it is shown")
    command.add_argument(
        "--interval",
        type=values.interval,
        default=0.5,
        metavar="SECONDS",
        help="least time between two; default: %(default)s",
    )
    add_door(command)


def _add_doctor(commands: Any) -> None:
    about = "what is wrong with this machine or mesh, and what to do about it"
    command = add_command(commands, "doctor", doctor.doctor, about)
    command.add_argument("--config", type=Path, metavar="FILE", help="a mesh.yaml: checked, and what it names")
    command.add_argument("--thorough", action="store_true", help="load vLLM, too, which takes a while")
    command.add_argument("--no-requests", action="store_true", help="ask no model for a token")
    command.add_argument("--json", action="store_true")
    add_door(command)


def _add_usage(commands: Any) -> None:
    reporting = add_command(
        commands, "usage", usage.show, "what was used, by month, tenant and model, and what it cost"
    )
    reporting.add_argument("--tenant")
    reporting.add_argument("--model")
    reporting.add_argument("--month", type=values.month, metavar="YYYY-MM")
    actions = reporting.add_subparsers(metavar="ACTION")
    erase = add_command(actions, "erase", usage.erase, "delete a tenant's usage")
    erase.add_argument("--tenant", required=True)
    trail = add_command(commands, "audit", usage.audit_trail, "who changed what, newest first")
    trail.add_argument("--limit", type=values.at_least_one, default=100, metavar="N", help="default: %(default)s")
    for command in (reporting, trail):
        command.add_argument("--json", action="store_true")
        add_door(command)
    add_door(erase, inherits=True)


def _add_render(commands: Any) -> None:
    targets = add_command(commands, "render", None, "deploy files from a mesh.yaml").add_subparsers(
        required=True, metavar="TARGET"
    )
    for name, run, about in (
        ("compose", render.compose, "a compose.yaml with every process, Envoy and Redis"),
        ("observed", render.observed, "the same with Jaeger, Prometheus and Grafana, for deploy/observability"),
        ("envoy", render.envoy, "the edge's Envoy configuration for containers"),
        ("policy", render.policy, "the routing policy that routers in containers follow, in JSON"),
        ("k8s", render.k8s, "Kubernetes manifests"),
    ):
        target = add_command(targets, name, run, about)
        target.add_argument("--config", type=Path, required=True, metavar="FILE", help="a mesh.yaml")
        target.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
        if name == "k8s":
            _add_k8s(target)


def _add_k8s(target: ArgumentParser) -> None:
    target.add_argument(
        "--namespace", type=values.dns_label, default="tokenloom", metavar="NAME", help="default: %(default)s"
    )
    target.add_argument("--image", default="tokenloom", metavar="IMAGE", help="default: %(default)s")
    target.add_argument(
        "--gpu-resource",
        action="append",
        type=values.pair,
        default=[],
        metavar="WORKER=RESOURCE",
        help="what a worker's cards are called, such as nvidia.com/mig-3g.20gb; default: nvidia.com/gpu",
    )
    target.add_argument(
        "--tolerate",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="a taint of nodes for workers, as of spot",
    )
    target.add_argument(
        "--max-replicas", type=values.at_least_one, default=1, metavar="N", help="of each worker, by KEDA; default: 1"
    )
    target.add_argument(
        "--prometheus", type=values.url, default="http://prometheus:9090", metavar="URL", help="default: %(default)s"
    )
    target.add_argument(
        "--busy-hours", type=values.hours, metavar="H-H", help="working hours in which all replicas run"
    )
    target.add_argument("--timezone", default="UTC", metavar="ZONE", help="of these; default: %(default)s")
    target.add_argument("--pod-monitor", action="store_true", help="have the Prometheus Operator scrape every process")


def _add_plan(commands: Any) -> None:
    command = add_command(commands, "plan", plan_command.plan, "whether a model fits; whether a mesh.yaml is right")
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="a mesh.yaml: checked, and each of its vLLM workers"
    )
    command.add_argument("--model", metavar="PATH", help="a folder, a Hugging Face id or s3://BUCKET/PATH")
    command.add_argument("--parameters", metavar="COUNT", help="a model by its size instead, such as 8B")
    command.add_argument(
        "--gpu-memory", metavar="SIZE,…", help="of each GPU: 24GiB, or 45,45,24; default: of this machine's"
    )
    command.add_argument("--cpu-memory", metavar="SIZE", help="for engines on a CPU; default: what is free here")
    command.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE", help="default: 0.8")
    for name, about in (
        ("--tensor-parallel-size", "GPUs that each layer is spread over; default: 1"),
        ("--pipeline-parallel-size", "GPUs that the layers are spread over; default: 1"),
        ("--max-model-len", "longest sequence, in tokens; default: the model's own"),
        ("--typical-length", "a usual sequence, in tokens; default: 2048"),
        ("--layers", "with --parameters: the model's num_hidden_layers"),
        ("--kv-heads", "with --parameters: its num_key_value_heads"),
        ("--head-dim", "with --parameters: its head_dim"),
    ):
        command.add_argument(name, type=int, metavar="N", help=about)
    command.add_argument("--dtype", metavar="TYPE", help="what the model runs in; default: what it was saved in")
    command.add_argument(
        "--kv-cache-dtype", metavar="TYPE", help="what the KV cache holds; default: what the model runs in"
    )
    command.add_argument("--json", action="store_true")


def _add_bench(commands: Any) -> None:
    command = add_command(commands, "bench", bench.bench, "put a load on an endpoint and measure how it is served")
    add_state(command)
    command.add_argument(
        "--edge",
        type=values.url,
        metavar="URL",
        help=f"any server of OpenAI's API, or a mesh that runs elsewhere; its key is read from {KEY_VARIABLE}",
    )
    command.add_argument("--api", choices=("openai", "tokenloom"), default="openai", help="default: %(default)s")
    command.add_argument("--endpoint", choices=("chat", "completions"), default="chat", help="default: %(default)s")
    command.add_argument("--model", metavar="NAME", help="default: the first that is listed")
    _add_load(command)
    command.add_argument(
        "--ttft", type=values.amount, default=1.0, metavar="SECONDS", help="a good request's; default: 1"
    )
    command.add_argument(
        "--tpot", type=values.amount, default=0.1, metavar="SECONDS", help="a good request's; default: 0.1"
    )
    command.add_argument(
        "--timeout", type=values.amount, default=300.0, metavar="SECONDS", help="of a request; default: 300"
    )
    command.add_argument("--json", action="store_true")


def _add_load(command: ArgumentParser) -> None:
    command.add_argument("--rate", type=values.amount, metavar="R", help="requests a second, at random moments")
    command.add_argument(
        "--concurrency", type=values.at_least_one, metavar="N", help="or so many requests at a time; default: 8"
    )
    command.add_argument("--requests", type=values.at_least_one, default=100, metavar="N", help="default: %(default)s")
    command.add_argument("--duration", type=values.amount, metavar="SECONDS", help="send none after so long")
    command.add_argument(
        "--warm-up", type=values.count, default=2, metavar="N", help="requests before; default: %(default)s"
    )
    for name, length in (("--prompt-tokens", 128), ("--output-tokens", 64)):
        command.add_argument(name, type=values.length, default=length, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--spread", type=values.share, default=0.0, metavar="S", help="lengths vary by ± S; default: 0"
    )
    command.add_argument(
        "--shared-prefix-tokens",
        type=values.count,
        default=0,
        metavar="N",
        help="what all prompts begin with; default: 0",
    )
    command.add_argument("--prompts", type=Path, metavar="FILE", help="JSON lines: texts, or {prompt, max_tokens}")
    command.add_argument("--ignore-eos", action="store_true", help="have every output be as long as it may")
    command.add_argument("--seed", type=values.count, default=0, metavar="N", help="default: 0")
