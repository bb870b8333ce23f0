"""Requests under a policy: which worker they get, when the first choice is full or away, and what is refused."""

from typing import Any

import pytest

from services.common.config import ConfigError
from services.common.errors import Reason
from services.common.policy import Policy, policy_from
from services.router.card import WorkerState
from services.router.degradation import Level
from services.router.policy import Policies
from services.router.ticket import Ticket
from tests.support.scheduling import Bench


def bench(**policy: Any) -> Bench:
    return Bench(policy=policy_from(policy, where="routing"))


def worker_of(ticket: Ticket) -> str:
    return ticket.lease.worker.worker_id if ticket.lease else ""


def test_pools_are_tried_in_order_and_the_next_one_is_for_when_the_first_is_full() -> None:
    mesh = bench(rules=[{"name": "short", "when": {"max_prompt_tokens": 10}, "pools": ["small", "large"]}])
    mesh.worker("s", pool="small", max_running=1)
    mesh.worker("l", pool="large", max_running=1)
    assert [worker_of(mesh.ask(prompt_tokens=5)) for _ in range(4)] == ["s", "s", "l", "l"]
    fifth = mesh.ask(prompt_tokens=5)
    assert fifth.is_waiting
    assert fifth.way.rule == "short"


def test_a_backup_pool_is_used_when_nobody_is_ready_and_not_when_all_are_busy() -> None:
    mesh = bench(rules=[{"name": "all", "pools": ["main"], "backup_pools": ["spare"]}])
    main = mesh.worker("main", pool="main", max_running=1)
    mesh.worker("spare", pool="spare")
    assert [worker_of(mesh.ask()) for _ in range(2)] == ["main", "main"]
    waiting = mesh.ask()
    assert waiting.is_waiting
    mesh.report(main, state=WorkerState.DRAINING)
    mesh.pass_time(0.1)
    last = mesh.ask()
    assert (worker_of(waiting), worker_of(last)) == ("spare", "spare")
    assert mesh.reason(last).endswith("rule all")


def test_a_request_that_may_takes_a_smaller_model_when_its_own_has_no_room() -> None:
    mesh = bench(degrade={"big": "tiny"})
    mesh.worker("b", models={"big": 8192}, max_running=1)
    mesh.worker("t", models={"tiny": 8192}, max_running=8)
    for _ in range(2):
        assert worker_of(mesh.ask("big", allow_degrade=True)) == "b"
    insisting = mesh.ask("big")
    willing = mesh.ask("big", allow_degrade=True)
    assert insisting.is_waiting
    assert worker_of(willing) == "t"
    assert willing.way.degraded
    assert willing.lease is not None
    assert willing.lease.request.model == "tiny"
    assert "tiny answers for big" in mesh.reason(willing)
    (record,) = mesh.decisions.of(willing.request.request_id)[-1:]
    assert (record.model, record.degraded) == ("big", True)


def test_a_request_that_waits_for_two_models_gets_the_one_that_is_free_first() -> None:
    mesh = bench(degrade={"big": "tiny"})
    mesh.worker("b", models={"big": 8192}, max_running=1)
    mesh.worker("t", models={"tiny": 8192}, max_running=1)
    held = [mesh.ask(model) for model in ("big", "big", "tiny", "tiny")]
    willing = mesh.ask("big", allow_degrade=True)
    assert willing.is_waiting
    mesh.admission.finish(held[2])
    assert worker_of(willing) == "t"
    mesh.admission.finish(held[0])
    assert mesh.admission.waiting_count == 0


def test_a_tenant_may_degrade_without_asking() -> None:
    mesh = bench(degrade={"big": "tiny"}, tenants={"acme": {"allow_degrade": True}})
    mesh.worker("t", models={"tiny": 8192})
    mesh.worker("b", models={"big": 8192}, max_running=1)
    mesh.ask("big"), mesh.ask("big")
    assert worker_of(mesh.ask("big", tenant="acme")) == "t"
    assert mesh.ask("big", tenant="other").is_waiting


def test_the_other_version_steps_in_while_the_chosen_one_is_away() -> None:
    mesh = bench(aliases={"chat": {"models": [{"model": "old", "weight": 0}, {"model": "new"}]}})
    mesh.worker("o", models={"old": 8192})
    new = mesh.worker("n", models={"new": 8192})
    assert worker_of(mesh.ask("chat", request_id="r")) == "n"
    mesh.fleet.remove(new)
    assert worker_of(mesh.ask("chat", request_id="r")) == "o"


def test_an_alias_of_a_model_that_nobody_serves_is_unknown() -> None:
    mesh = bench(aliases={"chat": "nothing"})
    mesh.worker()
    mesh.pass_time(5)
    error = mesh.ask("chat").error
    assert error is not None
    assert (error.reason, error.message) == (Reason.MODEL_NOT_FOUND, "the model 'chat' does not exist")


def test_an_unknown_slo_class_is_refused_by_name() -> None:
    mesh = bench()
    mesh.worker()
    error = mesh.ask(slo_class="asap").error
    assert error is not None
    assert (error.reason, error.field) == (Reason.INVALID_REQUEST, "slo_class")


def test_an_interactive_request_pays_more_for_a_late_first_token_than_a_batch_request() -> None:
    mesh = bench(slo_classes={"chatty": {"ttft_seconds": 0.5, "weight": 100}})
    # One has a backlog of two seconds and decodes fast; the other one is free and slow.
    busy, slow = mesh.worker("busy"), mesh.worker("slow")
    mesh.report(busy, pending_prefill_tokens=20_000, decode_step_seconds=0.01)
    mesh.report(slow, decode_step_seconds=0.1)
    assert worker_of(mesh.ask(slo_class="batch", prompt_tokens=10)) == "busy"
    assert worker_of(mesh.ask(slo_class="chatty", prompt_tokens=10)) == "slow"


def degraded(mesh: Bench, level: Level) -> None:
    mesh.policies.degradation.level = level


@pytest.mark.parametrize(
    ("level", "asked_tokens", "priority", "limit"),
    [
        (Level.NONE, 0, 0, 0),
        (Level.SHORT_OUTPUTS, 0, 0, 64),
        (Level.SHORT_OUTPUTS, 1000, -5, 64),
        (Level.SHORT_OUTPUTS, 10, 0, 0),
        (Level.REFUSING, 1000, -1, 64),
        (Level.REFUSING, 1000, 0, None),
    ],
)
def test_a_degraded_mesh_keeps_outputs_short_and_then_refuses(
    level: Level, asked_tokens: int, priority: int, limit: int | None
) -> None:
    mesh = bench(degradation={"output_token_limit": 64, "refuse_priorities_above": -1})
    mesh.worker()
    degraded(mesh, level)
    ticket = mesh.ask(max_output_tokens=asked_tokens, priority=priority)
    if limit is None:
        assert ticket.error is not None
        assert ticket.error.reason is Reason.NO_READY_WORKER
        assert ticket.error.retry_after_seconds
    else:
        assert ticket.output_token_limit == limit


def test_the_level_counts_workers_that_are_missing_and_not_those_that_operators_took_out() -> None:
    mesh = bench(degradation={"short_outputs_below": 0.7, "worsen_after_seconds": 0})
    workers = [mesh.worker(f"w{index}") for index in range(4)]
    mesh.fleet.drain("w0", True)
    mesh.policies.check_degradation()
    assert mesh.policies.degradation.reason == ""
    mesh.fleet.remove(workers[1])
    mesh.policies.check_degradation()
    assert mesh.policies.degradation.reason == "2 of 3 workers are healthy"
    assert mesh.ask(max_output_tokens=10**6).output_token_limit == 256


def test_an_invalid_policy_leaves_the_old_one_in_force() -> None:
    mesh = Bench()
    policies = Policies(mesh.fleet, clock=mesh.clock, pools=["small"], models=["big"])
    first = policy_from({"aliases": {"chat": "big"}}, where="routing")
    assert policies.set(first, by="test") == 2
    for wrong in ({"aliases": {"chat": "nope"}}, {"rules": [{"name": "r", "pools": ["nope"]}]}):
        with pytest.raises(ConfigError):
            policies.set(policy_from(wrong, where="routing"), by="test")
    assert (policies.current, policies.version) == (first, 2)
    assert policies.set(first, by="test") == 2
    assert policies.set(Policy(), by="test") == 3
