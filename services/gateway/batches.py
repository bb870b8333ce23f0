"""The batch API: POST and GET /v1/batches."""

import asyncio
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from services.common.errors import MeshError, Reason
from services.gateway.answers_files import Batch, BatchList
from services.gateway.batch_store import BatchRecord, BatchStore
from services.gateway.caller import Caller
from services.gateway.decoding import decode, invalid
from services.gateway.file_store import FileStore
from services.gateway.identity import Identity
from services.gateway.paging import PAGE_QUERY, page_of
from services.gateway.request import Request
from services.gateway.response import Response
from services.gateway.routes import Route
from services.gateway.stored import while_stored

__all__ = ["BatchRequest", "Batches", "batch_body"]

BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
_DAY_SECONDS = 24 * 3600.0
_MAX_REQUEST_BYTES = 64 << 10


class BatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/batches"""

    input_file_id: Annotated[str, Meta(min_length=1, max_length=128)]
    endpoint: BatchEndpoint
    completion_window: Literal["24h"]
    metadata: Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None


class Batches:
    """Takes batches; a runner works on them."""

    def __init__(self, store: BatchStore, files: FileStore) -> None:
        self._store = store
        self._files = files

    @property
    def routes(self) -> list[Route]:
        """What is served."""
        return [
            Route("POST", "/v1/batches", self.create, body=BatchRequest, answer=Batch),
            Route("GET", "/v1/batches", self.list, query=PAGE_QUERY, answer=BatchList),
            Route("GET", "/v1/batches/{batch_id}", self.retrieve, answer=Batch),
            Route("POST", "/v1/batches/{batch_id}/cancel", self.cancel, answer=Batch),
        ]

    async def create(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Takes a batch, which is checked and worked on from now on.

        Raises:
            MeshError: a bad field, or a file that isn't there.
        """
        del caller
        body = decode(await request.json_body(_MAX_REQUEST_BYTES), BatchRequest)
        with while_stored():
            file = await asyncio.to_thread(self._files.find, identity.tenant, body.input_file_id)
            if file is None or file.purpose != "batch":
                message = f"input_file_id: there is no batch file {body.input_file_id!r}"
                raise invalid("input_file_id", message)
            record = await self.begin(
                identity, endpoint=body.endpoint, input_file_id=body.input_file_id, metadata=body.metadata
            )
        await response.send_json(200, batch_body(record))

    async def begin(
        self, identity: Identity, *, endpoint: str, input_file_id: str, metadata: dict[str, str] | None = None
    ) -> BatchRecord:
        """Begins a batch of a file that is there. Raises DatabaseError."""
        return await asyncio.to_thread(
            self._store.create,
            tenant=identity.tenant,
            key_id=identity.key_id,
            identity=msgspec.json.encode(identity).decode(),
            endpoint=endpoint,
            input_file_id=input_file_id,
            metadata=metadata,
            seconds=_DAY_SECONDS,
        )

    async def list(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """The tenant's batches, the newest first."""
        del caller
        page = page_of(request.query)
        with while_stored():
            records = await asyncio.to_thread(self._store.list, identity.tenant, limit=page.limit + 1, after=page.after)
        await response.send_json(200, page.body([batch_body(record) for record in records]))

    async def retrieve(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """One batch."""
        del caller
        await response.send_json(200, batch_body(await self._find(request, identity)))

    async def cancel(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Stops a batch; what is done by then can be had."""
        del caller
        record = await self._find(request, identity)
        with while_stored():
            await asyncio.to_thread(self._store.cancel, identity.tenant, record.id)
        await response.send_json(200, batch_body(await self._find(request, identity)))

    async def _find(self, request: Request, identity: Identity) -> BatchRecord:
        batch_id = request.parameters["batch_id"]
        with while_stored():
            record = await asyncio.to_thread(self._store.find, identity.tenant, batch_id)
        if record is None:
            raise MeshError(Reason.NOT_FOUND, f"there is no batch {batch_id[:128]!r}", field="batch_id")
        return record


def batch_body(record: BatchRecord) -> dict[str, Any]:
    """A batch as clients see it."""
    states = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    times = {f"{state}_at": record.times.get(f"{state}_at") for state in states}
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "errors": {"object": "list", "data": record.errors} if record.errors else None,
        "input_file_id": record.input_file_id,
        "completion_window": "24h",
        "status": record.status,
        "output_file_id": record.output_file_id,
        "error_file_id": record.error_file_id,
        "created_at": int(record.created_at),
        "expires_at": int(record.expires_at),
        **{name: None if at is None else int(at) for name, at in times.items()},
        "request_counts": {"total": record.total, "completed": record.completed, "failed": record.failed},
        "metadata": record.metadata,
    }
