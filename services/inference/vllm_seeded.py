"""The random numbers of a generation with a seed, in the engine process: they go on where those emitted elsewhere left.

vLLM's older model runner draws from a generator of each request's own, once a step. Of steps that prefill a part of a
prompt it takes the number back, by the generator's offset. Processors' generators have none, and the engine ends there.
The newer runner makes each number from the seed and the token's position, and needs nothing of this.
"""

import functools
from collections.abc import Mapping
from typing import Any, Final

import torch
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.worker.gpu_input_batch import InputBatch

from services.inference.vllm_params import SEEDED_ARGUMENT

__all__ = ["carry_draws_on", "continues_draws"]

# What a step moves the offset by, as vLLM reckons when it takes a number back.
_OFFSET_OF_A_STEP: Final = 4
_SEED_BOUND: Final = 2**31


def continues_draws(config: Any) -> bool:
    """Whether an engine of vLLM's configuration can go on with what was drawn with a seed elsewhere."""
    if config.speculative_config is not None or config.model_config.use_fp64_gumbel:
        return False
    return bool(config.use_v2_model_runner) or config.device_config.device_type in {"cpu", "cuda"}


def carry_draws_on() -> None:
    """Has every generation with a seed that this process takes from now on begin with the number that is its next."""
    add, forward = InputBatch.add_request, TopKTopPSampler.forward_cpu

    @functools.wraps(add)
    def add_with_own_generator(batch: Any, request: Any) -> Any:
        if request.generator is not None and not isinstance(request.generator, _Draws):
            request.generator = _Draws.of(request.generator, request.sampling_params)
        return add(batch, request)

    @functools.wraps(forward)
    def forward_and_remember(sampler: Any, logits: Any, generators: Mapping[int, torch.Generator], *more: Any) -> Any:
        for generator in generators.values():
            # As vLLM warms up, it has others.
            if isinstance(generator, _Draws):
                generator.remember()
        return forward(sampler, logits, generators, *more)

    InputBatch.add_request = add_with_own_generator
    TopKTopPSampler.forward_cpu = forward_and_remember


class _Draws(torch.Generator):  # type: ignore[misc]  # torch is untyped here
    """A request's generator, which takes its last number back on processors, too."""

    _before: torch.Tensor | None = None

    @classmethod
    def of(cls, plain: torch.Generator, params: Any) -> "_Draws":
        """As `plain`, but for the numbers of what was emitted elsewhere."""
        draws = cls(device=plain.device)
        draws.set_state(plain.get_state())
        draws._skip((params.extra_args or {}).get(SEEDED_ARGUMENT, 0))
        return draws

    @property
    def _has_offset(self) -> bool:
        return bool(self.device.type != "cpu")

    def _skip(self, steps: int) -> None:
        if self._has_offset:
            self.set_offset(self.get_offset() + _OFFSET_OF_A_STEP * steps)
            return
        for _ in range(steps):
            # As vLLM draws there.
            torch.randint(0, _SEED_BOUND, (1,), generator=self, dtype=torch.long)

    def remember(self) -> None:
        """What comes now may be taken back."""
        self._before = self.get_state()

    def get_offset(self) -> int:
        return int(super().get_offset()) if self._has_offset else 0

    def set_offset(self, offset: int) -> None:
        if self._has_offset:
            super().set_offset(offset)
        elif self._before is not None:
            self.set_state(self._before)
