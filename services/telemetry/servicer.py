"""tokenloom.telemetry.v1.TelemetryService over a board of samples."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from tokenloom.telemetry.v1 import telemetry_pb2 as pb
from tokenloom.telemetry.v1 import telemetry_pb2_grpc

from services.common.errors import MeshError, Reason
from services.telemetry.board import Board
from services.telemetry.convert import list_response, watch_response

__all__ = ["TelemetryServicer"]


class TelemetryServicer(telemetry_pb2_grpc.TelemetryServiceServicer):
    """Answers from the latest sample. A call that comes before the first one waits for it."""

    def __init__(self, board: Board) -> None:
        self._board = board

    async def ListGpus(self, request: pb.ListGpusRequest, context: Any) -> pb.ListGpusResponse:  # noqa: ARG002
        """The GPUs with their latest readings.

        Raises:
            MeshError: NO_READY_WORKER, this process is stopping before it has sampled anything.
        """
        try:
            return list_response(await self._board.first())
        except EOFError as error:
            raise MeshError(Reason.NO_READY_WORKER, "GPU telemetry is stopping", retry_after_seconds=1) from error

    async def WatchGpus(
        self,
        request: pb.WatchGpusRequest,  # noqa: ARG002
        context: Any,  # noqa: ARG002
    ) -> AsyncIterator[pb.WatchGpusResponse]:
        """All GPUs, then those that changed, until the watcher leaves or this process stops."""
        async with aclosing(self._board.changes()) as changes:
            async for change in changes:
                yield watch_response(change)
