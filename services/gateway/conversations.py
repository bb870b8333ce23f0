"""What the Responses API remembers: answers and what led to them, in memory or in Redis."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Final, Protocol

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.common.errors import MeshError, Reason

__all__ = ["Conversations", "MemoryShelf", "RedisShelf", "Shelf", "Turn", "connect"]

_log = logging.getLogger(__name__)
_KEEP_SECONDS: Final = 30 * 24 * 3600
_MAX_MEMORY_BYTES: Final = 256 << 20
_MAX_TURNS: Final = 1024
_REDIS_SECONDS: Final = 0.25


class Turn(msgspec.Struct, kw_only=True):
    """One answer and what led to it."""

    response: msgspec.Raw
    """The response object."""
    input: list[msgspec.Raw]
    """The items of its own input."""
    earlier: list[str] = []
    """The answers before it, oldest first."""

    @property
    def output(self) -> list[msgspec.Raw]:
        """The items of the answer."""
        return msgspec.json.decode(self.response, type=_Output).output


class _Output(msgspec.Struct):
    output: list[msgspec.Raw]


class Shelf(Protocol):
    """Where turns are kept, by name."""

    async def put(self, name: str, value: bytes) -> None:
        """Keeps a value for 30 days."""
        ...

    async def get(self, names: Sequence[str]) -> list[bytes | None]:
        """The values of these names; None for what isn't there."""
        ...

    async def delete(self, name: str) -> bool:
        """Forgets a value; False when there is none."""
        ...


class MemoryShelf:
    """Keeps values in this process, the ones used last within a bound of bytes."""

    def __init__(self, *, max_bytes: int = _MAX_MEMORY_BYTES, clock: Callable[[], float] = monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._bytes = 0
        self._values: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    async def put(self, name: str, value: bytes) -> None:
        """Keeps a value, and forgets those used longest ago where there is no room."""
        await self.delete(name)
        self._values[name] = (self._clock() + _KEEP_SECONDS, value)
        self._bytes += len(value)
        while self._bytes > self._max_bytes:
            _, (_, dropped) = self._values.popitem(last=False)
            self._bytes -= len(dropped)

    async def get(self, names: Sequence[str]) -> list[bytes | None]:
        """The values of these names."""
        return [self._get(name) for name in names]

    def _get(self, name: str) -> bytes | None:
        entry = self._values.get(name)
        if entry is None or entry[0] < self._clock():
            return None
        self._values.move_to_end(name)
        return entry[1]

    async def delete(self, name: str) -> bool:
        """Forgets a value."""
        entry = self._values.pop(name, None)
        if entry is None:
            return False
        self._bytes -= len(entry[1])
        return True


class RedisShelf:
    """Keeps values in Redis, where every gateway sees them."""

    def __init__(self, client: Redis) -> None:
        self._redis = client

    async def put(self, name: str, value: bytes) -> None:
        """Keeps a value. Raises RedisError."""
        await self._redis.set(_key(name), value, ex=_KEEP_SECONDS)

    async def get(self, names: Sequence[str]) -> list[bytes | None]:
        """The values of these names. Raises RedisError."""
        values = await self._redis.mget([_key(name) for name in names]) if names else []
        return [value if isinstance(value, bytes) else None for value in values]

    async def delete(self, name: str) -> bool:
        """Forgets a value. Raises RedisError."""
        return bool(await self._redis.delete(_key(name)))


class Conversations:
    """Answers by id, each seen by its own tenant only.

    What this gateway wrote it also remembers itself, within a bound: while the shared shelf is away, conversations that
    stay with one gateway go on.
    """

    def __init__(self, shared: Shelf | None = None) -> None:
        self._shared = shared
        self._own = MemoryShelf()

    async def save(self, tenant: str, response_id: str, turn: Turn) -> None:
        """Remembers an answer. A shared shelf that is away is logged, not raised: the answer itself is good."""
        name, value = _name(tenant, response_id), msgspec.json.encode(turn)
        await self._own.put(name, value)
        if self._shared is not None:
            try:
                await self._shared.put(name, value)
            except RedisError as error:
                _log.warning("an answer is remembered here only", extra={"cause": repr(error)})

    async def turn(self, tenant: str, response_id: str) -> Turn:
        """An answer.

        Raises:
            MeshError: NOT_FOUND, or NO_READY_WORKER while the shelf that may have it is away.
        """
        (found,) = await self._get(tenant, [response_id])
        return found

    async def history(self, tenant: str, response_id: str) -> tuple[list[str], list[msgspec.Raw]]:
        """The answers that lead up to and include one, oldest first, and all their items.

        Raises:
            MeshError: as `turn`; INVALID_REQUEST when there are more than 1024.
        """
        last = await self.turn(tenant, response_id)
        if len(last.earlier) >= _MAX_TURNS:
            message = f"previous_response_id: the conversation has {_MAX_TURNS} turns"
            raise MeshError(Reason.INVALID_REQUEST, message, field="previous_response_id")
        turns = [*await self._get(tenant, last.earlier), last]
        return [*last.earlier, response_id], [item for turn in turns for item in (*turn.input, *turn.output)]

    async def forget(self, tenant: str, response_id: str) -> None:
        """Forgets an answer.

        Raises:
            MeshError: NOT_FOUND, or NO_READY_WORKER while the shelf that may have it is away.
        """
        name = _name(tenant, response_id)
        known = await self._own.delete(name)
        if self._shared is not None:
            try:
                known |= await self._shared.delete(name)
            except RedisError as error:
                raise _away() from error
        if not known:
            raise _unknown(response_id)

    async def _get(self, tenant: str, response_ids: Sequence[str]) -> list[Turn]:
        names = [_name(tenant, response_id) for response_id in response_ids]
        values = await self._own.get(names)
        missing = [name for name, value in zip(names, values, strict=True) if value is None]
        fetched = dict(zip(missing, await self._fetch(missing), strict=True))
        turns = []
        for response_id, name, value in zip(response_ids, names, values, strict=True):
            stored = value if value is not None else fetched[name]
            if stored is None:
                raise _unknown(response_id)
            turns.append(msgspec.json.decode(stored, type=Turn))
        return turns

    async def _fetch(self, names: list[str]) -> list[bytes | None]:
        if self._shared is None or not names:
            return [None] * len(names)
        try:
            return await self._shared.get(names)
        except RedisError as error:
            raise _away() from error


def connect(url: str) -> Redis:
    """A client whose every wait is bounded. Close it with `aclose()`."""
    return Redis.from_url(
        url,
        socket_timeout=_REDIS_SECONDS,
        socket_connect_timeout=_REDIS_SECONDS,
        # There is somebody waiting, and what is missing here is said.
        retry=Retry(NoBackoff(), 0),
    )


def _name(tenant: str, response_id: str) -> str:
    return f"{len(tenant)}:{tenant}:{response_id}"


def _key(name: str) -> str:
    return f"tokenloom:response:{name}"


def _unknown(response_id: str) -> MeshError:
    return MeshError(
        Reason.NOT_FOUND, f"there is no response {response_id[:128]!r}", field="response_id", code="response_not_found"
    )


def _away() -> MeshError:
    return MeshError(Reason.NO_READY_WORKER, "what was said before can't be looked up now", retry_after_seconds=1.0)
