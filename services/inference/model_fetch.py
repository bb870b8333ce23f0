"""A model that is in an object store: fetched once into a folder of this machine, before the engine starts."""

import asyncio
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from io import FileIO
from pathlib import Path, PurePosixPath
from time import monotonic
from typing import Final

import msgspec

from services.common.config import ConfigError
from services.common.object_store import ObjectStore, StoreAwayError, StoredFile, is_in_store
from services.common.settings_worker import WorkerSettings

__all__ = ["fetch_model", "with_local_model"]

_log = logging.getLogger(__name__)
_AT_A_TIME: Final = 4
# In a row without a byte; a store that is away for longer is somebody's to look at.
_TRIES: Final = 5
_LOCK_SECONDS: Final = 0.2
_PROGRESS_SECONDS: Final = 10.0
_PARTIAL: Final = ".partial"
_PIECE: Final = ".part"
# The same weights in other forms, where there are safetensors.
_OTHER_FORMS: Final = frozenset({".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot"})
_GIB: Final = 1 << 30


async def with_local_model(settings: WorkerSettings) -> WorkerSettings:
    """The same settings with the folder of a model that had to be fetched first.

    Raises:
        ConfigError: it isn't there, may not be read, or there is no room for it.
    """
    path = settings.model.path
    if settings.engine != "vllm" or path is None or not is_in_store(path):
        return settings
    folder = await fetch_model(path, settings.model_cache)
    return msgspec.structs.replace(settings, model=msgspec.structs.replace(settings.model, path=str(folder)))


async def fetch_model(url: str, cache: str) -> Path:
    """The folder of `cache` with the model of `url`: what the store has now, fetched unless it is there already.

    What was fetched when the fetch was interrupted stays, and isn't fetched again. Several processes may do this at the
    same time: one of them fetches, the others wait for it. While the store is away, what was fetched last is taken.

    Raises:
        ConfigError: it isn't there, may not be read, or there is no room for it; nothing was fetched last, either.
    """
    store = ObjectStore(url)
    try:
        home = _home(store.url, cache)
        async with _lock(home):
            return await _fetch(store, home)
    except OSError as error:
        raise ConfigError(f"model_cache: {cache}: {error.strerror or error}") from error


async def _fetch(store: ObjectStore, home: Path) -> Path:
    try:
        files = _needed(store.url, await asyncio.to_thread(store.files))
    except StoreAwayError as error:
        last = _last(home)
        if last is None:
            raise
        _log.warning("the store is away: taking what was fetched last", extra={"cause": str(error)})
        return last
    folder = home / _version(files)
    if not _is_whole(folder):
        partial = _begin(folder)
        await _Fetch(store, partial, files).run()
        partial.rename(folder)
    # The newest is the one to take while the store is away.
    os.utime(folder)
    return folder


class _Fetch:
    """The files of one version on their way."""

    def __init__(self, store: ObjectStore, folder: Path, files: Sequence[StoredFile]) -> None:
        self._store = store
        self._folder = folder
        # A file has its name only once all of it is there.
        self._files = [file for file in files if not (folder / file.path).is_file()]
        self._left = sum(max(0, file.size - _size(_piece(folder, file))) for file in self._files)

    async def run(self) -> None:
        self._check_room()
        begun, bytes_to_get = monotonic(), self._left
        _log.info("fetching the model", extra={"url": self._store.url, "bytes": bytes_to_get})
        turns = asyncio.Semaphore(_AT_A_TIME)
        try:
            async with asyncio.TaskGroup() as tasks:
                progress = tasks.create_task(self._tell())
                async with asyncio.TaskGroup() as fetching:
                    for file in self._files:
                        fetching.create_task(self._file(file, turns))
                progress.cancel()
        except* ConfigError as errors:
            raise _first(errors) from None
        seconds = round(monotonic() - begun, 1)
        _log.info("the model is fetched", extra={"url": self._store.url, "bytes": bytes_to_get, "seconds": seconds})

    def _check_room(self) -> None:
        free = shutil.disk_usage(self._folder).free
        if self._left > free:
            raise ConfigError(
                f"model_cache: {self._folder}: {self._store.url} takes {self._left / _GIB:.2f} GiB more, "
                f"and {free / _GIB:.2f} GiB are free there"
            )

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            _log.info("fetching the model", extra={"url": self._store.url, "bytes": self._left})

    async def _file(self, file: StoredFile, turns: asyncio.Semaphore) -> None:
        path, piece = self._folder / file.path, _piece(self._folder, file)
        async with turns:
            failures = 0
            _make(piece)
            while (begun_with := _size(piece)) != file.size:
                try:
                    await self._go_on(file, piece)
                except StoreAwayError:
                    failures = 0 if _size(piece) > begun_with else failures + 1
                    if failures == _TRIES:
                        raise
                    await asyncio.sleep(failures)
            piece.rename(path)

    async def _go_on(self, file: StoredFile, piece: Path) -> None:
        """Fetches what is missing of a file."""
        try:
            with piece.open("ab", buffering=0) as out:
                async for data in self._store.read_pieces(file, start=out.tell()):
                    await asyncio.to_thread(_write, out, data)
                    self._left -= len(data)
        except OSError as error:
            raise ConfigError(f"model_cache: {piece}: {error.strerror or error}") from error


def _needed(url: str, listed: Sequence[StoredFile]) -> list[StoredFile]:
    """What an engine reads of it.

    Raises:
        ConfigError: it is no model.
    """
    files = [file for file in listed if not file.path.endswith("/")]
    if not any(file.path == "config.json" for file in files):
        raise ConfigError(f"{url}: there is no config.json, but {files[0].path if files else 'nothing'}")
    for file in files:
        if ".." in PurePosixPath(file.path).parts or file.path.startswith("/"):
            raise ConfigError(f"{url}: a file may not be called {file.path!r}")
    if any(file.path.endswith(".safetensors") for file in files):
        return [file for file in files if PurePosixPath(file.path).suffix not in _OTHER_FORMS]
    return files


def _version(files: Sequence[StoredFile]) -> str:
    text = "\n".join(f"{file.path}\t{file.size}\t{file.tag}" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _home(url: str, cache: str) -> Path:
    """Where its versions are."""
    home = Path(cache).expanduser() / url.removeprefix("s3://").replace("/", "--")
    home.mkdir(parents=True, exist_ok=True)
    return home


def _begin(folder: Path) -> Path:
    """The folder in which a version is put together."""
    partial = folder.with_suffix(_PARTIAL)
    for other in folder.parent.glob(f"*{_PARTIAL}"):
        if other != partial:
            # Of a version that the store has no more.
            shutil.rmtree(other)
    partial.mkdir(exist_ok=True)
    return partial


def _last(home: Path) -> Path | None:
    return max((one for one in home.iterdir() if _is_whole(one)), key=lambda one: one.stat().st_mtime, default=None)


def _is_whole(folder: Path) -> bool:
    # It has its name only once everything is there.
    return folder.is_dir() and folder.suffix != _PARTIAL


def _piece(folder: Path, file: StoredFile) -> Path:
    return folder / f"{file.path}{_PIECE}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _make(piece: Path) -> None:
    piece.parent.mkdir(parents=True, exist_ok=True)
    piece.touch()


def _write(out: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[out.write(rest) :]


def _first(errors: ExceptionGroup[ConfigError]) -> ConfigError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ConfigError)
    return error


@asynccontextmanager
async def _lock(home: Path) -> AsyncIterator[None]:
    """For one process at a time; the kernel takes it back from one that dies."""
    with (home / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LOCK_SECONDS)
        yield
