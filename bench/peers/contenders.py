"""The routers that are compared, each started over engines of its own."""

import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from bench.processes import program, service, wait_for_http
from bench.routing.engine import BLOCK_TOKENS, EngineSpec
from services.common.keystore import KeyStore
from services.common.settings import RouterSettings
from services.common.settings_gateway import GatewaySettings
from services.common.settings_worker import ModelSettings, SimSettings, WorkerSettings
from services.mesh.envoy_binary import find_envoy
from tests.support.ports import free_port

__all__ = ["MODEL", "PEERS", "Contender", "Target", "envoy", "litellm", "peer", "tokenloom"]

MODEL: Final = "sim"
_CONTEXT: Final = 16_384
_TYPES: Final = "type.googleapis.com/envoy.extensions."

Contender = Callable[[Path, Sequence[EngineSpec]], AbstractContextManager["Target"]]
"""Starts a router over engines, with a folder for its files."""


class Target(NamedTuple):
    """Where requests go."""

    host: str
    key: str
    engines: Sequence[int]
    """The pids of the processes with an engine each."""


class Peer(NamedTuple):
    """How a peer's router is started."""

    arguments: tuple[str, ...]
    ready: str
    """A path that answers 200 once it serves."""


_COMMON: Final = ("--host", "127.0.0.1", "--log-level", "error")
_POLICIES: Final = ("cache_aware", "power_of_two")
PEERS: Final[Mapping[str, Mapping[str, Peer]]] = {
    "smg": {policy: Peer(("launch", *_COMMON, "--policy", policy), "/readiness") for policy in _POLICIES},
    "sglang-router": {policy: Peer(("launch", *_COMMON, "--policy", policy), "/readiness") for policy in _POLICIES},
    "vllm-router": {policy: Peer((*_COMMON, "--policy", policy), "/readiness") for policy in _POLICIES},
}
"""By program and policy; everything else is as they come."""


def _sim(spec: EngineSpec) -> SimSettings:
    return SimSettings(
        prefill_tokens_per_second=spec.prefill_tokens_per_second,
        decode_step_ms=1000 * spec.decode_step_seconds,
        decode_step_ms_per_sequence=1000 * spec.per_sequence_seconds,
        max_num_seqs=spec.max_running,
        kv_blocks=spec.kv_tokens // BLOCK_TOKENS,
        block_size=BLOCK_TOKENS,
        max_model_len=_CONTEXT,
    )


def _anywhere() -> str:
    return f"127.0.0.1:{free_port()}"


@contextmanager
def tokenloom(folder: Path, specs: Sequence[EngineSpec]) -> Iterator[Target]:
    """A gateway, a router, and a worker for each engine."""
    router, http, keys = _anywhere(), _anywhere(), str(folder / "keys.db")
    with KeyStore(keys) as store:
        _, key = store.create("bench")
    with ExitStack() as stack:
        settings = RouterSettings(name="router", listen=router, metrics=_anywhere())
        stack.enter_context(service("services.router", settings, folder))
        engines = [stack.enter_context(service("services.inference", _worker(spec, router), folder)) for spec in specs]
        gateway = GatewaySettings(
            name="gateway", listen=_anywhere(), metrics=_anywhere(), http=http, routers=[router], database=keys
        )
        stack.enter_context(service("services.gateway", gateway, folder))
        wait_for_http(f"http://{http}/readyz")
        yield Target(http, key, engines)


def _worker(spec: EngineSpec, router: str) -> WorkerSettings:
    listen = _anywhere()
    return WorkerSettings(
        name=spec.name,
        listen=listen,
        advertise=listen,
        metrics=_anywhere(),
        routers=[router],
        model=ModelSettings(name=MODEL),
        engine="sim",
        sim=_sim(spec),
    )


def peer(program_path: str, how: Peer) -> Contender:
    """A peer's router in front of an HTTP server for each engine."""

    @contextmanager
    def contender(folder: Path, specs: Sequence[EngineSpec]) -> Iterator[Target]:
        port = free_port()
        command = [program_path, *how.arguments, "--port", str(port), "--prometheus-port", str(free_port())]
        with ExitStack() as stack:
            urls, engines = stack.enter_context(_http_engines(folder, specs))
            stack.enter_context(program([*command, "--worker-urls", *urls], folder / "router.log"))
            wait_for_http(f"http://127.0.0.1:{port}{how.ready}", within=60)
            yield Target(f"127.0.0.1:{port}", "none", engines)

    return contender


def litellm(program_path: str) -> Contender:
    """litellm's proxy, with the HTTP servers as deployments of one model."""

    @contextmanager
    def contender(folder: Path, specs: Sequence[EngineSpec]) -> Iterator[Target]:
        port, key, config = free_port(), f"sk-{secrets.token_hex(16)}", folder / "litellm.json"
        command = [program_path, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        with _http_engines(folder, specs) as (urls, engines):
            models = [
                {
                    "model_name": MODEL,
                    "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"},
                }
                for url in urls
            ]
            config.write_bytes(msgspec.json.encode({"model_list": models, "general_settings": {"master_key": key}}))
            with program([*command, "--telemetry", "False"], folder / "litellm.log"):
                wait_for_http(f"http://127.0.0.1:{port}/health/liveliness", within=120)
                yield Target(f"127.0.0.1:{port}", key, engines)

    return contender


@contextmanager
def envoy(folder: Path, specs: Sequence[EngineSpec]) -> Iterator[Target]:
    """Envoy alone, in turn to the HTTP servers, with retries and outlier detection as they are commonly switched on."""
    port, admin, config = free_port(), free_port(), folder / "envoy.json"
    with _http_engines(folder, specs) as (urls, engines):
        config.write_bytes(msgspec.json.encode(_envoy_config(port, admin, urls)))
        with program([str(find_envoy()), "-c", str(config), "--log-level", "error"], folder / "envoy.log"):
            wait_for_http(f"http://127.0.0.1:{admin}/ready")
            yield Target(f"127.0.0.1:{port}", "none", engines)


def _envoy_config(port: int, admin: int, urls: Sequence[str]) -> dict[str, Any]:
    def address(at: int) -> dict[str, Any]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": at}}

    retries = {"retry_on": "connect-failure,refused-stream,reset,5xx", "num_retries": 3}
    route = {"match": {"prefix": "/"}, "route": {"cluster": "engines", "timeout": "0s", "retry_policy": retries}}
    manager = {
        "@type": f"{_TYPES}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPES}filters.http.router.v3.Router"},
            }
        ],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    endpoints = [{"endpoint": {"address": address(int(url.rpartition(":")[2]))}} for url in urls]
    cluster = {
        "name": "engines",
        "type": "STATIC",
        "lb_policy": "ROUND_ROBIN",
        "outlier_detection": {},
        "load_assignment": {"cluster_name": "engines", "endpoints": [{"lb_endpoints": endpoints}]},
    }
    listener = {"name": "in", "address": address(port), "filter_chains": [chain]}
    return {
        "admin": {"address": address(admin)},
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
    }


@contextmanager
def _http_engines(folder: Path, specs: Sequence[EngineSpec]) -> Iterator[tuple[list[str], list[int]]]:
    """Yields their URLs, and the pids of their processes."""
    with ExitStack() as stack:
        started = [stack.enter_context(_http_engine(folder, spec)) for spec in specs]
        yield [url for url, _ in started], [pid for _, pid in started]


@contextmanager
def _http_engine(folder: Path, spec: EngineSpec) -> Iterator[tuple[str, int]]:
    port = free_port()
    settings = ",".join(f"{name}={value}" for name, value in msgspec.to_builtins(_sim(spec)).items() if value != "")
    arguments = [sys.executable, "-m", "bench.peers.sim_openai", str(port), settings]
    with program(arguments, folder / f"{spec.name}.log") as pid:
        url = f"http://127.0.0.1:{port}"
        wait_for_http(f"{url}/health")
        yield url, pid
