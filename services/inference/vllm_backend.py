"""vLLM itself: starting it, asking it, stopping it. To be imported once the environment is prepared."""

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
from vllm.config.kv_events import KVEventsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import disable_envs_cache, enable_envs_cache
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import utils as engine_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import MPClient
from vllm.v1.engine.exceptions import EngineDeadError

from services.common.config import ConfigError
from services.common.engine_args import check_engine_args
from services.common.errors import MeshError, Reason
from services.common.settings_worker import WorkerSettings
from services.inference.calibration import PrefillMeter
from services.inference.engine import Capability, EngineCard, Generation, StructuredOutput
from services.inference.pooling import Jobs
from services.inference.vllm_arguments import vllm_arguments
from services.inference.vllm_emitted import emitted_processor
from services.inference.vllm_environment import has_cuda
from services.inference.vllm_form_params import form_checker, form_params, form_settings
from services.inference.vllm_media import placeholder_ids
from services.inference.vllm_nursery import Nursery
from services.inference.vllm_params import FORM_ARGUMENT, Limits, Plan
from services.inference.vllm_prompts import Prompts
from services.inference.vllm_replay import Replay
from services.inference.vllm_seeded import continues_draws
from services.inference.vllm_token_text import TokenTexts

if TYPE_CHECKING:
    from services.inference.vllm_parsing import Parsing, Reading
    from services.inference.vllm_pooling import VllmPooler

__all__ = ["Backend", "start_backend"]

_CPU_KV_CACHE_BYTES: Final = 64 << 20
_CPU_BLOCK_SIZE: Final = 32
_MAX_RUNNING: Final = 64
# Different adapters in one batch, each of which takes room on the card.
_LORA_SLOTS: Final = 4
_TEXTS_A_TURN: Final = 512
_SHUTDOWN_SECONDS: Final = 2.0
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
        self, llm: Any, *, card: EngineCard, prompts: Prompts, parsing: "Parsing | None", new_forms_per_minute: int
    ) -> None:
        self.llm = llm
        self.card = card
        self.prompts = prompts
        self.parsing = parsing
        """What reads calls and thinking out of outputs; None where nothing does."""
        self.limits = _limits(llm)
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
            self.llm.shutdown(timeout=_SHUTDOWN_SECONDS)
        except psutil.NoSuchProcess:
            # It ended by itself just as vLLM was about to kill it, which then leaves its sockets open.
            core.resources()


def _engine_input(plan: Plan, cache_salt: str) -> Any:
    if plan.media is None:
        return tokens_input(plan.tokens, cache_salt=cache_salt or None)
    # What was emitted follows the prompt, so the images stay where they are.
    salted = {"cache_salt": cache_salt} if cache_salt else {}
    return {**plan.media, "prompt_token_ids": plan.tokens, **salted}


def start_backend(settings: WorkerSettings, stats: Any, nursery: Nursery, kv_events: str) -> Backend:
    """Starts vLLM; blocks until it can serve. `stats` is told of every step, through vLLM's stat logger interface.

    Changes of its prefix cache are published at the ZeroMQ endpoint `kv_events`.

    Call it from a thread that lives as long as the engine is to: a spawned engine dies with the thread that started it.

    Raises:
        ConfigError: the settings name an argument that vLLM hasn't, or a value that it refuses.
    """
    path = settings.model.path
    if path is None:
        raise ConfigError('model.path: needed for engine "vllm"')
    # An engine before this one may have left it, and what is set meanwhile counts.
    disable_envs_cache()
    config = _vllm_config(settings, path, cuda=has_cuda())
    if config.kv_events_config is None and config.cache_config.enable_prefix_caching:
        config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=kv_events)
    processor = emitted_processor(config)
    if processor is not None:
        config.model_config.logits_processors = [*(config.model_config.logits_processors or ()), processor]
    with nursery.lent_to(engine_utils):
        try:
            llm = AsyncLLM.from_vllm_config(config, stat_loggers=[lambda _config, _index=0: stats])
        except BaseException as error:
            _close_context(error)
            raise
    try:
        backend = _backend(settings, llm, kv_events)
    except BaseException:
        llm.shutdown(timeout=_SHUTDOWN_SECONDS)
        raise
    # As vLLM does in the engine's process: else it reads the environment several times for each request.
    enable_envs_cache()
    return backend


def _close_context(error: BaseException) -> None:
    """Closes the ZeroMQ context of a client that failed to start: left to the collector, its end may block."""
    trace = error.__traceback__
    while trace is not None:
        client = trace.tb_frame.f_locals.get("self")
        if isinstance(client, MPClient) and hasattr(client, "resources"):
            client.resources.ctx.destroy(linger=0)
        trace = trace.tb_next


def _vllm_config(settings: WorkerSettings, path: str, *, cuda: bool) -> Any:
    check_engine_args(settings.engine_args, "engine_args")
    # The defaults have those of its settings in them that forms allow.
    given = {key: value for key, value in settings.engine_args.items() if key != "structured_outputs_config"}
    arguments = _defaults(settings, path, cuda=cuda) | vllm_arguments(given)
    try:
        return AsyncEngineArgs(model=path, **arguments).create_engine_config()
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(
            f"vLLM refuses model.path {path!r} with engine_args {settings.engine_args}: {error}"
        ) from error


def _defaults(settings: WorkerSettings, path: str, *, cuda: bool) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "max_num_seqs": _MAX_RUNNING,
        "scheduling_policy": "priority",
        "use_tqdm_on_load": False,
        "structured_outputs_config": form_settings(settings),
        **_lora(settings, cuda=cuda),
    }
    if cuda:
        return defaults | {"gpu_memory_utilization": settings.gpu_memory_utilization}
    return defaults | {
        "enforce_eager": True,
        "block_size": _CPU_BLOCK_SIZE,
        "kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES,
        "dtype": "float32" if _is_float32(path) else "bfloat16",
    }


def _lora(settings: WorkerSettings, *, cuda: bool) -> dict[str, Any]:
    model = settings.model
    if model.adapters_dir is None:
        return {}
    if cuda:
        slots = settings.engine_args.get("max_loras", min(_LORA_SLOTS, model.max_adapters))
        return {"enable_lora": True, "max_loras": slots, "max_cpu_loras": model.max_adapters}
    if "max_loras" in settings.engine_args:
        raise ConfigError("engine_args.max_loras: can't be set on a CPU, it follows from model.max_adapters")
    # On a CPU, vLLM takes the last slot for requests that use no adapter, in a batch with others that do: what is in it
    # would change what they say. So there is always one slot more than adapters, and slots are taken in their order.
    slots = model.max_adapters + 1
    return {"enable_lora": True, "max_loras": slots, "max_cpu_loras": slots}


def _is_float32(path: str) -> bool:
    # vLLM halves such models when it may choose, which on a CPU gains nothing and costs repeatable output.
    config = Path(path) / "config.json"
    found = json.loads(config.read_bytes()) if config.is_file() else {}
    return "float32" in (found.get("dtype"), found.get("torch_dtype"))


def _backend(settings: WorkerSettings, llm: Any, kv_events: str) -> Backend:
    if settings.otlp_endpoint is not None:
        # Given an endpoint beforehand, vLLM would make a provider and an exporter of its own. Told only now, its spans
        # go to the provider that this process has.
        llm.observability_config.otlp_traces_endpoint = settings.otlp_endpoint
        llm.output_processor.tracing_enabled = True
    end_id = llm.renderer.get_eos_token_id()
    # vLLM asks for it with each request, and the tokenizer looks it up each time.
    llm.renderer.get_eos_token_id = lambda: end_id
    prompts = Prompts(llm.renderer, context_tokens=llm.model_config.max_model_len)
    parsing = _parsing(settings, llm)
    card = dataclasses.replace(
        _card(settings, llm, prompts, parsing), kv_block_tokens=_told_block_tokens(llm.vllm_config, kv_events)
    )
    return Backend(llm, card=card, prompts=prompts, parsing=parsing, new_forms_per_minute=settings.new_forms_per_minute)


def _told_block_tokens(config: Any, kv_events: str) -> int:
    events = config.kv_events_config
    told = events is not None and events.enable_kv_cache_events and events.endpoint == kv_events
    return int(config.cache_config.block_size) if told else 0


def _parsing(settings: WorkerSettings, llm: Any) -> "Parsing | None":
    if settings.model.tool_call_parser is None and settings.model.reasoning_parser is None:
        return None
    # It brings half of vLLM's HTTP server along, which other engines do without.
    from services.inference.vllm_parsing import Parsing  # noqa: PLC0415

    return Parsing(settings.model, llm)


def _card(settings: WorkerSettings, llm: Any, prompts: Prompts, parsing: "Parsing | None") -> EngineCard:
    cache = llm.vllm_config.cache_config
    can = {Capability.GENERATE, Capability.LOGPROBS}
    if prompts.has_chat_template:
        can |= {Capability.CHAT, *prompts.media_limits} | (parsing.capabilities if parsing is not None else set())
    if llm.model_config.runner_type == "pooling":
        # What it can instead is asked of the engine: see pooler().
        can = set()
    return EngineCard(
        kind="vllm",
        model=settings.model.name,
        max_context_tokens=llm.model_config.max_model_len,
        vocabulary_size=llm.model_config.get_vocab_size(),
        capabilities=frozenset(can),
        max_running=llm.vllm_config.scheduler_config.max_num_seqs,
        kv_cache_tokens=cache.kv_cache_size_tokens or (cache.num_gpu_blocks or 0) * cache.block_size,
    )


def _limits(llm: Any) -> Limits:
    configured = llm.model_config.try_get_generation_config().get("eos_token_id")
    ends = {configured} if isinstance(configured, int) else set(configured or ())
    return Limits(
        context_tokens=llm.model_config.max_model_len,
        vocabulary=llm.model_config.get_vocab_size(),
        logprobs=llm.model_config.max_logprobs,
        end_ids=frozenset(ends | {llm.renderer.get_eos_token_id()} - {None}),
        end_id=llm.renderer.get_eos_token_id(),
        counts_emitted=emitted_processor(llm.vllm_config) is not None,
        continues_draws=continues_draws(llm.vllm_config),
        placeholder_ids=placeholder_ids(llm.model_config),
    )
