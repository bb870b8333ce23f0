"""CPU of the gateway for each streamed token, or for each request of one token, beside other proxies' in the same run.

    python -m bench.gateway_cpu [--smg PATH] [--litellm PATH] [--streams 64] [--tokens-per-second 100] [--seconds 20]
    python -m bench.gateway_cpu --requests 2000 [--whole] [--smg PATH] [--streams 16] [--beside CHECKOUT] [--repeat 5]

`--smg` and `--litellm` are the programs of `pip install smg==1.13.0` and of `pip install 'litellm[proxy]'`, each in an
environment of its own; `--beside` is another checkout of this repository. All are up all the time and take turns, in
one order and then in the other. They get the same schedule of tokens from an engine that does nothing else, and the
same client; the CPU is user + system of the proxy alone; of ours, it is the gateway's and, for requests, the router's.
The last lines are the middle of each figure, and of its ratios to the others within a turn.
"""

import argparse
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.processes import code_of, exact_cpu_seconds, program, service, wait_for_http
from bench.turns import ratios
from services.common.keystore import KeyStore
from services.common.settings import RouterSettings
from services.common.settings_gateway import GatewaySettings
from services.common.settings_worker import ModelSettings, SimSettings, WorkerSettings
from tests.support.ports import free_port


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """What is measured."""

    name: str
    pids: tuple[int, ...]
    target: str
    key: str


@contextmanager
def tokenloom(
    folder: Path,
    streams: int,
    tokens_per_second: float,
    *,
    otlp_endpoint: str | None = None,
    checkout: Path | None = None,
    gateway_module: str = "services.gateway",
) -> Iterator[Proxy]:
    """A gateway with a router and one simulated worker; their code is that of `checkout`, None: this one's."""
    keys = str(folder / "keys.db")
    router, worker, gateway = _processes(streams, tokens_per_second, keys, otlp_endpoint)
    with KeyStore(keys) as store:
        _, key = store.create("bench")
    with ExitStack() as stack:
        with code_of(checkout):
            router_pid = stack.enter_context(service("services.router", router, folder))
            stack.enter_context(service("services.inference", worker, folder))
            pid = stack.enter_context(service(gateway_module, gateway, folder))
        wait_for_http(f"http://{gateway.http}/readyz")
        name = "tokenloom" if checkout is None else checkout.name
        yield Proxy(name=name, pids=(pid, router_pid), target=gateway.http, key=key)


def _processes(
    streams: int, tokens_per_second: float, keys: str, otlp_endpoint: str | None
) -> tuple[RouterSettings, WorkerSettings, GatewaySettings]:
    ports = [f"127.0.0.1:{free_port()}" for _ in range(8)]
    model = ModelSettings(name="sim")
    sim = SimSettings(
        decode_step_ms=1000 / tokens_per_second,
        decode_step_ms_per_sequence=0,
        max_num_seqs=max(streams, 1),
        prefill_tokens_per_second=1e9,
        kv_blocks=1 << 20,
        max_model_len=1 << 20,
    )
    router = RouterSettings(name="router", listen=ports[0], metrics=ports[1], picker=ports[7])
    worker = WorkerSettings(
        name="worker-0",
        listen=ports[2],
        advertise=ports[2],
        metrics=ports[3],
        routers=[ports[0]],
        model=model,
        engine="sim",
        sim=sim,
    )
    gateway = GatewaySettings(
        name="gateway",
        listen=ports[4],
        metrics=ports[5],
        http=ports[6],
        routers=[ports[0]],
        router_sessions=[ports[7]],
        database=keys,
        otlp_endpoint=otlp_endpoint,
    )
    return router, worker, gateway


@contextmanager
def smg(folder: Path, path: str, tokens_per_second: float) -> Iterator[Proxy]:
    """smg in front of a server that streams on the same schedule."""
    backend, port = free_port(), free_port()
    server = [sys.executable, "-m", "bench.sse_backend", str(backend), str(tokens_per_second)]
    launch = [path, "launch", "--host", "127.0.0.1", "--port", str(port), "--worker-urls"]
    launch += [f"http://127.0.0.1:{backend}", "--policy", "round_robin", "--log-level", "error"]
    launch += ["--prometheus-port", str(free_port())]
    with program(server, folder / "backend.log"), program(launch, folder / "smg.log") as pid:
        wait_for_http(f"http://127.0.0.1:{port}/readiness", within=60)
        yield Proxy(name="smg", pids=(pid,), target=f"127.0.0.1:{port}", key="none")


@contextmanager
def litellm(folder: Path, path: str, tokens_per_second: float) -> Iterator[Proxy]:
    """litellm's proxy in front of the same server."""
    backend, port = free_port(), free_port()
    server = [sys.executable, "-m", "bench.sse_backend", str(backend), str(tokens_per_second)]
    parameters = {"model": "openai/sim", "api_base": f"http://127.0.0.1:{backend}/v1", "api_key": "none"}
    config = folder / "litellm.yaml"
    key = f"sk-{secrets.token_hex(16)}"
    models = [{"model_name": "sim", "litellm_params": parameters}]
    config.write_text(json.dumps({"model_list": models, "general_settings": {"master_key": key}}))
    launch = [path, "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
    with program(server, folder / "backend.log"), program(launch, folder / "litellm.log") as pid:
        wait_for_http(f"http://127.0.0.1:{port}/health/liveliness", within=90)
        yield Proxy(name="litellm", pids=(pid,), target=f"127.0.0.1:{port}", key=key)


def measure_requests(
    proxy: Proxy, connections: int, requests: int, *, whole: bool, rest_seconds: float = 0.0
) -> dict[str, float]:
    """One run of many requests for one token; what is left to do behind them counts for `rest_seconds`."""
    client = [sys.executable, "-m", "bench.request_client", proxy.target, proxy.key, str(connections), str(requests)]
    with subprocess.Popen(
        [*client, *(["whole"] if whole else [])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        run.stdout.readline()
        before = [exact_cpu_seconds(pid) for pid in proxy.pids]
        run.stdin.write("go\n")
        run.stdin.flush()
        result = json.loads(run.stdout.readline())
        time.sleep(rest_seconds)
        cpu = [exact_cpu_seconds(pid) - earlier for pid, earlier in zip(proxy.pids, before, strict=True)]
    took = result["request_seconds"]
    return {
        "us_cpu_per_request": 1e6 * sum(cpu) / requests,
        "us_cpu_of_the_first_process": 1e6 * cpu[0] / requests,
        "requests_per_second": requests / result["seconds"],
        "ms_p50": 1000 * took[len(took) // 2],
    }


def measure(proxy: Proxy, streams: int, max_tokens: int) -> dict[str, float]:
    """One run of the client against a proxy."""
    client = [sys.executable, "-m", "bench.sse_client", proxy.target, proxy.key, str(streams)]
    subprocess.run([*client, "20"], check=True, capture_output=True)  # warms connections and code
    before = exact_cpu_seconds(proxy.pids[0])
    run = subprocess.run([*client, str(max_tokens)], check=True, capture_output=True, text=True)
    cpu = exact_cpu_seconds(proxy.pids[0]) - before
    result = json.loads(run.stdout)
    firsts = result["first_event_seconds"]
    return {
        "us_cpu_per_token": 1e6 * cpu / (streams * max_tokens),
        # A token that ends no character is no event; the servers that proxies are measured with have none of those.
        "us_cpu_per_event": 1e6 * cpu / result["events"],
        "tokens_per_second": streams * max_tokens / result["seconds"],
        "events_per_token": result["events"] / (streams * max_tokens),
        "first_event_ms_p50": 1000 * firsts[len(firsts) // 2],
    }


def main() -> None:
    """Measures each proxy in turn and prints one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smg", help="path of the smg program")
    parser.add_argument("--litellm", help="path of the litellm program")
    parser.add_argument("--requests", type=int, default=0, help="so many of one token each, instead of long streams")
    parser.add_argument("--whole", action="store_true", help="with --requests: answers in one piece")
    parser.add_argument("--beside", type=Path, help="another checkout of this repository, which takes turns, too")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument(
        "--tokens-per-second", type=float, default=100.0, help="of each stream; large: as fast as it goes"
    )
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    max_tokens = int(options.seconds * min(options.tokens_per_second, 10_000))
    with ExitStack() as stack:
        proxies = [stack.enter_context(each) for each in _proxies(options, stack)]
        found: dict[str, list[dict[str, float]]] = {proxy.name: [] for proxy in proxies}
        for number in range(options.repeat):
            for proxy in proxies if number % 2 == 0 else proxies[::-1]:
                if options.requests:
                    measured = measure_requests(proxy, options.streams, options.requests, whole=options.whole)
                else:
                    measured = measure(proxy, options.streams, max_tokens)
                found[proxy.name].append(measured)
                print(proxy.name, json.dumps(measured), flush=True)
    for line in _summary(found):
        print(line)


def _proxies(options: argparse.Namespace, stack: ExitStack) -> Iterator[AbstractContextManager[Proxy]]:
    def folder() -> Path:
        return Path(stack.enter_context(tempfile.TemporaryDirectory()))

    streams, rate = options.streams, options.tokens_per_second
    yield tokenloom(folder(), streams, rate)
    if options.beside:
        yield tokenloom(folder(), streams, rate, checkout=options.beside)
    if options.smg:
        yield smg(folder(), options.smg, rate)
    if options.litellm:
        yield litellm(folder(), options.litellm, rate)


def _summary(found: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    for name, rounds in found.items():
        middles = {figure: round(statistics.median(one[figure] for one in rounds), 1) for figure in rounds[0]}
        yield f"median of {name}: {json.dumps(middles)}"
    (own, mine), *others = found.items()
    cost = next(iter(mine[0]))
    for name, its in others:
        told = ratios([one[cost] for one in mine], [one[cost] for one in its])
        yield f"{cost} of {own} over that of {name}, median of {len(its)} turns and its bounds (95 %): {told}"


if __name__ == "__main__":
    main()
