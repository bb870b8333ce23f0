"""Files in S3, or in what speaks its API as MinIO does: listed and read, by credentials from the AWS_* variables."""

import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from services.common.config import ConfigError

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import S3Store

__all__ = ["ENVIRONMENT", "ObjectStore", "StoreAwayError", "StoredFile", "check_url", "is_in_store"]

_SCHEME: Final = "s3://"
_URL: Final = re.compile(r"s3://(?P<bucket>[A-Za-z0-9][A-Za-z0-9.\-_]{1,254})/(?P<path>[^?#]*[^/?#])/*")
ENVIRONMENT: Final = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_SKIP_SIGNATURE",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
)
"""What says who asks, and where: to be there in each process that reads. MinIO is an AWS_ENDPOINT_URL."""
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_RETRIES: Final = 3
_RETRY_SECONDS: Final = 20
_CONNECT_SECONDS: Final = 5
_PIECE_BYTES: Final = 8 << 20
_CODE: Final = re.compile(r"<Code>([^<]*)</Code>")
_SAID: Final = re.compile(r"<Message>([^<]*)</Message>")
_STATUS: Final = re.compile(r"status code: (\d{3})")


class StoreAwayError(ConfigError):
    """The store doesn't answer, or not now; what was asked for may be there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One object below a URL."""

    path: str
    """Relative to the URL."""
    size: int
    """Bytes."""
    tag: str
    """Another one for other content."""


def is_in_store(path: str | None) -> bool:
    """Whether a model's path is a URL of a store, rather than a folder or a Hugging Face id."""
    return path is not None and path.startswith(_SCHEME)


def check_url(url: str, where: str) -> None:
    """Checks the form of a URL; `where` names the key that has it.

    Raises:
        ConfigError: it is none of a folder in a bucket.
    """
    if _URL.fullmatch(url) is None:
        raise ConfigError(f"{where}: expected s3://BUCKET/PATH, got the value {url!r}")


class ObjectStore:
    """The files below one URL. Every method but read_pieces() blocks."""

    def __init__(self, url: str) -> None:
        """Reads the AWS_* variables; asks nobody yet.

        Raises:
            ConfigError: the URL or a variable can't be used, or the package obstore is missing.
        """
        check_url(url, "path")
        self.url = url.rstrip("/")
        self._bucket, _, path = self.url.removeprefix(_SCHEME).partition("/")
        self._store = _open(self._bucket, path)

    def files(self) -> list[StoredFile]:
        """All files, in the order of their paths.

        Raises:
            StoreAwayError: it doesn't answer.
            ConfigError: there is no such bucket, nothing below the URL, or no right to see it.
        """
        with self._errors():
            listed = [one for page in self._store.list() for one in page]
        found = [
            StoredFile(path=one["path"], size=one["size"], tag=one["e_tag"] or one["last_modified"].isoformat())
            for one in listed
        ]
        if not found:
            raise ConfigError(f"{self.url}: the bucket {self._bucket!r} has nothing below that path")
        return sorted(found, key=lambda one: one.path)

    def read(self, path: str, *, start: int = 0, length: int | None = None) -> bytes:
        """A part of a file, or all of it from `start`.

        Raises:
            StoreAwayError: it doesn't answer.
            ConfigError: there is no such file, or no right to read it.
        """
        with self._errors(path):
            if length is None:
                return bytes(self._store.get(path, options={"range": {"offset": start}}).bytes())
            return bytes(self._store.get_range(path, start=start, length=length))

    async def read_pieces(self, file: StoredFile, *, start: int) -> AsyncIterator[bytes]:
        """A file from `start` on, in pieces of some MiB, as long as it is the one that was listed.

        Raises:
            StoreAwayError: it stopped to answer.
            ConfigError: the file is gone or another one by now, or there is no right to read it.
        """
        options: GetOptions = {"range": {"offset": start}}
        if file.tag.startswith('"'):
            options["if_match"] = file.tag
        with self._errors(file.path):
            found = await self._store.get_async(file.path, options=options)
            async for piece in found.stream(min_chunk_size=_PIECE_BYTES):
                yield bytes(piece)

    @contextmanager
    def _errors(self, path: str = "") -> Iterator[None]:
        from obstore import exceptions  # noqa: PLC0415  # see _open()

        try:
            yield
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise _explained(f"{self.url}/{path}".rstrip("/"), self._bucket, error) from error


def _open(bucket: str, path: str) -> "S3Store":
    try:
        from obstore.exceptions import BaseError  # noqa: PLC0415  # a native library, for who needs it
        from obstore.store import S3Store  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"path: a model in S3 needs the package obstore: {error}") from error
    endpoint = _endpoint()
    settings: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    try:
        return S3Store(
            bucket,
            prefix=path,
            # Plain HTTP is for who says so by the endpoint.
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
                # Of a whole file; that nothing comes any more is told by the next one.
                "timeout": timedelta(days=1),
                "read_timeout": timedelta(seconds=_RETRY_SECONDS),
            },
            retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)},
            **settings,
        )
    except (BaseError, ValueError) as error:
        raise ConfigError(f"s3://{bucket}/{path}: {_first_line(error)}") from error


def _endpoint() -> str:
    for name in _ENDPOINTS:
        if url := os.environ.get(name, ""):
            parts = urlsplit(url)
            if parts.scheme not in {"http", "https"} or not parts.hostname:
                raise ConfigError(f"{name}: expected http://HOST:PORT or https://HOST, got the value {url!r}")
            return url
    return ""


def _explained(where: str, bucket: str, error: Exception) -> ConfigError:
    text = str(error)
    code, said, status = (_found(pattern, text) for pattern in (_CODE, _SAID, _STATUS))
    if code == "NoSuchBucket":
        return ConfigError(f"{where}: there is no bucket {bucket!r}")
    if code == "NoSuchKey" or isinstance(error, FileNotFoundError) or status == "404":
        return ConfigError(f"{where}: there is no such file")
    if status == "412":
        return ConfigError(f"{where}: it was changed while it was read: try again")
    if status in {"400", "401", "403"}:
        hint = "see AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL"
        return ConfigError(f"{where}: refused with {status} {code} {said}".rstrip() + f": {hint}")
    if "169.254.169.254" in text or "169.254.170" in text:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket"
        return StoreAwayError(f"{where}: there are no credentials: {hint}")
    return StoreAwayError(f"{where}: the store can't be reached: {_cause(error)}; is AWS_ENDPOINT_URL right?")


def _found(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""


def _cause(error: Exception) -> str:
    return _first_line(error).rpartition(" - ")[2]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
