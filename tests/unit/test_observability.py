"""The files of deploy/observability: the vocabulary of metrics, and the rules and dashboards that speak it."""

import json
import re
import subprocess
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.errors import TABLE, Reason
from services.common.metrics import OTHER, BoundedLabel
from tests.support.prometheus import needs_prometheus
from tests.support.vocabulary import FOLDER, asked_by_rules, labels, strays, vocabulary

DASHBOARDS = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))
UNIT_ENDINGS = {
    "seconds": "_seconds",
    "bytes": "_bytes",
    "ratio": "_ratio",
    "hertz": "_hertz",
    "watts": "_watts",
    "joules": "_joules",
    "degrees Celsius": "_celsius",
}
# Labels of the scrape, not of a process.
SCRAPE_LABELS = {"process", "service", "job", "instance", "le"}


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def expressions() -> Iterator[tuple[str, str]]:
    for group in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]:
        yield from ((f"rules.yaml: {rule.get('alert') or rule['record']}", rule["expr"]) for rule in group["rules"])
    for file in DASHBOARDS:
        for panel in json.loads(file.read_text())["panels"]:
            yield from ((f"{file.name}: {panel['title']}", target["expr"]) for target in panel.get("targets", ()))


@pytest.mark.parametrize("entry", vocabulary(), ids=lambda entry: entry.name)
def test_a_metric_is_named_after_what_it_is(entry: Any) -> None:
    assert re.fullmatch(rf"tokenloom_{entry.service}_[a-z0-9_]+", entry.name)
    assert (entry.type == "counter") == entry.name.endswith("_total")
    ending = UNIT_ENDINGS.get(entry.unit, "")
    assert entry.name.removesuffix("_total").endswith(ending)
    assert entry.labels <= labels().keys()
    assert entry.meaning.endswith(".")


def test_there_is_no_metric_twice_and_no_label_without_a_metric() -> None:
    names = [entry.name for entry in vocabulary()]
    assert len(set(names)) == len(names)
    assert {label for entry in vocabulary() for label in entry.labels} == labels().keys()


@pytest.mark.parametrize(("where", "expression"), [pytest.param(*pair, id=pair[0]) for pair in expressions()])
def test_rules_and_dashboards_ask_only_for_metrics_and_labels_that_there_are(where: str, expression: str) -> None:
    del where
    series = {name: entry for entry in vocabulary() for name in entry.series}
    asked = set(re.findall(r"\btokenloom_[a-z0-9_]+", expression))
    assert asked <= series.keys()
    known = {label for name in asked for label in series[name].labels} | SCRAPE_LABELS
    for selector in re.findall(r"\{([^}]*)\}", expression):
        assert set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", selector)) <= known
    for grouping in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {label.strip() for label in grouping.split(",") if label.strip()} <= known | {"tenant"}


def test_what_counts_as_failed_is_what_the_service_itself_is_at_fault_for() -> None:
    at_fault = {reason.value.lower() for reason, row in TABLE.items() if row.http >= 500}
    at_fault.add(Reason.NO_CAPACITY.value.lower())
    found = [set(match.split("|")) for _, text in expressions() for match in re.findall(r'outcome=~"([^"]*)"', text)]
    assert len(found) == 4
    assert all(outcomes == at_fault for outcomes in found)


@needs_prometheus
def test_the_rules_do_what_their_tests_say() -> None:
    for command in (("check", "rules", "rules.yaml"), ("test", "rules", "rules_test.yaml")):
        done = subprocess.run(
            ["promtool", *command], cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


# What fires as each phase of the recorded run ends; where nothing stands nothing does, and in the calm at first never.
_CARD = 'process="telemetry",index'
FIRING = {
    "a card is hot": [f'alertname="TokenloomGpuHot",{_CARD}="0"', f'alertname="TokenloomGpuThrottled",{_CARD}="0"'],
    "a card's memory is nearly full": [f'alertname="TokenloomGpuMemoryHigh",{_CARD}="1"'],
    "a card is lost": [f'alertname="TokenloomGpuUnusable",{_CARD}="1"'],
    "a queue builds up": ['alertname="TokenloomLongQueue"', 'alertname="TokenloomSlowFirstToken",model="sim"'],
    "a worker stands still": ['alertname="TokenloomProcessDown",process="worker-1"'],
}
# It fires for a moment while a card is hot, until the router has seen that its worker is as quick as ever.
_FIRING = 'count by (alertname, index, model, process) (ALERTS{alertstate="firing",alertname!="TokenloomWorkerSlow"})'


@needs_prometheus
def test_alerts_fire_on_what_happened_to_a_real_mesh_and_rest_while_nothing_did(tmp_path: Path) -> None:
    recording = yaml.safe_load((FOLDER / "recorded.yaml").read_text())
    phases = {phase["name"]: phase["steps"] for phase in recording["phases"]}
    assert phases.keys() > FIRING.keys()
    looks = [(step, list[str]()) for step in range(5, phases["calm"], 5)]
    ends = accumulate(phases.values())
    looks += [(end - 1, FIRING.get(name, [])) for name, end in zip(phases, ends, strict=True)]
    seconds = int(recording["step"].removesuffix("s"))
    test = {
        "interval": recording["step"],
        "input_series": recording["series"],
        "promql_expr_test": [
            {
                "expr": _FIRING,
                "eval_time": f"{step * seconds}s",
                "exp_samples": [{"labels": f"{{{alert}}}", "value": 1} for alert in firing],
            }
            for step, firing in looks
        ],
    }
    file = {"rule_files": [str(FOLDER / "rules.yaml")], "evaluation_interval": recording["step"], "tests": [test]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(file))
    command = ["promtool", "test", "rules", "test.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_recorded_run_has_all_that_rules_ask_of() -> None:
    recorded = {
        one["series"].partition("{")[0] for one in yaml.safe_load((FOLDER / "recorded.yaml").read_text())["series"]
    }
    assert asked_by_rules() <= recorded


def test_every_alert_is_tested_where_it_is_to_fire_and_where_it_is_not() -> None:
    fires: set[str] = set()
    rests: set[str] = set()
    for test in yaml.safe_load((FOLDER / "rules_test.yaml").read_text())["tests"]:
        for case in test["alert_rule_test"]:
            (fires if case.get("exp_alerts") else rests).add(case["alertname"])
    assert fires == rests == {rule["alert"] for rule in alerts()}
    assert all(rule["labels"]["severity"] in ("critical", "warning", "info") for rule in alerts())


def test_a_label_whose_values_come_from_outside_has_only_so_many_of_them() -> None:
    label = BoundedLabel(2)
    assert [label.of(value) for value in ("a", "b", "c", "a", "d")] == ["a", "b", OTHER, "a", OTHER]


def test_what_is_not_in_the_vocabulary_is_found() -> None:
    page = "\n".join(
        (
            "# HELP tokenloom_router_leases Leases that are out.",
            "# TYPE tokenloom_router_leases gauge",
            'tokenloom_router_leases{worker="a"} 1',
            "# HELP tokenloom_router_news_total Something new.",
            "# TYPE tokenloom_router_news_total counter",
            "tokenloom_router_news_total 1",
            "",
        )
    )
    found = set(strays("router", page))
    assert {
        "tokenloom_router_leases has the labels ['worker']",
        "tokenloom_router_news_total is not in the vocabulary of router",
    } <= found
    assert "tokenloom_router_workers is not exposed by router" in found
