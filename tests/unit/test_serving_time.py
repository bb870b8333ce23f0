"""When a full queue has room again, by how long requests took."""

import pytest

from services.common.errors import Reason
from services.inference.serving_time import ServingTime


@pytest.mark.parametrize(
    ("served", "waiting", "max_running", "wait"),
    [
        # Nothing is known yet: a second each.
        ((), 0, 4, 0.25),
        ((), 7, 4, 2.0),
        ((8.0,), 0, 4, 2.0),
        ((8.0,), 3, 4, 8.0),
        # A mean that forgets: 8 moves by a tenth towards 18.
        ((8.0, 18.0), 3, 4, 9.0),
        # Never so soon that it would be no wait, never so late that nobody comes back.
        ((0.001,), 0, 4, 0.1),
        ((900.0,), 63, 4, 60.0),
    ],
)
def test_who_finds_a_full_queue_hears_when_it_is_their_turn(
    served: tuple[float, ...], waiting: int, max_running: int, wait: float
) -> None:
    time = ServingTime()
    for seconds in served:
        time.observe(seconds)
    error = time.queue_full(waiting=waiting, max_running=max_running)
    assert error.reason is Reason.NO_CAPACITY
    assert error.retry_after_seconds == pytest.approx(wait)
