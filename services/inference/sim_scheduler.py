"""Which sequences of the simulated engine run in a step: continuous batching, chunked prefill, KV and prefix cache."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Final

from services.common.errors import MeshError
from services.common.settings_worker import SimSettings
from services.inference.cache_journal import CacheJournal
from services.inference.calibration import PrefillMeter
from services.inference.sim_cache import BlockPool
from services.inference.sim_sequence import SimSequence

__all__ = ["SimScheduler"]

# Prompt tokens that one step takes at most, so that a long prompt holds up those who decode for a while only.
_CHUNK_TOKENS: Final = 512


class SimScheduler:
    """Sequences that wait, are prefilled, and decode; each holds blocks of the cache while it runs."""

    def __init__(
        self,
        settings: SimSettings,
        clock: Callable[[], float],
        journal: CacheJournal,
        *,
        die: Callable[[], None],
    ) -> None:
        """`clock` gives seconds. `die` is called when a poisonous prompt is computed, and forgets the cache."""
        self._settings = settings
        self._clock = clock
        self._journal = journal
        self._die = die
        self._pool = BlockPool(settings.kv_blocks, journal)
        self._generations: dict[str, list[SimSequence]] = {}
        self._sequences: dict[int, SimSequence] = {}
        self._waiting: list[SimSequence] = []
        self._prefilling: dict[int, SimSequence] = {}
        self._decoding: dict[int, SimSequence] = {}
        self._arrivals = 0
        self.prefill_meter = PrefillMeter()
        """How fast prompts are computed."""
        self.pending_prefill_tokens = 0
        """Tokens of prompts that are still to be computed."""
        self.query_tokens = 0
        """Tokens of all prompts that began to run."""
        self.hit_tokens = 0
        """Those of them that were in the cache."""

    def __len__(self) -> int:
        """Sequences that it has."""
        return len(self._sequences)

    @property
    def running(self) -> int:
        """Sequences that are prefilled or decode."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        """Sequences that have no room yet."""
        return len(self._waiting)

    @property
    def decoding(self) -> int:
        """Sequences that get a token with the next step."""
        return len(self._decoding)

    @property
    def kv_usage(self) -> float:
        """Share of the cache's blocks that somebody holds, 0 to 1."""
        return self._pool.usage

    @property
    def chunk(self) -> int:
        """Prompt tokens that the next step computes."""
        return min(_CHUNK_TOKENS, sum(sequence.pending for sequence in self._prefilling.values()))

    def step_seconds(self, chunk: int = _CHUNK_TOKENS) -> float:
        """How long a step takes that computes `chunk` prompt tokens beside a token for each that decodes."""
        settings, batch = self._settings, len(self._decoding)
        decode = settings.decode_step_ms + (batch - 1) * settings.decode_step_ms_per_sequence if batch else 0.0
        return decode / 1000 + chunk / settings.prefill_tokens_per_second

    def add(self, generation_id: str, sequences: Sequence[SimSequence]) -> None:
        """Takes the sequences of a generation, one a choice."""
        self._generations[generation_id] = list(sequences)
        for sequence in sequences:
            self._arrivals += 1
            sequence.arrive(self._arrivals, self._clock())
            self._sequences[sequence.id] = sequence
            self._enqueue(sequence)

    def abort(self, generation_id: str) -> None:
        """Drops the sequences of a generation. Unknown ids are ignored."""
        for sequence in tuple(self._generations.get(generation_id, ())):
            self._remove(sequence)

    def fail_all(self, error: MeshError) -> None:
        """Drops everything, and says why."""
        for generation_id, sequences in tuple(self._generations.items()):
            self.abort(generation_id)
            sequences[0].sink.failed(error)

    def forget_cache(self) -> None:
        """Begins with an empty cache. Nothing may run."""
        self._journal.clear()
        self._pool = BlockPool(self._settings.kv_blocks, self._journal)

    def admit(self) -> None:
        """Has those run, in their order, that there is room for."""
        while self._waiting and self.running < self._settings.max_num_seqs:
            sequence = self._waiting[0]
            size = self._settings.block_size
            # The last token is always computed: the first output comes from it.
            found = min(self._pool.lookup(sequence.hashes), (sequence.length - 1) // size)
            alone = min(sequence.length // size + 1, self._settings.kv_blocks) - found
            if not self._pool.admit(sequence.hashes[:found], alone):
                return
            self._waiting.pop(0)
            sequence.shared, sequence.alone = found, alone
            self._begin(sequence, found * size)

    def prefill(self, chunk: int, now: float) -> None:
        """Computes so many prompt tokens, first come, first served; whose prompt is done decodes from the next step."""
        for sequence in tuple(self._prefilling.values()):
            part = min(chunk, sequence.pending)
            sequence.pending -= part
            chunk -= part
            self.pending_prefill_tokens -= part
            if sequence.pending:
                return
            if sequence.is_poison:
                self._die()
                return
            self.prefill_meter.observe(sequence.prefill_tokens, sequence.prefill_begun, now)
            self._finish_prefill(sequence, now)

    def decode(self, now: float) -> None:
        """Gives every sequence that decodes its next token."""
        # The hot path: once for each token. Whoever is called may abort any sequence.
        for sequence in tuple(self._decoding.values()):
            if not sequence.decoding:
                continue
            if sequence.first is None and not self._first(sequence, now):
                continue
            sequence.deliver(*next(sequence.steps))
            sequence.left -= 1
            if not sequence.left:
                self._end_segment(sequence, now)

    def _enqueue(self, sequence: SimSequence) -> None:
        sequence.pending = sequence.length
        self.pending_prefill_tokens += sequence.pending
        insort(self._waiting, sequence, key=_order)

    def _begin(self, sequence: SimSequence, cached: int) -> None:
        self.pending_prefill_tokens -= cached
        sequence.pending -= cached
        sequence.prefill_begun = self._clock()
        sequence.prefill_tokens = sequence.pending
        if sequence.scheduled is None:
            sequence.scheduled = sequence.prefill_begun
            sequence.cached = min(cached, sequence.prompt_count)
            self.query_tokens += sequence.prompt_count
            self.hit_tokens += sequence.cached
        self._prefilling[sequence.id] = sequence

    def _finish_prefill(self, sequence: SimSequence, now: float) -> None:
        del self._prefilling[sequence.id]
        for block in sequence.hashes[sequence.shared :]:
            self._share(sequence, block)
        self._decoding[sequence.id] = sequence
        sequence.decoding = True
        if sequence.is_complete:
            if self._first(sequence, now):
                self._complete(sequence, now)
        else:
            sequence.plan_segment()

    def _share(self, sequence: SimSequence, block: int) -> None:
        self._pool.share(block)
        sequence.shared += 1
        sequence.alone -= 1

    def _first(self, sequence: SimSequence, now: float) -> bool:
        sequence.first = now
        sequence.sink.started(sequence.prompt_count, sequence.cached, sequence.echo)
        return sequence.decoding

    def _end_segment(self, sequence: SimSequence, now: float) -> None:
        if not sequence.decoding:
            return
        if sequence.is_complete:
            self._complete(sequence, now)
            return
        self._share(sequence, sequence.fill_block())
        while not self._pool.grow():
            victim = max((*self._prefilling.values(), *self._decoding.values()), key=_order)
            self._preempt(victim)
            if victim is sequence:
                return
        sequence.alone += 1
        sequence.plan_segment()

    def _preempt(self, sequence: SimSequence) -> None:
        # As real engines do: its blocks go to others, and it computes them again when there is room.
        self._stop_running(sequence)
        self._enqueue(sequence)

    def _complete(self, sequence: SimSequence, now: float) -> None:
        sequence.flush()
        if not sequence.decoding:
            return
        self._remove(sequence)
        sequence.sink.completed(sequence.reason, sequence.usage, sequence.timings(now), sequence.stop_cause)

    def _remove(self, sequence: SimSequence) -> None:
        del self._sequences[sequence.id]
        siblings = self._generations[sequence.generation_id]
        if len(siblings) == 1:
            del self._generations[sequence.generation_id]
        else:
            self._generations[sequence.generation_id] = [each for each in siblings if each is not sequence]
        if sequence.id in self._prefilling or sequence.id in self._decoding:
            self._stop_running(sequence)
        else:
            del self._waiting[bisect_left(self._waiting, sequence.order, key=_order)]
            self.pending_prefill_tokens -= sequence.pending

    def _stop_running(self, sequence: SimSequence) -> None:
        self._prefilling.pop(sequence.id, None)
        self._decoding.pop(sequence.id, None)
        sequence.decoding = False
        self.pending_prefill_tokens -= sequence.pending
        sequence.pending = 0
        self._pool.release(sequence.hashes[: sequence.shared], sequence.alone)
        sequence.shared = sequence.alone = 0


def _order(sequence: SimSequence) -> tuple[int, int]:
    return sequence.order
