"""vLLM itself as it runs: asking it, and stopping it. To be imported once the environment is prepared."""

import asyncio
import dataclasses
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.inference.calibration import PrefillMeter
from services.inference.engine import Capability, EngineCard
from services.inference.pooling import Jobs
from services.inference.request import Generation, StructuredOutput
from services.inference.vllm_form_params import form_checker, form_params
from services.inference.vllm_params import FORM_ARGUMENT, Limits, Plan
from services.inference.vllm_prompts import Prompts
from services.inference.vllm_replay import Replay
from services.inference.vllm_token_text import TokenTexts

if TYPE_CHECKING:
    from services.inference.vllm_parsing import Parsing, Reading
    from services.inference.vllm_pooling import VllmPooler

__all__ = ["SHUTDOWN_SECONDS", "Backend"]

_TEXTS_A_TURN: Final = 512
SHUTDOWN_SECONDS: Final = 2.0
"""How long an engine process may take to end."""
# Weights of another shape don't go where the present ones are.
_SHAPE: Final = (
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
# The names that vLLM has for our fields, where they differ.
_FIELDS: Final = {
    "logprobs": "sampling.logprob_count",
    "prompt_logprobs": "sampling.prompt_logprob_count",
    "input_ids": "prompt",
    "input_text": "prompt",
    "image": "chat.messages",
    "audio": "chat.messages",
    "n": "choice_count",
    **{name: f"sampling.{name}" for name in ("allowed_token_ids", "bad_words", "max_tokens", "temperature", "top_p")},
}

_log = logging.getLogger(__name__)


class Backend:
    """A running AsyncLLM, and what of vLLM's is needed to use it."""

    def __init__(
        self,
        llm: Any,
        *,
        card: EngineCard,
        limits: Limits,
        prompts: Prompts,
        parsing: "Parsing | None",
        new_forms_per_minute: int,
    ) -> None:
        self.llm = llm
        self.card = card
        self.prompts = prompts
        self.parsing = parsing
        """What reads calls and thinking out of outputs; None where nothing does."""
        self.limits = limits
        self.most_step_tokens = int(llm.vllm_config.scheduler_config.max_num_batched_tokens)
        """Tokens that the engine computes in one step at most."""
        self.dead: type[Exception] = EngineDeadError
        """What vLLM raises when its engine process is gone."""
        self._dropped_weights = False
        self.texts = TokenTexts(llm.get_tokenizer())
        self._forms = form_checker(llm, new_per_minute=new_forms_per_minute)
        if self._forms is not None:
            # They are checked already, where they can't hold up everybody else.
            llm.input_processor.structured_outputs_config = None
            self.card = dataclasses.replace(card, capabilities=card.capabilities | {Capability.STRUCTURED_OUTPUT})

    def watch(self) -> None:
        """Begins to listen to the engine, which otherwise only happens with the first request. On the event loop."""
        self.llm._run_output_handler()

    async def warm_up(self) -> None:
        """Has the engine generate, so that the first request doesn't pay for what the engine does only once.

        Raises:
            EngineDeadError: it died of that.
        """
        if Capability.GENERATE not in self.card.capabilities:
            return
        sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False)
        async for _ in self.llm.generate(tokens_input([0]), sampling, "warm-up"):
            pass

    async def probe(self) -> None:
        """Returns when the engine process has answered, which it does between two steps. Raises when it is dead."""
        await self.llm.engine_core.is_scheduler_paused_async()

    async def sleep(self, level: int) -> None:
        """Gives the GPU's memory back.

        Raises:
            MeshError: FAILED_PRECONDITION, it was not started so that it can.
        """
        if not self.llm.model_config.enable_sleep_mode:
            message = "this engine can't sleep: it needs a GPU and engine_args.enable_sleep_mode"
            raise MeshError(Reason.FAILED_PRECONDITION, message)
        await self.llm.sleep(level)
        self._dropped_weights = level > 1

    async def wake(self) -> None:
        """Takes the GPU's memory again, and reads the weights again where sleep dropped them."""
        if self._dropped_weights:
            await self.llm.wake_up(["weights"])
            await self.llm.collective_rpc("reload_weights")
            await self.llm.wake_up(["kv_cache"])
        else:
            await self.llm.wake_up()

    def check_checkpoint(self, path: str) -> None:
        """Checks what can be checked of new weights before the present ones are touched.

        Raises:
            MeshError: FAILED_PRECONDITION, they don't fit.
        """
        config = Path(path) / "config.json"
        if not config.is_file():
            raise MeshError(Reason.FAILED_PRECONDITION, "path: there is no checkpoint", field="path")
        found, present = json.loads(config.read_bytes()), self.llm.model_config.hf_config.to_dict()
        for key in _SHAPE:
            if key in found and found[key] != present.get(key):
                message = f"path: the checkpoint's {key} is {found[key]}, the model's is {present.get(key)}"
                raise MeshError(Reason.FAILED_PRECONDITION, message, field="path")

    async def reload(self, path: str) -> None:
        """Replaces the weights and forgets what was cached with the old ones. Nothing may run."""
        await self.llm.pause_generation(mode="wait", clear_cache=True)
        try:
            await self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        finally:
            await self.llm.resume_generation()

    async def died(self) -> None:
        """Returns when the engine process is gone."""
        await asyncio.wait([self.llm.output_handler])

    async def add(
        self,
        generation: Generation,
        plan: Plan,
        *,
        detokenize: bool,
        reading: "Reading | None" = None,
        lora: Any = None,
    ) -> Any:
        """Hands a request to the engine; returns the collector that its outputs come through.

        `lora` is vLLM's request for the adapter to use; None uses none.

        Raises:
            MeshError: vLLM refuses it (INVALID_REQUEST).
        """
        arguments = plan.arguments()
        if not detokenize:
            arguments |= {"stop": None, "detokenize": False}
        if generation.structured_output is not None:
            arguments["structured_outputs"] = form_params(generation.structured_output)
            if plan.emitted_token_ids:
                extra = arguments.get("extra_args", {}) | {FORM_ARGUMENT: len(plan.emitted_token_ids)}
                arguments["extra_args"] = extra
        with self.refusals("messages" if generation.kind == "chat" else "prompt"):
            return await self.llm.add_request(
                generation.id,
                _engine_input(plan, generation.salt),
                # It is this request's alone; vLLM would copy it deeply.
                SamplingParams(**arguments, output_kind=RequestOutputKind.DELTA, skip_clone=True),
                lora_request=lora,
                **self._thinking(generation, plan, reading),
                trace_headers=self.trace_headers(generation.traceparent),
                priority=generation.priority,
            )

    def _thinking(self, generation: Generation, plan: Plan, reading: "Reading | None") -> dict[str, Any]:
        if reading is not None:
            return reading.engine_arguments(plan.prompt_token_ids)
        # Elsewhere than in a chat nobody thinks first.
        thinks = self.parsing is not None and self.parsing.has_reasoning
        return {"reasoning_ended": True} if thinks and generation.structured_output is not None else {}

    async def check_form(self, form: StructuredOutput, *, tenant: str = "", field: str | None = None) -> None:
        """Returns when outputs can be held to the form; raises MeshError as Forms.check() does."""
        if self._forms is None:
            message = "this model's outputs can't be held to a form"
            raise MeshError(Reason.UNIMPLEMENTED, message, field=field or "structured_output")
        await self._forms.check(form, tenant=tenant, field=field)

    def replay(self, plan: Plan) -> Replay | None:
        """What turns a continuation's tokens into text; None for a new generation, whose text vLLM makes."""
        return Replay(self.llm.get_tokenizer(), plan) if plan.emitted_token_ids else None

    def trace_headers(self, traceparent: str) -> dict[str, str] | None:
        """What vLLM's own span of a request is to hang on; None while nothing is traced."""
        traces = self.llm.observability_config.otlp_traces_endpoint is not None
        return {"traceparent": traceparent} if traceparent and traces else None

    async def pooler(self, max_queued: int, prefill: PrefillMeter) -> "VllmPooler | None":
        """What embeds and scores, which the card then says too; None where the engine generates. On the event loop.

        Raises:
            ConfigError: the model pools, but neither embeddings nor scores.
        """
        config = self.llm.model_config
        if config.runner_type != "pooling":
            return None
        # It brings half of vLLM's HTTP server along, which engines that generate do without.
        from services.inference.vllm_pooling import VllmPooler, pooling_abilities  # noqa: PLC0415

        tasks = await self.llm.get_supported_tasks()
        can = pooling_abilities(config, tasks)
        if not can:
            raise ConfigError(f"model.path: this model neither embeds nor scores, vLLM says it can {', '.join(tasks)}")
        size = config.embedding_size if Capability.EMBED in can else 0
        self.card = dataclasses.replace(self.card, capabilities=can, embedding_dimensions=size)
        return VllmPooler(self, tasks, Jobs(self.card.max_running, max_queued), prefill)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token on its own; gives way to other tasks meanwhile."""
        texts: list[str] = []
        for token_id in token_ids:
            texts.append(self.texts.alone(token_id))
            if not len(texts) % _TEXTS_A_TURN:
                await asyncio.sleep(0)
        return texts

    async def release(self, request_id: str) -> None:
        """Frees what the engine holds for a request, if it holds anything."""
        if self.llm is None:
            return
        try:
            await self.llm.abort(request_id)
        except self.dead:
            _log.debug("nothing to free in a dead engine")
        # vLLM forgets the choices of a request, but not what holds them together.
        parents = self.llm.output_processor.parent_requests
        for internal_id in [key for key, parent in parents.items() if parent.external_req_id == request_id]:
            del parents[internal_id]

    @contextmanager
    def refusals(self, field: str) -> Iterator[None]:
        """Turns what vLLM raises for a bad request into INVALID_REQUEST, on `field` unless vLLM names one."""
        try:
            yield
        except (VLLMClientError, ValueError) as error:
            parameter = getattr(error, "parameter", None)
            named = _FIELDS.get(parameter, parameter) if parameter else field
            raise MeshError(Reason.INVALID_REQUEST, str(error), field=named) from error

    async def stop(self, in_thread: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Ends the engine process and frees what it held, within two seconds; once stopped, does nothing.

        `in_thread` runs what blocks.
        """
        if self._forms is not None:
            await self._forms.close()
        self.prompts.close()
        if self.llm is None:
            return
        if self.llm.output_handler is not None:
            # Else it takes the end for a failure, and says so.
            self.llm.output_handler.cancel()
        await in_thread(self.shut_down)
        # vLLM leaves it open.
        self.llm.engine_core.resources.ctx.destroy(linger=0)
        # Left to the end of the process, its finalizer would miss half of Python.
        self.llm = None

    def shut_down(self) -> None:
        """Ends the engine process. Blocks."""
        core = self.llm.engine_core
        try:
            self.llm.shutdown(timeout=SHUTDOWN_SECONDS)
        except psutil.NoSuchProcess:
            # It ended by itself just as vLLM was about to kill it, which then leaves its sockets open.
            core.resources()


def _engine_input(plan: Plan, cache_salt: str) -> Any:
    if plan.media is None:
        return tokens_input(plan.tokens, cache_salt=cache_salt or None)
    # What was emitted follows the prompt, so the images stay where they are.
    salted = {"cache_salt": cache_salt} if cache_salt else {}
    return {**plan.media, "prompt_token_ids": plan.tokens, **salted}
