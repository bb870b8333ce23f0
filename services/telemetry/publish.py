"""GPU readings in Redis, for whoever doesn't speak gRPC. Redis being away costs nobody else anything."""

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.telemetry.gpu import PLAIN_FIELDS, Gpu, Sample
from services.telemetry.sampler import Sampler

__all__ = ["STREAM", "Publisher", "connect", "fields", "key"]

STREAM: Final = "tokenloom:gpu:samples"
_STREAM_LENGTH: Final = 10_000
_TIMEOUT_SECONDS: Final = 1.0
_log = logging.getLogger(__name__)


def connect(url: str) -> Redis:
    """A client that gives up after a second. Use it as an async context manager.

    Raises:
        ValueError: it is no Redis URL.
    """
    return Redis.from_url(
        url,
        socket_timeout=_TIMEOUT_SECONDS,
        socket_connect_timeout=_TIMEOUT_SECONDS,
        # The next sample is the retry.
        retry=Retry(NoBackoff(), 0),
        max_connections=1,
    )


def key(uuid: str) -> str:
    """The hash of one GPU's latest reading."""
    return f"tokenloom:gpu:{uuid}"


def fields(gpu: Gpu) -> dict[str, str]:
    """A GPU as text, under the names of the proto; what the card doesn't report is left out."""
    return dict(_fields(gpu))


def _fields(gpu: Gpu) -> Iterator[tuple[str, str]]:
    yield "uuid", gpu.uuid
    yield "index", str(gpu.index)
    yield "name", gpu.name
    yield "node", gpu.node
    yield "sample_time", f"{gpu.sample_time:.6f}"
    yield "health", gpu.health.value
    yield "health_reason", gpu.health_reason
    for name in PLAIN_FIELDS:
        value = getattr(gpu.reading, name)
        if value is not None:
            yield name, str(value).lower() if isinstance(value, bool) else str(value)
    yield "throttle_reasons", ",".join(gpu.reading.throttle_reasons)
    yield "processes", json.dumps([[each.pid, each.memory_used_bytes] for each in gpu.reading.processes])


class Publisher:
    """Writes each sample to Redis: one hash a GPU, which expires when samples stop, and one stream of all of them."""

    def __init__(self, redis: Redis, *, period_seconds: float) -> None:
        self._redis = redis
        self._expiry_ms = round(1000 * max(5.0, 5 * period_seconds))
        self._is_away = False
        self._failures = 0

    @property
    def failures(self) -> int:
        """Samples that couldn't be written."""
        return self._failures

    async def run(self, sampler: Sampler) -> None:
        """Publishes until sampling ends. Samples that come while Redis is slow are skipped."""
        async with aclosing(sampler.samples()) as samples:
            async for sample in samples:
                await self.publish(sample)

    async def publish(self, sample: Sample) -> None:
        """Writes one sample, for a second at most. Says once when Redis goes and once when it is back."""
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                await self._write(sample)
        except (RedisError, OSError) as error:
            self._failures += 1
            if not self._is_away:
                _log.warning("redis is away; GPU readings are not published", extra={"cause": _cause(error)})
            self._is_away = True
            # Half a conversation may be left in it.
            await self._redis.connection_pool.disconnect()
        else:
            if self._is_away:
                _log.info("redis is back")
            self._is_away = False

    async def _write(self, sample: Sample) -> None:
        # In one transaction, so that nobody finds the moment in which a hash is deleted: fields may have gone.
        async with self._redis.pipeline(transaction=True) as pipeline:
            for gpu in sample.gpus:
                values: dict[Any, Any] = dict(fields(gpu))  # redis types its mappings invariantly
                pipeline.delete(key(gpu.uuid))
                pipeline.hset(key(gpu.uuid), mapping=values)
                pipeline.pexpire(key(gpu.uuid), self._expiry_ms)
                pipeline.xadd(STREAM, values, maxlen=_STREAM_LENGTH, approximate=True)
            await pipeline.execute()


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
