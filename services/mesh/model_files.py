"""A model's configuration and the headers of its weights: of a folder, in S3, or on the Hugging Face Hub."""

import math
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from services.common.config import ConfigError
from services.common.object_store import ObjectStore, is_in_store
from services.common.safetensors_header import LENGTH_BYTES, entries

__all__ = ["ModelFiles", "Tensor", "model_files"]

_CONFIG: Final = "config.json"
_WEIGHTS: Final = ".safetensors"
_MOST_HEADER_BYTES: Final = 100 << 20
# Nearly every header is in it, so one request is enough.
_FIRST_BYTES: Final = 100_000


class Tensor(NamedTuple):
    """What a header says of one."""

    kind: str
    """The type of its values, as safetensors has it: BF16, for example."""
    values: int
    size: int
    """Bytes."""


class ModelFiles(Protocol):
    """What is read of a model before it is loaded."""

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine."""

    def config(self) -> bytes:
        """Its config.json; ConfigError where there is none."""

    def tensors(self) -> Iterator[Tensor]:
        """Of all its safetensors files; ConfigError where one is none."""


def model_files(model: str) -> ModelFiles:
    """Those of a folder, of a Hugging Face id, downloaded or not, or of a URL in S3. Weights are never fetched.

    Raises:
        ConfigError: there are none, or they can't be reached.
    """
    if is_in_store(model):
        return _Store(model)
    folder = Path(model).expanduser()
    if (folder / _CONFIG).is_file():
        return _Folder(folder)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"model: there is no folder with a config.json, got the value {model!r}")
    kept = _download(model)
    if kept is not None and any(kept.glob(f"*{_WEIGHTS}")):
        return _Folder(kept)
    try:
        return _Hub(model)
    except ConfigError:
        if kept is not None:
            return _Folder(kept)
        raise


class _Folder:
    is_here = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def config(self) -> bytes:
        path = self._folder / _CONFIG
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error

    def tensors(self) -> Iterator[Tensor]:
        for path in sorted(self._folder.glob(f"*{_WEIGHTS}")):
            try:
                with path.open("rb") as file:
                    yield from _tensors(str(path), lambda start, length: os.pread(file.fileno(), length, start))
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror}") from error


class _Store:
    is_here = False

    def __init__(self, url: str) -> None:
        self._store = ObjectStore(url)
        self._paths = [file.path for file in self._store.files()]

    def config(self) -> bytes:
        return self._store.read(_CONFIG)

    def tensors(self) -> Iterator[Tensor]:
        for path in self._paths:
            if path.endswith(_WEIGHTS) and "/" not in path:
                yield from _tensors(f"{self._store.url}/{path}", self._reader(path))

    def _reader(self, path: str) -> Callable[[int, int], bytes]:
        first = self._store.read(path, length=_FIRST_BYTES)

        def read(start: int, length: int) -> bytes:
            if start + length <= len(first):
                return first[start : start + length]
            return self._store.read(path, start=start, length=length)

        return read


class _Hub:
    """Asks nobody where HF_HUB_OFFLINE is set."""

    is_here = False

    def __init__(self, repository: str) -> None:
        self._repository = repository
        try:
            # It comes with vLLM, and takes a while.
            hub, errors = import_module("huggingface_hub"), import_module("huggingface_hub.errors")
        except ImportError as error:
            raise ConfigError(
                f"{self._unknown}, and the package huggingface_hub, which would ask, is missing"
            ) from error
        try:
            # First of all: this one gives up at once when nobody can be reached.
            self._tensors = self._headers(hub, errors)
            self._config = Path(hub.hf_hub_download(repository, _CONFIG)).read_bytes()
        except errors.GatedRepoError as error:
            raise ConfigError(f"model: {repository!r}: its owner has to admit you: set HF_TOKEN") from error
        except errors.RepositoryNotFoundError as error:
            raise ConfigError(
                f"{self._unknown}, and the Hugging Face Hub has no such model, or none for you"
            ) from error
        except errors.SafetensorsParsingError as error:
            raise ConfigError(f"model: {repository!r}: not a safetensors file: {error}") from error
        except (errors.HFValidationError, errors.HTTPError, OSError) as error:
            cause = str(error).strip().partition("\n")[0]
            raise ConfigError(f"{self._unknown}, and the Hugging Face Hub can't be asked: {cause}") from error

    @property
    def _unknown(self) -> str:
        return f"model: there is no folder with a config.json, and no download of that name: {self._repository!r}"

    def config(self) -> bytes:
        return self._config

    def tensors(self) -> Iterator[Tensor]:
        yield from self._tensors

    def _headers(self, hub: Any, errors: Any) -> list[Tensor]:
        try:
            found = hub.get_safetensors_metadata(self._repository)
        except errors.NotASafetensorsRepoError:
            return []
        return [
            Tensor(one.dtype, math.prod(one.shape), one.data_offsets[1] - one.data_offsets[0])
            for file in found.files_metadata.values()
            for one in file.tensors.values()
        ]


def _download(repository: str) -> Path | None:
    """The newest download of a Hugging Face id; maybe of its configuration alone."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    kept = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{repository.replace('/', '--')}" / "snapshots"
    found = sorted(kept.glob(f"*/{_CONFIG}"), key=lambda path: path.stat().st_mtime) if kept.is_dir() else []
    return found[-1].parent if found else None


def _tensors(where: str, read: Callable[[int, int], bytes]) -> Iterator[Tensor]:
    """`read` gives bytes from a start on, as many as are asked for."""
    length = int.from_bytes(read(0, LENGTH_BYTES), "little")
    if not 0 < length <= _MOST_HEADER_BYTES:
        raise ConfigError(f"{where}: not a safetensors file")
    try:
        for tensor in entries(read(LENGTH_BYTES, length)).values():
            begin, end = tensor["data_offsets"]
            yield Tensor(tensor["dtype"], math.prod(tensor["shape"]), end - begin)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: not a safetensors file: {error}") from error
