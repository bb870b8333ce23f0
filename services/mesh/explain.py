"""tokenloom explain: why the router chose what it chose, in plain words."""

from argparse import Namespace
from collections.abc import Iterator

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToJson
from tokenloom.router.v1 import admin_pb2

from services.mesh.edge_client import ask_router
from services.mesh.state import State

__all__ = ["explain"]


def explain(arguments: Namespace) -> int:
    """Tells every decision about a request, oldest first."""
    request = admin_pb2.ExplainRequest(request_id=arguments.request_id)
    answer = ask_router(State(arguments.state_dir), "Explain", request)
    if arguments.json:
        print(MessageToJson(answer, preserving_proto_field_name=True))
        return 0
    for number, decision in enumerate(answer.decisions):
        if number:
            print()
        for line in _told(decision):
            print(line)
    return 0


def _told(decision: admin_pb2.Decision) -> Iterator[str]:
    at = decision.decision_time.ToDatetime().strftime("%H:%M:%S.%f")[:-3]
    wanted = f"model {decision.model}, a prompt of about {decision.prompt_token_count} tokens"
    yield f"{at} UTC  {wanted}, after {_seconds(decision.queue_duration)} in the queue"
    yield f"  chosen: {decision.worker_id or 'nobody'}"
    yield f"  because: {decision.reason}"
    if decision.rule:
        yield f"  rule of the policy: {decision.rule}"
    if decision.degraded:
        yield "  degraded: a smaller model than was asked for"
    for candidate in sorted(decision.candidates, key=_order):
        yield f"  {candidate.worker_id}: {_judged(candidate)}"


def _judged(candidate: admin_pb2.Candidate) -> str:
    if candidate.excluded_reason:
        return f"out of the question: {candidate.excluded_reason}"
    first = _seconds(candidate.predicted_time_to_first_token_duration)
    each = _seconds(candidate.predicted_time_per_output_token_duration)
    whole = _seconds(candidate.cost_duration)
    cached = candidate.predicted_cached_token_count
    note = f", {cached} tokens of the prompt cached" if cached else ""
    return f"first token in {first}, then one every {each}, reckoned with {whole} in all{note}"


def _order(candidate: admin_pb2.Candidate) -> tuple[bool, int, str]:
    return bool(candidate.excluded_reason), candidate.cost_duration.ToNanoseconds(), candidate.worker_id


def _seconds(duration: Duration) -> str:
    seconds = duration.ToNanoseconds() / 1e9
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
