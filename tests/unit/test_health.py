"""A GPU's condition, reading by reading."""

import pytest

from services.telemetry.gpu import EventKind, Health, Incident, Reading
from services.telemetry.health import HARMFUL_REASONS, HEALTHY, Condition

H, D = Health.HEALTHY, Health.DEGRADED


def memory(percent: float) -> Reading:
    return Reading(memory_used_bytes=int(percent * 10), memory_total_bytes=1000)


def heat(celsius: int | None) -> Reading:
    return Reading(temperature_celsius=celsius)


def throttle(*reasons: str) -> Reading:
    return Reading(throttle_reasons=reasons)


def verdicts(*readings: Reading) -> list[Health]:
    condition, seen = HEALTHY, []
    for reading in readings:
        condition = condition.after(reading)
        seen.append(condition.health)
    return seen


@pytest.mark.parametrize(
    ("percents", "expected"),
    [
        ([50, 98], [H, H]),
        ([98.1], [D]),
        ([99, 97, 95.1, 95], [D, D, D, H]),
        ([99, 95, 97, 98, 98.1], [D, H, H, H, D]),
    ],
)
def test_memory_pressure_begins_above_98_percent_and_ends_at_95(percents: list[float], expected: list[Health]) -> None:
    assert verdicts(*map(memory, percents)) == expected


@pytest.mark.parametrize(
    ("celsius", "expected"),
    [
        ([90], [H]),
        ([91, 90, 86, 85], [D, D, D, H]),
        ([91, 85, 90, 91], [D, H, H, D]),
        ([91, None], [D, H]),
    ],
)
def test_heat_begins_above_90_degrees_and_ends_at_85(celsius: list[int | None], expected: list[Health]) -> None:
    assert verdicts(*map(heat, celsius)) == expected


@pytest.mark.parametrize("reason", sorted(HARMFUL_REASONS))
def test_a_harmful_throttle_reason_degrades_until_three_samples_without(reason: str) -> None:
    held, free = throttle(reason), throttle()

    assert verdicts(held, free, free, free) == [D, D, D, H]
    assert verdicts(held, free, free, held, free, free, free) == [D, D, D, D, D, D, H]


@pytest.mark.parametrize("reason", ["sw_power_cap", "applications_clocks_setting", "sync_boost"])
def test_clocks_held_down_on_purpose_degrade_nothing(reason: str) -> None:
    assert verdicts(throttle(reason)) == [H]


def test_a_card_that_reports_nothing_is_healthy() -> None:
    assert verdicts(Reading(), Reading(memory_used_bytes=5), Reading(memory_used_bytes=0, memory_total_bytes=0)) == [
        H,
        H,
        H,
    ]


def test_every_complaint_is_in_the_reason() -> None:
    reading = Reading(
        memory_used_bytes=990,
        memory_total_bytes=1000,
        temperature_celsius=93,
        throttle_reasons=("sw_power_cap", "hw_slowdown", "hw_thermal_slowdown"),
    )

    reason = HEALTHY.after(reading).reason

    assert reason == "memory 99.0 % used; 93 °C hot; throttled by hw_slowdown, hw_thermal_slowdown"


def test_a_silent_card_is_lost_at_once_and_back_with_its_first_answer() -> None:
    lost = HEALTHY.after(memory(99)).after_silence("it does not answer: GPU is lost")

    assert (lost.health, lost.reason) == (Health.LOST, "it does not answer: GPU is lost")
    assert lost.after(memory(97)) == Condition()


def test_a_lost_card_always_has_a_reason() -> None:
    assert HEALTHY.after_silence("").reason


def xid(number: int) -> tuple[Incident, ...]:
    return (Incident(kind=EventKind.XID, xid=number),)


@pytest.mark.parametrize("number", [48, 62, 64, 79, 95, 119, 140])
def test_a_fatal_xid_fails_the_card_until_it_has_been_away(number: int) -> None:
    failed = HEALTHY.after(Reading(), xid(number))
    later = failed
    for _ in range(1000):
        later = later.after(Reading())

    assert failed.health is later.health is Health.FAILED
    assert failed.reason.startswith(f"XID {number}")
    assert later.after_silence("GPU is lost").after(Reading()).health is Health.HEALTHY


def test_a_fatal_xid_is_over_once_the_driver_wants_nothing_done_for_three_samples() -> None:
    none, reset = Reading(recovery_action="none"), Reading(recovery_action="gpu_reset")
    condition, seen = HEALTHY.after(none, xid(95)), []
    for reading in (none, none, reset, none, none, none):
        condition = condition.after(reading)
        seen.append(condition.health)

    assert seen == [Health.FAILED] * 5 + [H]


@pytest.mark.parametrize("number", [13, 31, 43, 45, 94])
def test_an_xid_of_an_application_says_nothing_of_the_card(number: int) -> None:
    assert HEALTHY.after(Reading(), xid(number)).health is H


@pytest.mark.parametrize(
    ("incident", "reason"),
    [
        (Incident(kind=EventKind.XID, xid=74), "XID 74, NVLink error"),
        (Incident(kind=EventKind.XID, xid=999), "XID 999"),
        (Incident(kind=EventKind.UNCORRECTED_ECC_ERROR), "an ECC error could not be corrected"),
    ],
)
def test_an_error_that_the_card_recovered_from_degrades_for_sixty_samples(incident: Incident, reason: str) -> None:
    condition = HEALTHY.after(Reading(), (incident,))
    assert (condition.health, condition.reason) == (D, reason)
    for _ in range(59):
        condition = condition.after(Reading())
        assert condition.health is D

    assert condition.after(Reading()).health is H


@pytest.mark.parametrize(
    ("reading", "health", "reason"),
    [
        (Reading(recovery_action="gpu_reset"), Health.FAILED, "the driver asks for gpu_reset"),
        (Reading(recovery_action="drain_p2p"), D, "the driver asks for drain_p2p"),
        (Reading(row_remap_failed=True), Health.FAILED, "a row of memory could not be remapped"),
        (Reading(row_remap_pending=True), D, "a row of memory waits for a reset to be remapped"),
        (Reading(recovery_action="none", row_remap_failed=False, row_remap_pending=False), H, ""),
    ],
)
def test_what_the_driver_wants_done_is_a_complaint(reading: Reading, health: Health, reason: str) -> None:
    condition = HEALTHY.after(reading)

    assert (condition.health, condition.reason) == (health, reason)
    assert condition.after(Reading()).health is H
