"""Processes under measurement: started from a settings struct, their CPU read from the operating system."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path

import httpx
import msgspec
import psutil

from services.common.settings import ProcessSettings
from services.mesh import leash

__all__ = ["code_of", "cpu_seconds", "environment", "exact_cpu_seconds", "program", "service", "wait_for_http"]

_LEASH = Path(leash.__file__)


@contextmanager
def environment(added: Mapping[str, str]) -> Iterator[None]:
    """Has what is started in the block see these variables."""
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def code_of(checkout: Path | None) -> Iterator[None]:
    """Has what is started in the block run the code of another checkout of this repository; None: of this one."""
    if checkout is None:
        yield
        return
    root = checkout.resolve()
    with chdir(root), environment({"PYTHONPATH": f"{root}{os.pathsep}{root / 'protos' / 'gen'}"}):
        yield


@contextmanager
def program(arguments: list[str], log: Path) -> Iterator[int]:
    """Runs a program, named by its path, until the block is left or this process ends; yields its pid."""
    leashed = [sys.executable, str(_LEASH), str(os.getpid()), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(leashed, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def service(module: str, settings: ProcessSettings, folder: Path) -> Iterator[int]:
    """Runs a module, `services.NAME`, with these settings until the block is left; yields its pid."""
    config = folder / f"{settings.name}.json"
    config.write_bytes(msgspec.json.encode(settings))
    arguments = [sys.executable, "-m", module, "--config", str(config)]
    with program(arguments, folder / f"{settings.name}.log") as pid:
        yield pid


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process and its children so far."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def exact_cpu_seconds(pid: int) -> float:
    """The same of a process without its children, in nanoseconds instead of hundredths of a second."""
    # What clock_getcpuclockid() makes of a pid on Linux.
    return time.clock_gettime(~pid << 3 | 2)


def wait_for_http(url: str, *, within: float = 20.0) -> None:
    """Waits until a URL answers 200."""
    deadline = time.monotonic() + within
    while True:
        try:
            if httpx.get(url, timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(url)
        time.sleep(0.05)
