"""A file that is sent as multipart/form-data, taken as it comes."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from services.common.errors import MeshError, Reason
from services.gateway.decoding import invalid
from services.gateway.request import Request

__all__ = ["Upload", "boundary_of", "read_upload"]

_MAX_FIELD_BYTES: Final = 4096
_MAX_FIELDS: Final = 16


@dataclass(slots=True)
class Upload:
    """What has come so far."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    """Set once the file itself begins."""


def boundary_of(request: Request) -> bytes:
    """What separates the parts.

    Raises:
        MeshError: UNSUPPORTED_MEDIA_TYPE.
    """
    media_type, options = parse_options_header(request.header(b"content-type") or "")
    boundary = options.get(b"boundary")
    if media_type != b"multipart/form-data" or not boundary or len(boundary) > 256:
        raise MeshError(Reason.UNSUPPORTED_MEDIA_TYPE, "send the file as content-type: multipart/form-data")
    return boundary


async def read_upload(request: Request, upload: Upload, *, limit: int) -> AsyncIterator[bytes]:
    """The bytes of the part named "file"; the other parts are put into `upload.fields`, also those behind the file.

    Raises:
        MeshError: it is no multipart/form-data, is too large, or has no file.
    """
    parts = _Parts(upload)
    parser = MultipartParser(boundary_of(request), parts.callbacks())
    try:
        async for data in request.body_parts(limit):
            parser.write(data)
            if piece := parts.take():
                yield piece
        parser.finalize()
    except FormParserError as error:
        raise invalid(None, f"the body is no valid multipart/form-data: {error}", "invalid_form") from None
    if upload.filename is None:
        raise invalid("file", "missing required parameter: file", "missing_required_parameter")


class _Parts:
    """Collects what the parser finds."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self._header = [bytearray(), bytearray()]
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._value = bytearray()
        self._file = bytearray()

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._headers.clear,
            "on_header_field": lambda data, start, end: self._extend(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._extend(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin,
            "on_part_data": lambda data, start, end: self._data(data[start:end]),
            "on_part_end": self._end,
        }

    def take(self) -> bytes:
        """What has come of the file since the last call."""
        taken, self._file = bytes(self._file), bytearray()
        return taken

    def _extend(self, which: int, data: bytes) -> None:
        self._header[which] += data
        if len(self._header[which]) > _MAX_FIELD_BYTES:
            raise invalid(None, f"a header of a part is longer than {_MAX_FIELD_BYTES} bytes", "invalid_form")

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = [bytearray(), bytearray()]

    def _begin(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == "file":
            if self._upload.filename is not None:
                raise invalid("file", "file: one file a request")
            self._upload.filename = options.get(b"filename", b"").decode(errors="replace")[:256] or "file"

    def _data(self, data: bytes) -> None:
        if self._name == "file":
            self._file += data
            return
        self._value += data
        if len(self._value) > _MAX_FIELD_BYTES:
            raise invalid(
                self._name[:64], f"{self._name[:64]}: longer than {_MAX_FIELD_BYTES} bytes", "string_above_max_length"
            )

    def _end(self) -> None:
        if self._name == "file":
            return
        if len(self._upload.fields) >= _MAX_FIELDS:
            raise invalid(None, f"more than {_MAX_FIELDS} parts", "invalid_form")
        self._upload.fields[self._name] = self._value.decode(errors="replace")
        self._value = bytearray()
