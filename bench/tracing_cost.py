"""What tracing every request costs the gateway, and what it costs when the backend never answers.

    python -m bench.tracing_cost [--streams 256] [--tokens 64] [--starts 4] [--rounds 5]

Three gateways run side by side and take turns with the same short streams: one that traces nothing, one that sends
every trace to a real OTLP receiver, and one whose backend takes connections and never answers. They are started anew
several times, since the same program is some percent faster or slower by how its memory happens to lie. CPU is user +
system of the gateway alone; latencies are the client's times to the first event.
"""

import argparse
import json
import socket
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import psutil

from bench.gateway_cpu import Proxy, measure, tokenloom
from tests.support.otlp import otlp_receiver

_TOKENS_PER_SECOND: Final = 200.0
_MIB: Final = 1 << 20
Round = dict[str, dict[str, float]]
"""What was measured of each gateway, one after the other."""


def main() -> None:
    """Prints one line a gateway."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rounds = list[Round]()
    for _ in range(options.starts):
        with _gateways(options.streams) as proxies:
            for number in range(options.rounds):
                rounds.append(
                    _round(proxies, first=number % len(proxies), streams=options.streams, tokens=options.tokens)
                )
    for name in rounds[0]:
        print(name, json.dumps(_summary(name, rounds, options.tokens)), flush=True)


@contextmanager
def _gateways(streams: int) -> Iterator[dict[str, Proxy]]:
    with ExitStack() as stack:
        receiver = stack.enter_context(otlp_receiver())
        hole = stack.enter_context(socket.socket())
        hole.bind(("127.0.0.1", 0))
        hole.listen(64)
        endpoints = {"untraced": None, "traced": receiver.endpoint, "blackholed": f"127.0.0.1:{hole.getsockname()[1]}"}
        proxies: dict[str, Proxy] = {}
        for name, endpoint in endpoints.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            running = tokenloom(folder, streams, _TOKENS_PER_SECOND, otlp_endpoint=endpoint)
            proxies[name] = stack.enter_context(running)
        yield proxies


def _round(proxies: dict[str, Proxy], *, first: int, streams: int, tokens: int) -> Round:
    names = [*list(proxies)[first:], *list(proxies)[:first]]
    measured = {name: measure(proxies[name], streams, tokens) for name in names}
    return {name: {**measured[name], **_memory(proxy)} for name, proxy in proxies.items()}


def _summary(name: str, rounds: list[Round], tokens: int) -> dict[str, float]:
    """Medians over the rounds; ratios are taken within a round, since a busy machine slows all of it."""
    of_round = [(each[name], each["untraced"]) for each in rounds]
    return {
        "ms_cpu_per_request": statistics.median(own["us_cpu_per_token"] for own, _ in of_round) * tokens / 1000,
        "cpu_ratio": statistics.median(own["us_cpu_per_token"] / base["us_cpu_per_token"] for own, base in of_round),
        "first_event_ms_p50": statistics.median(own["first_event_ms_p50"] for own, _ in of_round),
        "first_event_ratio": statistics.median(
            own["first_event_ms_p50"] / base["first_event_ms_p50"] for own, base in of_round
        ),
        "memory_mib": max(own["memory_mib"] for own, _ in of_round),
    }


def _memory(proxy: Proxy) -> dict[str, float]:
    return {"memory_mib": sum(psutil.Process(pid).memory_info().rss for pid in proxy.pids) / _MIB}


if __name__ == "__main__":
    main()
