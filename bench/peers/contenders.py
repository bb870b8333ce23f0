"""The routers that are compared, each started over engines of its own."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from bench.processes import program, service, wait_for_http
from bench.routing.engine import BLOCK_TOKENS, EngineSpec
from services.common.keystore import KeyStore
from services.common.settings import GatewaySettings, ModelSettings, RouterSettings, SimSettings, WorkerSettings
from tests.support.ports import free_port

__all__ = ["MODEL", "PEERS", "Contender", "Target", "peer", "tokenloom"]

MODEL: Final = "sim"
_CONTEXT: Final = 16_384

Contender = Callable[[Path, Sequence[EngineSpec]], AbstractContextManager["Target"]]
"""Starts a router over engines, with a folder for its files."""


class Target(NamedTuple):
    """Where requests go."""

    host: str
    key: str


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
        stack.enter_context(service("router", settings, folder))
        for spec in specs:
            stack.enter_context(service("inference", _worker(spec, router), folder))
        gateway = GatewaySettings(
            name="gateway", listen=_anywhere(), metrics=_anywhere(), http=http, routers=[router], database=keys
        )
        stack.enter_context(service("gateway", gateway, folder))
        wait_for_http(f"http://{http}/readyz")
        yield Target(http, key)


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
        with ExitStack() as stack:
            urls = [stack.enter_context(_http_engine(folder, spec)) for spec in specs]
            port = free_port()
            command = [program_path, *how.arguments, "--port", str(port), "--prometheus-port", str(free_port())]
            stack.enter_context(program([*command, "--worker-urls", *urls], folder / "router.log"))
            wait_for_http(f"http://127.0.0.1:{port}{how.ready}", within=60)
            yield Target(f"127.0.0.1:{port}", "none")

    return contender


@contextmanager
def _http_engine(folder: Path, spec: EngineSpec) -> Iterator[str]:
    port = free_port()
    settings = ",".join(f"{name}={value}" for name, value in msgspec.to_builtins(_sim(spec)).items() if value != "")
    arguments = [sys.executable, "-m", "bench.peers.sim_openai", str(port), settings]
    with program(arguments, folder / f"{spec.name}.log"):
        url = f"http://127.0.0.1:{port}"
        wait_for_http(f"{url}/health")
        yield url
