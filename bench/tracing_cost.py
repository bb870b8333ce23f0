"""What tracing every request costs the gateway.

    python -m bench.tracing_cost [--requests 500] [--pairs 20] [--starts 2] [--streams 64] [--tokens 64] [--hole]
                                 [--beside CHECKOUT]

One gateway, whose tracing is turned on and off between short runs of the same requests for one token: two processes of
one program differ by more than that, by how their memory happens to lie. CPU is user + system of the gateway, from the
beginning of a run until what it has left behind is sent; a difference is that of a run with tracing to the one next to
it without. A stream has as many spans as a request for one token, so the same is told as a part of what a stream takes,
which is measured without tracing. Each line is a median and its bounds (95 %). `--hole`: the backend takes connections
and never answers. `--beside`: another checkout of this repository, whose gateway takes turns with this one's.
"""

import argparse
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from bench.gateway_cpu import Proxy, measure, measure_requests, tokenloom
from bench.turns import Middle, middle
from tests.support.otlp import otlp_receiver

_TOKENS_PER_SECOND: Final = 100.0
# Spans wait for half a second, and are on their way for less than the rest.
_REST_SECONDS: Final = 0.8
_WARMING_RUNS: Final = 3
_STREAM_RUNS: Final = 7


@dataclass(frozen=True, slots=True)
class Run:
    """What a request took in one run: microseconds of CPU, what was left behind included, and milliseconds."""

    cpu: float
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs, one after the other."""

    on: Run
    off: Run


@dataclass(frozen=True, slots=True)
class Found:
    """What one checkout took."""

    pairs: list[Pair] = field(default_factory=list)
    streams: list[float] = field(default_factory=list)
    """Microseconds of CPU of a stream, without tracing."""


def main() -> None:
    """Prints one line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, help="of one run")
    parser.add_argument("--pairs", type=int, default=20, help="of runs with and without tracing, a start")
    parser.add_argument("--starts", type=int, default=2, help="of the gateway")
    parser.add_argument("--streams", type=int, default=64, help="at a time")
    parser.add_argument("--tokens", type=int, default=64, help="of the streams whose cost it is compared with")
    parser.add_argument("--hole", action="store_true")
    parser.add_argument("--beside", type=Path, help="another checkout of this repository, which takes turns")
    options = parser.parse_args()
    names = [None, options.beside] if options.beside else [None]
    found = {name: Found() for name in names}
    for _ in range(options.starts):
        with ExitStack() as stack:
            begin = partial(_gateway, options.streams, hole=options.hole)
            _measure({name: stack.enter_context(begin(checkout=name)) for name in names}, found, options)
    for name, its in found.items():
        _tell(name.name if name else "this one", its, options.tokens)


def _measure(
    proxies: Mapping[Path | None, Proxy], found: Mapping[Path | None, Found], options: argparse.Namespace
) -> None:
    for proxy in proxies.values():
        for _ in range(_WARMING_RUNS):
            _run(proxy, options, traced=True)
    for number in range(options.pairs):
        order = list(proxies) if number % 4 < 2 else list(proxies)[::-1]
        for name in order:
            found[name].pairs.append(_pair(proxies[name], options, number))
    for _ in range(_STREAM_RUNS):
        for name, proxy in proxies.items():
            found[name].streams.append(_stream_cpu(proxy, options))


def _tell(name: str, found: Found, tokens: int) -> None:
    pairs = found.pairs
    more = middle([pair.on.cpu - pair.off.cpu for pair in pairs])
    stream = middle(found.streams)
    print(f"{name}:")
    print(f"CPU for tracing a request, us: {more}")
    print(f"CPU of a request for one token, us: {middle([pair.off.cpu for pair in pairs])}")
    print(f"CPU of a stream of {tokens} tokens, us: {stream}")
    of_stream = Middle(*(1 + part / stream.median for part in (more.median, more.low, more.high)))
    print(f"the same with tracing over that without: {of_stream}")
    print(f"of requests for one token: {middle([pair.on.cpu / pair.off.cpu for pair in pairs])}")
    slower = [pair.on.milliseconds / pair.off.milliseconds for pair in pairs]
    print(f"time that such a request takes, with tracing over without: {middle(slower)}", flush=True)


@contextmanager
def _gateway(streams: int, *, hole: bool, checkout: Path | None) -> Iterator[Proxy]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if hole:
            silent = stack.enter_context(socket.socket())
            silent.bind(("127.0.0.1", 0))
            silent.listen(64)
            endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        else:
            endpoint = stack.enter_context(otlp_receiver()).endpoint
        yield stack.enter_context(
            tokenloom(
                folder,
                streams,
                _TOKENS_PER_SECOND,
                otlp_endpoint=endpoint,
                checkout=checkout,
                gateway_module="bench.toggled_gateway",
            )
        )


def _pair(proxy: Proxy, options: argparse.Namespace, number: int) -> Pair:
    order = (True, False) if number % 2 == 0 else (False, True)
    runs = {traced: _run(proxy, options, traced=traced) for traced in order}
    return Pair(on=runs[True], off=runs[False])


def _run(proxy: Proxy, options: argparse.Namespace, *, traced: bool) -> Run:
    os.kill(proxy.pids[0], signal.SIGUSR2 if traced else signal.SIGUSR1)
    measured = measure_requests(proxy, options.streams, options.requests, whole=False, rest_seconds=_REST_SECONDS)
    return Run(measured["us_cpu_of_the_first_process"], measured["ms_p50"])


def _stream_cpu(proxy: Proxy, options: argparse.Namespace) -> float:
    os.kill(proxy.pids[0], signal.SIGUSR1)
    per_token = measure(proxy, options.streams, options.tokens)["us_cpu_per_token"]
    return float(options.tokens * per_token)


if __name__ == "__main__":
    main()
