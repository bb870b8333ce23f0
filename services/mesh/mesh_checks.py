"""Is a running mesh well? Its processes, its workers and GPUs, its clocks, and a request from one end to the other."""

import asyncio
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from tokenloom.inference.v1 import inference_pb2
from tokenloom.router.v1 import admin_pb2

from services.common.errors import MeshError, Reason
from services.mesh.config_checks import folder_finding, redis_finding
from services.mesh.edge_client import Door, ask_gateway, ask_router
from services.mesh.finding import Finding, Level
from services.mesh.fleet_view import FleetView, Trouble
from services.mesh.fleet_watch import watch_fleet
from services.mesh.request_story import told
from services.mesh.state import State
from services.mesh.up import process_states

__all__ = ["fleet_findings", "mesh_findings"]

_AHEAD_SECONDS: Final = 2.0
_REQUEST_SECONDS: Final = 30.0
_SLOW_SECONDS: Final = 5.0
_ROW_SECONDS: Final = 3.0
_BETWEEN_SECONDS: Final = 0.1
_LOG_BYTES: Final = 256 << 10
_RECENT: Final = timedelta(minutes=10)
_GENERATES: Final = {inference_pb2.CAPABILITY_GENERATE, inference_pb2.CAPABILITY_CHAT}
_LOG_OF: Final = "see its log: {}"


def mesh_findings(state: State, *, requests: bool) -> Iterator[Finding]:
    """Looks at the mesh of a state folder; `requests`: each model is asked for a token, which is charged."""
    if (pid := state.running_pid()) is None:
        yield Finding(Level.NOTE, "mesh", f"none runs in {state.folder}", "tokenloom up starts one")
        return
    mesh = state.read_mesh()
    if mesh is None:
        advice = f"wait for it; what it waits for is in {state.folder / 'logs'}"
        said = f"the one in {state.folder} is starting or stopping (process {pid})"
        yield Finding(Level.TROUBLE, "mesh", said, advice)
        return
    yield from _processes(mesh, state)
    yield from _logs(mesh, state)
    yield from _stores(state)
    yield from fleet_findings(Door(str(mesh["operators"]), str(mesh["admin_key"])), requests=requests)


def fleet_findings(door: Door, *, requests: bool) -> Iterator[Finding]:
    """Looks at a mesh through its edge alone."""
    try:
        yield _edge(door)
        view = asyncio.run(_view(door))
    except MeshError as error:
        refused = error.reason in (Reason.INVALID_API_KEY, Reason.PERMISSION_DENIED)
        advice = (
            "use an admin key of this mesh"
            if refused
            else "it needs Envoy, a gateway and the router: see which is gone"
        )
        yield Finding(Level.TROUBLE, "edge", f"{door.url} does not tell: {error.message}", advice)
        return
    yield from _fleet(view)
    if requests:
        yield from _requests(door)


def _processes(mesh: dict[str, Any], state: State) -> Iterator[Finding]:
    for process in asyncio.run(process_states(mesh)):
        subject = f"process {process['name']}"
        log = _LOG_OF.format(state.log(process["name"]))
        match process["state"]:
            case "ready":
                yield Finding(Level.OK, subject, f"ready (process {process['pid']})")
            case "gone":
                yield Finding(
                    Level.TROUBLE, subject, "it is gone; the launcher starts it again unless it was told not to", log
                )
            case said:
                yield Finding(Level.TROUBLE, subject, f"it runs and says that it is {said}", log)


def _logs(mesh: dict[str, Any], state: State) -> Iterator[Finding]:
    since = (datetime.now(UTC) - _RECENT).strftime("%Y-%m-%dT%H:%M:%S")
    for process in mesh["processes"]:
        path = state.log(process["name"])
        errors = [line for line in _last_lines(path) if line.get("level") == "error" and line.get("time", "") >= since]
        if errors:
            said = f"{len(errors)} errors in the last ten minutes, the latest: {errors[-1].get('message')}"
            yield Finding(Level.NOTE, f"log of {process['name']}", said, f"read {path}")


def _last_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            read = json.loads(line)
        except ValueError:
            # Cut off at the beginning, or what a library wrote.
            continue
        if isinstance(read, dict):
            yield read


def _stores(state: State) -> Iterator[Finding]:
    yield folder_finding(state)
    try:
        # Of all processes it alone has one file whatever the mesh is made of; all are told the same.
        settings = json.loads(state.config("telemetry").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if url := settings.get("redis_url"):
        yield redis_finding(url)


def _edge(door: Door) -> Finding:
    began = time.monotonic()
    said = ask_gateway(door, "/readyz")
    took = time.monotonic() - began
    return Finding(Level.OK, "edge", f"{door.url} says {said.get('status')}, in {told(took)}")


async def _view(door: Door) -> FleetView:
    async with watch_fleet(door, interval_seconds=1.0) as watch:
        return await watch.first()


def _fleet(view: FleetView) -> Iterator[Finding]:
    for worker in view.workers:
        if worker.is_ready and not worker.slow_reasons:
            yield Finding(Level.OK, worker.name, f"ready, {worker.running} of {worker.slots} slots busy")
    for trouble in view.troubles:
        level = Level.NOTE if trouble.kind in _NOTES else Level.TROUBLE
        yield Finding(level, trouble.subject, trouble.what, _advice(trouble))
    for gpu in view.gpus:
        if gpu.health == "healthy":
            yield Finding(Level.OK, f"GPU {gpu.node}/{gpu.index}", f"{gpu.name}, healthy")


def _advice(trouble: Trouble) -> str:
    if trouble.kind == "worker_out":
        return next((advice for why, advice in _OUT.items() if why in trouble.what), _ADVICE["worker_out"])
    if trouble.kind == "worker_slow":
        return next((advice for why, advice in _SLOW.items() if why in trouble.what), "")
    return _ADVICE[trouble.kind]


_ADVICE: Final = {
    "no_workers": "the workers' logs say why they don't reach the router",
    "degraded": "bring back the workers that are missing, or change the policy's degradation",
    "waiting": "tokenloom top shows who is busy; more workers, or limits for whoever asks for so much",
    "worker_out": "its log says why; it is started again where its process is gone",
    "machine": "start its telemetry again, or see why this machine can't reach it",
    "driver": "nvidia-smi should work first; after an update of the driver, restart the machine",
    "gpu": "dmesg and nvidia-smi say more; heat: airflow or a power limit; errors: reset the card, then replace it",
}
_OUT: Final = {
    "drained": "tokenloom workers undrain gives it work again",
    "cordoned": "tokenloom workers undrain gives it work again",
    "asleep": "tokenloom workers wake brings it back",
    "silent": "its process hangs, or its machine or network is too busy: see its log, and how loaded the machine is",
    "gpu lost": "see what is said of its card; it takes work again once the card is well",
}
_SLOW: Final = {
    "the state of its GPU": "see the card's temperature and power: tokenloom top; airflow or a power limit",
    "a decode step": "see what else uses its card or its CPU; tokenloom workers drain takes it out of service",
    "it prefills": "see what else uses its card or its CPU; tokenloom workers drain takes it out of service",
    "its KV cache": "give it more memory (gpu_memory_utilization), shorter contexts, or another worker beside it",
    "it failed": "its log says what failed",
}
# What slows the mesh down and does not stop it.
_NOTES: Final = ("waiting", "worker_slow")


def _requests(door: Door) -> Iterator[Finding]:
    workers = ask_router(door, "ListWorkers", admin_pb2.ListWorkersRequest()).workers
    cards = {card.name: card for worker in workers for card in worker.load.models or worker.registration.models}
    for name, card in sorted(cards.items()):
        able = set(card.capabilities)
        if not able or able & _GENERATES:
            yield _asked(door, name, "/v1/completions", {"prompt": "ping", "max_tokens": 1})
        elif inference_pb2.CAPABILITY_EMBED in able:
            yield _asked(door, name, "/v1/embeddings", {"input": "ping"})
    if cards:
        yield _accounting(door)


def _asked(door: Door, model: str, path: str, body: dict[str, Any]) -> Finding:
    subject, began = f"request to {model}", time.monotonic()
    try:
        ask_gateway(door, path, {"model": model, **body}, timeout=_REQUEST_SECONDS)
    except MeshError as error:
        advice = "the findings above say which part does not work; if none does: tokenloom status, and the logs"
        return Finding(Level.TROUBLE, subject, f"{path} failed: {error.message}", advice)
    took = time.monotonic() - began
    if took > _SLOW_SECONDS:
        return Finding(Level.NOTE, subject, f"answered, but after {told(took)}", "tokenloom top shows who is busy")
    return Finding(Level.OK, subject, f"answered in {told(took)}")


def _accounting(door: Door) -> Finding:
    """Is what was asked for just now in the ledger?"""
    asked_at, deadline = time.time(), time.monotonic() + _ROW_SECONDS
    while time.monotonic() < deadline:
        try:
            rows = ask_gateway(door, f"/v1/admin/requests?limit={1}")["data"]
        except MeshError as error:
            if error.reason is Reason.PERMISSION_DENIED:
                return Finding(Level.NOTE, "usage", "this key may not see it")
            break
        if rows and asked_at - rows[0]["time"] < _REQUEST_SECONDS:
            if rows[0]["time"] > time.time() + _AHEAD_SECONDS:
                advice = "set both clocks right: limits, bills and expiring keys go by them"
                return Finding(Level.TROUBLE, "clock", "the gateway's is ahead of this machine's", advice)
            return Finding(Level.OK, "usage", f"written down, request {quote(rows[0]['request_id'])} for one")
        time.sleep(_BETWEEN_SECONDS)
    advice = "the gateway's log says why the database takes no rows; they wait in its journal meanwhile"
    return Finding(Level.TROUBLE, "usage", "the requests just made are not in the database", advice)
