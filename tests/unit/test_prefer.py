"""The Prefer header, as a table."""

import pytest

from services.common.errors import MeshError, Reason
from services.gateway.prefer import Preference, preference_of


@pytest.mark.parametrize(
    ("header", "preference"),
    [
        (None, None),
        ("", None),
        ("return=minimal", None),
        ("respond-async", Preference(is_async=True)),
        ("Respond-Async", Preference(is_async=True)),
        ("wait=10", Preference(wait_seconds=10)),
        ("wait=0", Preference(wait_seconds=0)),
        ('wait="3600"', Preference(wait_seconds=3600)),
        ("respond-async, wait=10", Preference(wait_seconds=10, is_async=True)),
        ("return=minimal, wait = 5 ; foo=bar,respond-async", Preference(wait_seconds=5, is_async=True)),
        ("wait=5, wait=7", Preference(wait_seconds=5)),
    ],
)
def test_a_preference_is_read_and_what_means_nothing_here_is_ignored(
    header: str | None, preference: Preference | None
) -> None:
    assert preference_of(header) == preference


@pytest.mark.parametrize("wait", ["", "soon", "-1", "1.5", "3601", "9" * 1000, "٣", "0x10", "1_0"])
def test_a_wait_that_is_no_number_of_seconds_is_refused_by_name_and_bound(wait: str) -> None:
    with pytest.raises(MeshError) as caught:
        preference_of(f"respond-async, wait={wait}")
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_REQUEST, "prefer")
    assert "0 to 3600" in caught.value.message
