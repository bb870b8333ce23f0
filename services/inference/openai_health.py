"""Whether a server with OpenAI's API is there and well, what model it has, and how busy it says that it is."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.common.settings_worker import WorkerSettings
from services.inference.engine import Capability, EngineCard
from services.inference.openai_flavours import Flavour
from services.inference.openai_tokens import decoded
from services.inference.openai_upstream import KEY_REFUSED, Upstream

__all__ = ["Health", "Seen"]

_log = logging.getLogger(__name__)
_STARTING: Final = "the server behind this worker does not answer yet"
_AWAY: Final = "the server behind this worker does not answer"
_LONGEST_PROBE_SECONDS: Final = 5.0
# One answer that is late says little; so many in a row say that nothing comes.
_MOST_LATE: Final = 2
_VLLM: Final = "vllm:"
# What the engine itself tells with every step, and what is read of it.
_OF_ENGINE: Final = tuple(
    _VLLM + name
    for name in (
        "num_requests_running", "num_requests_waiting{", "kv_cache_usage_perc", "prefix_cache_queries_total",
        "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total", "iteration_tokens_total_count",
    )
)  # fmt: skip  # a table


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a server says of itself."""

    kv_usage: float = 0.0
    others: int = 0
    """Requests that are not this worker's."""
    prefix_queries: int = 0
    prefix_hits: int = 0


class _ModelMeta(msgspec.Struct):
    n_ctx: int | None = None
    n_vocab: int = 0


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    """As vLLM and others tell it."""
    meta: _ModelMeta | None = None
    """What llama.cpp's server tells."""

    @property
    def context(self) -> int | None:
        """Longest sequence, in tokens."""
        return self.max_model_len or (self.meta.n_ctx if self.meta is not None else None)


class _Models(msgspec.Struct):
    data: list[_Model]


class _Vector(msgspec.Struct):
    embedding: list[float]


class _Vectors(msgspec.Struct):
    data: list[_Vector]


class Health:
    """Asks a server whether it is there, and takes note when it isn't."""

    def __init__(
        self,
        upstream: Upstream,
        flavour: Flavour,
        settings: WorkerSettings,
        *,
        lose_silent: Callable[[float], None],
    ) -> None:
        """`lose_silent` fails what has heard nothing since a time of the monotonic clock."""
        assert settings.upstream is not None
        self._upstream = upstream
        self._flavour = flavour
        self._settings = settings.upstream
        self._name = settings.model.name
        self._model = settings.upstream.model or settings.model.name
        self._lose_silent = lose_silent
        self._soon = asyncio.Event()
        self._engine_path = flavour.engine
        self.own: Callable[[], int] = int
        """How many requests the worker has there."""
        self.seen = Seen()
        self._values: Mapping[str, float] = {}
        self.away = _STARTING
        """Why its front is not to be used; empty: it is."""
        self.stalled = ""
        """Why its engine is not, whatever the front says; empty: it is."""
        self.progress = 0
        """Goes up whenever what its metrics say of its engine has changed."""
        self.starts = 0
        """How often the server was found well after it was not."""

    @property
    def trouble(self) -> str:
        """Why the worker takes nothing; empty: it does."""
        return self.away or self.stalled

    async def start(self) -> EngineCard:
        """Waits until the server is there and works.

        Raises:
            ConfigError: it refuses the key, has not the model, or does not say what must be known of it.
        """
        told = ""
        while True:
            try:
                card = await self._card()
                await self._canary()
            except MeshError as error:
                self._check_bearable(error)
                if error.message != told:
                    told = error.message
                    _log.warning("waiting for the server", extra={"url": self._settings.url, "cause": told})
                await asyncio.sleep(self._settings.probe_seconds)
                continue
            self._well()
            return card

    def check_soon(self) -> None:
        """Something broke off: asks now rather than when it is time."""
        self._soon.set()

    async def watch(self) -> None:
        """Asks its front for as long as it runs."""
        failures, well_at, ill_at, begun = 0, time.monotonic(), 0.0, time.monotonic()
        while True:
            # One that is late has had its time.
            await self._wait(until=begun + self._settings.probe_seconds)
            begun = time.monotonic()
            try:
                await self._probe()
                if self.away:
                    await self._canary()
            except MeshError as error:
                failures += 1
                ill_at = begun if failures == 1 else ill_at
                gone = error.reason is Reason.NO_READY_WORKER
                if gone or failures >= _MOST_LATE:
                    # A server that is leaving takes nothing, but may still bring what it has.
                    self._ill(error, ill_at if failures >= _MOST_LATE else well_at)
                continue
            failures, well_at = 0, begun
            if self.away:
                self._well()

    async def _wait(self, *, until: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                await self._soon.wait()
        except TimeoutError:
            return
        self._soon.clear()

    def _ill(self, error: MeshError, silent_since: float) -> None:
        if not self.away:
            _log.error("the server is away", extra={"url": self._settings.url, "cause": error.message})
        self.away, self.seen = _AWAY, Seen()
        self._lose_silent(silent_since)

    def _well(self) -> None:
        self.starts += 1
        # What it has just done, its engine did.
        self.away = self.stalled = ""
        _log.info("the server is well", extra={"url": self._settings.url, "model": self._model})

    def _check_bearable(self, error: MeshError) -> None:
        if error.message == KEY_REFUSED:
            raise ConfigError("upstream.api_key_variable: the server refuses the key") from error

    async def _probe(self) -> None:
        seconds = min(_LONGEST_PROBE_SECONDS, max(1.0, 2 * self._settings.probe_seconds))
        if not self._flavour.health:
            await self._upstream.get("/models", seconds=seconds)
            return
        await self._upstream.get(self._flavour.health, seconds=seconds, at_root=True)
        if self._flavour.metrics:
            metrics = await self._upstream.get(self._flavour.metrics, seconds=seconds, at_root=True)
            values = _values(metrics, self._model)
            self.progress += values != self._values
            self._values, self.seen = values, _seen(values, self.own())

    def stall(self, reason: str) -> None:
        """Its engine is known not to work: what waits for it fails."""
        if not self.trouble:
            _log.error("the server's engine is stalled", extra={"url": self._settings.url})
        self.stalled = reason
        self._lose_silent(time.monotonic())

    def answered(self) -> None:
        """Its engine has answered."""
        if self.stalled and not self.away:
            self._well()

    async def ask_engine(self) -> None:
        """Returns when its engine has done a little, or has told something of itself. Raises MeshError: it did not."""
        if self._engine_path:
            seconds = self._settings.timeout_seconds
            try:
                await self._upstream.get(self._engine_path, seconds=seconds, at_root=True)
            except MeshError as error:
                if error.reason is not Reason.UNIMPLEMENTED:
                    raise
                # It was started so that it doesn't tell.
                self._engine_path = ""
            else:
                return
        await self._canary()

    async def _canary(self) -> None:
        """Has the server do a little work. Raises MeshError: it does not."""
        capabilities = self._flavour.capabilities
        if Capability.EMBED in capabilities:
            await self._embed()
            return
        body: dict[str, Any] = {"model": self._model, "max_tokens": 1}
        try:
            if Capability.GENERATE in capabilities:
                await self._upstream.post("/completions", {**body, "prompt": "1"})
            else:
                await self._upstream.post("/chat/completions", {**body, "messages": [{"role": "user", "content": "1"}]})
        except MeshError as error:
            if error.reason in (Reason.MODEL_NOT_FOUND, Reason.UNIMPLEMENTED, Reason.INVALID_REQUEST):
                raise MeshError(Reason.ENGINE_FAILED, f"its canary is refused: {error.message}") from error
            raise

    async def _embed(self) -> int:
        answer = await self._upstream.post("/embeddings", {"model": self._model, "input": "1"})
        vectors = decoded(answer, _Vectors).data
        if not vectors or not vectors[0].embedding:
            raise MeshError(Reason.ENGINE_FAILED, "the server behind this worker embeds nothing")
        return len(vectors[0].embedding)

    async def _card(self) -> EngineCard:
        answer = await self._upstream.get("/models", seconds=_LONGEST_PROBE_SECONDS)
        models = decoded(answer, _Models).data
        model = next((model for model in models if model.id == self._model), None)
        if model is None:
            has = ", ".join(repr(model.id) for model in models[:16])
            raise ConfigError(f"upstream.model: the server has no model {self._model!r}, it has {has or 'none'}")
        context = self._settings.max_context_tokens or model.context
        if context is None:
            raise ConfigError(
                "upstream.max_context_tokens: missing, and the server does not say how long its context is"
            )
        capabilities = frozenset(self._flavour.capabilities)
        return EngineCard(
            kind="openai",
            model=self._name,
            max_context_tokens=min(context, model.context or context),
            vocabulary_size=model.meta.n_vocab if model.meta is not None else 0,
            capabilities=capabilities,
            max_running=self._settings.max_running,
            kv_cache_tokens=0,
            embedding_dimensions=await self._embed() if Capability.EMBED in capabilities else 0,
        )


def _seen(values: Mapping[str, float], own: int) -> Seen:
    """What metrics with vLLM's names say of requests."""
    there = values.get("num_requests_running", 0.0) + values.get("num_requests_waiting", 0.0)
    return Seen(
        kv_usage=min(1.0, max(0.0, values.get("kv_cache_usage_perc", 0.0))),
        others=max(0, int(there) - own),
        prefix_queries=int(values.get("prefix_cache_queries_total", 0.0)),
        prefix_hits=int(values.get("prefix_cache_hits_total", 0.0)),
    )


def _values(text: bytes, model: str) -> Mapping[str, float]:
    """Of the metrics that come out of vLLM's engine, by their names; none where they are others."""
    values: dict[str, float] = {}
    try:
        # The parser is slow, and most of the text is of no interest.
        told = (line for line in text.decode().splitlines() if line.startswith(_OF_ENGINE))
        lines = [line for line in told if f'model_name="{model}"' in line]
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                name = sample.name.removeprefix(_VLLM)
                values[name] = values.get(name, 0.0) + sample.value
    except ValueError:
        return {}
    return values
