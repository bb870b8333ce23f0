"""Embeddings and scores by vLLM: its own preparation of prompts and reading of results, around its engine."""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, Final

from vllm.entrypoints.pooling.embed.io_processor import EmbedIOProcessor
from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest
from vllm.entrypoints.pooling.scoring.io_processor import ScoringIOProcessors
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest
from vllm.entrypoints.pooling.typing import PoolingServeContext
from vllm.entrypoints.pooling.utils import enable_scoring_api
from vllm.exceptions import VLLMClientError
from vllm.outputs import ScoringRequestOutput
from vllm.renderers.chat_utils import ChatTemplateConfig
from vllm.tasks import SCORE_TYPE_MAP

from services.common.errors import MeshError, Reason
from services.common.prefix import tenant_salt
from services.inference.calibration import PrefillMeter
from services.inference.engine import Capability, Load
from services.inference.pooling import Embedded, EmbedJob, Job, Jobs, Scored, ScoreJob, check_can, check_length

if TYPE_CHECKING:
    from services.inference.vllm_backend import Backend

__all__ = ["VllmPooler", "pooling_abilities"]

_log = logging.getLogger(__name__)
_EMBED: Final = "embed"
# What vLLM calls a prompt that is too long.
_LENGTHS: Final = ("input_text", "input_tokens")


def pooling_abilities(model_config: Any, tasks: Sequence[str]) -> frozenset[Capability]:
    """What a model that pools can do for us, of the tasks that vLLM supports with it."""
    can = {Capability.EMBED} if _EMBED in tasks else set()
    if enable_scoring_api(tuple(tasks), model_config):
        can.add(Capability.SCORE)
    return frozenset(can)


class VllmPooler:
    """The pooling side of one running vLLM; cancelling a call aborts it in the engine."""

    def __init__(self, backend: "Backend", tasks: Sequence[str], jobs: Jobs, prefill: PrefillMeter) -> None:
        """`tasks` are those that vLLM supports with the model; `jobs` and `prefill` are told of what is done."""
        self._backend = backend
        self._llm = backend.llm
        self._jobs = jobs
        self._prefill = prefill
        # So many inputs are in the engine; more of one job wait here, or a large one would fill vLLM's own queue.
        self._room = asyncio.Semaphore(backend.card.max_running)
        model_config = self._llm.model_config
        parts = {
            "vllm_config": self._llm.vllm_config,
            "renderer": self._llm.renderer,
            "chat_template_config": ChatTemplateConfig(),
        }
        can = backend.card.capabilities
        self._embedding: Any = EmbedIOProcessor(**parts) if Capability.EMBED in can else None
        kind = SCORE_TYPE_MAP.get(model_config.get_pooling_task(tuple(tasks)))
        self._scoring: Any = ScoringIOProcessors[kind](**parts) if Capability.SCORE in can else None

    def load(self, *, trouble: str) -> Load:
        """How the engine is, this moment."""
        return Load(
            running=self._jobs.running,
            waiting=self._jobs.waiting,
            pending_prefill_tokens=self._jobs.pending_tokens,
            prefill_tokens_per_second=self._prefill.tokens_per_second,
            trouble=trouble,
        )

    async def embed(self, job: EmbedJob) -> Embedded:
        """One vector an input; see Pooler.embed."""
        check_can(self._backend.card, Capability.EMBED)
        self._check_characters(job, [(f"{job.field}[{i}]", entry) for i, entry in enumerate(job.inputs)])
        request = EmbeddingCompletionRequest(
            input=list(job.inputs),
            dimensions=job.dimensions,
            truncate_prompt_tokens=job.token_limit,
            truncation_side=None if job.token_limit is None else "right" if job.keep_beginning else "left",
        )
        with self._jobs.one():
            outputs, tokens = await self._serve(self._embedding, request, job, job.field)
        vectors = [output.outputs.data.float().tolist() for output in outputs]
        return Embedded(vectors=vectors, prompt_tokens=tokens, cached_tokens=_cached(outputs))

    async def score(self, job: ScoreJob) -> Scored:
        """One score a text; see Pooler.score."""
        check_can(self._backend.card, Capability.SCORE)
        texts = [(f"texts[{i}]", text) for i, text in enumerate(job.texts)]
        self._check_characters(job, [("query", job.query), *texts])
        request = RerankRequest(query=job.query, documents=list(job.texts), truncate_prompt_tokens=job.token_limit)
        with self._jobs.one():
            outputs, tokens = await self._serve(self._scoring, request, job, "texts")
        scores = [ScoringRequestOutput.from_base(output).outputs.score for output in outputs]
        return Scored(scores=scores, prompt_tokens=tokens, cached_tokens=_cached(outputs))

    def _check_characters(self, job: Job, inputs: Sequence[tuple[str, str | Sequence[int]]]) -> None:
        # Megabytes would keep the tokenizer busy for seconds just to be refused.
        longest = getattr(self._llm.get_tokenizer(), "max_chars_per_token", 0)
        for field, entry in inputs:
            if job.token_limit is None and isinstance(entry, str) and longest:
                check_length(field, len(entry) // longest, self._backend.card)

    async def _serve(self, processor: Any, request: Any, job: Job, field: str) -> tuple[list[Any], int]:
        begun = time.monotonic()
        context = PoolingServeContext(
            request=request,
            model_name=self._backend.card.model,
            request_id=job.id,
            pooling_params=processor.create_pooling_params(request),
            lora_request=None,
            priorities=job.priority,
            prompt_extras={},
        )
        context.engine_inputs = await self._rendered(processor, context, job, field)
        if processor is self._embedding:
            processor.maybe_pre_process_chunked(context)
        counts = [len(entry["prompts"]["prompt_token_ids"]) for entry in context.engine_inputs]
        with self._jobs.tokens(sum(counts)):
            context.final_res_batch = await self._compute(context.engine_inputs, job)
        processor.post_process_online(context)
        self._prefill.observe(sum(counts) - _cached(context.final_res_batch), begun, time.monotonic())
        self._jobs.served(time.monotonic() - begun)
        return context.final_res_batch, sum(counts)

    async def _rendered(self, processor: Any, context: Any, job: Job, field: str) -> list[Any]:
        """The prompts as vLLM takes them, each within the model's context."""
        with _refused("dimension_count" if isinstance(job, EmbedJob) and job.dimensions is not None else field):
            context.pooling_params.verify(self._llm.model_config)
            wanted = processor.get_request_factory_online(context)
        # A cross-encoder has a prompt a text; an embedding model has one more, for the query, before them.
        texts_from = len(wanted) - len(job.texts) if isinstance(job, ScoreJob) else 0
        rendered = []
        for index, one in enumerate(wanted, start=-texts_from):
            with _refused(f"{field}[{index}]" if index >= 0 else "query"):
                rendered.append(await processor.render_async(one))
        return rendered

    async def _compute(self, inputs: Sequence[Any], job: Job) -> list[Any]:
        tasks = [asyncio.create_task(self._one(entry, f"{job.id}-{index}", job)) for index, entry in enumerate(inputs)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            # The first failure, and the caller's own leaving, end the others in the engine too.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, entry: Any, name: str, job: Job) -> Any:
        async with self._room:
            try:
                output = await self._encode(entry, name, job)
            except self._backend.dead as error:
                raise MeshError(Reason.ENGINE_FAILED, "the engine failed") from error
            except Exception as error:
                _log.error("an input could not be pooled", exc_info=error)
                raise MeshError(Reason.ENGINE_FAILED, "the engine failed") from error
        if output is None or output.error is not None:
            raise MeshError(Reason.ENGINE_FAILED, "the engine ended the request")
        return output

    async def _encode(self, entry: Any, name: str, job: Job) -> Any:
        last = None
        salted = {"cache_salt": tenant_salt(job.cache_tenant)} if job.cache_tenant else {}
        stream = self._llm.encode(
            {**entry["prompts"], **salted},
            entry["params"],
            request_id=name,
            trace_headers=self._backend.trace_headers(job.traceparent),
            priority=job.priority,
        )
        async with aclosing(stream) as outputs:
            async for output in outputs:
                last = output
        return last


@contextmanager
def _refused(field: str) -> Iterator[None]:
    """Turns what vLLM raises for a bad request into an error on `field`."""
    try:
        yield
    except (VLLMClientError, ValueError) as error:
        too_long = getattr(error, "parameter", None) in _LENGTHS
        reason = Reason.CONTEXT_LENGTH_EXCEEDED if too_long else Reason.INVALID_REQUEST
        raise MeshError(reason, f"{field}: {error.args[0] if error.args else error}", field=field) from error


def _cached(outputs: Sequence[Any]) -> int:
    return sum(output.num_cached_tokens or 0 for output in outputs)
