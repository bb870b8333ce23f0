"""When an engine that makes no progress is given up."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.common.settings_worker import WatchdogSettings
from services.inference.signs import signs_of
from services.inference.watchdog import Signs, Watchdog
from tests.support.waiting import eventually, wait_until

SETTINGS = WatchdogSettings(probe_seconds=0.05, silence_seconds=0.5, busy_seconds=1.2, restart_seconds=1.5)


class Wedgeable:
    """An engine that can be made to fall silent."""

    def __init__(self) -> None:
        self.steps = 0
        self.longest_step_seconds: float | None = 0.0
        self.going = asyncio.Event()
        self.going.set()
        self.is_stopped = False
        self.cpu_share = 0.0
        self.starved_share = 0.0
        self.told: list[tuple[str, float]] = []
        self.probes = 0
        self._begun = asyncio.get_running_loop().time()

    async def probe(self) -> None:
        self.probes += 1
        await self.going.wait()

    def signs(self) -> Signs:
        now = asyncio.get_running_loop().time()
        return Signs(
            stopped=self.is_stopped, cpu_seconds=self.cpu_share * now, starved_seconds=self.starved_share * now
        )

    def stalled(self, reason: str) -> None:
        self._tell(reason)

    def recovered(self) -> None:
        self._tell("recovered")

    def kill(self) -> None:
        self._tell("killed")
        self.going.set()

    def _tell(self, what: str) -> None:
        self.told.append((what, asyncio.get_running_loop().time() - self._begun))

    @property
    def heard(self) -> list[str]:
        return [what for what, _ in self.told]


@asynccontextmanager
async def watched() -> AsyncIterator[Wedgeable]:
    engine = Wedgeable()
    watching = asyncio.create_task(Watchdog(engine, SETTINGS).run())
    try:
        yield engine
    finally:
        watching.cancel()
        await asyncio.wait([watching])


async def test_an_idle_engine_that_answers_is_left_alone() -> None:
    async with watched() as engine:
        await eventually(lambda: engine.probes > 4, within=2)
        assert engine.heard == []


async def test_an_engine_that_makes_steps_is_not_even_asked() -> None:
    async with watched() as engine:
        for _ in range(40):
            engine.steps += 1
            await asyncio.sleep(0.01)
        assert engine.probes <= 1


async def test_a_silent_engine_is_given_up_and_taken_back_when_it_answers() -> None:
    async with watched() as engine:
        engine.going.clear()
        await eventually(lambda: engine.heard == ["the engine makes no progress"], within=2)
        assert 0.5 <= engine.told[0][1] < 1.5
        engine.going.set()
        await eventually(lambda: engine.heard[1:] == ["recovered"], within=1)


async def test_a_stopped_process_is_given_up_however_long_its_step_may_take() -> None:
    async with watched() as engine:
        engine.longest_step_seconds = 60.0
        engine.is_stopped = True
        engine.going.clear()
        await eventually(lambda: engine.heard == ["the engine's process is stopped"], within=2)


@pytest.mark.parametrize(("step", "cpu", "starved"), [(0.7, 0, 0), (0, 0.5, 0), (0, 0.05, 0.9), (None, 0, 0)])
async def test_a_long_step_is_waited_for_in_proportion(step: float | None, cpu: float, starved: float) -> None:
    async with watched() as engine:
        engine.longest_step_seconds, engine.cpu_share, engine.starved_share = step, cpu, starved
        engine.going.clear()
        await eventually(lambda: bool(engine.told), within=4)
        assert engine.told[0][1] >= 1.1


async def test_an_engine_that_stays_silent_is_killed() -> None:
    async with watched() as engine:
        engine.going.clear()
        await eventually(lambda: engine.heard[1:] == ["killed"], within=5)
        assert engine.told[1][1] >= 1.4


async def test_steps_made_while_it_is_asked_count_as_progress() -> None:
    async with watched() as engine:
        engine.going.clear()
        for _ in range(12):
            engine.steps += 1
            await asyncio.sleep(0.1)
        assert engine.heard == []


def test_a_stopped_descendant_and_the_processor_time_of_a_tree_are_seen() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    parent = subprocess.Popen([sys.executable, "-c", code], process_group=0)
    try:
        wait_until(lambda: signs_of([parent.pid]).cpu_seconds > 0.3, within=10)
        assert not signs_of([parent.pid]).stopped
        os.killpg(parent.pid, signal.SIGSTOP)
        wait_until(lambda: signs_of([parent.pid]).stopped, within=2)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
    assert signs_of([parent.pid]) == Signs()


def test_processes_that_share_a_processor_are_seen_to_wait_for_it() -> None:
    processor = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{processor}}})\nwhile True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    try:
        wait_until(lambda: signs_of([busy[0].pid]).starved_seconds > 0.2, within=10)
    finally:
        for process in busy:
            process.kill()
            process.wait()
