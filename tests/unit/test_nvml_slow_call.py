"""Calls that may never return."""

import threading
from collections.abc import Iterator

import pytest

from services.telemetry.slow_call import SlowCall
from tests.support.waiting import eventually


class Driver:
    """Returns 1, 2, 3, …; waits for `free` before it does."""

    def __init__(self) -> None:
        self.calls = 0
        self.free = threading.Event()

    def __call__(self) -> int:
        self.calls += 1
        mine = self.calls
        self.free.wait(10)
        return mine


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.free.set()


async def test_what_the_function_returns_is_returned(driver: Driver) -> None:
    driver.free.set()
    call = SlowCall(driver, name="slow")

    assert [await call.result(1), await call.result(1)] == [1, 2]


async def test_what_the_function_raises_is_raised() -> None:
    call = SlowCall(lambda: 1 // 0, name="slow")

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await call.result(1)


async def test_a_hanging_call_keeps_its_one_thread(driver: Driver) -> None:
    call = SlowCall(driver, name="slow-hangs")

    for _ in range(3):
        with pytest.raises(TimeoutError):
            await call.result(0.02)

    assert driver.calls == 1
    assert [thread.name for thread in threading.enumerate()].count("slow-hangs") == 1


async def test_an_overdue_result_is_dropped_for_a_fresh_one(driver: Driver) -> None:
    call = SlowCall(driver, name="slow")
    with pytest.raises(TimeoutError):
        await call.result(0.02)

    driver.free.set()

    assert await call.result(1) == 2


async def test_the_thread_ends_with_its_call(driver: Driver) -> None:
    driver.free.set()
    await SlowCall(driver, name="slow-ends").result(1)

    await eventually(lambda: "slow-ends" not in [thread.name for thread in threading.enumerate()], within=1)
