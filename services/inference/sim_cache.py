"""The KV cache of the simulated engine: blocks, shared by what they hold, forgotten when they are needed."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from services.common.prefix import chained, root
from services.inference.cache_journal import CacheJournal

__all__ = ["BlockPool", "block_hashes", "salt_hash"]


def salt_hash(salt: str) -> int:
    """What the first block of a prompt comes after: see services.common.prefix.salt_of."""
    return int.from_bytes(root(salt), "little")


def block_hashes(token_ids: Sequence[int], block_size: int, *, after: int) -> list[int]:
    """One hash for each full block of tokens, each depending on all before it; `after` is the hash before the first.

    They are those of services.common.prefix, by which the whole mesh knows blocks.
    """
    hashes: list[int] = []
    parent = after.to_bytes(8, "little")
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = chained(parent, array("I", token_ids[start : start + block_size]).tobytes())
        hashes.append(int.from_bytes(parent, "little"))
    return hashes


class BlockPool:
    """A fixed number of blocks. A sequence holds some alone; those that are full it shares by their hash.

    A shared block that nobody holds stays until its room is needed, the least recently held first.
    """

    def __init__(self, block_count: int, journal: CacheJournal | None = None) -> None:
        """`journal` is told which shared blocks come and go."""
        self._journal = journal or CacheJournal()
        self._total = block_count
        self._free = block_count
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return self._free + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of the blocks that somebody holds, 0 to 1."""
        return 1 - self.available / self._total

    def lookup(self, hashes: Sequence[int]) -> int:
        """How many of these, from the first on, are here."""
        for found, block in enumerate(hashes):
            if block not in self._holders and block not in self._idle:
                return found
        return len(hashes)

    def admit(self, shared: Sequence[int], alone: int) -> bool:
        """Holds the blocks `shared`, which are here, and `alone` new ones; or nothing, when there is no room."""
        waking = sum(block in self._idle for block in shared)
        if self.available - waking < alone:
            return False
        for block in shared:
            self._hold(block)
        self._take(alone)
        return True

    def grow(self) -> bool:
        """Holds one new block; False when there is none."""
        if self.available == 0:
            return False
        self._take(1)
        return True

    def share(self, block: int) -> None:
        """A block that was held alone is full and is shared from now on by its hash."""
        if block in self._holders or block in self._idle:
            self._free += 1
            self._hold(block)
        else:
            self._holders[block] = 1
            self._journal.store(block)

    def release(self, shared: Sequence[int], alone: int) -> None:
        """Lets go of everything that a sequence holds."""
        self._free += alone
        # The last first: a prefix is of use without what follows it, and not the other way round.
        for block in reversed(shared):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                del self._holders[block]
                self._idle[block] = None

    def _hold(self, block: int) -> None:
        self._idle.pop(block, None)
        self._holders[block] = self._holders.get(block, 0) + 1

    def _take(self, count: int) -> None:
        while self._free < count:
            self._journal.remove(self._idle.popitem(last=False)[0])
            self._free += 1
        self._free -= count
