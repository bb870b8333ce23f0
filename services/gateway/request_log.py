"""The gateway's log line of a request that is over, the same on both lanes."""

import logging
from collections.abc import Mapping
from typing import Final

from services.gateway.pieces import Spent

__all__ = ["facts_of", "log_request"]

_log = logging.getLogger(__name__)
_LEFT: Final = 499
"""The status of a request whose client left before anything was answered."""


def log_request(
    *,
    trace_id: str,
    request_id: str,
    lane: str,
    endpoint: str,
    outcome: str,
    status: int,
    seconds: float,
    facts: Mapping[str, object],
) -> None:
    """Writes the line. `status` 0: nothing was answered; `facts`: whatever else is known, such as tenant and tokens."""
    _log.info(
        "request",
        extra={
            "trace_id": trace_id,
            "request": request_id,
            "lane": lane,
            "endpoint": endpoint,
            "outcome": outcome,
            "status": status or _LEFT,
            "duration_ms": round(seconds * 1000, 1),
            **facts,
        },
    )


def facts_of(spent: Spent) -> dict[str, object]:
    """What a generation took, as the line has it."""
    facts: dict[str, object] = {"worker": spent.worker}
    if spent.model:
        facts["model"] = spent.model
    if spent.ttft_seconds is not None:
        facts["ttft_ms"] = round(1000 * spent.ttft_seconds, 1)
    if spent.tpot_seconds is not None:
        facts["tpot_ms"] = round(1000 * spent.tpot_seconds, 2)
    facts |= {
        "input_tokens": spent.prompt_tokens,
        "cached_tokens": spent.cached_tokens,
        "output_tokens": spent.output_tokens,
    }
    return facts
