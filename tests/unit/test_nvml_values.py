"""What NVML's numbers mean."""

import pytest

from services.telemetry.nvml_card import throttle_reasons


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (0x0, ()),
        (0x1, ()),
        (0x2, ("applications_clocks_setting",)),
        (0x4, ("sw_power_cap",)),
        (0x8, ("hw_slowdown",)),
        (0x10, ("sync_boost",)),
        (0x20, ("sw_thermal_slowdown",)),
        (0x40, ("hw_thermal_slowdown",)),
        (0x80, ("hw_power_brake_slowdown",)),
        (0x100, ("display_clock_setting",)),
        (0x48, ("hw_slowdown", "hw_thermal_slowdown")),
        (1 << 63 | 0x5, ("sw_power_cap",)),
    ],
)
def test_each_bit_has_its_name_and_idling_is_no_reason(mask: int, names: tuple[str, ...]) -> None:
    assert throttle_reasons(mask) == names
