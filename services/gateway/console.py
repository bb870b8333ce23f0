"""The web console at `/`: static files, from memory. What they show they ask for with the key that a user enters."""

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Final

from services.common.errors import MeshError, Reason
from services.gateway.request import Request
from services.gateway.response import Response

__all__ = ["Console"]

_FOLDER: Final = "web"
_PREFIX: Final = "/console/"
_TYPES: Final = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".svg": b"image/svg+xml",
}
_METHODS: Final = ("GET", "HEAD")
# Nothing but our own files runs or is loaded, nothing is sent anywhere else, and no page may frame this one.
_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final = (
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    # It is asked for again each time, and mostly answered with 304: a new version is there at once.
    (b"cache-control", b"no-cache"),
)


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: bytes
    tag: str


class Console:
    """The files, by path."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        for entry in resources.files("services.gateway").joinpath(_FOLDER).iterdir():
            media_type = _TYPES.get(f".{entry.name.rpartition('.')[2]}")
            if media_type is not None:
                content = entry.read_bytes()
                tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
                self._files[f"{_PREFIX}{entry.name}"] = _File(content, media_type, tag)
        self._files["/"] = self._files.pop(f"{_PREFIX}index.html")

    def has(self, path: str) -> bool:
        """Whether a path is the console's, whether there is a file or not."""
        return path == "/" or path.startswith(_PREFIX)

    async def answer(self, request: Request, response: Response) -> None:
        """Answers with a file.

        Raises:
            MeshError: there is none, or it was not to be read.
        """
        file = self._files.get(request.path)
        if file is None:
            raise MeshError(Reason.NOT_FOUND, "there is no such page", code="unknown_url")
        if request.method not in _METHODS:
            raise MeshError(Reason.METHOD_NOT_ALLOWED, f"{request.path} takes {' and '.join(_METHODS)}")
        headers = [(b"etag", file.tag.encode()), *_HEADERS]
        if request.header(b"if-none-match") == file.tag:
            await response.send_whole(304, b"", headers)
        else:
            await response.send_whole(200, file.content, [(b"content-type", file.media_type), *headers])
