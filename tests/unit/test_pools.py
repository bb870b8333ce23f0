"""What a policy makes of a request: a table of requests, and the shares of a canary."""

from collections import Counter
from typing import Any

import pytest

from services.common.policy import policy_from
from services.router.pools import choices
from services.router.request import Request

SERVED = {("big", "large"), ("tiny", "small"), ("tiny", "large"), ("embedder", "small"), ("new", "large")}
CANARY = {"models": [{"model": "big", "weight": 9}, {"model": "new"}]}
POLICY = policy_from(
    {
        "aliases": {"chat": "big", "canary": CANARY, "new": CANARY},
        "rules": [
            {"name": "embeddings", "when": {"tasks": ["embed", "score"]}, "pools": ["small"]},
            {"name": "vip", "when": {"tenants": ["acme"], "max_priority": -1}, "pools": ["large", "small"]},
            {
                "name": "short",
                "when": {"max_prompt_tokens": 100, "max_output_tokens": 50},
                "pools": ["small"],
                "backup_pools": ["large"],
            },
            {"name": "long", "when": {"min_prompt_tokens": 1000}, "pools": ["large"]},
        ],
        "degrade": {"big": "tiny"},
    },
    where="routing",
)


def ways(**request: Any) -> list[tuple[str | None, str, str]]:
    """Model, pool (? for any) and what it is for, of each way."""
    found = choices(POLICY, Request(**request), lambda model, pool: (model, pool) in SERVED)
    return [
        (
            way.request.model,
            ",".join(sorted(way.request.pools or ("?",))),
            "+".join(filter(None, (way.rule, "backup" if way.backup else "", "degraded" if way.degraded else ""))),
        )
        for way in found
    ]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"model": "big", "prompt_tokens": 500}, [("big", "?", "")]),
        ({"model": "chat", "prompt_tokens": 500}, [("big", "?", "")]),
        ({"model": "embedder", "task": "embed"}, [("embedder", "small", "embeddings")]),
        (
            {"model": "tiny", "prompt_tokens": 100, "max_output_tokens": 50},
            [("tiny", "small", "short"), ("tiny", "large", "short+backup")],
        ),
        # Without a limit it may be long.
        ({"model": "tiny", "prompt_tokens": 100}, [("tiny", "?", "")]),
        ({"model": "tiny", "prompt_tokens": 101, "max_output_tokens": 50}, [("tiny", "?", "")]),
        ({"model": "tiny", "prompt_tokens": 1000}, [("tiny", "large", "long")]),
        # None of the rule's own pools has the model; its backup pool does.
        (
            {"model": "big", "prompt_tokens": 10, "max_output_tokens": 5},
            [("big", "small", "short"), ("big", "large", "short+backup")],
        ),
        # The embeddings' pool has no such model at all: the next rule that fits counts.
        ({"model": "big", "task": "score", "prompt_tokens": 2000}, [("big", "large", "long")]),
        (
            {"model": "tiny", "tenant": "acme", "priority": -1},
            [("tiny", "large", "vip"), ("tiny", "small", "vip")],
        ),
        ({"model": "tiny", "tenant": "acme", "priority": 0}, [("tiny", "?", "")]),
        (
            {"model": "chat", "prompt_tokens": 500, "allow_degrade": True},
            [("big", "?", ""), ("tiny", "?", "degraded")],
        ),
        (
            {"model": "big", "prompt_tokens": 1500, "allow_degrade": True},
            [("big", "large", "long"), ("tiny", "large", "long+degraded")],
        ),
        # A request that moves keeps the model that it has begun with, though new requests of that name are shared out.
        ({"model": "new", "attempt": 2}, [("new", "?", "")]),
        ({"model": "unknown"}, [("unknown", "?", "")]),
        ({"model": None}, [(None, "?", "")]),
    ],
)
def test_a_request_gets_the_ways_that_the_policy_says(
    request_: dict[str, Any], expected: list[tuple[str | None, str, str]]
) -> None:
    assert ways(**request_) == expected


def test_a_canary_gets_its_share_and_the_other_version_stands_by() -> None:
    chosen = Counter(ways(model="canary", request_id=f"r{index}")[0][0] for index in range(5000))
    assert chosen["new"] == pytest.approx(500, rel=0.15)
    for index in range(20):
        first, second = ways(model="canary", request_id=f"r{index}")
        assert {first[0], second[0]} == {"big", "new"}
        assert (first[2], second[2]) == ("", "backup")


def test_a_session_stays_with_its_version() -> None:
    for session in map(str, range(50)):
        versions = {ways(model="canary", session=session, request_id=f"r{index}")[0][0] for index in range(20)}
        assert len(versions) == 1


def test_a_tenant_stays_with_its_version_where_the_alias_says_so() -> None:
    versions = [{"model": "big"}, {"model": "new"}]
    policy = policy_from({"aliases": {"chat": {"models": versions, "sticky": "tenant"}}}, where="routing")

    def model(tenant: str, number: int) -> str | None:
        request = Request(model="chat", tenant=tenant, session=f"s{number}", request_id=f"r{number}")
        return choices(policy, request, lambda *_: True)[0].request.model

    of_tenants = [{model(f"t{tenant}", number) for number in range(10)} for tenant in range(40)]
    assert all(len(models) == 1 for models in of_tenants)
    assert {name for models in of_tenants for name in models} == {"big", "new"}


def test_a_version_without_weight_only_stands_by() -> None:
    versions = [{"model": "new", "weight": 0}, {"model": "big", "weight": 1}]
    policy = policy_from({"aliases": {"chat": {"models": versions}}}, where="routing")
    for index in range(50):
        found = choices(policy, Request(model="chat", request_id=f"r{index}"), lambda *_: True)
        assert [(way.request.model, way.backup) for way in found] == [("big", False), ("new", True)]
