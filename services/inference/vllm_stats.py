"""What vLLM tells of each of its steps, kept as the numbers that a load report needs."""

import math
import time
from typing import Any, Final

from services.inference.calibration import DecodeModel, TokenRate

__all__ = ["EngineStats"]

_STEPS_UNDER_WAY_SECONDS: Final = 0.25


class EngineStats:
    """vLLM's stat logger interface (which upstream calls unstable), called after each step and never while idle."""

    def __init__(self) -> None:
        self.steps = 0
        """Steps of every engine so far."""
        self.running = 0
        self.waiting = 0
        self._told_at = -math.inf
        """When a step last told how many wait: time.monotonic()."""
        self._left_at = -math.inf
        self.kv_usage = 0.0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.decode = DecodeModel()
        self.output = TokenRate()
        self.warming_up = True
        """Whether what it does now says nothing about its speed."""

    def reset(self) -> None:
        """The engine starts again, empty; what was learnt and counted stays."""
        self.running = self.waiting = 0
        self.kv_usage = 0.0
        self.warming_up = True

    def leave_queue(self) -> None:
        """One that may have waited was taken out of the engine."""
        self._left_at = time.monotonic()

    @property
    def known_waiting(self) -> int:
        """Sequences that wait, by the last step; 0 when that may count some that have left since."""
        # An idle engine takes no step, so what its last one said stays; and steps under way don't know of who left.
        return self.waiting if self._told_at > self._left_at + _STEPS_UNDER_WAY_SECONDS else 0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """One engine step."""
        del mm_cache_stats, engine_idx
        self.steps += 1
        if scheduler_stats is not None:
            self._told_at = time.monotonic()
            self.running = scheduler_stats.num_running_reqs
            self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self.kv_usage = scheduler_stats.kv_cache_usage
            self.prefix_queries += scheduler_stats.prefix_cache_stats.queries
            self.prefix_hits += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is None or self.warming_up:
            return
        self.output.observe(iteration_stats.num_generation_tokens)
        if not iteration_stats.time_to_first_tokens_iter:
            self._observe_decode(iteration_stats.inter_token_latencies_iter)

    def _observe_decode(self, gaps: list[float]) -> None:
        # Every sequence of a pure decode step waited equally long for its token, but for those that were preempted.
        if gaps:
            self.decode.observe(len(gaps), sorted(gaps)[len(gaps) // 2])

    def log_engine_initialized(self) -> None:
        """Part of vLLM's interface; there is nothing to say."""

    def log(self) -> None:
        """Part of vLLM's interface; there is nothing to say."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Part of vLLM's interface; these engines don't sleep."""
