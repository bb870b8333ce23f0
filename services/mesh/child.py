"""One process of the mesh: started, watched, started again when it dies, stopped."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Final

from services.common.process import NAME_VARIABLE
from services.mesh import leash
from services.mesh.plan import ProcessPlan
from services.mesh.probe import poll
from services.mesh.state import State

__all__ = ["Backoff", "Child", "StartError"]

_TAIL_BYTES: Final = 3000


class StartError(Exception):
    """A process did not become ready. The message says which, why, and what it said last."""


@dataclass(slots=True)
class Backoff:
    """How long to wait before a process is started again: longer each time, until one lives long enough."""

    first_seconds: float = 0.1
    most_seconds: float = 5.0
    forget_seconds: float = 10.0
    """A process that lived as long as this begins anew."""
    _next: float = 0.0

    def after(self, lived_seconds: float) -> float:
        """Seconds to wait after a process that lived so long."""
        if lived_seconds >= self.forget_seconds or self._next == 0.0:
            self._next = self.first_seconds
        wait, self._next = self._next, min(self._next * 2, self.most_seconds)
        return wait


class Child:
    """One process of the mesh."""

    def __init__(self, plan: ProcessPlan, state: State, *, say: Callable[[str], None]) -> None:
        """`say` tells people what happens, a line each."""
        self.plan = plan
        self._state = state
        self._say = say
        self._process: Process | None = None
        self._stopping = asyncio.Event()
        self._backoff = Backoff()
        self._started_at = 0.0

    @property
    def pid(self) -> int | None:
        """Its process id; None before it is started."""
        return None if self._process is None else self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it is there."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Starts it and waits until it is ready.

        Raises:
            StartError: it ended, or its time is up.
        """
        process = await self._spawn()
        ready = asyncio.create_task(poll(self.plan.ready))
        ended = asyncio.create_task(process.wait())
        try:
            limit = self.plan.start_seconds
            await asyncio.wait((ready, ended), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise StartError(f"{self.plan.name} {_how_it_ended(process)} before it was ready\n{self._tail()}")
            if not ready.done():
                raise StartError(f"{self.plan.name} was not ready after {limit:g} s\n{self._tail()}")
            await ready
        finally:
            ready.cancel()
            ended.cancel()

    async def keep(self, on_change: Callable[[], None], *, restart: bool) -> None:
        """Watches it until it is stopped, and starts it again when it dies; tells `on_change` once it is ready."""
        while True:
            await self._wait()
            if self._stopping.is_set():
                return
            if not restart:
                self._say(f"{self.plan.name} {_how_it_ended(self._process)}")
                return
            await self._start_again()
            if not self._stopping.is_set():
                on_change()

    async def stop(self, *, within: float) -> None:
        """Ends it: SIGTERM, and SIGKILL after `within` seconds."""
        self._stopping.set()
        if self._process is None or not self.is_running:
            return
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(within):
                await self._process.wait()
        except TimeoutError:
            self._say(f"{self.plan.name} did not stop within {within:g} s and is killed")
            self._signal(signal.SIGKILL)
            await self._process.wait()
            return
        if self._process.returncode:
            self._say(f"{self.plan.name} {_how_it_ended(self._process)} as it was stopped")

    async def _start_again(self) -> None:
        """Starts it until it is ready."""
        while not self._stopping.is_set():
            wait = self._backoff.after(monotonic() - self._started_at)
            self._say(f"{self.plan.name} {_how_it_ended(self._process)}; starting it again in {wait * 1000:.0f} ms")
            if await self._is_stopped_within(wait):
                return
            try:
                await self.start()
            except StartError as error:
                self._say(str(error))
                await self._kill()
                continue
            self._say(f"{self.plan.name} is ready again after {monotonic() - self._started_at:.1f} s")
            return

    async def _is_stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._stopping.wait()
        except TimeoutError:
            return False

    async def _spawn(self) -> Process:
        state, plan = self._state, self.plan
        state.config(plan.name).write_text(plan.config, encoding="utf-8")
        state.rotate(plan.name)
        command = (sys.executable, "-I", str(Path(leash.__file__)), str(os.getpid()), *plan.command)
        environment = {**os.environ, "TOKENLOOM_PARENT_PID": str(os.getpid()), NAME_VARIABLE: plan.name}
        with state.log(plan.name).open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                # Ctrl-C is for the launcher, which stops everything in order.
                start_new_session=True,
            )
        self._started_at = monotonic()
        return self._process

    async def _wait(self) -> None:
        if self._process is not None:
            await self._process.wait()

    async def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        await self._wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.is_running:
            self._process.send_signal(number)

    def _tail(self) -> str:
        try:
            with self._state.log(self.plan.name).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = log.read().decode(errors="replace").splitlines()[-15:]
        except OSError:
            return ""
        return "\n".join(f"  | {line}" for line in lines)


def _how_it_ended(process: Process | None) -> str:
    code = None if process is None else process.returncode
    if code is None:
        return "is gone"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
