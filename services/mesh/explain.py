"""tokenloom explain: why a request went where it went, and where its time went, in plain words."""

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

from google.protobuf.json_format import MessageToDict
from tokenloom.router.v1 import admin_pb2

from services.common.errors import MeshError, Reason
from services.mesh.edge_client import Door, ask_gateway, ask_router, door_of
from services.mesh.fleet_view import plain
from services.mesh.request_story import Story, seconds_of, told

__all__ = ["decision_lines", "explain"]

# A row is in the database soon after its request has ended.
_TRIES: Final = 4
_BETWEEN_TRIES_SECONDS: Final = 0.15
_BAR: Final = 20


def explain(arguments: Namespace) -> int:
    """Tells what is known of a request: its time, why it took that long, and each of the router's decisions."""
    story = _story(door_of(arguments), arguments.request_id)
    if arguments.json:
        print(json.dumps(_as_json(story), indent=2))
        return 0
    for line in _lines(story, arguments.request_id):
        print(line)
    return 0


def _story(door: Door, request_id: str) -> Story:
    decisions = _decisions(door, request_id)
    row = _row(door, request_id, tries=_TRIES if decisions else 1)
    if row is None and not decisions:
        message = f"no decision of this request is known, and no end of it: {request_id!r} should be an x-request-id"
        raise MeshError(Reason.NOT_FOUND, message)
    workers = ask_router(door, "ListWorkers", admin_pb2.ListWorkersRequest()).workers
    slow = {worker.registration.worker_id: list(worker.slow_reasons) for worker in workers if worker.slow_reasons}
    return Story(row=row, decisions=decisions, slow_workers=slow)


def _decisions(door: Door, request_id: str) -> list[admin_pb2.Decision]:
    try:
        return list(ask_router(door, "Explain", admin_pb2.ExplainRequest(request_id=request_id)).decisions)
    except MeshError as error:
        if error.reason is Reason.NOT_FOUND:
            return []
        raise


def _row(door: Door, request_id: str, *, tries: int) -> dict[str, Any] | None:
    for attempt in range(tries):
        if attempt:
            time.sleep(_BETWEEN_TRIES_SECONDS)
        try:
            row: dict[str, Any] = ask_gateway(door, f"/v1/admin/requests/{quote(request_id, safe='')}")
        except MeshError as error:
            if error.reason not in (Reason.NOT_FOUND, Reason.MODEL_NOT_FOUND):
                raise
        else:
            return row
    return None


def _as_json(story: Story) -> dict[str, Any]:
    return {
        "request": story.row,
        "phases": [{"name": one.name, "seconds": one.seconds, "note": one.note} for one in story.phases],
        "causes": story.causes,
        "decisions": [MessageToDict(one, preserving_proto_field_name=True) for one in story.decisions],
    }


def _lines(story: Story, request_id: str) -> Iterator[str]:
    row = story.row
    if row is None:
        yield f"{plain(request_id)} has not ended, or is not known to have"
    else:
        began = datetime.fromtimestamp(row["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        what = f"{plain(row['endpoint'])} of {plain(row['tenant'])}, model {plain(row['model'])}"
        yield f"{plain(request_id)}: {what}, {began} UTC"
        yield f"  {plain(row['outcome'])} after {told(row['duration_seconds'] or 0.0)}, on {plain(row['worker'])}"
        yield ""
        yield "Where its time went"
        yield from _phase_lines(story)
    if story.causes:
        yield ""
        yield "Why it took that long"
        yield from (f"  - {cause}" for cause in story.causes)
    yield ""
    yield "Where it went, and why"
    if not story.decisions:
        yield "  The router remembers this request no more."
    for decision in story.decisions:
        yield from decision_lines(decision)


def _phase_lines(story: Story) -> Iterator[str]:
    total = sum(phase.seconds for phase in story.phases)
    for phase in story.phases:
        share = phase.seconds / total if total else 0.0
        bar = "█" * round(_BAR * share)
        note = f"  {phase.note}" if phase.note else ""
        yield f"  {phase.name:<28}{told(phase.seconds):>10} {100 * share:4.0f} % {bar:<{_BAR}}{note}".rstrip()


def decision_lines(decision: admin_pb2.Decision) -> Iterator[str]:
    """One of the router's decisions: who got the request and why, and what each worker was reckoned with."""
    at = decision.decision_time.ToDatetime().strftime("%H:%M:%S.%f")[:-3]
    wanted = f"model {plain(decision.model)}, a prompt of about {decision.prompt_token_count} tokens"
    yield f"  {at} UTC  {wanted}, after {told(seconds_of(decision.queue_duration))} in the queue"
    yield f"    chosen: {plain(decision.worker_id) or 'nobody'}"
    yield f"    because: {plain(decision.reason)}"
    if decision.rule:
        yield f"    rule of the policy: {plain(decision.rule)}"
    if decision.degraded:
        yield "    degraded: a smaller model than was asked for"
    for candidate in sorted(decision.candidates, key=_order):
        yield f"    {plain(candidate.worker_id)}: {_judged(candidate)}"


def _judged(candidate: admin_pb2.Candidate) -> str:
    if candidate.excluded_reason:
        return f"out of the question: {plain(candidate.excluded_reason)}"
    first = told(seconds_of(candidate.predicted_time_to_first_token_duration))
    if candidate.HasField("predicted_delay_duration"):
        first += f" ({told(seconds_of(candidate.predicted_delay_duration))} of it learnt: first tokens there came late)"
    each = told(seconds_of(candidate.predicted_time_per_output_token_duration))
    whole = told(seconds_of(candidate.cost_duration))
    cached = candidate.predicted_cached_token_count
    note = f", {cached} tokens of the prompt cached" if cached else ""
    return f"first token in {first}, then one every {each}, reckoned with {whole} in all{note}"


def _order(candidate: admin_pb2.Candidate) -> tuple[bool, int, str]:
    return bool(candidate.excluded_reason), candidate.cost_duration.ToNanoseconds(), candidate.worker_id
