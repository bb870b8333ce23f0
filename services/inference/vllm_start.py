"""How vLLM is started: the arguments that it gets, and what is read of it once it runs.

To be imported once the environment is prepared.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import vllm.platforms
from vllm.config.kv_events import KVEventsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import disable_envs_cache, enable_envs_cache
from vllm.v1.engine import utils as engine_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import MPClient

from services.common.config import ConfigError
from services.common.cpu_cache import CPU_BLOCK_TOKENS, cpu_cache_bytes, free_memory
from services.common.engine_args import check_engine_args
from services.common.kv_cache import DTYPE_BYTES, KvCache, kv_cache
from services.common.settings_worker import WorkerSettings
from services.inference.engine import Capability, EngineCard
from services.inference.vllm_arguments import vllm_arguments
from services.inference.vllm_backend import SHUTDOWN_SECONDS, Backend
from services.inference.vllm_emitted import emitted_processor
from services.inference.vllm_environment import has_cuda
from services.inference.vllm_form_params import form_settings
from services.inference.vllm_media import placeholder_ids
from services.inference.vllm_nursery import Nursery
from services.inference.vllm_params import Limits
from services.inference.vllm_prompts import Prompts
from services.inference.vllm_seeded import continues_draws

if TYPE_CHECKING:
    from services.inference.vllm_parsing import Parsing

__all__ = ["start_backend"]

_log = logging.getLogger(__name__)

_MAX_RUNNING: Final = 64
# Different adapters in one batch, each of which takes room on the card.
_LORA_SLOTS: Final = 4


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
    context = config.model_config.max_model_len
    with nursery.lent_to(engine_utils):
        try:
            llm = AsyncLLM.from_vllm_config(config, stat_loggers=[lambda _config, _index=0: stats])
        except BaseException as error:
            _close_context(error)
            raise
    try:
        backend = _backend(settings, llm, kv_events)
    except BaseException:
        llm.shutdown(timeout=SHUTDOWN_SECONDS)
        raise
    if (fits := llm.model_config.max_model_len) < context:
        said = "the KV cache holds less than the model's context: engine_args.kv_cache_memory_bytes is its size"
        _log.warning(said, extra={"context_tokens": context, "max_model_len": fits})
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
    if not vllm.platforms.current_platform.device_type:
        # Where its own build finds nothing to run on it is of no platform, and says so much later, in no words of use.
        raise ConfigError(
            'engine: "vllm" is installed for GPUs, and finds none here; does nvidia-smi, and may this container use '
            "them? Without a GPU, install locks/cpu.lock"
        )
    # The defaults have those of its settings in them that forms allow.
    given = {key: value for key, value in settings.engine_args.items() if key != "structured_outputs_config"}
    arguments = _defaults(settings, path, cuda=cuda) | vllm_arguments(given)
    try:
        config = AsyncEngineArgs(model=path, **arguments).create_engine_config()
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(
            f"vLLM refuses model.path {path!r} with engine_args {settings.engine_args}: {error}"
        ) from error
    if not cuda:
        _size_cpu_cache(config, given)
    return config


def _size_cpu_cache(config: Any, given: Mapping[str, Any]) -> None:
    model, cache = config.model_config, config.cache_config
    dtype_bytes = DTYPE_BYTES.get(cache.cache_dtype, float(model.dtype.itemsize))
    parallel = config.parallel_config
    try:
        each = kv_cache(
            model.hf_text_config.to_dict(),
            dtype_bytes=dtype_bytes,
            tensor_parallel=parallel.tensor_parallel_size,
            pipeline_parallel=parallel.pipeline_parallel_size,
        )
    except ConfigError:
        # A model of another build, or one that keeps no tokens.
        each = KvCache(full_bytes=0, sliding_bytes=0, window=0, kind="unknown")
    cache.kv_cache_memory_bytes = cpu_cache_bytes(each, model.max_model_len, free_bytes=free_memory(), arguments=given)
    if given.get("max_model_len") is None:
        # Then vLLM takes as much of the model's context as fits.
        model.original_max_model_len = -1


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
        "block_size": CPU_BLOCK_TOKENS,
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
    return Backend(
        llm,
        card=card,
        limits=_limits(llm),
        prompts=prompts,
        parsing=parsing,
        new_forms_per_minute=settings.new_forms_per_minute,
    )


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
