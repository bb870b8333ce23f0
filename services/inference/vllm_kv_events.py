"""What vLLM publishes of its prefix cache, in the names that the whole mesh has for blocks."""

import asyncio
import logging
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from services.common.prefix import chained, root, salt_of
from services.inference.cache_journal import CacheJournal

__all__ = ["BlockNames", "KvEvents"]

_log = logging.getLogger(__name__)
_UNKNOWN_SEQUENCE: Final = -1


class KvEvents:
    """Listens to what an engine publishes, for as long as the block; the engine may be another one in between."""

    def __init__(self, model: str, journal: CacheJournal) -> None:
        """`model` is the name that requests use."""
        self._names = BlockNames(model, journal)
        self._journal = journal
        self._sequence = _UNKNOWN_SEQUENCE

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenloom-"))
            self.endpoint = f"ipc://{Path(folder) / 'kv-events'}"
            """Where the engine is to publish."""
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            listening = tasks.create_task(self._listen(), name="vllm kv events")
            stack.callback(listening.cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(None, None, None)

    def forget(self) -> None:
        """The engine is gone, and its cache with it."""
        self._sequence = _UNKNOWN_SEQUENCE
        self._names.clear()

    async def _listen(self) -> None:
        import zmq  # noqa: PLC0415  # both come with vLLM
        import zmq.asyncio  # noqa: PLC0415

        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as subscription:  # type: ignore[attr-defined]
            subscription.linger = 0
            subscription.subscribe(b"")
            subscription.connect(self.endpoint)
            while True:
                _, sequence, payload = await subscription.recv_multipart()
                self._take(int.from_bytes(sequence, "big"), msgspec.msgpack.decode(payload)[1])

    def _take(self, sequence: int, events: list[dict[str, Any]]) -> None:
        if sequence != self._sequence + 1:
            # What was missed could be anything, so nothing is known of the cache any more.
            _log.info("events of the prefix cache were missed", extra={"from": self._sequence, "to": sequence})
            self._names.clear()
        self._sequence = sequence
        for event in events:
            match event["type"]:
                case "BlockStored":
                    self._names.stored(event)
                case "BlockRemoved":
                    self._names.removed(event["block_hashes"])
                case "AllBlocksCleared":
                    self._names.clear()


class BlockNames:
    """The mesh's names of the blocks that vLLM has, by vLLM's own."""

    def __init__(self, model: str, journal: CacheJournal) -> None:
        self._model = model
        self._journal = journal
        self._ours: dict[Any, bytes] = {}

    def stored(self, event: Mapping[str, Any]) -> None:
        """Takes in vLLM's BlockStored. Blocks of more than text, and what follows them, are left out."""
        if event.get("group_idx"):
            # A further group of layers caches the same tokens again.
            return
        parent, size = self._parent(event), event["block_size"]
        for index, theirs in enumerate(event["block_hashes"]):
            if parent is None or (index and _salt(event, index) is not None):
                return
            tokens = event["token_ids"][index * size : (index + 1) * size]
            parent = chained(parent, array("I", tokens).tobytes())
            self._ours[theirs] = parent
            self._journal.store(int.from_bytes(parent, "little"))

    def removed(self, blocks: Sequence[Any]) -> None:
        """Takes in vLLM's BlockRemoved."""
        for theirs in blocks:
            ours = self._ours.pop(theirs, None)
            if ours is not None:
                self._journal.remove(int.from_bytes(ours, "little"))

    def clear(self) -> None:
        """Everything is gone."""
        self._ours.clear()
        self._journal.clear()

    def _parent(self, event: Mapping[str, Any]) -> bytes | None:
        if event["parent_block_hash"] is not None:
            return self._ours.get(event["parent_block_hash"]) if _salt(event, 0) is None else None
        salt = _salt(event, 0)
        if salt is not None and not isinstance(salt, str):
            return None
        return root(salt_of(event["lora_name"] or self._model, salt or ""))


def _salt(event: Mapping[str, Any], index: int) -> Any:
    """What the block's hash depends on beyond its tokens and its adapter: a salt, or what is no text; None: nothing."""
    extra = event.get("extra_keys")
    keys = list((extra[index] if extra else None) or ())
    if event["lora_name"] is not None and event["lora_name"] in keys:
        keys.remove(event["lora_name"])
    return (keys[0] if len(keys) == 1 else tuple(keys)) if keys else None
