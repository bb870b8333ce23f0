"""What a load showed: latencies, throughput, and how much of it was good enough."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from services.mesh.bench_load import Result
from services.mesh.bench_sample import Sample

__all__ = ["Objective", "as_json", "as_text", "percentile"]

_PERCENTILES: Final = (50, 90, 95, 99)
_LATENCIES: Final = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "gap_ms": "gap", "e2e_ms": "end to end"}


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request must keep to count as good, in seconds."""

    ttft: float
    tpot: float

    def is_kept(self, sample: Sample) -> bool:
        """Whether it was answered to the end, soon and fluently."""
        in_time = sample.ttft is not None and sample.ttft <= self.ttft
        return sample.ok and in_time and (sample.tpot is None or sample.tpot <= self.tpot)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of the values, which are sorted, that at least `percent` of them don't exceed."""
    return values[max(0, math.ceil(len(values) * percent / 100) - 1)]


def as_json(result: Result, objective: Objective) -> dict[str, Any]:
    """The report, as plain data. Latencies in milliseconds, rates a second; a rate over the time of the whole run."""
    done = [sample for sample in result.samples if sample.ok]
    seconds = max(result.seconds, 1e-9)
    kept = sum(objective.is_kept(sample) for sample in done)
    prompt_tokens = sum(sample.prompt_tokens for sample in done)
    errors = Counter(sample.error for sample in result.samples if sample.error is not None)
    return {
        "seconds": round(result.seconds, 3),
        "requests": {"sent": len(result.samples), "ok": len(done), "not_sent": result.not_sent},
        "errors": dict(errors.most_common()),
        "throughput": {
            "requests": round(len(done) / seconds, 3),
            "prompt_tokens": round(prompt_tokens / seconds, 1),
            "output_tokens": round(sum(sample.output_tokens for sample in done) / seconds, 1),
        },
        "goodput": {
            "requests": round(kept / seconds, 3),
            "share": round(kept / max(1, len(result.samples) + result.not_sent), 4),
            "ttft_objective_ms": _ms(objective.ttft),
            "tpot_objective_ms": _ms(objective.tpot),
        },
        "cached_share": round(sum(sample.cached_tokens for sample in done) / max(1, prompt_tokens), 4),
        "ttft_ms": _spread(sample.ttft for sample in done),
        "tpot_ms": _spread(sample.tpot for sample in done),
        "gap_ms": _spread(gap for sample in done for gap in sample.gaps),
        "e2e_ms": _spread(sample.seconds for sample in done),
    }


def as_text(report: dict[str, Any]) -> Iterator[str]:
    """The report for people, line by line."""
    requests, errors = report["requests"], report["errors"]
    failed = f"; failed: {', '.join(f'{count} {code}' for code, count in errors.items())}" if errors else ""
    unsent = f"; {requests['not_sent']} not sent: too many under way" if requests["not_sent"] else ""
    yield f"requests    {requests['ok']} of {requests['sent']} answered in {report['seconds']:g} s{failed}{unsent}"
    rates, good = report["throughput"], report["goodput"]
    tokens = f"{rates['prompt_tokens']:,.0f} prompt tokens/s, {rates['output_tokens']:,.0f} output tokens/s"
    yield f"throughput  {rates['requests']:g} requests/s, {tokens}; {report['cached_share']:.0%} of prompts were cached"
    objective = f"TTFT ≤ {good['ttft_objective_ms']:g} ms and TPOT ≤ {good['tpot_objective_ms']:g} ms"
    yield f"goodput     {good['requests']:g} requests/s, {good['share']:.0%} of all, with {objective}"
    if report["e2e_ms"]:
        yield ""
        yield f"{'ms':<12}" + "".join(f"{name:>10}" for name in report["e2e_ms"])
    for name, about in _LATENCIES.items():
        if values := report[name]:
            yield f"{about:<12}" + "".join(f"{value:>10,.1f}" for value in values.values())


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    points = {f"p{percent}": _ms(percentile(known, percent)) for percent in _PERCENTILES}
    return {"mean": _ms(math.fsum(known) / len(known)), **points, "max": _ms(known[-1])}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
