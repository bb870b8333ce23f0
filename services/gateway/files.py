"""The files API: POST, GET and DELETE /v1/files."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from services.common.errors import MeshError, Reason
from services.gateway.answers import Deleted
from services.gateway.answers_files import File, FileList
from services.gateway.caller import Caller
from services.gateway.decoding import invalid
from services.gateway.file_store import CHUNK_BYTES, FileRecord, FileStore
from services.gateway.identity import Identity
from services.gateway.paging import PAGE_QUERY, page_of
from services.gateway.request import Request
from services.gateway.response import Response
from services.gateway.routes import Route
from services.gateway.stored import while_stored
from services.gateway.uploads import Upload, boundary_of, read_upload

__all__ = ["Files"]

_PURPOSES: Final = ("batch",)
_MIN_EXPIRY_SECONDS: Final = 3600
_MAX_EXPIRY_SECONDS: Final = 30 * 24 * 3600
_ENVELOPE_BYTES: Final = 64 << 10
"""What the form may add to the file."""
_FORM: Final = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": list(_PURPOSES)},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": _MIN_EXPIRY_SECONDS, "maximum": _MAX_EXPIRY_SECONDS},
    },
    "dependentRequired": {"expires_after[anchor]": ["expires_after[seconds]"]},
}


class Files:
    """Takes files for batches, and hands out what batches made."""

    def __init__(self, store: FileStore, *, max_file_bytes: int, max_tenant_bytes: int) -> None:
        self._store = store
        self._max_file_bytes = max_file_bytes
        self._max_tenant_bytes = max_tenant_bytes

    @property
    def routes(self) -> list[Route]:
        """What is served."""
        return [
            Route("POST", "/v1/files", self.create, form=_FORM, answer=File),
            Route("GET", "/v1/files", self.list, query={**PAGE_QUERY, "purpose": {"type": "string"}}, answer=FileList),
            Route("GET", "/v1/files/{file_id}", self.retrieve, answer=File),
            Route("DELETE", "/v1/files/{file_id}", self.delete, answer=Deleted),
            Route("GET", "/v1/files/{file_id}/content", self.content),
        ]

    async def create(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Takes a file.

        Raises:
            MeshError: it is too large, or no file, or not for anything that is done here.
            ClientLeftError: the client left; nothing is kept.
        """
        del caller
        boundary_of(request)
        limit = self._max_file_bytes + _ENVELOPE_BYTES
        request.check_length(limit)
        with while_stored():
            await self._check_room(identity)
            record = await self._take(request, identity.tenant, limit)
        await response.send_json(200, _body(record))

    async def keep(self, identity: Identity, filename: str, content: bytes) -> str:
        """Makes a batch's file of what a request of the tenant's was; returns its id.

        Raises:
            MeshError: the tenant's files hold too much already.
            DatabaseError: the database is away.
        """
        await self._check_room(identity)
        parts = iter([content])
        record = await asyncio.to_thread(self._store.write, identity.tenant, filename, "batch", parts)
        return record.id

    async def _check_room(self, identity: Identity) -> None:
        used = await asyncio.to_thread(self._store.used_bytes, identity.tenant)
        if used >= self._max_tenant_bytes:
            message = f"the files of this tenant hold {used} bytes, {self._max_tenant_bytes} at most"
            raise MeshError(Reason.REQUEST_TOO_LARGE, message, field="file")

    async def _take(self, request: Request, tenant: str, limit: int) -> FileRecord:
        upload = Upload()
        file_id = await asyncio.to_thread(self._store.begin, tenant, "batch")
        try:
            await self._write(file_id, read_upload(request, upload, limit=limit))
            _check_purpose(upload.fields)
            expires_in = _expiry(upload.fields)
            return await asyncio.to_thread(
                self._store.complete, file_id, filename=upload.filename or "file", expires_in=expires_in
            )
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._store.delete, file_id))
            raise

    async def _write(self, file_id: str, parts: AsyncIterator[bytes]) -> None:
        number, size, buffer = 0, 0, bytearray()
        async for part in parts:
            buffer += part
            size += len(part)
            if size > self._max_file_bytes:
                raise MeshError(
                    Reason.REQUEST_TOO_LARGE, f"file: larger than {self._max_file_bytes} bytes", field="file"
                )
            if len(buffer) >= CHUNK_BYTES:
                await asyncio.to_thread(self._store.append, file_id, number, bytes(buffer))
                number, buffer = number + 1, bytearray()
        await asyncio.to_thread(self._store.append, file_id, number, bytes(buffer))

    async def list(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """The tenant's files, by time."""
        del caller
        page, purpose = page_of(request.query), request.query.get("purpose")
        with while_stored():
            records = await asyncio.to_thread(
                self._store.list,
                identity.tenant,
                purpose=purpose,
                limit=page.limit + 1,
                after=page.after,
                newest_first=page.newest_first,
            )
        await response.send_json(200, page.body([_body(record) for record in records]))

    async def retrieve(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """One file, not its content."""
        del caller
        await response.send_json(200, _body(await self._find(request, identity)))

    async def delete(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Deletes a file."""
        del caller
        record = await self._find(request, identity)
        with while_stored():
            await asyncio.to_thread(self._store.delete, record.id)
        await response.send_json(200, {"id": record.id, "object": "file", "deleted": True})

    async def content(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """What is in a file."""
        del caller
        record = await self._find(request, identity)
        await response.send_bytes(self._chunks(record.id), length=record.bytes)

    async def _chunks(self, file_id: str) -> AsyncIterator[bytes]:
        number = 0
        while (data := await asyncio.to_thread(self._store.chunk, file_id, number)) is not None:
            yield data
            number += 1

    async def _find(self, request: Request, identity: Identity) -> FileRecord:
        file_id = request.parameters["file_id"]
        with while_stored():
            record = await asyncio.to_thread(self._store.find, identity.tenant, file_id)
        if record is None:
            raise MeshError(Reason.NOT_FOUND, f"there is no file {file_id[:128]!r}", field="file_id")
        return record


def _check_purpose(fields: dict[str, str]) -> None:
    known = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
    for name in fields.keys() - known:
        raise invalid(name[:64], f"unknown parameter: {name[:64]}", "unknown_parameter")
    purpose = fields.get("purpose")
    if purpose is None:
        raise invalid("purpose", "missing required parameter: purpose", "missing_required_parameter")
    if purpose not in _PURPOSES:
        raise invalid("purpose", f"purpose: expected one of {', '.join(_PURPOSES)}")


def _expiry(fields: dict[str, str]) -> float | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor not in (None, "created_at"):
        raise invalid("expires_after.anchor", "expires_after.anchor: expected created_at")
    if seconds is None:
        if anchor is None:
            return None
        message = "missing required parameter: expires_after.seconds"
        raise invalid("expires_after.seconds", message, "missing_required_parameter")
    if not (seconds.isdecimal() and _MIN_EXPIRY_SECONDS <= int(seconds[:12]) <= _MAX_EXPIRY_SECONDS):
        message = f"expires_after.seconds: expected {_MIN_EXPIRY_SECONDS} to {_MAX_EXPIRY_SECONDS}"
        raise invalid("expires_after.seconds", message)
    return float(seconds)


def _body(record: FileRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": int(record.created_at),
        "expires_at": None if record.expires_at is None else int(record.expires_at),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
    }
