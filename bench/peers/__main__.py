"""Routers side by side in real time: tokenloom's, and peers' as PyPI has them, over the same simulated engines.

    python -m bench.peers CASE ... [--smg PATH] [--vllm-router PATH] [--sglang-router PATH] [--plots FOLDER]

CASE is one of unequal, shared, idle, overload. Each PATH is a program of an environment of its own
(`pip install smg==1.13.0`, `pip install vllm-router`, `pip install sglang-router`). Every contender gets the same
trace, one after the other, from the same client, with engines that are started anew: tokenloom's in its workers, the
peers' behind HTTP servers. Answers end where the model ends them, and nobody is told beforehand when that is. `idle` is
there because routing does not help then.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import uvloop

from bench.peers.cases import CASES, Case, prompts
from bench.peers.client import Heard, play
from bench.peers.contenders import PEERS, Contender, peer, tokenloom
from bench.peers.plot import svg
from bench.routing.runs import percentile

_WARM_SECONDS: Final = 10.0
_HEAD: Final = (
    f"{'router':<28}{'p50 s':>8}{'p90 s':>8}{'p95 s':>8}{'p99 s':>8}{'hits':>7}{'whole p50 s':>13}"
    f"{'served':>8}{'refused':>9}{'within p99 ms':>15}{'with retry-after':>18}{'lost':>6}"
)


def _measure(contender: Contender, case: Case, texts: Sequence[str]) -> list[Heard]:
    due = [(arrival.at, arrival.prompt_tokens) for arrival in case.trace]
    with (
        tempfile.TemporaryDirectory() as folder,
        contender(Path(folder), case.specs) as target,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(play(target, texts, due, slo_class=case.slo_class))


def _ttfts(heard: Sequence[Heard]) -> list[float]:
    return [one.ttft for one in heard if one.ttft is not None and one.at >= _WARM_SECONDS]


def _line(name: str, heard: Sequence[Heard]) -> str:
    ttfts = _ttfts(heard)
    shares = "".join(f"{percentile(ttfts, share):>8.3f}" for share in (0.5, 0.9, 0.95, 0.99))
    served = [one for one in heard if one.ttft is not None]
    hits = sum(one.cached_tokens for one in served) / max(1, sum(one.prompt_tokens for one in served))
    whole = percentile([one.ended for one in served if one.ended and one.at >= _WARM_SECONDS], 0.5)
    refused = [one.refused_after for one in heard if one.refused_after is not None]
    within = f"{1000 * percentile(refused, 0.99):.0f}" if refused else "-"
    complete, told = sum(one.ended > 0 for one in heard), sum(one.says_when for one in heard)
    return (
        f"{name:<28}{shares}{hits:>7.3f}{whole:>13.3f}"
        f"{complete:>8}{len(refused):>9}{within:>15}{told:>18}{len(heard) - complete - len(refused):>6}"
    )


def _contenders(programs: Mapping[str, str | None]) -> dict[str, Contender]:
    found: dict[str, Contender] = {"tokenloom": tokenloom}
    for name, path in programs.items():
        if path is not None:
            found |= {f"{name} {policy}": peer(path, how) for policy, how in PEERS[name].items()}
    return found


def main() -> None:
    """Prints a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=list(CASES), metavar="CASE")
    for name in PEERS:
        parser.add_argument(f"--{name}", help=f"path of the program {name}")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="contenders whose name begins so")
    parser.add_argument("--plots", type=Path, help="a folder for one SVG a case")
    options = parser.parse_args()
    contenders = _contenders({name: getattr(options, name.replace("-", "_")) for name in PEERS})
    for name in options.cases:
        case = CASES[name](options.seconds, options.seed)
        texts = prompts(case.trace)
        print(f"{name}: {CASES[name].__doc__} {len(texts)} requests in {options.seconds:g} s\n{_HEAD}", flush=True)
        curves: dict[str, list[float]] = {}
        for label, contender in contenders.items():
            if options.only is None or label.startswith(options.only):
                heard = _measure(contender, case, texts)
                curves[label] = _ttfts(heard)
                print(_line(label, heard), flush=True)
                for refusal in sorted({one.refusal for one in heard if one.refusal})[:3]:
                    print(f"  {refusal}", flush=True)
        if options.plots is not None:
            (options.plots / f"{name}.svg").write_text(svg(f"{name}: {CASES[name].__doc__}", curves))


if __name__ == "__main__":
    main()
