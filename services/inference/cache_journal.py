"""What a prefix cache holds, told to every router: first all of it, then what changes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final
from weakref import WeakSet

__all__ = ["CacheBatch", "CacheJournal", "CacheReader"]

_MOST_A_BATCH: Final = 4096


@dataclass(slots=True)
class CacheBatch:
    """Changes to be told in one message. Blocks are named by the hashes of services.common.prefix."""

    number: int
    """From 1, without gaps, for each reader."""
    cleared: bool = False
    """Everything was dropped, before what follows."""
    stored: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)


class CacheJournal:
    """Kept by an engine, read by each stream to a router at its own pace."""

    def __init__(self) -> None:
        self.present: dict[int, None] = {}
        """The blocks that are there, oldest first."""
        self._readers: WeakSet[CacheReader] = WeakSet()

    def store(self, block: int) -> None:
        """A block is there now."""
        if block not in self.present:
            self.present[block] = None
            self._note(block)

    def remove(self, block: int) -> None:
        """A block is gone."""
        if block in self.present:
            del self.present[block]
            self._note(block)

    def clear(self) -> None:
        """Everything is gone, or what is there is not known."""
        self.present.clear()
        for reader in self._readers:
            reader.restart()

    def reader(self) -> "CacheReader":
        """One that is told everything from now on, beginning with what is there."""
        reader = CacheReader(self)
        self._readers.add(reader)
        return reader

    def _note(self, block: int) -> None:
        for reader in self._readers:
            reader.note(block)


class CacheReader:
    """What one router has not been told yet: never more than what is there and what it still believes to be there."""

    def __init__(self, journal: CacheJournal) -> None:
        self._journal = journal
        self._number = 0
        self._cleared = True
        self._told: set[int] = set()
        self._changed: dict[int, None] = dict.fromkeys(journal.present)

    def note(self, block: int) -> None:
        """A block came or went."""
        self._changed[block] = None

    def restart(self) -> None:
        """Everything is gone."""
        self._cleared = True
        self._told.clear()
        self._changed.clear()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self._changed and not self._cleared

    def batches(self) -> Iterator[CacheBatch]:
        """Everything that there is to tell, in messages of bounded size."""
        while not self.is_empty:
            yield self._next()

    def _next(self) -> CacheBatch:
        self._number += 1
        batch = CacheBatch(self._number, self._cleared)
        self._cleared = False
        for block in _taken(self._changed):
            if block in self._journal.present:
                if block not in self._told:
                    self._told.add(block)
                    batch.stored.append(block)
            elif block in self._told:
                self._told.discard(block)
                batch.removed.append(block)
        return batch


def _taken(changed: dict[int, None]) -> Iterable[int]:
    blocks = list(islice(changed, _MOST_A_BATCH))
    for block in blocks:
        del changed[block]
    return blocks
