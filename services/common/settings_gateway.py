"""The configuration of a gateway: who is let in, what requests cost, and what is kept of them."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from services.common.settings import Address, Count, Positive, ProcessSettings
from services.common.settings_guardrails import GuardrailSettings

__all__ = [
    "BatchSettings",
    "GatewaySettings",
    "GrantSettings",
    "JwtSettings",
    "LedgerSettings",
]


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
    router_sessions: list[Address] = msgspec.field(default_factory=list)
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
