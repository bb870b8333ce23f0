"""Which worker has how much of a prompt cached: by its text, by its tokens, or by the session that it continues.

Two indexes of the same kind say which workers have a block, as one bit a worker: asking costs as much as the prompt has
blocks, however many workers there are.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from services.common.prefix import TEXT_BLOCK_BYTES, root, salt_of, tenant_salt, token_block_hashes
from services.router.request import Request
from services.router.worker import Worker

__all__ = ["BlockIndex", "Prefixes"]

_BYTES_PER_TOKEN: Final = 4.0
_TEXT_BLOCK_TOKENS: Final = TEXT_BLOCK_BYTES / _BYTES_PER_TOKEN
# Of a worker that does not say how much KV cache it has.
_UNKNOWN_KV_TOKENS: Final = 131_072
_LEAST_BLOCKS: Final = 64
_MOST_BLOCKS: Final = 1 << 17
_SESSIONS: Final = 65_536
_EVICTED_SHARE: Final = 8
# How fast a worker's cache is taken to be smaller when less was found there than was expected, and larger again.
_SHRINK: Final = 0.9
_GROW: Final = 1.02
_LEAST_SHARE: Final = 0.1
_NOTICEABLE: Final = 0.8

_Key = tuple[str, str, str]


class BlockIndex:
    """Blocks by worker. Beyond its bound a worker's blocks are forgotten, the least recently used first."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        """Bits of the workers that have a block."""
        self._bits: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._blocks: dict[str, dict[int, int]] = {}
        """Of each worker, the blocks and when they were used."""
        self._uses = 0

    def depths(self, hashes: Sequence[int]) -> dict[str, int]:
        """How many of these blocks, from the first on, each worker has; none with none of them."""
        if not hashes:
            return {}
        holders = self._holders
        having = holders.get(hashes[0], 0)
        found: dict[str, int] = {}
        depth = 1
        while having:
            still = having & holders.get(hashes[depth], 0) if depth < len(hashes) else 0
            if still != having:
                for name in self._named(having ^ still):
                    found[name] = depth
                having = still
            depth += 1
        return found

    def add(self, worker_id: str, hashes: Sequence[int], *, most: int) -> None:
        """A worker has these blocks now; of `most` that it may have, the last ones are the first to be forgotten."""
        bit = self._bit(worker_id)
        blocks, holders = self._blocks[worker_id], self._holders
        for block in hashes:
            if block not in blocks:
                holders[block] = holders.get(block, 0) | bit
        # A beginning is of use without what follows, and not the other way round.
        self._uses += len(hashes)
        blocks.update(zip(hashes, range(self._uses, self._uses - len(hashes), -1), strict=True))
        if len(blocks) > most:
            self._evict(worker_id, most)

    def drop(self, worker_id: str, hashes: Iterable[int]) -> None:
        """A worker has these blocks no more."""
        blocks, bit = self._blocks.get(worker_id), self._bits.get(worker_id, 0)
        if blocks is None:
            return
        for block in hashes:
            if blocks.pop(block, None) is not None:
                self._unhold(block, bit)

    def forget(self, worker_id: str) -> None:
        """Nothing is known of a worker."""
        bit = self._bits.pop(worker_id, 0)
        if not bit:
            return
        del self._names[bit]
        for block in self._blocks.pop(worker_id):
            self._unhold(block, bit)

    def count(self, worker_id: str) -> int:
        """How many blocks a worker is taken to have."""
        return len(self._blocks.get(worker_id, ()))

    def _bit(self, worker_id: str) -> int:
        bit = self._bits.get(worker_id)
        if bit is None:
            bit = 1
            while bit in self._names:
                bit <<= 1
            self._bits[worker_id] = bit
            self._names[bit] = worker_id
            self._blocks[worker_id] = {}
        return bit

    def _named(self, bits: int) -> Iterable[str]:
        while bits:
            lowest = bits & -bits
            yield self._names[lowest]
            bits ^= lowest

    def _evict(self, worker_id: str, most: int) -> None:
        # Some more than needed at once, so that sorting is paid for by many.
        blocks, bit = self._blocks[worker_id], self._bits[worker_id]
        for block in sorted(blocks, key=blocks.__getitem__)[: len(blocks) - most + most // _EVICTED_SHARE]:
            del blocks[block]
            self._unhold(block, bit)

    def _unhold(self, block: int, bit: int) -> None:
        left = self._holders[block] & ~bit
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]


class _Known:
    """What else is known of one worker's cache."""

    __slots__ = ("sequence", "share", "told", "worker")

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.told = False
        """Whether it tells what is in its cache, and no message was lost."""
        self.sequence = 0
        self.share = 1.0
        """Of its KV cache, how much is there for prefixes, as it turned out."""


class Prefixes:
    """What is cached where, as far as that is known.

    Workers tell which blocks of tokens they have; that counts where a prompt's tokens are known. Otherwise what was
    sent where is remembered, by hashes of the text, as much as the worker's KV cache holds; or, for a request without
    any, which worker served its session last.
    """

    def __init__(self, *, max_sessions: int = _SESSIONS, isolates_tenants: bool = False) -> None:
        """`isolates_tenants`: what one tenant's prompts leave in caches is of no use to others."""
        self._isolates_tenants = isolates_tenants
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[_Key, tuple[str, int]] = OrderedDict()
        self._text = BlockIndex()
        self._tokens: dict[int, BlockIndex] = {}
        self._known: dict[str, _Known] = {}

    def cached(self, request: Request) -> dict[str, float]:
        """How many tokens of the prompt each worker has cached, by worker; those that have none are left out."""
        if request.prompt_token_ids and self._tokens:
            found = self._by_tokens(request)
            if found:
                return found
        if request.prefix_hashes:
            return self._by_text(request)
        if request.session:
            worker_id, tokens = self._sessions.get(_key(request), ("", 0))
            return {worker_id: float(min(tokens, request.prompt_tokens))} if worker_id else {}
        return {}

    def note(self, request: Request, worker: Worker) -> None:
        """The request's prompt is on its way into that worker's cache."""
        if request.prefix_hashes:
            known = self._of(worker)
            self._text.add(worker.worker_id, self._text_hashes(request), most=_most_blocks(worker, known.share))
        elif request.session:
            self._sessions[_key(request)] = (worker.worker_id, request.prompt_tokens)
            self._sessions.move_to_end(_key(request))
            if len(self._sessions) > self._max_sessions:
                self._sessions.popitem(last=False)

    def learn(self, request: Request, worker: Worker, *, expected: float, cached: int) -> None:
        """A request is over, of whose prompt `expected` tokens should have been cached, and `cached` were."""
        known = self._known.get(worker.worker_id)
        if known is None or known.worker is not worker or not request.prefix_hashes:
            return
        if cached < _NOTICEABLE * expected - _TEXT_BLOCK_TOKENS:
            # It has forgotten what it was thought to have: it forgets sooner than its size says.
            known.share = max(_LEAST_SHARE, known.share * _SHRINK)
        elif expected:
            known.share = min(1.0, known.share * _GROW)

    def tell(
        self, worker: Worker, sequence: int, *, cleared: bool, stored: Sequence[int], removed: Sequence[int]
    ) -> None:
        """A worker tells what its cache gained and lost; after a gap it isn't believed until it starts afresh."""
        size = worker.card.block_tokens
        if not size:
            return
        known = self._of(worker)
        index = self._tokens.setdefault(size, BlockIndex())
        if cleared:
            index.forget(worker.worker_id)
            self._text.forget(worker.worker_id)
        elif sequence != known.sequence + 1:
            index.forget(worker.worker_id)
            known.told = False
        known.told = known.told or cleared or sequence == 1
        known.sequence = sequence
        if known.told:
            index.drop(worker.worker_id, removed)
            index.add(worker.worker_id, stored, most=max(_LEAST_BLOCKS, min(_MOST_BLOCKS, _kv_tokens(worker) // size)))

    def forget(self, worker: Worker) -> None:
        """A worker is gone, and its cache with it; one that was replaced is forgotten already."""
        known = self._known.get(worker.worker_id)
        if known is not None and known.worker is worker:
            self._drop(worker.worker_id)

    def _of(self, worker: Worker) -> _Known:
        known = self._known.get(worker.worker_id)
        if known is None or known.worker is not worker:
            # Another process of the same name starts with nothing.
            self._drop(worker.worker_id)
            known = self._known[worker.worker_id] = _Known(worker)
        return known

    def _drop(self, worker_id: str) -> None:
        self._known.pop(worker_id, None)
        self._text.forget(worker_id)
        for index in self._tokens.values():
            index.forget(worker_id)

    def _text_hashes(self, request: Request) -> Sequence[int]:
        hashes = request.prefix_hashes
        if not self._isolates_tenants or not request.tenant:
            return hashes
        # What follows the first block is only looked at where that is there.
        return (hashes[0] ^ _tenant_hash(request.tenant), *hashes[1:])

    def _by_text(self, request: Request) -> dict[str, float]:
        hashes, prompt = self._text_hashes(request), request.prompt_tokens
        # The part of a block that ends the prompt has no hash; what follows the longest text that is hashed has none.
        blocks = max(len(hashes) + 0.5, prompt / _TEXT_BLOCK_TOKENS / 2)
        return {name: prompt * depth / blocks for name, depth in self._text.depths(hashes).items()}

    def _by_tokens(self, request: Request) -> dict[str, float]:
        tenant = request.tenant if self._isolates_tenants else ""
        ids, salt = request.prompt_token_ids, salt_of(request.model or "", tenant_salt(tenant))
        found: dict[str, float] = {}
        for size, index in self._tokens.items():
            for name, depth in index.depths(token_block_hashes(ids, size, salt=salt)).items():
                # The last token is computed all the same.
                found[name] = float(min(depth * size, len(ids) - 1, request.prompt_tokens))
        return found


def _key(request: Request) -> _Key:
    return request.tenant, request.model or "", request.session


def _kv_tokens(worker: Worker) -> int:
    return worker.card.kv_tokens or _UNKNOWN_KV_TOKENS


def _most_blocks(worker: Worker, share: float) -> int:
    return max(_LEAST_BLOCKS, min(_MOST_BLOCKS, int(share * _kv_tokens(worker) / _TEXT_BLOCK_TOKENS)))


@lru_cache(maxsize=4096)
def _tenant_hash(tenant: str) -> int:
    return int.from_bytes(root(tenant), "big")
