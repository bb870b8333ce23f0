"""Routing quality in virtual time: python -m bench.routing [CASE ...] [--seconds S] [--seed N]

Each case plays the same trace for each policy and prints what clients saw. tokenloom's rows come from the router's own
scheduler and admission; the other policies pick the moment a request arrives, knowing what every engine has at that
moment, which is more than a router of theirs would know.
"""

import argparse
import time

from bench.routing.cases import CASES, Row

_HEAD = (
    f"{'case':<58}{'policy':<16}{'p50 s':>8}{'p95 s':>8}{'p99 s':>8}{'TPOT ms':>9}{'hits':>7}{'max/mean':>10}"
    f"{'refused':>9}"
)


def _line(row: Row) -> str:
    return (
        f"{row.case:<58}{row.policy:<16}{row.p50:>8.3f}{row.p95:>8.3f}{row.p99:>8.3f}{1000 * row.tpot:>9.1f}"
        f"{row.hit_rate:>7.3f}{row.imbalance:>10.2f}{row.refused:>9}"
    )


def main() -> None:
    """Prints a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all when none is named")
    parser.add_argument("--seconds", type=float, default=180.0, help="length of each trace, in virtual seconds")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"there is no case {sorted(unknown)[0]!r}")
    print(_HEAD)
    for name in options.cases or CASES:
        began = time.monotonic()
        for row in CASES[name](options.seed, options.seconds):
            print(_line(row), flush=True)
        print(f"  ({name}: {time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
