"""The configuration of each process, as `python -m services.NAME --config FILE` reads it and the launcher writes it."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
import regex
from msgspec import Meta

from services.common.policy import Policy

__all__ = [
    "AdapterSettings",
    "Address",
    "BatchSettings",
    "FilterSettings",
    "GatewaySettings",
    "GrantSettings",
    "GuardSettings",
    "GuardrailSettings",
    "JwtSettings",
    "LedgerSettings",
    "MetricsPushSettings",
    "ModelSettings",
    "ModerationFilter",
    "PatternsFilter",
    "PersonalDataFilter",
    "ProcessSettings",
    "RouterSettings",
    "SimSettings",
    "SizeFilter",
    "TelemetrySettings",
    "TracingSettings",
    "UpstreamSettings",
    "WatchdogSettings",
    "WorkerSettings",
]

Address = Annotated[str, Meta(pattern=r"^.+:\d{1,5}$", description="host:port; port 0 takes any free one")]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


class TracingSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Which traces are kept, where spans go anywhere."""

    sample_ratio: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Share of the requests whose trace is kept whatever comes of them, unless a client has decided it already."""
    slow_seconds: Positive = 10.0
    """Of the others, each process keeps its part of those that failed, moved to another worker, or took so long."""


class MetricsPushSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Where metrics are pushed beside being served, and how often."""

    endpoint: Address
    """A backend that takes metrics over OTLP gRPC."""
    seconds: Annotated[float, Meta(ge=0.5, le=3600)] = 15.0
    """Between two pushes."""


class ProcessSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What every process has."""

    name: Name
    """The process's name, for example "worker-0"; a worker is known to the router by it."""
    listen: Address
    """Where it serves gRPC."""
    metrics: Address
    """Where it serves Prometheus metrics over HTTP."""
    otlp_endpoint: Address | None = None
    """Where spans go, over OTLP gRPC; null exports none."""
    tracing: TracingSettings = TracingSettings()
    """Which ones."""
    metrics_push: MetricsPushSettings | None = None
    """Where metrics go, over OTLP gRPC; null: they wait for scrapes only."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class TelemetrySettings(ProcessSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """services.telemetry"""

    node: str = ""
    """The name of this machine in readings; empty: its host name."""
    sample_seconds: Annotated[float, Meta(ge=0.1, le=60)] = 1.0
    own_gpus: bool = True
    """Whether this machine's GPUs are sampled; a hub on a machine without any needs not."""
    agents: list[Address] = []
    """Agents of other machines, whose GPUs are joined to this one's own: then this is the hub to watch."""
    redis_url: str | None = None
    """Where this machine's readings are published besides gRPC and Prometheus, for example redis://127.0.0.1:6379/0."""


class RouterSettings(ProcessSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """services.router"""

    picker: Address | None = None
    """Where it serves the endpoint picker for our own edge, and sessions of gateways, over a leaner server than that of
    `listen`, which serves both for anybody else; null does without."""
    picker_fallbacks: Annotated[int, Meta(ge=0, le=8)] = 0
    """How many further endpoints other gateways are named after the one picked, for those that can try one after the
    other (Envoy's override_host policy). An ORIGINAL_DST cluster takes none."""
    telemetry: list[Address] = []
    """Telemetry agents whose GPU readings are joined to the workers."""
    isolate_tenants: bool = True
    """Whether workers keep what tenants' prompts leave in caches apart."""
    max_waiting: Annotated[int, Meta(ge=0, le=1_000_000)] = 1024
    """Requests that may wait for a worker; the next one is refused with NO_CAPACITY."""
    max_wait_seconds: Positive = 60.0
    """Longest that a request waits before it is refused."""
    ready_grace_seconds: Annotated[float, Meta(ge=0)] = 5.0
    """How long a request waits for a worker to register when there is none at all."""
    routing: Policy = Policy()
    """The policy in force at the start, unless `policy_path` has one."""
    policy_path: str | None = None
    """The file that keeps the policy: read at the start and whenever it changes, written when an operator sets another
    one; null: what is set lasts as long as the process."""
    pools: list[Name] | None = None
    """The pools that a policy may name; null: any."""
    models: list[str] | None = None
    """The models that a policy may name, beside those that workers serve; null: any."""
    expected_workers: Annotated[int, Meta(ge=0)] = 0
    """Workers that there are when all is well; 0: as many as were seen lately."""


class AdapterSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One LoRA adapter, which is served under a name of its own."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,254}$")]
    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    """Its folder; a relative one is inside adapters_dir."""


class ModelSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One model, as mesh.yaml lists it."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    path: str | None = None
    """A folder or a Hugging Face id; null only for the simulated engine."""
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
    engine_args: dict[str, Any] = {}
    """Further arguments of vLLM's AsyncEngineArgs, by their Python names."""
    sim: SimSettings = SimSettings()
    upstream: UpstreamSettings | None = None
    """The server that does the work; for the engine "openai" alone."""
    watchdog: WatchdogSettings = WatchdogSettings()
    start_seconds: Positive = 1800.0
    """Longest that the engine's first start may take; a later one, five times what the first one took."""
    max_queued: Annotated[int, Meta(ge=0)] = 64
    """Requests that may wait inside the engine beyond those that run; the next one is refused with NO_CAPACITY."""
    drain_seconds: Annotated[float, Meta(ge=0)] = 30.0
    """How long running generations may go on after SIGTERM."""
    client_timeout_seconds: Positive = 30.0
    """How long a client of the typed API may take nothing of its answer before its generation is stopped."""
    report_seconds: Annotated[float, Meta(gt=0, le=0.25)] = 0.1
    """Longest between two load reports."""
    isolate_tenants: bool = True
    """Whether what one tenant's prompts leave in the engine's cache serves that tenant alone."""
    new_forms_per_minute: Count = 120
    """Forms of outputs that one tenant may bring along that were not compiled before; the next one is refused."""


class GrantSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What the bearer of a token may do; as for keys, what is left out has no bound."""

    models: list[str] | None = None
    endpoints: list[str] | None = None
    priority: int = 0
    allow_degrade: bool = False
    debug: bool = False
    admin: bool = False
    rpm: Count | None = None
    tpm: Count | None = None
    concurrency: Count | None = None
    budget: Positive | None = None


class JwtSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Which tokens of an identity provider are taken, and what their bearers may do."""

    jwks: Annotated[str, Meta(min_length=1)]
    """The provider's keys: a file, or an http(s) URL."""
    issuer: Annotated[str, Meta(min_length=1)]
    audience: Annotated[str, Meta(min_length=1)]
    algorithms: tuple[
        Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"], ...
    ] = ("RS256", "ES256", "EdDSA")
    """Signatures that are taken; none with a shared secret."""
    leeway_seconds: Annotated[float, Meta(ge=0, le=300)] = 30.0
    """How far clocks may differ."""
    refresh_seconds: Annotated[float, Meta(ge=1)] = 300.0
    """How often the keys are read again; one that is not known yet is looked for at once."""
    tenant_claim: str = "sub"
    role_claim: str = "roles"
    """A list, or names with spaces between them, as `scope` has."""
    roles: dict[str, GrantSettings] = {}
    """What a role may do; of several, the first one that is listed here counts."""
    default: GrantSettings | None = None
    """What a bearer without any of these roles may do; null: nothing."""


class LedgerSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What requests cost, and how long that is known."""

    gpu_hour_prices: dict[str, Annotated[float, Meta(ge=0)]] = {}
    """What an hour of a worker's GPUs costs, by the worker's name."""
    default_gpu_hour_price: Annotated[float, Meta(ge=0)] = 0.0
    """The same of workers that are not listed."""
    retention_days: Annotated[int, Meta(ge=1)] | None = None
    """Usage older than this is deleted; null keeps it."""


class PatternsFilter(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag="patterns", tag_field="kind"
):
    """Regular expressions: a text that one of them matches is refused, or what it matches is masked."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    """What a refusal calls it."""
    patterns: dict[str, str] | list[str]
    """By the label that stands in their place, or without: then it is the filter's name."""
    action: Literal["refuse", "mask"] = "refuse"

    def __post_init__(self) -> None:
        """Raises ValueError: one is no regular expression, or matches the empty text."""
        for pattern in self.patterns.values() if isinstance(self.patterns, dict) else self.patterns:
            try:
                matches_nothing = regex.compile(pattern).match("")
            except regex.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
            if matches_nothing is not None:
                raise ValueError(f"{pattern!r} matches the empty text")


class PersonalDataFilter(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag="personal_data", tag_field="kind"
):
    """Personal data that can be told by its form and check digits."""

    entities: list[Literal["EMAIL_ADDRESS", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS", "US_SSN", "PHONE_NUMBER"]] = (
        msgspec.field(
            default_factory=lambda: [
                "EMAIL_ADDRESS",
                "CREDIT_CARD",
                "IBAN_CODE",
                "IP_ADDRESS",
                "US_SSN",
                "PHONE_NUMBER",
            ]
        )
    )
    phone_region: Annotated[str, Meta(min_length=2, max_length=2)] | None = None
    """The country, such as DE, whose phone numbers are known without a country code; null: none."""
    action: Literal["refuse", "mask"] = "mask"


class SizeFilter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag="size", tag_field="kind"):
    """A bound on the whole prompt."""

    max_characters: Annotated[int, Meta(ge=1)]


class ModerationFilter(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag="moderation", tag_field="kind"
):
    """A service that answers as OpenAI's POST /v1/moderations does. Answers are held back until it was asked."""

    url: str
    model: str | None = None
    api_key_variable: str | None = None
    """The environment variable that has the service's key."""
    timeout_seconds: Positive = 2.0
    when_away: Literal["refuse", "pass"] = "refuse"


FilterSettings = PatternsFilter | PersonalDataFilter | SizeFilter | ModerationFilter


class GuardSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What prompts and answers go through."""

    input: list[FilterSettings] = []
    output: list[FilterSettings] = []
    log_content: bool = False
    """Write prompts and answers to the log. Nothing else ever does."""


class GuardrailSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Filters by tenant; one that is listed has its own only."""

    default: GuardSettings = GuardSettings()
    tenants: dict[str, GuardSettings] = {}


class BatchSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Files, and the batches of requests that are made of them."""

    concurrency: Annotated[int, Meta(ge=0, le=1024)] = 8
    """Requests of a batch that a gateway makes at the same time; 0: this gateway works on none."""
    max_file_bytes: Count = 100 << 20
    max_tenant_bytes: Count = 1 << 30
    """What all files of one tenant may hold."""


class GatewaySettings(ProcessSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """services.gateway. `http` serves the OpenAI API and the edge's checks of keys, `listen` these checks over gRPC."""

    http: Address
    routers: list[Address]
    """Every router replica; the first one that answers is used."""
    router_sessions: list[Address] = []
    """Where each of them takes sessions over its leaner server, which is its `picker`; empty: all do at `routers`."""
    database: str
    """Where keys, usage and audit are: a SQLite file, made when it is not there, or `postgresql://…`."""
    journal: str | None = None
    """The folder in which usage waits for the database, on a disk that outlives this process, and of this process
    alone; null: beside the SQLite file, or `journal-NAME` where the process runs."""
    redis_url: str | None = None
    """Where replicas share limits, for example redis://127.0.0.1:6379/0; null: each gives away its part of them."""
    replicas: Count = 1
    """How many gateways there are, this one among them."""
    jwt: JwtSettings | None = None
    """Tokens of an identity provider that are taken beside keys; null: none."""
    ledger: LedgerSettings = LedgerSettings()
    fleet_memory_seconds: Annotated[float, Meta(ge=0)] = 60.0
    """How long requests are placed among the workers that were ready last while no router answers."""
    batches: BatchSettings = BatchSettings()
    guardrails: GuardrailSettings = GuardrailSettings()
    max_body_bytes: Count = 4 << 20
    request_timeout_seconds: Positive = 600.0
    """Longest that one request may take, queueing included."""
    drain_seconds: Annotated[float, Meta(ge=0)] = 30.0
    """How long running streams may go on after SIGTERM."""
    client_timeout_seconds: Positive = 30.0
    """How long a client may send nothing of its request, or take nothing of its answer, before it is given up."""

    def __post_init__(self) -> None:
        """Raises ValueError: the routers and where they take sessions do not match."""
        if self.router_sessions and len(self.router_sessions) != len(self.routers):
            raise ValueError(f"router_sessions: expected one for each of the {len(self.routers)} routers")
