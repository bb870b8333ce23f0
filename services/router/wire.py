"""The router's protos as domain values, and back."""

import ipaddress
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from tokenloom.inference.v1 import inference_pb2
from tokenloom.router.v1 import admin_pb2, router_pb2

from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.common.policy import Policy, parse_policy
from services.router.card import Card, Load, WorkerState
from services.router.cost import is_late
from services.router.decisions import Record
from services.router.degradation import Level
from services.router.fleet import Clock
from services.router.request import Request
from services.router.ticket import Ticket
from services.router.worker import Lease, Outcome, Worker

__all__ = [
    "capability_name",
    "card",
    "decision",
    "degradation",
    "duration",
    "first_token_seconds",
    "grant",
    "load",
    "outcome",
    "policy",
    "request",
    "served",
    "tenants",
    "worker",
]

_MOST_SEQUENCES: Final = 65_536
_LONGEST_ID: Final = 256

_STATES: Final = {
    router_pb2.WORKER_STATE_UNSPECIFIED: WorkerState.UNKNOWN,
    router_pb2.WORKER_STATE_READY: WorkerState.READY,
    router_pb2.WORKER_STATE_DRAINING: WorkerState.DRAINING,
    router_pb2.WORKER_STATE_UNAVAILABLE: WorkerState.UNAVAILABLE,
    router_pb2.WORKER_STATE_ASLEEP: WorkerState.ASLEEP,
}
_TASKS: Final = {
    router_pb2.TASK_UNSPECIFIED: "generate",
    router_pb2.TASK_GENERATE: "generate",
    router_pb2.TASK_EMBED: "embed",
    router_pb2.TASK_SCORE: "score",
}
_LEVELS: Final = {
    Level.NONE: admin_pb2.DEGRADATION_LEVEL_NONE,
    Level.SHORT_OUTPUTS: admin_pb2.DEGRADATION_LEVEL_SHORT_OUTPUTS,
    Level.REFUSING: admin_pb2.DEGRADATION_LEVEL_REFUSING,
}
_OUTCOMES: Final = {
    router_pb2.OUTCOME_COMPLETED: Outcome.COMPLETED,
    router_pb2.OUTCOME_REFUSED: Outcome.REFUSED,
    router_pb2.OUTCOME_FAILED: Outcome.FAILED,
}


def card(message: router_pb2.Registration) -> Card:
    """Who a worker is.

    Raises:
        MeshError: INVALID_REQUEST, it can't be used as it says it is.
    """
    if not 0 < len(message.worker_id) <= _LONGEST_ID:
        raise _invalid("worker_id", f"must have 1 to {_LONGEST_ID} characters")
    if not _is_endpoint(message.endpoint):
        raise _invalid("endpoint", f"must be ip:port, since the edge takes it as it is, not {message.endpoint[:80]!r}")
    if not message.models or any(not model.name for model in message.models):
        raise _invalid("models", "must have at least one entry, each with a name")
    return Card(
        worker_id=message.worker_id,
        endpoint=message.endpoint,
        models={model.name: model.max_context_token_count for model in message.models},
        abilities={model.name: frozenset(map(capability_name, model.capabilities)) for model in message.models},
        pool=message.pool,
        gpu_uuids=tuple(message.gpu_uuids),
        max_running=min(max(1, message.max_running_count), _MOST_SEQUENCES),
        kv_tokens=message.kv_cache_token_count,
        block_tokens=message.kv_block_token_count,
        said=message,
    )


def _invalid(field: str, what: str) -> MeshError:
    return MeshError(Reason.INVALID_REQUEST, f"registration.{field} {what}", field=f"registration.{field}")


def _is_endpoint(text: str) -> bool:
    host, _, port = text.rpartition(":")
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        return 0 < int(port) < 65_536
    except ValueError:
        return False


def load(message: router_pb2.LoadReport, known: Card) -> Load:
    """How a worker says it is. `known`: who it said it was.

    Raises:
        MeshError: INVALID_REQUEST, it says that it serves models that can't be.
    """
    single, more = message.decode_step_duration, message.decode_step_per_sequence_duration
    return Load(
        running=message.running_count,
        waiting=message.waiting_count,
        kv_usage=message.kv_usage_ratio,
        pending_prefill_tokens=message.pending_prefill_token_count,
        prefill_tokens_per_second=message.prefill_tokens_per_second or None,
        decode_step_seconds=_seconds(single) if message.HasField("decode_step_duration") else None,
        decode_step_per_sequence_seconds=_seconds(more)
        if message.HasField("decode_step_per_sequence_duration")
        else None,
        state=_STATES.get(message.state, WorkerState.UNKNOWN),
        card=_changed(known, message.models) if message.models else None,
        said=message,
    )


def _changed(known: Card, models: Iterable[inference_pb2.ModelCard]) -> Card:
    registration = router_pb2.Registration()
    registration.CopyFrom(known.said)
    del registration.models[:]
    registration.models.extend(models)
    return card(registration)


def request(message: router_pb2.Acquire) -> Request:
    """What a gateway asks for."""
    return Request(
        model=message.model,
        request_id=message.request_id,
        prompt_tokens=message.prompt_token_count,
        max_output_tokens=message.max_output_token_count,
        tenant=message.tenant_id,
        priority=message.priority,
        session=message.session_id,
        excluded=frozenset(message.excluded_worker_ids),
        timeout_seconds=_seconds(message.timeout) if message.HasField("timeout") else None,
        prefix_hashes=tuple(message.prefix_hashes),
        prompt_token_ids=tuple(message.prompt_token_ids),
        slo_class=message.slo_class,
        attempt=max(1, message.attempt),
        emitted_tokens=message.emitted_token_count,
        needs=_needs(message),
        occupies_slot=message.task != router_pb2.TASK_TOKENIZE,
        task=_TASKS.get(message.task, "tokenize"),
        allow_degrade=message.allow_degrade,
    )


def _needs(message: router_pb2.Acquire) -> frozenset[str]:
    task = _TASKS.get(message.task)
    needs = {capability_name(capability) for capability in message.required_capabilities}
    return frozenset(needs | {task} if task else needs)


def capability_name(capability: inference_pb2.Capability.ValueType) -> str:
    """A capability as cards and requests name it: "generate", "embed"; one that this router does not know by number."""
    names = inference_pb2.Capability.DESCRIPTOR.values_by_number
    known = names.get(capability)
    return known.name.removeprefix("CAPABILITY_").lower() if known else str(capability)


def grant(handle: int, ticket: Ticket, lease: Lease) -> router_pb2.Grant:
    """A worker for a gateway's request."""
    message = router_pb2.Grant(
        handle=handle,
        worker_id=lease.worker.worker_id,
        endpoint=lease.worker.endpoint,
        queue_duration=duration(ticket.queue_seconds),
        reason=ticket.reason,
        model=lease.request.model or "",
        degraded=ticket.way.degraded,
        output_token_limit=ticket.output_token_limit,
    )
    decision = ticket.decision
    if (
        decision is not None
        and decision.prediction is not None
        and lease.worker.load.prefill_tokens_per_second is not None
    ):
        message.predicted_time_to_first_token_duration.CopyFrom(duration(decision.prediction[0]))
    return message


def first_token_seconds(release: router_pb2.Release) -> float | None:
    """How long the first token took from the grant on; None when there was none."""
    if not release.HasField("time_to_first_token_duration"):
        return None
    return _seconds(release.time_to_first_token_duration)


def outcome(value: router_pb2.Outcome.ValueType) -> Outcome:
    """How a lease ended."""
    return _OUTCOMES.get(value, Outcome.CANCELLED)


def worker(worker: Worker, clock: Clock, slow_reasons: Iterable[str] = ()) -> admin_pb2.Worker:
    """A worker for operators, with why it is slow."""
    return admin_pb2.Worker(
        registration=worker.card.said,
        load=worker.load.said,
        lease_count=len(worker.leases),
        last_report_time=_timestamp(worker.reported_at, clock),
        drained=worker.drained,
        cordoned=worker.cordoned,
        excluded_reason=worker.excluded_reason(clock()),
        report_age_duration=duration(clock() - worker.reported_at),
        admitted_ratio=worker.admitted_ratio,
        prefill_tokens_per_second=worker.load.prefill_tokens_per_second or 0.0,
        slow_reasons=slow_reasons,
    )


def tenants(running: Counter[str], waiting: Counter[str], *, most: int) -> list[admin_pb2.TenantLoad]:
    """Whose requests run and wait, for operators: the tenants with the most, and no more than `most` of them."""
    return [
        admin_pb2.TenantLoad(tenant_id=name, running_count=running[name], waiting_count=waiting[name])
        for name, _ in (running + waiting).most_common(most)
    ]


def served(
    names: Mapping[str, tuple[str, ...]], workers: Iterable[Worker], clock: Clock
) -> list[admin_pb2.ServedModel]:
    """The names that requests may use, by name; `names` has the models behind each alias."""
    found: dict[str, admin_pb2.ServedModel] = {}
    now = clock()
    for worker in workers:
        for card in worker.card.said.models:
            _count(found.setdefault(card.name, admin_pb2.ServedModel(name=card.name)), card, worker.is_ready(now))
    aliases = {}
    for name, targets in names.items():
        alias = aliases[name] = admin_pb2.ServedModel(name=name, target_models=targets)
        for target in targets:
            if target in found:
                behind = found[target]
                _count(alias, behind.card, behind.ready_worker_count)
    return [model for _, model in sorted({**found, **aliases}.items())]


def _count(model: admin_pb2.ServedModel, card: inference_pb2.ModelCard, ready: int) -> None:
    model.ready_worker_count += ready
    if card.max_context_token_count >= model.card.max_context_token_count:
        model.card.CopyFrom(card)


def decision(record: Record, clock: Clock) -> admin_pb2.Decision:
    """A decision for operators."""
    message = admin_pb2.Decision(
        decision_time=_timestamp(record.at, clock),
        model=record.model,
        worker_id=record.worker_id,
        reason=record.reason,
        queue_duration=duration(record.queue_seconds),
        prompt_token_count=record.prompt_tokens,
        rule=record.rule,
        degraded=record.degraded,
    )
    for worker_id, why, prediction in record.looked_at:
        candidate = message.candidates.add(worker_id=worker_id, excluded_reason=why)
        if not why:
            ttft, tpot, cost, slot, cached, delay = prediction
            candidate.predicted_time_to_first_token_duration.CopyFrom(duration(ttft))
            candidate.predicted_time_per_output_token_duration.CopyFrom(duration(tpot))
            candidate.cost_duration.CopyFrom(duration(cost))
            candidate.predicted_slot_wait_duration.CopyFrom(duration(slot))
            candidate.predicted_cached_token_count = int(cached)
            if is_late(prediction):
                candidate.predicted_delay_duration.CopyFrom(duration(delay))
    return message


def policy(text: str) -> Policy:
    """The policy that an operator sends.

    Raises:
        MeshError: INVALID_REQUEST, it has not the shape of one.
    """
    try:
        return parse_policy(text, where="routing")
    except ConfigError as error:
        raise MeshError(Reason.INVALID_REQUEST, str(error), field="policy_json") from error


def degradation(level: Level) -> admin_pb2.DegradationLevel.ValueType:
    """How far the mesh is degraded."""
    return _LEVELS[level]


def duration(seconds: float) -> Duration:
    """Seconds as a proto; within what a proto holds."""
    whole = int(min(max(0.0, seconds), 1e9))
    return Duration(seconds=whole, nanos=int((min(max(0.0, seconds), 1e9) - whole) * 1e9))


def _seconds(message: Duration) -> float:
    return message.seconds + message.nanos / 1e9


def _timestamp(at: float, clock: Clock) -> Timestamp:
    # The router's clock only counts; what time it is, is asked where it is shown.
    stamp = Timestamp()
    stamp.FromNanoseconds(int((time.time() - (clock() - at)) * 1e9))
    return stamp
