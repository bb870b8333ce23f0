"""How `tokenloom top` looks: a header, what is wrong, GPUs, workers and tenants, within any terminal's size."""

import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.common.errors import MeshError
from services.mesh.fleet_view import FleetView, GpuView, MigView, TenantView, Trouble, WorkerView

__all__ = ["Screen", "print_view", "rendered"]

_MOST_TROUBLES: Final = 6
_MOST_GPUS: Final = 8
_MOST_TENANTS: Final = 4
_FEWEST_ROWS: Final = 3
_HEADINGS: Final = 3
"""Lines beside tables and troubles: the header, the workers' heading, and how many there are."""
_WIDE: Final = 110
_BAR: Final = 8
_PIPE_COLUMNS: Final = 160


class Screen:
    """The whole terminal, as long as the block lasts; what was on it before comes back."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = Live(console=self._console, screen=True, auto_refresh=False, vertical_overflow="crop")
        self._first_row = 0
        self._last_row = 0

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def scroll(self, rows: int) -> None:
        """Moves the table of workers down by rows, up where negative; 0 goes to its top."""
        self._first_row = min(max(0, self._first_row + rows), self._last_row) if rows else 0

    def show(self, view: FleetView | None, error: MeshError | None) -> None:
        """Draws. `error`: why the view is an old one."""
        if view is None:
            return
        self._last_row = max(0, len(view.workers) - 1)
        self._first_row = min(self._first_row, self._last_row)
        width, height = self._console.size
        drawn = rendered(view, width=width, height=height, first_row=self._first_row, error=error)
        self._live.update(drawn, refresh=True)


def print_view(view: FleetView) -> None:
    """Prints everything, as far as the output is wide."""
    # Where nobody looks, nothing has to be cut.
    console = Console() if sys.stdout.isatty() else Console(width=_PIPE_COLUMNS)
    height = len(view.troubles) + len(view.gpus) + len(view.workers) + len(view.tenants) + 99
    console.print(rendered(view, width=console.width, height=height, first_row=0, most=height))


def rendered(
    view: FleetView,
    *,
    width: int,
    height: int,
    first_row: int,
    error: MeshError | None = None,
    most: int | None = None,
) -> RenderableType:
    """A view in so many columns and lines; `most`: of each kind, where there is room for all."""
    troubles = [_trouble(trouble) for trouble in view.troubles[: most or _MOST_TROUBLES]]
    parts: list[RenderableType] = [_header(view, error), *troubles]
    gpus = view.gpus[: most or _MOST_GPUS]
    tenants = view.tenants[: most or _MOST_TENANTS]
    used = sum(1 + len(line) // width for line in troubles)
    used += (sum(1 + len(gpu.instances) for gpu in gpus) + 1 if gpus else 0) + (len(tenants) + 1 if tenants else 0)
    rows = max(_FEWEST_ROWS, height - used - _HEADINGS)
    if gpus:
        parts.append(_gpu_table(gpus, width))
    ordered = sorted(view.workers, key=_order)
    shown = ordered[first_row : first_row + rows]
    parts.append(_worker_table(shown, width))
    if len(shown) < len(ordered):
        more = f"workers {first_row + 1} to {first_row + len(shown)} of {len(ordered)}; arrows scroll, q ends"
        parts.append(Text(more, style="dim", no_wrap=True, overflow="ellipsis"))
    if tenants:
        parts.append(_tenant_table(tenants))
    return Group(*parts)


def _header(view: FleetView, error: MeshError | None) -> Text:
    ready = sum(worker.is_ready for worker in view.workers)
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append("tokenloom ", "bold")
    line.append(f"{view.time[11:19]} UTC  ")
    line.append(f"{ready}/{len(view.workers)} workers", "bold green" if ready == len(view.workers) else "bold yellow")
    line.append(f" · {view.streams} streams · ")
    line.append(f"{view.waiting} waiting", "bold yellow" if view.waiting else "")
    line.append(f" · {view.tokens_per_second:.0f} tok/s")
    if error is not None:
        line = Text(f"no news since {view.time[11:19]} UTC: {error.message}", "bold red", no_wrap=True)
    return line


def _trouble(trouble: Trouble) -> Text:
    line = Text("! ", "bold red", no_wrap=False)
    line.append(f"{trouble.subject}: ", "bold")
    line.append(trouble.what, "yellow")
    return line


def _order(worker: WorkerView) -> tuple[bool, bool, float, str]:
    # What is in trouble first, then the busiest.
    return worker.is_ready, not worker.slow_reasons, -(worker.leases / max(1, worker.slots)), worker.name


def _table(*columns: tuple[str, str, int]) -> Table:
    """A table without lines; each column has a heading, a side, and a least width."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold cyan", expand=False)
    for heading, side, least in columns:
        table.add_column(heading, justify="right" if side == "right" else "left", no_wrap=True, min_width=least)
    return table


def _gpu_table(gpus: Iterable[GpuView], width: int) -> Table:
    table = _table(
        *(("GPU", "left", 10), ("UTIL", "right", 5), ("MEMORY", "right", 12), ("TEMP", "right", 5)),
        *(("POWER", "right", 9), ("STATE", "left", 7)),
    )
    for gpu in gpus:
        hot = (gpu.temperature_celsius or 0) >= 85
        state = (
            gpu.health
            if not gpu.throttle_reasons
            else f"{gpu.health}, {', '.join(gpu.throttle_reasons)}".replace("_", " ")
        )
        name = f"{gpu.node}/{gpu.index} {gpu.name}" if width >= _WIDE else f"{gpu.index} {gpu.name}"
        table.add_row(
            Text(name),
            _said(gpu.utilization_percent, "{:.0f} %"),
            _memory(gpu),
            Text(_said(gpu.temperature_celsius, "{:.0f} °C"), "bold red" if hot else ""),
            f"{_said(gpu.power_watts, '{:.0f}')}/{_said(gpu.power_limit_watts, '{:.0f} W')}",
            Text(state, "green" if gpu.health == "healthy" else "bold red"),
        )
        for one in gpu.instances:
            table.add_row(Text(f"  {one.name}"), "", _memory(one), "", "", Text(", ".join(one.workers)))
    return table


def _memory(gpu: GpuView | MigView) -> str:
    if gpu.memory_used_bytes is None or gpu.memory_total_bytes is None:
        return "-"
    return f"{gpu.memory_used_bytes / 2**30:.1f}/{gpu.memory_total_bytes / 2**30:.0f} GiB"


def _worker_table(workers: Iterable[WorkerView], width: int) -> Table:
    wide = width >= _WIDE
    table = _table(
        ("WORKER", "left", 8),
        ("POOL", "left", 4),
        *([("MODELS", "left", 8)] if wide else []),
        ("RUN", "right", 6),
        ("WAIT", "right", 4),
        ("", "left", _BAR),
        ("KV", "right", 4),
        ("TOK/S", "right", 5),
        ("STEP", "right", 7),
        *([("PREFILL", "right", 7), ("CACHED", "right", 6), ("REPORT", "right", 6)] if wide else []),
        ("STATE", "left", 6),
    )
    for worker in workers:
        wide_cells = [
            _said(worker.prefill_tokens_per_second, "{:.0f}/s"),
            _said(worker.prefix_hit_percent, "{:.0f} %"),
            f"{worker.report_age_ms} ms",
        ]
        table.add_row(
            Text(worker.name),
            Text(worker.pool),
            *([Text(",".join(worker.models))] if wide else []),
            f"{worker.running}/{worker.slots}",
            str(worker.waiting),
            _bar(worker.leases / max(1, worker.slots)),
            f"{worker.kv_percent:.0f}%",
            f"{worker.tokens_per_second:.0f}",
            _said(worker.decode_step_ms, "{:.1f}ms"),
            *(wide_cells if wide else []),
            _state(worker),
        )
    return table


def _state(worker: WorkerView) -> Text:
    if not worker.is_ready:
        return Text(worker.state, "bold red")
    return Text("slow", "bold yellow") if worker.slow_reasons else Text("ready", "green")


def _tenant_table(tenants: Iterable[TenantView]) -> Table:
    table = _table(("TENANT", "left", 24), ("RUNNING", "right", 7), ("WAITING", "right", 7))
    for one in tenants:
        table.add_row(Text(one.tenant), str(one.running), str(one.waiting))
    return table


def _bar(share: float) -> Text:
    full = round(_BAR * min(1.0, share))
    return Text("█" * full + "░" * (_BAR - full), "yellow" if share >= 1 else "green")


def _said(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
