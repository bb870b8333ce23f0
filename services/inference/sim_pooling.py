"""A simulated engine that pools: embeddings and scores, in the time that their prefill would take."""

import asyncio
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

from services.common.errors import MeshError, Reason
from services.common.settings_worker import SimSettings
from services.inference import sim_text
from services.inference.cache_journal import CacheJournal
from services.inference.calibration import PrefillMeter
from services.inference.engine import Capability, EngineCard, Load
from services.inference.output import Sink
from services.inference.pooling import Embedded, EmbedJob, Jobs, Scored, ScoreJob, check_can, check_length
from services.inference.request import ChatMessage, ChatOptions, Generation
from services.inference.sim_embedding import cosine, embedding
from services.inference.sim_tokenizer import SimTokenizer

__all__ = ["SimPooler"]

_RETRY_SECONDS: Final = 1.0


class SimPooler:
    """An engine that embeds and scores, and computes only hashes. Use it as an async context manager."""

    def __init__(
        self,
        settings: SimSettings,
        model_name: str,
        max_queued: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_queued` jobs may wait beyond the `max_num_seqs` that run; `clock` gives seconds."""
        self._settings = settings
        self._clock = clock
        self._card = EngineCard(
            kind="sim",
            model=model_name,
            max_context_tokens=settings.max_model_len,
            vocabulary_size=sim_text.VOCABULARY_SIZE,
            capabilities=frozenset({Capability.EMBED, Capability.SCORE}),
            max_running=settings.max_num_seqs,
            kv_cache_tokens=0,
            embedding_dimensions=settings.embedding_dimensions,
        )
        self._tokenizer = SimTokenizer(self._card)
        self._jobs = Jobs(settings.max_num_seqs, max_queued)
        self._prefill = PrefillMeter()
        self._computing = asyncio.Lock()
        self._alive = False
        self.cache_journal = CacheJournal()

    async def __aenter__(self) -> Self:
        self._alive = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alive = False

    @property
    def card(self) -> EngineCard:
        """What it is."""
        return self._card

    @property
    def load(self) -> Load:
        """How it is, this moment."""
        return Load(
            running=self._jobs.running,
            waiting=self._jobs.waiting,
            pending_prefill_tokens=self._jobs.pending_tokens,
            prefill_tokens_per_second=self._prefill.tokens_per_second,
            trouble="" if self._alive else "the worker is stopping",
        )

    async def submit(self, generation: Generation, sink: Sink) -> None:
        """Refuses: an engine that pools does not generate."""
        del generation, sink
        check_can(self._card, Capability.GENERATE)

    def abort(self, generation_id: str) -> None:
        """Nothing to stop: it generates nothing."""

    async def sleep(self, level: int) -> None:
        """Nothing to give back; see Engine.sleep."""

    async def wake(self) -> None:
        """Nothing to do; see Engine.wake."""

    async def reload_weights(self, path: str) -> None:
        """Nothing to do; see Engine.reload_weights."""
        if path:
            raise MeshError(Reason.FAILED_PRECONDITION, "path: the simulated engine has no checkpoints", field="path")

    @property
    def adapters(self) -> None:
        """None: there are no weights to adapt."""
        return

    @property
    def pooler(self) -> Self:
        """Itself."""
        return self

    async def embed(self, job: EmbedJob) -> Embedded:
        """One unit vector an input; see Pooler.embed."""
        inputs = [self._tokens(entry, job.field, index, job) for index, entry in enumerate(job.inputs)]
        count = sum(map(len, inputs))
        with self._jobs.one():
            await self._compute(count)
            dimensions = self._settings.embedding_dimensions
            vectors = [embedding(tokens, dimensions, keep=job.dimensions) for tokens in inputs]
        return Embedded(vectors=vectors, prompt_tokens=count)

    async def score(self, job: ScoreJob) -> Scored:
        """The cosine similarity of the query's embedding and each text's; see Pooler.score."""
        texts = [self._tokens(text, "texts", index, job) for index, text in enumerate(job.texts)]
        spelled = self._tokenizer.tokens(job.query, "query", limit=job.token_limit)
        query = self._cut(spelled, "query", job.token_limit, beginning=True)
        count = len(query) + sum(map(len, texts))
        with self._jobs.one():
            await self._compute(count)
            dimensions = self._settings.embedding_dimensions
            wanted = embedding(query, dimensions)
            scores = [cosine(wanted, embedding(tokens, dimensions)) for tokens in texts]
        return Scored(scores=scores, prompt_tokens=count)

    async def tokenize(
        self, prompt: str | Sequence[ChatMessage], chat: ChatOptions | None = None, *, special_tokens: bool = True
    ) -> list[int]:
        """The tokens of a text or a conversation; see Engine.tokenize."""
        del special_tokens
        return self._tokenizer.tokenize(prompt, chat)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token on its own; see Engine.token_texts."""
        return self._tokenizer.token_texts(token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; see Engine.detokenize."""
        return self._tokenizer.detokenize(token_ids)

    def _tokens(self, entry: str | Sequence[int], field: str, index: int, job: EmbedJob | ScoreJob) -> Sequence[int]:
        name = f"{field}[{index}]"
        tokens = self._tokenizer.tokens(entry, name, limit=job.token_limit) if isinstance(entry, str) else entry
        beginning = not isinstance(job, EmbedJob) or job.keep_beginning
        return self._cut(tokens, name, job.token_limit, beginning=beginning)

    def _cut(self, tokens: Sequence[int], field: str, limit: int | None, *, beginning: bool) -> Sequence[int]:
        if limit is not None and len(tokens) > limit:
            tokens = tokens[:limit] if beginning else tokens[-limit:]
        check_length(field, len(tokens), self._card)
        return tokens

    async def _compute(self, tokens: int) -> None:
        settings = self._settings
        with self._jobs.tokens(tokens):
            async with self._computing:
                if not self._alive:
                    raise MeshError(
                        Reason.NO_READY_WORKER, "the worker is stopping", retry_after_seconds=_RETRY_SECONDS
                    )
                begun = self._clock()
                await asyncio.sleep(settings.decode_step_ms / 1000 + tokens / settings.prefill_tokens_per_second)
                self._prefill.observe(tokens, begun, self._clock())
        self._jobs.served(self._clock() - begun)
