"""The configuration of a worker: its model, and what does the work of its engine."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from services.common.object_store import check_url, is_in_store
from services.common.settings import Address, Count, Name, Positive, ProcessSettings

__all__ = [
    "AdapterSettings",
    "ModelSettings",
    "SimSettings",
    "UpstreamSettings",
    "WatchdogSettings",
    "WorkerSettings",
]


class AdapterSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One LoRA adapter, which is served under a name of its own."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,254}$")]
    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    """Its folder; a relative one is inside adapters_dir."""


class ModelSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One model, as mesh.yaml lists it."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    """What requests call it."""
    path: str | None = None
    """A folder, a Hugging Face id, or s3://BUCKET/PATH; null only for the simulated engine."""
    tool_call_parser: str | None = None
    """vLLM's parser of the function calls that the model writes, for example "hermes"; null refuses tools."""
    reasoning_parser: str | None = None
    """vLLM's parser that tells the model's thinking from its answer, for example "deepseek_r1"; null: all is answer."""
    adapters_dir: str | None = None
    """The only folder to take LoRA adapters from, at the start or while it runs; null serves none."""
    adapters: list[AdapterSettings] = []
    """Adapters to serve from the start."""
    adapter_bases: list[str] = []
    """Other names of this model, as adapters may have them in base_model_name_or_path."""
    max_adapters: Annotated[int, Meta(ge=1, le=1024)] = 16
    """Adapters that can be loaded at the same time."""

    def __post_init__(self) -> None:
        """Checks what one key says about another one."""
        if self.path is not None and is_in_store(self.path):
            check_url(self.path, "path")
        names = [adapter.name for adapter in self.adapters]
        if self.adapters and self.adapters_dir is None:
            raise ValueError("adapters: need adapters_dir, the folder that they are in")
        if len(names) > self.max_adapters:
            raise ValueError(f"adapters: at most max_adapters, which is {self.max_adapters}, got {len(names)}")
        for name in names:
            if names.count(name) > 1 or name == self.name:
                raise ValueError(f"adapters: the name {name!r} is taken already")


class SimSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How fast and how large a simulated engine is."""

    runner: Literal["generate", "pooling"] = "generate"
    """What it does, as with vLLM: one engine generates text, or it embeds and scores."""
    embedding_dimensions: Annotated[int, Meta(ge=1, le=4096)] = 64
    """Components of the embeddings of a runner that pools."""
    prefill_tokens_per_second: Positive = 20_000.0
    decode_step_ms: Positive = 10.0
    """A decode step with one sequence."""
    decode_step_ms_per_sequence: Annotated[float, Meta(ge=0)] = 0.05
    """What each further sequence adds."""
    max_num_seqs: Count = 64
    kv_blocks: Count = 4096
    block_size: Count = 16
    max_model_len: Count = 8192
    poison_text: Annotated[str, Meta(max_length=256)] = ""
    """A prompt with this text in it kills the engine once it is computed; empty: none does."""
    restart_seconds: Annotated[float, Meta(ge=0)] = 1.0
    """How long a dead engine takes to be there again."""


class WatchdogSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """When an engine that makes no progress is given up."""

    probe_seconds: Annotated[float, Meta(ge=0.05, le=10)] = 0.25
    """How often an engine that makes no steps is asked whether it is there."""
    silence_seconds: Annotated[float, Meta(ge=0.5, le=600)] = 1.5
    """How much longer than its longest step it may stay silent while it computes nothing."""
    busy_seconds: Annotated[float, Meta(ge=0.5, le=3600)] = 20.0
    """How long it may stay silent while it computes."""
    restart_seconds: Annotated[float, Meta(ge=0.5, le=3600)] = 30.0
    """How long it may stay silent until it is killed and started again."""


class UpstreamSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A server with OpenAI's API that does the work of an engine."""

    url: Annotated[str, Meta(min_length=1, max_length=2048)]
    """Its base URL as clients of the API have it, for example http://10.0.0.7:8000/v1."""
    model: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    """The model's name there; null: the same as here."""
    api_key_variable: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    """The environment variable that has the server's key; null sends none."""
    flavour: Literal["openai", "vllm", "llama_cpp", "llama_cpp_python"] = "openai"
    """What it takes beyond OpenAI's API: nothing, or what the servers of vLLM, llama.cpp or llama-cpp-python take."""
    parameters: list[
        Literal[
            "top_k", "min_p", "repetition_penalty", "repeat_penalty", "min_tokens", "ignore_eos", "stop_token_ids",
            "bad_words", "allowed_token_ids", "chat_template_kwargs",
        ]
    ] = []  # fmt: skip  # a table
    """Further parameters that it takes, by their names there; what it is not known to take is refused."""
    capabilities: (
        list[
            Literal[
                "generate", "chat", "embed", "tools", "reasoning", "structured_output", "images", "audio", "logprobs"
            ]
        ]
        | None
    ) = None
    """What the model can do there; null: generate and chat, and, of vLLM and llama.cpp, log-probabilities and
    structured output."""
    max_context_tokens: Annotated[int, Meta(ge=2)] | None = None
    """Longest sequence that the model takes there; null: as the server says, where it does."""
    max_running: Annotated[int, Meta(ge=1, le=65_536)] = 32
    """Requests that it works on at the same time; more wait, as far as max_queued of the worker allows."""
    connect_seconds: Positive = 5.0
    """Longest that it may take to take a connection."""
    timeout_seconds: Positive = 120.0
    """Longest that it may stay silent with a request."""
    probe_seconds: Annotated[float, Meta(ge=0.05, le=60)] = 0.5
    """How often it is asked whether it is there. Two answers in a row that take longer than a second, or than twice as
    long as this, say that it is not."""
    canary_seconds: Annotated[float, Meta(ge=0.25)] | None = None
    """How often its engine is asked whether it works, by a token that it generates or at less cost where it can tell,
    while nothing else shows it. null: every 0.75 s; of the flavour "openai", which may cost money, only while it brings
    nothing of what it has to do, every second."""

    def __post_init__(self) -> None:
        """Raises ValueError: the URL is none that can be asked."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url: expected http://HOST:PORT/v1 or https://HOST/v1")
        if parts.query or parts.fragment or parts.username is not None or parts.password is not None:
            raise ValueError("url: has no user, query or fragment; a key comes from api_key_variable")


class WorkerSettings(ProcessSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """services.inference"""

    advertise: Address
    """Where gateways and the edge reach it: `ip:port`, never a name, since the edge takes it as it is."""
    routers: list[Address]
    """Every router replica; the worker registers with all of them."""
    pool: Name = "default"
    model: ModelSettings
    engine: Literal["vllm", "sim", "openai"]
    gpu: int | str | None = None
    """CUDA device by index or UUID (`GPU-…`, `MIG-…`), several with commas between; null on a CPU, or where
    CUDA_VISIBLE_DEVICES is set already."""
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=0.98)] = 0.8
    """Share of the card's memory that vLLM may take."""
    engine_args: dict[str, Any] = msgspec.field(default_factory=dict)
    """Further arguments of vLLM's AsyncEngineArgs, by their Python names."""
    sim: SimSettings = SimSettings()
    upstream: UpstreamSettings | None = None
    """The server that does the work; for the engine "openai" alone."""
    watchdog: WatchdogSettings = WatchdogSettings()
    model_cache: Annotated[str, Meta(min_length=1)] = "~/.cache/tokenloom/models"
    """The folder that a model which is in S3 is fetched into; workers of a machine share it."""
    start_seconds: Positive = 1800.0
    """Longest that the engine's first start may take; a later one, five times what the first one took."""
    max_queued: Annotated[int, Meta(ge=0)] = 64
    """Requests that may wait inside the engine beyond those that run; the next one is refused with NO_CAPACITY."""
    drain_seconds: Annotated[float, Meta(ge=0)] = 30.0
    """How long running generations may go on after SIGTERM."""
    client_timeout_seconds: Positive = 30.0
    """How long a client of the typed API may take nothing of its answer before its generation is stopped."""
    report_seconds: Annotated[float, Meta(gt=0, le=0.25)] = 0.1
    """Longest between two load reports while anything runs; while nothing does, 0.2 s."""
    isolate_tenants: bool = True
    """Whether what one tenant's prompts leave in the engine's cache serves that tenant alone."""
    new_forms_per_minute: Count = 120
    """Forms of outputs that one tenant may bring along that were not compiled before; the next one is refused."""
