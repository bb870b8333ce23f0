"""Penalties and bad words of a generation that goes on elsewhere: counted over its whole output.

vLLM takes tokens that were emitted elsewhere for prompt, which presence and frequency penalties and bad words leave
out. These logits processors, one for each of vLLM's model runners, count them in. They run in the engine process and
call what vLLM itself calls, in its order, so that what is chosen is the same to the last bit. vLLM's own penalties are
off for such a request; its own bad words stay on, since what they rule out is ruled out here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.ops.bad_words import apply_bad_words
from vllm.v1.sample.ops.penalties import apply_all_penalties
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotLogitsProcessor

from services.inference.vllm_params import EMITTED_ARGUMENT

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

__all__ = ["EmittedByRow", "EmittedBySlot", "emitted_processor"]


def emitted_processor(config: Any) -> str | None:
    """The processor for an engine of vLLM's configuration, as vLLM wants it named; None where vLLM takes none."""
    if config.model_config.runner_type != "generate" or config.model_config.return_sampling_mask:
        return None
    if config.use_v2_model_runner:
        return f"{__name__}:{EmittedBySlot.__name__}"
    return None if config.speculative_config is not None else f"{__name__}:{EmittedByRow.__name__}"


@dataclass(frozen=True, slots=True)
class _Counting:
    """What a continuation is to be counted with."""

    emitted: int
    """How many tokens of what vLLM takes for its prompt, at the end, are output."""
    presence: float
    frequency: float
    repetition: float
    bad_words: list[list[int]]


def _counting(params: SamplingParams) -> _Counting | None:
    """None where vLLM counts right: nearly always."""
    found = (params.extra_args or {}).get(EMITTED_ARGUMENT)
    if found is None:
        return None
    return _Counting(
        emitted=found["count"],
        presence=found["presence_penalty"],
        frequency=found["frequency_penalty"],
        repetition=found["repetition_penalty"],
        bad_words=params.bad_words_token_ids or [],
    )


class EmittedByRow(LogitsProcessor):  # type: ignore[misc]  # vLLM is untyped here
    """For the model runner that hands token lists to its processors, and penalizes after them."""

    def __init__(self, _config: Any, device: torch.device, _is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """No: it changes what is likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows the requests through the rows of the batch."""
        process_dict_updates(self._rows, batch_update, self._row)

    def _row(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> "_Row | None":
        counting = _counting(params)
        return None if counting is None else _Row(counting, prompt or [], output, self._device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Changes the rows of continuations in `logits`, float32 [rows, vocabulary], in place."""
        for row, found in self._rows.items():
            found.apply(logits[row : row + 1])
        return logits


class _Row:
    """One continuation in a batch."""

    def __init__(self, counting: _Counting, prompt: list[int], output: list[int], device: torch.device) -> None:
        """`output` is vLLM's own list, which grows."""
        cut = len(prompt) - counting.emitted
        self._emitted, self._output, self._bad_words = prompt[cut:], output, counting.bad_words
        self._prompt = torch.tensor([prompt[:cut]], dtype=torch.int64, device=device)
        self._presence, self._frequency, self._repetition = (
            torch.tensor([value], dtype=torch.float32, device=device)
            for value in (counting.presence, counting.frequency, counting.repetition)
        )

    def apply(self, logits: torch.Tensor) -> None:
        """`logits` is float32 [1, vocabulary]."""
        past = [[*self._emitted, *self._output]]
        if self._bad_words:
            apply_bad_words(logits, {0: self._bad_words}, past)
        apply_all_penalties(logits, self._prompt, self._presence, self._frequency, self._repetition, past)


class EmittedBySlot(SlotLogitsProcessor):  # type: ignore[misc]  # vLLM is untyped here
    """For the model runner that keeps tokens in slots on the GPU, and penalizes before its processors."""

    def __init__(self, _config: Any, req_states: "LogitsProcRequestState") -> None:
        self._states = req_states
        self._slots: dict[int, _Counting] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Takes note of who is in a slot now; true for a continuation."""
        counting = _counting(sampling_params)
        if counting is None:
            self._slots.pop(req_idx, None)
            return False
        self._slots[req_idx] = counting
        return True

    def apply(self, logits: torch.Tensor, ctx: "LogitsContext") -> torch.Tensor:
        """Changes the rows of continuations in `logits`, float32 [rows, vocabulary], in place."""
        slots = [slot for slot in ctx.idx_mapping_np.tolist() if slot in self._slots] if self._slots else []
        if slots:
            _Slots(self._states, slots, [self._slots[slot] for slot in slots], ctx).apply(logits, ctx)
        return logits


# Rows of everybody else have a state too, the first, which vLLM's kernels leave as they are.
_NEUTRAL: Final = _Counting(emitted=0, presence=0.0, frequency=0.0, repetition=1.0, bad_words=[])


class _Slots:
    """The continuations of one step, as vLLM's kernels want them: one state each after the neutral one."""

    def __init__(
        self,
        states: "LogitsProcRequestState",
        slots: Sequence[int],
        countings: Sequence[_Counting],
        ctx: "LogitsContext",
    ) -> None:
        self._device, self._vocabulary = states.device, states.vocab_size
        self._countings = [_NEUTRAL, *countings]
        of_slot = [0] * states.max_num_reqs
        for state, slot in enumerate(slots, start=1):
            of_slot[slot] = state
        self._state_of_row = self._tensor(of_slot, torch.int32)[ctx.expanded_idx_mapping.long()]
        # Of a prompt that is computed in parts, what is beyond this step counts for nothing: its row is thrown away.
        self._longest = int(ctx.seq_lens_upper_bound_np.max())
        sources = [slots[0], *slots]
        index = self._tensor(sources, torch.int64)
        self._tokens = states.all_token_ids.gpu[index, : self._longest]
        self._total = states.total_len.gpu[index].clamp(max=self._longest)
        prompts = [
            min(int(states.prompt_len.np[slot]) - counting.emitted, self._longest)
            for slot, counting in zip(sources, self._countings, strict=True)
        ]
        self._prompt = self._tensor(prompts, torch.int32)

    def apply(self, logits: torch.Tensor, ctx: "LogitsContext") -> None:
        """Penalties, then bad words: the order of this runner."""
        # Triton, which they need, isn't where the other runner is.
        from vllm.v1.worker.gpu.sample import bad_words, penalties  # noqa: PLC0415

        count = len(self._countings)
        seen = torch.zeros(count, -(-self._vocabulary // 32), dtype=torch.int32, device=self._device)
        counts = torch.zeros(count, self._vocabulary, dtype=torch.int32, device=self._device)
        states = torch.arange(1, count, dtype=torch.int32, device=self._device)
        penalties.bincount(states, self._tokens, self._prompt, self._total, seen, counts, self._longest)
        values = [
            self._tensor([getattr(one, name) for one in self._countings], torch.float32)
            for name in ("repetition", "frequency", "presence")
        ]
        rows = (ctx.input_ids, ctx.expanded_local_pos)
        penalties.apply_penalties(logits, self._state_of_row, *rows, *values, seen, counts)
        most = max(len(one.bad_words) for one in self._countings)
        if most:
            lengths = (self._tokens, self._prompt, self._total)
            bad_words.apply_bad_words(logits, self._state_of_row, *self._words(most), *lengths, *rows, most)

    def _words(self, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The bad words' tokens one after the other, where each begins and the last ends, and how many there are."""
        flat = [[token for word in one.bad_words for token in word] for one in self._countings]
        width = max(len(tokens) for tokens in flat)
        offsets = [[sum(map(len, one.bad_words[:end])) for end in range(most + 1)] for one in self._countings]
        return (
            self._tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in flat], torch.int32),
            self._tensor(offsets, torch.int32),
            self._tensor([len(one.bad_words) for one in self._countings], torch.int32),
        )

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)
