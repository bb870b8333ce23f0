"""The routing policy's shape: what is taken, and what is refused by the key at fault."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.config import ConfigError
from services.common.policy import MAX_POLICY_BYTES, Policy, parse_policy, policy_from, policy_json

RULE = {"name": "r", "pools": ["small"]}


def checked(raw: dict[str, Any]) -> Policy:
    return parse_policy(json.dumps(raw), where="routing").check(
        "routing", pools=["small", "large"], models=["big", "medium", "tiny"]
    )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"alias": {}}, "unknown field `alias`"),
        ({"aliases": {"chat": 5}}, "routing.aliases.chat: "),
        ({"aliases": {"chat": {"models": []}}}, "routing.aliases.chat: models: "),
        ({"aliases": {"chat": "nope"}}, "routing.aliases.chat: there is no model 'nope' among 'big', 'medium', 'tiny'"),
        ({"aliases": {"chat": {"models": [{"model": "big", "wait": 1}]}}}, "routing.aliases.chat: models[0]: "),
        ({"aliases": {"chat": {"models": [{"model": "big", "weight": -1}]}}}, "models[0].weight"),
        ({"aliases": {"chat": {"models": [{"model": "big", "weight": 0}]}}}, "chat.models: expected a weight above 0"),
        ({"aliases": {"chat": {"models": [{"model": "big"}, {"model": "big"}]}}}, "the name 'big' is there twice"),
        ({"aliases": {"chat": "big", "big": "tiny"}}, "routing.aliases.chat: 'big' is an alias itself"),
        ({"rules": [RULE, RULE]}, "routing.rules: the name 'r' is there twice"),
        ({"rules": [{**RULE, "pools": []}]}, "rules[0].pools: "),
        ({"rules": [{**RULE, "pools": ["huge"]}]}, "routing.rules[0].pools[0]: there is no pool 'huge'"),
        ({"rules": [{**RULE, "backup_pools": ["huge"]}]}, "routing.rules[0].backup_pools[0]: there is no pool 'huge'"),
        ({"rules": [{**RULE, "backup_pools": ["small"]}]}, "the name 'small' is there twice"),
        ({"rules": [{**RULE, "when": {"tasks": ["paint"]}}]}, "rules[0].when.tasks[0]"),
        (
            {"rules": [{**RULE, "when": {"min_prompt_tokens": 9, "max_prompt_tokens": 8}}]},
            "routing.rules[0].when.max_prompt_tokens: expected at least min_prompt_tokens, which is 9, got the value 8",
        ),
        ({"rules": [{**RULE, "when": {"slo_classes": ["asap"]}}]}, "rules[0].when.slo_classes[0]: there is no class"),
        ({"slo_classes": {"asap": {"ttft_seconds": 0}}}, "routing.slo_classes.asap: ttft_seconds"),
        ({"default_slo_class": "asap"}, "routing.default_slo_class: there is no class 'asap'"),
        ({"tenants": {"acme": {"slo_class": "asap"}}}, "routing.tenants.acme.slo_class: there is no class 'asap'"),
        ({"degrade": {"big": "nope"}}, "routing.degrade.big: there is no model 'nope'"),
        ({"degrade": {"big": "medium", "medium": "big"}}, "leads back to 'big'"),
        ({"degradation": {"short_outputs_below": 1.5}}, "degradation.short_outputs_below"),
        (
            {"degradation": {"short_outputs_below": 0.3, "refusing_below": 0.5}},
            "routing.degradation.refusing_below: expected at most short_outputs_below",
        ),
    ],
)
def test_what_is_wrong_with_a_policy_is_said_by_its_key(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(raw)
    assert message in str(caught.value)
    assert str(caught.value).startswith("routing")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00", "x" * (MAX_POLICY_BYTES + 1), "[]", "7"])
def test_what_is_no_policy_at_all_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_policy(text)


def test_a_policy_is_the_same_after_a_way_through_json() -> None:
    policy = checked(
        {
            "aliases": {"fast": "tiny", "chat": {"models": [{"model": "big", "weight": 9}, {"model": "tiny"}]}},
            "rules": [{**RULE, "when": {"tasks": ["embed"], "max_priority": -1}, "backup_pools": ["large"]}],
            "slo_classes": {"asap": {"ttft_seconds": 0.2}},
            "tenants": {"acme": {"slo_class": "asap", "allow_degrade": True}},
            "degrade": {"big": "medium", "medium": "tiny"},
            "degradation": {"short_outputs_below": 0.8, "refusing_below": 0.5},
        }
    )
    assert parse_policy(policy_json(policy)) == policy
    assert list(policy.smaller("big")) == ["medium", "tiny"]


def test_the_documented_policy_is_valid() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = [part for part in readme.split("```") if part.startswith("yaml\nrouting:")]
    policy = policy_from(yaml.safe_load(block.removeprefix("yaml"))["routing"], where="routing")
    policy.check("routing", pools=["small", "large"], models=["llama", "llama-next", "llama-small"])
    assert [rule.name for rule in policy.rules] == ["embeddings", "short", "long"]
