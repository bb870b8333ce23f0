"""tokenloom doctor: what is wrong with this machine or mesh, in plain words, and what to do about it."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Final

from services.mesh.config_checks import config_findings, folder_finding, port_finding
from services.mesh.edge_client import door_of
from services.mesh.finding import Finding, Level
from services.mesh.machine_checks import machine_findings
from services.mesh.mesh_checks import fleet_findings, mesh_findings
from services.mesh.state import State

__all__ = ["doctor"]

_EDGE_HOST: Final = "127.0.0.1"
_EDGE_PORT: Final = 8080
_MARKS: Final = {Level.OK: "ok     ", Level.NOTE: "note   ", Level.TROUBLE: "TROUBLE"}
_COLORS: Final = {Level.OK: "32", Level.NOTE: "33", Level.TROUBLE: "1;31"}


def doctor(arguments: Namespace) -> int:
    """Looks at everything; the exit code is 1 when something does not work, 0 when notes are all there is."""
    found: list[Finding] = []
    for finding in _findings(arguments):
        found.append(finding)
        if not arguments.json:
            _print(finding)
    troubles = sum(finding.level is Level.TROUBLE for finding in found)
    if arguments.json:
        print(json.dumps([_as_json(finding) for finding in found], indent=2))
    else:
        notes = sum(finding.level is Level.NOTE for finding in found)
        print(f"\n{_count(troubles, 'trouble')}, {_count(notes, 'note')}, {len(found)} things looked at")
    return 1 if troubles else 0


def _findings(arguments: Namespace) -> Iterator[Finding]:
    requests = not arguments.no_requests
    if arguments.edge is not None:
        # This machine says nothing of a mesh that runs elsewhere.
        yield from fleet_findings(door_of(arguments), requests=requests)
        return
    state = State(arguments.state_dir)
    runs = state.running_pid() is not None
    yield from machine_findings(state.folder, thorough=arguments.thorough, runs=runs)
    if arguments.config is not None:
        yield from config_findings(arguments.config, runs=runs)
    elif not runs:
        yield port_finding(_EDGE_HOST, _EDGE_PORT)
        yield folder_finding(state)
    yield from mesh_findings(state, requests=requests)


def _print(finding: Finding) -> None:
    mark = _MARKS[finding.level]
    if sys.stdout.isatty():
        mark = f"\x1b[{_COLORS[finding.level]}m{mark}\x1b[0m"
    print(f"{mark}  {finding.subject}: {finding.said}", flush=True)
    if finding.advice:
        print(f"           → {finding.advice}", flush=True)


def _as_json(finding: Finding) -> dict[str, str]:
    return {
        "level": finding.level.value,
        "subject": finding.subject,
        "said": finding.said,
        "advice": finding.advice,
    }


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
