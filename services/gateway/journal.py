"""Usage on its way to the database: an append-only file, so that neither a killed gateway nor a database that is away
loses a row.

A request is noted when it is let in and once more, with what it used, before its client sees the end. A note is in the
kernel's hands by the event loop's next turn, together with those of others: before a worker hears of the request, and
before the end of the answer is written, which waits for that (`after`). From then on they outlive the process; a thread
has the disk keep them a few milliseconds later.

A call of the typed lane is noted a few milliseconds after it is let in: the edge knows of it, too, and tells its end to
whoever is the gateway then.
"""

import asyncio
import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import msgspec

from services.common.ledger import UsageRow

__all__ = ["CLOSES", "Entry", "Journal", "JournalInUseError", "read_entries", "segments_of"]

CLOSES: Final = b'["close"'
"""How the lines of requests that are over begin."""
_log = logging.getLogger(__name__)
_SYNC_SECONDS: Final = 0.01
_SEGMENT_BYTES: Final = 8 << 20
_MAX_KEPT: Final = 10_000
_READ_BYTES: Final = 1 << 20


class JournalInUseError(Exception):
    """Another gateway writes to the folder."""


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """One line."""

    kind: Literal["open", "close"]
    row: UsageRow


class Journal:
    """Writes entries to numbered files. One thread writes; leave the last, unfinished file to it."""

    def __init__(self, folder: Path) -> None:
        """Takes the folder, and begins a file in it after those that are there.

        Raises:
            JournalInUseError: another process has it.
            OSError: it can't be made.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise JournalInUseError(f"another gateway uses the journal in {folder}: give each its own") from None
        self._encode = msgspec.json.Encoder().encode
        self._open: dict[str, UsageRow] = {}
        self._noted: list[bytes] = []
        self._then: list[Callable[[], None]] = []
        self._kept: list[bytes] = []
        self._file = -1
        self._size = 0
        self._dirty = threading.Event()
        self._closing = False
        self.failures = 0
        """Writes that the disk refused. What they held is written as soon as it takes it again."""
        self._begin(1 + max((number for number, _ in segments_of(folder)), default=0))
        self._syncer = threading.Thread(target=self._sync, name="journal", daemon=True)
        self._syncer.start()

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._folder

    @property
    def current(self) -> int:
        """The number of the file that is written to."""
        return self._number

    def open(self, row: UsageRow) -> None:
        """Notes a request that was let in."""
        self._open[row.id] = row
        self._note("open", row)

    def close_row(self, row: UsageRow) -> None:
        """Notes what a request used."""
        self._open.pop(row.id, None)
        self._note("close", row)

    def after(self, call: Callable[[], None]) -> None:
        """Calls back once the kernel has what is noted so far: at once, if it has all."""
        if self._noted:
            self._then.append(call)
        else:
            call()

    def flush(self) -> None:
        """Gives to the kernel what is noted."""
        if not self._noted:
            return
        then, self._then = self._then, []
        self._append_noted()
        if self._size > _SEGMENT_BYTES:
            self._begin_another()
        for call in then:
            call()

    def _note(self, kind: Literal["open", "close"], row: UsageRow) -> None:
        self._noted.append(self._line(kind, row))
        if len(self._noted) == 1:
            try:
                # A write is a system call: who else begins or ends meanwhile shares it.
                asyncio.get_running_loop().call_soon(self.flush)
            except RuntimeError:
                self.flush()

    def stop(self) -> None:
        """Has the disk keep everything, and lets the folder go."""
        self.flush()
        self._closing = True
        self._dirty.set()
        self._syncer.join(timeout=5)
        os.close(self._file)
        os.close(self._lock)

    def _line(self, kind: Literal["open", "close"], row: UsageRow) -> bytes:
        return self._encode(Entry(kind, row)) + b"\n"

    def _begin_another(self) -> None:
        try:
            self._begin(self._number + 1)
        except OSError as error:
            # This one does for as long.
            self._fail(error.strerror or "")
            return
        # Nothing that is still wanted is in the files before this one once they are in the database.
        self._noted += (self._line("open", still_open) for still_open in self._open.values())
        self._append_noted()

    def _append_noted(self) -> None:
        lines = b"".join(self._noted)
        self._noted.clear()
        if lines:
            self._append(lines)

    def _append(self, lines: bytes) -> None:
        # The order matters to nobody, but a half-written line must be ended first.
        if self._kept or not self._write(lines):
            self._keep(lines)

    def _keep(self, lines: bytes) -> None:
        if len(self._kept) < _MAX_KEPT:
            self._kept.append(lines)
        else:
            _log.error("a usage row is lost: the disk has refused it and too many before it")
        kept, self._kept = self._kept, []
        # An empty line ends one that was cut short.
        if not self._write(b"\n" + b"".join(kept)):
            self._kept = kept

    def _write(self, data: bytes) -> bool:
        try:
            written = os.write(self._file, data)
        except OSError as error:
            self._fail(error.strerror or "")
            return False
        self._size += written
        if not self._dirty.is_set():
            self._dirty.set()
        if written != len(data):
            self._fail("cut short")
            return False
        return True

    def _fail(self, cause: str) -> None:
        self.failures += 1
        _log.error("the journal can't be written", extra={"cause": cause})

    def _begin(self, number: int) -> None:
        path = self._folder / f"{number:08d}.jsonl"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if self._file >= 0:
            os.fdatasync(self._file)
            os.close(self._file)
        self._file, self._number, self._size = file, number, 0

    def _sync(self) -> None:
        while not self._closing:
            self._dirty.wait()
            self._dirty.clear()
            # A file that was ended meanwhile has been synced then.
            with suppress(OSError):
                os.fdatasync(self._file)
            if not self._closing:
                # Whoever comes in the meantime shares the next one.
                threading.Event().wait(_SYNC_SECONDS)
        with suppress(OSError):
            os.fdatasync(self._file)


def segments_of(folder: Path) -> list[tuple[int, Path]]:
    """The files of a journal by number, oldest first."""
    return sorted((int(path.stem), path) for path in folder.glob("*.jsonl") if path.stem.isdecimal())


def read_entries(path: Path, offset: int, *, only: bytes = b"") -> Iterator[tuple[Entry, int]]:
    """Whole lines of a file from an offset, each with the offset after it. A line that was cut short is skipped.

    `only`: so are those that begin otherwise.
    """
    decode = msgspec.json.Decoder(Entry).decode
    with path.open("rb") as file:
        file.seek(offset)
        rest = b""
        while part := file.read(_READ_BYTES):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                offset += len(line) + 1
                if line and line.startswith(only):
                    try:
                        entry = decode(line)
                    except msgspec.DecodeError:
                        continue
                    yield entry, offset
