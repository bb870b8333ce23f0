"""What a mesh takes while nobody asks it for anything: `python -m bench.idle [--beside CHECKOUT] [--seconds 40]`.

Two simulated workers, the edge and all else, started as users start them; `--beside`: another checkout's mesh stands
idle at the same time. Printed is the CPU of each process as a share of a core, and how often a second its threads were
woken.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.processes import code_of, exact_cpu_seconds
from tests.support.mesh import Mesh, running_mesh

# What starting has begun, health checks among it, comes to rest.
_SETTLING_SECONDS: Final = 8.0
_WOKEN: Final = "voluntary_ctxt_switches:"


@dataclass(frozen=True, slots=True)
class Look:
    """What a process has taken so far."""

    cpu_seconds: float
    wakes: int


def main() -> None:
    """Prints one line a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="another checkout of this repository")
    parser.add_argument("--seconds", type=float, default=40.0)
    options = parser.parse_args()
    checkouts = [None, options.beside] if options.beside else [None]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        meshes = list[tuple[str, Mesh]]()
        for number, checkout in enumerate(checkouts):
            with code_of(checkout):
                mesh = stack.enter_context(running_mesh(folder / str(number), "--engine", "sim", "--workers", "2"))
            meshes.append((checkout.name if checkout else "this one", mesh))
        time.sleep(_SETTLING_SECONDS)
        before = {pid: _look(pid) for _, mesh in meshes for _, pid in _processes(mesh)}
        began = time.monotonic()
        time.sleep(options.seconds)
        for checkout_name, mesh in meshes:
            for name, pid in _processes(mesh):
                now, seconds = _look(pid), time.monotonic() - began
                share = (now.cpu_seconds - before[pid].cpu_seconds) / seconds
                wakes = (now.wakes - before[pid].wakes) / seconds
                print(f"{checkout_name:20} {name:12} {100 * share:6.2f} % of a core, woken {wakes:5.0f} times a second")


def _processes(mesh: Mesh) -> Iterator[tuple[str, int]]:
    for process in mesh.state["processes"]:
        yield process["name"], process["pid"]


def _look(pid: int) -> Look:
    wakes = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        lines = status.read_text(encoding="utf-8").splitlines()
        wakes += sum(int(line.split()[1]) for line in lines if line.startswith(_WOKEN))
    return Look(exact_cpu_seconds(pid), wakes)


if __name__ == "__main__":
    main()
