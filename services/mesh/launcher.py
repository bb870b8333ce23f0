"""Runs a whole mesh on this machine."""

import asyncio
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, Final

from services.mesh.child import Child, StartError
from services.mesh.config import MeshConfig
from services.mesh.edge_drain import drain_edge
from services.mesh.plan import ProcessPlan, database_of, plan_processes
from services.mesh.policy_watch import PolicyWatch
from services.mesh.probe import lists_models, poll
from services.mesh.scrape import local_targets
from services.mesh.state import State

__all__ = ["Launcher"]

_STOP_SECONDS: Final = 5.0
_MODELS_SECONDS: Final = 30.0
_MODEL_FILE: Final = "config.json"
# The edge first: what it has let in is finished by those behind it, which stop in the order of a request's way.
_STOP_ORDER: Final = ("envoy", "gateway", "inference", "router", "telemetry")


class Launcher:
    """Starts the processes of a mesh, keeps them running, and stops them in order."""

    def __init__(
        self,
        mesh: MeshConfig,
        state: State,
        *,
        restart: bool,
        say: Callable[[str], None],
        config: Path | None = None,
    ) -> None:
        """`config` is the file that describes the mesh, where there is one: its routing policy is followed."""
        self._mesh = mesh
        self._config = config
        self._state = state
        self._restart = restart
        self._say = say
        self._admin_key = ""
        self._children: list[Child] = []

    @property
    def url(self) -> str:
        """Where clients come in."""
        host = self._mesh.edge.host
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104  # compared, not bound
        return f"{'http' if self._mesh.edge.tls is None else 'https'}://{shown}:{self._mesh.edge.port}"

    @property
    def _door(self) -> str:
        """Where whoever is on this machine comes in, without TLS in any case."""
        ports = [child.plan.ports["operators"] for child in self._children if "operators" in child.plan.ports]
        return f"http://127.0.0.1:{ports[0]}" if ports else self.url

    async def run(self, stop: asyncio.Event) -> int:
        """Runs the mesh until `stop` is set; returns the exit code."""
        database = database_of(self._mesh, self._state)
        self._state.write_database(database)
        self._admin_key = self._state.admin_key(database)
        try:
            if not await _unless(stop, self._make_model()):
                return 0
            # What was set while the last mesh ran is over with it.
            self._state.policy.unlink(missing_ok=True)
            self._children = [
                Child(plan, self._state, say=self._say) for plan in plan_processes(self._mesh, self._state)
            ]
            if not await _unless(stop, self._start()):
                return 0
            self._write()
            self._say(self._greeting())
            await self._keep(stop)
        except StartError as error:
            self._say(f"tokenloom: {error}")
            return 1
        finally:
            self._state.mesh_file.unlink(missing_ok=True)
            self._state.targets_file.unlink(missing_ok=True)
            await asyncio.shield(self._stop())
        return 0

    async def _make_model(self) -> None:
        folder = self._state.demo_model
        if (folder / _MODEL_FILE).exists() or not any(_needs_demo_model(self._mesh)):
            return
        self._say("making the demo model…")
        began = monotonic()
        with self._state.log("demo_model").open("ab") as log:
            command = (sys.executable, "-m", "services.inference.demo_model", str(folder))
            maker = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
            try:
                code = await maker.wait()
            finally:
                if maker.returncode is None:
                    maker.kill()
        if code != 0:
            raise StartError(
                f"the demo model could not be made (exit code {code}): see {self._state.log('demo_model')}"
            )
        self._say(f"making the demo model…  done in {monotonic() - began:.1f} s")

    async def _start(self) -> None:
        try:
            async with asyncio.TaskGroup() as starting:
                for child in self._children:
                    starting.create_task(self._start_one(child))
        except* StartError as errors:
            raise errors.exceptions[0] from None
        await self._wait_for_models()

    async def _start_one(self, child: Child) -> None:
        began = monotonic()
        what = f"starting {child.plan.name} ({child.plan.label})…"
        self._say(what)
        await child.start()
        self._say(f"{what}  ready in {monotonic() - began:.1f} s")

    async def _wait_for_models(self) -> None:
        """The last proof: through the edge, with a key, every model is there."""
        names = {name for pool in self._mesh.pools for name in pool.serves}
        try:
            async with asyncio.timeout(_MODELS_SECONDS):
                await poll(lists_models(self._door, self._admin_key, names))
        except TimeoutError:
            listed = ", ".join(sorted(names))
            raise StartError(
                f"everything runs, but {self._door}/v1/models does not list {listed} after {_MODELS_SECONDS:g} s"
            ) from None

    async def _keep(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as keeping:
            kept = [keeping.create_task(child.keep(self._write, restart=self._restart)) for child in self._children]
            if self._config is not None:
                watch = PolicyWatch(self._config, self._mesh, self._state, say=self._say)
                kept.append(keeping.create_task(watch.run()))
            await stop.wait()
            self._say("stopping…")
            for task in kept:
                task.cancel()

    async def _stop(self) -> None:
        by_service: dict[str, list[Child]] = {service: [] for service in _STOP_ORDER}
        for child in self._children:
            by_service[child.plan.service].append(child)
        for child in by_service["envoy"]:
            await self._drain(child)
        for children in by_service.values():
            async with asyncio.TaskGroup() as stopping:
                for child in children:
                    stopping.create_task(child.stop(within=_STOP_SECONDS))

    async def _drain(self, envoy: Child) -> None:
        if envoy.is_running:
            admin = f"http://127.0.0.1:{envoy.plan.ports['admin']}"
            left = await drain_edge(admin, within=self._mesh.drain_seconds)
            if left:
                self._say(f"{left} requests are cut off after {self._mesh.drain_seconds:g} s")

    def _write(self) -> None:
        processes = [_entry(child.plan, child.pid) for child in self._children]
        self._state.targets_file.write_text(json.dumps(local_targets(child.plan for child in self._children), indent=2))
        mesh = {"edge": self.url, "operators": self._door, "admin_key": self._admin_key, "processes": processes}
        self._state.write_mesh(mesh)

    def _greeting(self) -> str:
        model = self._mesh.pools[0].serves[0]
        messages = [{"role": "user", "content": "Hello!"}]
        body = json.dumps({"model": model, "messages": messages, "max_tokens": 64, "stream": True})
        return "\n".join(
            (
                "",
                f"tokenloom is ready at {self.url}; a browser shows its console there, with the key below",
                "",
                *_about_answers(self._mesh),
                f"curl -N {self.url}/v1/chat/completions \\",
                f"  -H 'Authorization: Bearer {self._admin_key}' \\",
                "  -H 'Content-Type: application/json' \\",
                f"  -d {shlex.quote(body)}",
                "",
            )
        )


async def _unless(stop: asyncio.Event, work: Any) -> bool:
    """Does work, unless it is stopped before it is done; tells whether it is done."""
    working, stopped = asyncio.ensure_future(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((working, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        await working
        return True
    finally:
        stopped.cancel()
        working.cancel()
        await asyncio.wait((working,))


def _entry(plan: ProcessPlan, pid: int | None) -> dict[str, Any]:
    return {"name": plan.name, "service": plan.service, "pid": pid, "ports": plan.ports}


def _about_answers(mesh: MeshConfig) -> Iterator[str]:
    """What nobody should wonder about in the first answer."""
    real = "a folder, a Hugging Face id or s3://BUCKET/PATH"
    if any(_needs_demo_model(mesh)):
        yield "The demo model has random weights: its answers are gibberish, and that is all they can be."
        yield f"For real ones stop this and: tokenloom up --model MODEL   ({real})"
        yield ""
    elif all(worker.engine == "sim" for pool in mesh.pools for worker in pool.workers):
        yield "The engines are simulated: their answers are made-up words. For real ones: tokenloom up --model MODEL"
        yield ""


def _needs_demo_model(mesh: MeshConfig) -> Iterator[bool]:
    for pool in mesh.pools:
        for worker in pool.workers:
            yield worker.engine == "vllm" and mesh.model(pool.model_of(worker)).path is None
