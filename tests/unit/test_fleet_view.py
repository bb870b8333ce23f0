"""The fleet as people look at it, and how the terminal shows it."""

import io
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from rich.console import Console
from tokenloom.inference.v1 import inference_pb2
from tokenloom.router.v1 import admin_pb2, router_pb2
from tokenloom.telemetry.v1 import telemetry_pb2

from services.mesh.fleet_view import FleetView, plain, view_of
from services.mesh.top_screen import rendered

READY = telemetry_pb2.Driver(state=telemetry_pb2.DRIVER_STATE_READY)


def worker(name: str, *, excluded: str = "", slow: tuple[str, ...] = (), **load: Any) -> admin_pb2.Worker:
    return admin_pb2.Worker(
        registration=router_pb2.Registration(
            worker_id=name,
            pool="large",
            engine="vllm",
            max_running_count=8,
            gpu_uuids=[f"GPU-{name}"],
            models=[inference_pb2.ModelCard(name="demo")],
        ),
        load=router_pb2.LoadReport(
            **{"running_count": 3, "kv_usage_ratio": 0.251, "decode_step_duration": Duration(nanos=12_340_000), **load}
        ),
        lease_count=3,
        excluded_reason=excluded,
        slow_reasons=slow,
    )


def gpu(name: str, **more: Any) -> telemetry_pb2.Gpu:
    known = {"uuid": f"GPU-{name}", "node": "n1", "name": "NVIDIA L40", "health": telemetry_pb2.GPU_HEALTH_HEALTHY}
    return telemetry_pb2.Gpu(**{**known, **more})


def view(*workers: admin_pb2.Worker, gpus: tuple[telemetry_pb2.Gpu, ...] = (), **fleet: Any) -> FleetView:
    message = admin_pb2.WatchFleetResponse(workers=workers, **fleet)
    return view_of("http://edge", message, {one.uuid: one for one in gpus}, READY)


def screen(shown: FleetView, *, width: int, height: int, first_row: int = 0) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    with console.capture() as captured:
        console.print(rendered(shown, width=width, height=height, first_row=first_row))
    return captured.get().splitlines()


def test_workers_and_gpus_are_joined_and_what_a_card_does_not_report_is_absent() -> None:
    seen = view(worker("w0"), gpus=(gpu("w0", utilization_percent=0),))
    (card,), (one,) = seen.gpus, seen.workers
    assert (card.workers, card.utilization_percent, card.temperature_celsius) == (["w0"], 0, None)
    assert (one.kv_percent, one.decode_step_ms, one.prefix_hit_percent, one.state) == (25.1, 12.34, None, "ready")
    assert (seen.streams, seen.troubles) == (3, [])


@pytest.mark.parametrize(
    ("workers", "gpus", "fleet", "said"),
    [
        ([], [], {}, [("workers", "none is registered")]),
        (
            [worker("w0", excluded="silent for 3.0 s", slow=("heat",))],
            [],
            {},
            [("w0", "takes no work: silent for 3.0 s")],
        ),
        ([worker("w0")], [], {"waiting_count": 2}, [("queue", "2 requests wait for a worker with room")]),
        ([worker("w0")], [], {"degradation_reason": "few workers"}, [("mesh", "degraded: few workers")]),
        (
            [worker("w0", slow=("a decode step takes long",)), worker("w1")],
            [gpu("w0", throttle_reasons=["hw_thermal_slowdown"])],
            {},
            [("w0", "slow: a decode step takes long; its GPU: hw_thermal_slowdown")],
        ),
        (
            [worker("w0", excluded="gpu lost")],
            [gpu("w0", health=telemetry_pb2.GPU_HEALTH_LOST, health_reason="it fell off the bus")],
            {},
            [
                ("w0", "takes no work: gpu lost; its GPU: it fell off the bus"),
                ("GPU n1/0", "lost: it fell off the bus"),
            ],
        ),
        (
            [worker("w0", slow=("heat",))],
            [
                gpu(
                    "split",
                    mig_instances=[telemetry_pb2.MigInstance(uuid="GPU-w0", name="1g.10gb")],
                    throttle_reasons=["sw_power_cap"],
                )
            ],
            {},
            [("w0", "slow: heat; its GPU: sw_power_cap")],
        ),
    ],
)
def test_what_is_wrong_is_said_in_words(
    workers: list[admin_pb2.Worker],
    gpus: list[telemetry_pb2.Gpu],
    fleet: dict[str, Any],
    said: list[tuple[str, str]],
) -> None:
    found = view(*workers, gpus=tuple(gpus), **fleet).troubles
    assert [(one.subject, one.what) for one in found] == said


def test_machines_whose_telemetry_or_driver_fails_are_named() -> None:
    failed = telemetry_pb2.Driver(state=telemetry_pb2.DRIVER_STATE_FAILED, message="NVML: unknown error")
    nodes = [telemetry_pb2.Node(name="n1", driver=READY, away=True), telemetry_pb2.Node(name="n2", driver=failed)]
    found = view_of(
        "http://edge", admin_pb2.WatchFleetResponse(workers=[worker("w0")]), {}, failed, nodes=nodes
    ).troubles
    assert [(one.subject, one.what) for one in found] == [
        ("machine n1", "its telemetry does not answer"),
        ("NVIDIA driver of n2", "NVML: unknown error"),
    ]


def test_names_that_others_chose_can_not_steer_a_terminal() -> None:
    assert plain("a\x1b[2J\x07\u202eb\n") == "a?[2J??b?"
    assert len(plain("x" * 500)) == 128
    lines = screen(view(tenants=[admin_pb2.TenantLoad(tenant_id="\x1b]0;x\x07[red]evil")]), width=80, height=24)
    assert any("?]0;x?[red]evil" in line for line in lines)


@pytest.mark.parametrize("width", [80, 132])
def test_sixty_four_workers_fit_any_terminal_those_in_trouble_first(width: int) -> None:
    many = [worker(f"worker-{index:02d}") for index in range(64)]
    many[40] = worker("worker-40", excluded="unavailable")
    many[50] = worker("worker-50", slow=("a decode step takes 80.0 ms, 8.0 times as long as on the others (10.0 ms)",))
    cards = tuple(gpu(f"worker-{index:02d}", index=index, utilization_percent=50) for index in range(64))
    tenants = [admin_pb2.TenantLoad(tenant_id=f"tenant-{index}", running_count=index) for index in range(64)]
    shown = view(*many, gpus=cards, tenants=tenants)
    lines = screen(shown, width=width, height=24)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= width
    rows = [line.split()[0] for line in lines if line.startswith("worker-")]
    assert rows[:2] == ["worker-40", "worker-50"]
    assert any("of 64" in line for line in lines)
    down = screen(shown, width=width, height=24, first_row=63)
    assert [line.split()[0] for line in down if line.startswith("worker-")] == ["worker-63"]
