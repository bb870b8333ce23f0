"""deploy/observability/metrics.yaml: what it says, and whether what a process exposes is that."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["FOLDER", "Entry", "asked_by_rules", "labels", "strays", "vocabulary"]

FOLDER = Path(__file__).parents[2] / "deploy" / "observability"
_OF_HISTOGRAMS = {"le"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One metric of the vocabulary."""

    service: str
    name: str
    type: str
    unit: str
    meaning: str
    labels: frozenset[str]

    @property
    def series(self) -> set[str]:
        """The names that its series have."""
        if self.type != "histogram":
            return {self.name}
        return {f"{self.name}_{part}" for part in ("bucket", "sum", "count")}


@cache
def vocabulary() -> list[Entry]:
    """Every metric that there is to be."""
    return [
        Entry(
            service=service,
            name=entry["name"],
            type=entry["type"],
            unit=entry["unit"],
            meaning=entry["meaning"],
            labels=frozenset(entry.get("labels", ())),
        )
        for service, entries in _file()["metrics"].items()
        for entry in entries
    ]


def asked_by_rules() -> set[str]:
    """The series that deploy/observability/rules.yaml asks of, those that it makes itself aside."""
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    text = " ".join(rule["expr"] for group in groups for rule in group["rules"])
    return set(re.findall(r"\btokenloom_[a-z0-9_]+", text))


def labels() -> dict[str, str]:
    """What the values of each label can be."""
    described: dict[str, str] = _file()["labels"]
    return described


def strays(service: str, exposition: str) -> Iterator[str]:
    """What a process of a service exposes under a name of ours and should not, and what it should and does not."""
    wanted = {entry.name: entry for entry in vocabulary() if entry.service in (service, "process")}
    for family in text_string_to_metric_families(exposition):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if not name.startswith("tokenloom_"):
            continue
        entry = wanted.pop(name, None)
        if entry is None:
            yield f"{name} is not in the vocabulary of {service}"
            continue
        if (family.type, family.documentation) != (entry.type, entry.meaning):
            yield f"{name} is a {family.type}: {family.documentation}"
        used = {label for sample in family.samples for label in sample.labels} - _OF_HISTOGRAMS
        if family.samples and used != entry.labels:
            yield f"{name} has the labels {sorted(used)}"
    yield from (f"{name} is not exposed by {service}" for name in wanted)


@cache
def _file() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((FOLDER / "metrics.yaml").read_text())
    return parsed
