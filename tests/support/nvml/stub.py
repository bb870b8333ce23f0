"""A machine with NVIDIA GPUs that isn't one: builds stub.c as libnvidia-ml.so.1 and says what it answers."""

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["L40", "NOT_LOADED", "RTX_4090", "Card", "NvmlStub"]

NOT_LOADED = 9
"""NVML_ERROR_DRIVER_NOT_LOADED. Of the others: 3 is not supported, 15 GPU is lost, 16 reset required, 999 unknown."""
_SOURCE = Path(__file__).with_name("stub.c")
_GB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card answers. None: not supported. A string "!N": NVML's error N.

    Attributes:
        processes: "PID:BYTES" or "PID:-" (memory not told), with blanks between them.
        clock_reasons: NVML's mask; 0x40 is hw_thermal_slowdown.
        drawing: the same, of processes that draw.
        events: "NUMBER:TYPE:DATA" with blanks between them, numbers from 1; type 8 is an XID, with its number as data,
            2 an uncorrected ECC error.
        event_types: NVML's mask of the events that it tells of.
        remapped_rows: corrected, uncorrected, pending, failed.
        recovery_action: NVML's number; 0 is none, 1 a reset.
        pcie_tx_bytes, pcie_rx_bytes: counters, which only newer cards have; the others have rates in kB/s.
        mig: the UUIDs of its MIG instances, with blanks between them; "" for a card that is not split, and could be.
        mig_instance: is an instance of a card before it, and not counted; instances come last.
        error: answers everything with this NVML error, until the session that has seen it ends.
    """

    uuid: str
    name: str
    memory_total: int | str | None = 48 * _GB
    memory_used: int | str | None = 1 * _GB
    utilization: int | str | None = 10
    memory_utilization: int | str | None = 5
    temperature: int | str | None = 40
    power_mw: int | str | None = 60_500
    power_limit_mw: int | str | None = 300_000
    sm_clock: int | str | None = 1_500
    memory_clock: int | str | None = 9_001
    clock_reasons: int | str | None = 0
    ecc_uncorrected: int | str | None = 0
    processes: str | None = None
    drawing: str | None = None
    events: str | None = None
    event_types: int | str | None = 0x10B
    memory_temperature: int | str | None = None
    slowdown_temperature: int | str | None = None
    fan_speed: int | str | None = None
    performance_state: int | str | None = None
    max_sm_clock: int | str | None = None
    energy_mj: int | str | None = None
    pcie_tx_kb: int | str | None = None
    pcie_rx_kb: int | str | None = None
    pcie_tx_bytes: int | str | None = None
    pcie_rx_bytes: int | str | None = None
    pcie_generation: int | str | None = None
    pcie_width: int | str | None = None
    max_pcie_generation: int | str | None = None
    max_pcie_width: int | str | None = None
    pcie_replays: int | str | None = None
    ecc_corrected: int | str | None = None
    remapped_rows: str | None = None
    recovery_action: int | str | None = None
    mig: str | None = None
    mig_instance: int | None = None
    error: int | None = None

    def lines(self) -> list[str]:
        """Its part of the state file."""
        values = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        return ["card", *(f"{name} {value}" for name, value in values if value is not None)]


L40 = Card(uuid="GPU-l40", name="NVIDIA L40", memory_total=45 * _GB)
RTX_4090 = Card(uuid="GPU-4090", name="NVIDIA GeForce RTX 4090", memory_total=24 * _GB, ecc_uncorrected=None)


@cache
def _compiled(build: str, *, old: bool) -> bytes:
    options = [f'-DSTUB_BUILD="{build}"', *(["-DSTUB_OLD"] if old else [])]
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", *options]
    with TemporaryDirectory() as folder:
        library = Path(folder) / "stub.so"
        subprocess.run([*command, "-o", str(library), str(_SOURCE), "-lpthread"], check=True, timeout=30)
        return library.read_bytes()


class NvmlStub:
    """A built library in a folder of its own, and the file that it answers from.

    Start processes with `environment` to give them this NVML.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state = folder / "nvml-state"
        self.build()

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, with the stub in it."""
        paths = [str(self.folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join(paths),
            "TOKENLOOM_NVML_STUB_STATE": str(self._state),
        }

    def build(self, *, build: str = "1", old: bool = False) -> None:
        """Puts the library there, in place of the one that was.

        `build` is compared with the `kernel` of show(); an `old` library lacks the functions of newer drivers.
        """
        fresh = self.folder / "libnvidia-ml.so.fresh"
        fresh.write_bytes(_compiled(build, old=old))
        fresh.replace(self.folder / "libnvidia-ml.so.1")

    def remove(self) -> None:
        """Takes the library away."""
        (self.folder / "libnvidia-ml.so.1").unlink()

    def show(
        self,
        cards: Iterable[Card] = (),
        *,
        version: str = "570.86.10",
        error: int | None = None,
        hang: bool = False,
        kernel: str | None = None,
    ) -> None:
        """What it answers from now on.

        `error` is NVML's answer to every call; with `hang` calls don't return until the next show(); with a `kernel`
        other than the library's build, versions don't match.
        """
        driver = {"version": version, "error": error, "hang": 1 if hang else None, "kernel": kernel}
        lines = [f"{name} {value}" for name, value in driver.items() if value is not None]
        for card in cards:
            lines += card.lines()
        fresh = self._state.with_suffix(".fresh")
        fresh.write_text("\n".join([*lines, ""]), encoding="utf-8")
        fresh.replace(self._state)
