"""tokenloom up, status and down."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from time import monotonic, sleep
from typing import Any, Final

import msgspec

from services.common.config import ConfigError
from services.common.process import run
from services.mesh.config import MeshConfig
from services.mesh.config_file import load_mesh, parse_engine_args, parse_sim
from services.mesh.config_rules import check_folders
from services.mesh.defaults import count_gpus, default_mesh, otlp_endpoint_of
from services.mesh.launcher import Launcher
from services.mesh.ports import check_free
from services.mesh.probe import Probe, grpc_health, http_ok
from services.mesh.state import MeshRunningError, State

__all__ = ["down", "process_states", "status", "up"]

_POLL_SECONDS: Final = 0.05
# Beyond draining: every process has its time to stop.
_STOP_SECONDS: Final = 60.0


def up(arguments: Namespace) -> int:
    """Runs a mesh in the foreground, or in the background once it is ready."""
    state = State(arguments.state_dir)
    mesh = _mesh(arguments)
    if arguments.detach:
        return _detach(state)
    state.make()
    try:
        with state.lock():
            state.mesh_file.unlink(missing_ok=True)
            check_free(mesh.edge.host, mesh.edge.port)
            launcher = Launcher(mesh, state, restart=arguments.restart, say=_say, config=arguments.config)
            return run(launcher.run)
    except MeshRunningError as error:
        _say(f"tokenloom: {error}")
        return 1


def status(arguments: Namespace) -> int:
    """Tells what runs; the exit code is 0 when everything does."""
    state = State(arguments.state_dir)
    mesh = state.read_mesh()
    if state.running_pid() is None or mesh is None:
        starting = state.running_pid() is not None
        _say(f"the mesh in {state.folder} is starting or stopping" if starting else f"no mesh runs in {state.folder}")
        return 1
    rows = asyncio.run(process_states(mesh))
    if arguments.json:
        _say(json.dumps({"edge": mesh["edge"], "processes": rows}, indent=2))
    else:
        _print_table(mesh["edge"], rows)
    return 0 if all(row["state"] == "ready" for row in rows) else 1


def down(arguments: Namespace) -> int:
    """Stops a mesh, draining first."""
    state = State(arguments.state_dir)
    pid = state.running_pid()
    if not pid:
        _say(f"no mesh runs in {state.folder}")
        return 0
    _say("stopping the mesh…")
    os.kill(pid, signal.SIGTERM)
    deadline = monotonic() + _STOP_SECONDS
    while state.running_pid() is not None:
        if monotonic() > deadline:
            _say(f"the launcher (process {pid}) did not stop within {_STOP_SECONDS:g} s: it is killed, and all with it")
            os.kill(pid, signal.SIGKILL)
            state.mesh_file.unlink(missing_ok=True)
            return 1
        sleep(_POLL_SECONDS)
    _say("the mesh is down")
    return 0


def _mesh(arguments: Namespace) -> MeshConfig:
    mesh = _without_config(arguments) if arguments.config is None else _with_config(arguments)
    if arguments.edge_port is not None:
        mesh = msgspec.structs.replace(mesh, edge=msgspec.structs.replace(mesh.edge, port=arguments.edge_port))
    endpoint = arguments.otlp_endpoint or mesh.otlp_endpoint or otlp_endpoint_of(os.environ)
    return msgspec.structs.replace(mesh, otlp_endpoint=endpoint)


def _without_config(arguments: Namespace) -> MeshConfig:
    return default_mesh(
        engine=arguments.engine or "vllm",
        workers=1 if arguments.workers is None else arguments.workers,
        model=arguments.model,
        sim=None if arguments.sim is None else parse_sim(arguments.sim),
        engine_args=parse_engine_args(arguments.engine_args or ""),
        gpus=count_gpus(),
    )


def _with_config(arguments: Namespace) -> MeshConfig:
    for name in ("engine", "workers", "model", "sim", "engine_args"):
        value = getattr(arguments, name)
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: not together with --config, which says it itself; got the value {value!r}")
    return check_folders(load_mesh(arguments.config), str(arguments.config))


def _detach(state: State) -> int:
    """Starts the same command in the background and shows what it says until it is ready or gone."""
    state.make()
    if (pid := state.running_pid()) is not None:
        _say(f"tokenloom: a mesh runs in {state.folder} already (process {pid})")
        return 1
    state.mesh_file.unlink(missing_ok=True)
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    log = state.folder / "logs" / "launcher.log"
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "services.mesh", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    with log.open(encoding="utf-8", errors="replace") as said:
        while True:
            code, ready = launcher.poll(), state.mesh_file.exists()
            sys.stdout.write(said.read())
            sys.stdout.flush()
            if code is not None:
                return code
            if ready:
                return 0
            sleep(_POLL_SECONDS)


async def process_states(mesh: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a mesh.json's processes, each with its `state`: "ready", "not ready" or "gone"."""
    states = await asyncio.gather(*(_state_of(process) for process in mesh["processes"]))
    return [{**process, "state": found} for process, found in zip(mesh["processes"], states, strict=True)]


async def _state_of(process: dict[str, Any]) -> str:
    if not _is_alive(process["pid"]):
        return "gone"
    return "ready" if await _probe(process)() else "not ready"


def _probe(process: dict[str, Any]) -> Probe:
    ports: dict[str, int] = process["ports"]
    if process["service"] == "envoy":
        return http_ok(f"http://127.0.0.1:{ports['admin']}/ready")
    if process["service"] == "gateway":
        return http_ok(f"http://127.0.0.1:{ports['http']}/readyz")
    return grpc_health(f"127.0.0.1:{ports['grpc']}")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _print_table(edge: str, rows: list[dict[str, Any]]) -> None:
    lines = [("NAME", "SERVICE", "PID", "STATE", "PORTS")]
    for row in rows:
        ports = " ".join(f"{name}={port}" for name, port in row["ports"].items())
        lines.append((row["name"], row["service"], str(row["pid"]), row["state"], ports))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    _say(edge)
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        _say("  ".join([*padded, line[4]]))


def _say(line: str) -> None:
    print(line, flush=True)
