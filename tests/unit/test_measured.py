"""Tests that are tried again: they pass when one try does, and fail as they would without."""

from collections.abc import Callable

import pytest

from tests.support.measured import measured

TRIES = 3


class Flaky:
    """A test that fails some times before it passes."""

    def __init__(self, failures: int, error: type[BaseException] = AssertionError) -> None:
        self.failures = failures
        self.error = error
        self.tries = 0

    def fail_or_pass(self) -> None:
        self.tries += 1
        if self.tries <= self.failures:
            raise self.error(f"try {self.tries}")


def run_plain(flaky: Flaky) -> None:
    @measured
    def test() -> None:
        flaky.fail_or_pass()

    test()


def run_async(flaky: Flaky) -> None:
    @measured
    async def test() -> None:
        flaky.fail_or_pass()

    # It waits for nothing, so it needs no event loop.
    with pytest.raises(StopIteration):
        test().send(None)


both = pytest.mark.parametrize("run", [run_plain, run_async])


@both
@pytest.mark.parametrize("failures", range(TRIES))
def test_a_test_passes_with_the_first_try_that_does(run: Callable[[Flaky], None], failures: int) -> None:
    flaky = Flaky(failures)
    run(flaky)
    assert flaky.tries == failures + 1


@both
def test_a_test_that_fails_each_time_fails_as_it_did_last(run: Callable[[Flaky], None]) -> None:
    flaky = Flaky(TRIES)
    with pytest.raises(AssertionError, match="try 3"):
        run(flaky)
    assert flaky.tries == TRIES


@both
def test_what_ends_a_process_is_not_tried_again(run: Callable[[Flaky], None]) -> None:
    flaky = Flaky(1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(flaky)
    assert flaky.tries == 1
