"""A request that finds no room becomes a batch of one, where its client says `Prefer: respond-async`."""

import dataclasses
from typing import Any, Final

import msgspec

from services.common.errors import MeshError, Reason
from services.gateway.batch_lines import MAX_LINE_BYTES
from services.gateway.batch_store import BatchRecord
from services.gateway.batches import Batches, batch_body
from services.gateway.caller import Caller
from services.gateway.files import Files
from services.gateway.identity import Identity
from services.gateway.prefer import PREFER, preference_of
from services.gateway.request import Request
from services.gateway.response import Response
from services.gateway.routes import Handler, Route
from services.gateway.stored import while_stored

__all__ = ["put_off"]

# What says how to stream an answer says nothing of it.
_OF_STREAMS: Final = ("stream", "stream_options")


def put_off(route: Route, files: Files, batches: Batches) -> Route:
    """The same route, for requests that may wait."""
    return dataclasses.replace(route, handler=_PutOff(route.handler, files, batches), may_be_put_off=True)


class _PutOff:
    """A handler that heeds what its client prefers."""

    def __init__(self, handler: Handler, files: Files, batches: Batches) -> None:
        self.__doc__ = handler.__doc__  # the summary of its operation
        self._handler = handler
        self._files = files
        self._batches = batches

    async def __call__(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        preference = preference_of(request.header(PREFER))
        if preference is None:
            await self._handler(request, response, identity, caller)
            return
        caller.wait_seconds = preference.wait_seconds
        try:
            await self._handler(request, response, identity, caller)
        except MeshError as error:
            if not preference.is_async or error.reason is not Reason.NO_CAPACITY or response.started:
                raise
            line = _line(request, caller)
            if not identity.may_use("batches") or len(line) > MAX_LINE_BYTES:
                raise
            try:
                record = await self._begin(identity, line, endpoint=request.path, name=caller.request_id)
            except MeshError as failed:
                # It asked for an answer, and hears why there is none now; not what is wrong with files.
                raise error from failed
            if caller.account is not None:
                # What the batch takes is in rows of its own.
                caller.account.settle(error.reason.value.lower())
            await self._tell(response, record)

    async def _begin(self, identity: Identity, line: bytes, *, endpoint: str, name: str) -> BatchRecord:
        with while_stored():
            file_id = await self._files.keep(identity, f"{name}.jsonl", line)
            return await self._batches.begin(identity, endpoint=endpoint, input_file_id=file_id)

    @staticmethod
    async def _tell(response: Response, record: BatchRecord) -> None:
        response.add_header("location", f"/v1/batches/{record.id}")
        response.add_header("preference-applied", "respond-async")
        await response.send_json(202, batch_body(record))


def _line(request: Request, caller: Caller) -> bytes:
    body: dict[str, Any] = msgspec.json.decode(request.json)
    for name in _OF_STREAMS:
        body.pop(name, None)
    line = {"custom_id": caller.request_id, "method": "POST", "url": request.path, "body": body}
    return msgspec.json.encode(line) + b"\n"
