"""The worker's gRPC services over its engine."""

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, Final

import grpc.aio
from tokenloom.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc

from services.common.allowed_models import check_unrouted
from services.common.errors import MeshError, Reason
from services.common.priority import PRIORITY_HEADER, priority_of
from services.common.rpc import metadata_of
from services.inference import convert
from services.inference.call import Call
from services.inference.convert import timing_metadata, usage_metadata
from services.inference.engine import AdapterControl, card_of, cards_of
from services.inference.gate import Gate
from services.inference.generations import Generations, Run
from services.inference.lifecycle import Lifecycle
from services.inference.patience import Abandoned, Writing, bounded_writes
from services.inference.pooling_calls import PoolingCalls
from services.inference.session import Session

__all__ = ["InferenceServicer", "WorkerServicer", "register"]

_CLIENT_SECONDS: Final = 30.0


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """The public, typed way in."""

    def __init__(
        self, gate: Gate, generations: Generations, *, worker: str = "", client_seconds: float = _CLIENT_SECONDS
    ) -> None:
        """`worker`: the name of this worker, for the accounts of calls.

        `client_seconds`: how long a client may take nothing of its answer.
        """
        self._gate = gate
        self._generations = generations
        self._worker = worker
        self._client_seconds = client_seconds
        self.abandoned = Abandoned()
        """The requests whose clients took nothing for so long."""
        self.pooling = PoolingCalls(gate, generations)
        """What is answered beside Generate."""

    async def Generate(  # type: ignore[override]  # grpc.aio takes a coroutine that writes, the stub knows only generators
        self,
        request: generation_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """Streams one generation."""
        left = context.time_remaining()
        if left is not None and left <= 0:
            raise MeshError(Reason.DEADLINE_EXCEEDED, "the deadline has passed already")
        loop = asyncio.get_running_loop()

        def overflowed() -> None:
            # Soon, since this is called from within the engine.
            loop.call_soon(run.fail, MeshError(Reason.NO_CAPACITY, "the output is not read in time"))

        call = Call(request.model, overflowed=overflowed)
        run = self._start(request, call, context)
        try:
            await run.submit()
            async with bounded_writes(self._client_seconds) as writing:
                await self._stream(call, request.model, context, writing)
        except TimeoutError:
            self.abandoned.note(str(metadata_of(context).get("x-request-id", "")))
            raise MeshError(Reason.NO_CAPACITY, "the output is not read in time") from None
        finally:
            run.cancel()

    async def Embed(
        self, request: inference_pb2.EmbedRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.EmbedResponse:
        """One embedding a text."""
        check_unrouted(request.model, metadata_of(context))
        return await self.pooling.embed(request, context)

    async def Tokenize(
        self,
        request: inference_pb2.TokenizeRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> inference_pb2.TokenizeResponse:
        """Tokenizes as Generate would."""
        check_unrouted(request.model, metadata_of(context))
        return await self.pooling.tokenize(request)

    async def Detokenize(
        self,
        request: inference_pb2.DetokenizeRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> inference_pb2.DetokenizeResponse:
        """Turns tokens back into text."""
        check_unrouted(request.model, metadata_of(context))
        return await self.pooling.detokenize(request)

    async def Score(
        self, request: inference_pb2.ScoreRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.ScoreResponse:
        """One score a text."""
        check_unrouted(request.model, metadata_of(context))
        return await self.pooling.score(request, context)

    async def ListModels(
        self,
        request: inference_pb2.ListModelsRequest,  # noqa: ARG002  # gRPC's signature
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002  # gRPC's signature
    ) -> inference_pb2.ListModelsResponse:
        """The model of this worker, and its adapters."""
        return inference_pb2.ListModelsResponse(models=map(convert.model_card_to_proto, cards_of(self._gate.engine)))

    def _start(
        self, request: generation_pb2.GenerateRequest, call: Call, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Run:
        metadata = metadata_of(context)
        request_id = str(metadata.get("x-request-id", ""))
        try:
            check_unrouted(request.model, metadata)
            engine = self._gate.admit()
            generation = convert.generation_from_proto(
                request,
                card_of(engine, request.model),
                generation_id=self._generations.new_id(request_id),
                priority=_priority(metadata),
                traceparent=str(metadata.get("traceparent", "")),
                tenant=str(metadata.get("x-tokenloom-tenant", "")),
            )
        except MeshError as error:
            self._generations.refused(error)
            raise
        return self._generations.start(engine, generation, call, request_id)

    async def _stream(
        self, call: Call, model: str, context: grpc.aio.ServicerContext[Any, Any], writing: Writing
    ) -> None:
        loop = asyncio.get_running_loop()
        async with aclosing(call.events()) as events:
            async for event in events:
                if event.HasField("delta"):
                    self._generations.metrics.output(len(event.delta.token_ids))
                elif event.HasField("completed"):
                    usage = event.completed.usage
                    context.set_trailing_metadata(
                        (
                            *usage_metadata(
                                usage.prompt_token_count, usage.cached_token_count, usage.output_token_count
                            ),
                            *timing_metadata(model, self._worker, event.completed.timings),
                        )
                    )
                writing.since = loop.time()
                await context.write(event)
                writing.since = None


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """The inside door: sessions with gateways."""

    def __init__(self, gate: Gate, generations: Generations, lifecycle: Lifecycle) -> None:
        self._gate = gate
        self._generations = generations
        self._lifecycle = lifecycle
        self._sessions: set[Session] = set()
        self._closed = False

    async def Session(  # type: ignore[override]  # grpc.aio takes a coroutine that writes, the stub knows only generators
        self,
        request_iterator: Any,
        context: grpc.aio.ServicerContext[worker_pb2.SessionRequest, worker_pb2.SessionResponse],
    ) -> None:
        """Serves one gateway for as long as it is there."""
        if self._closed:
            raise MeshError(Reason.NO_READY_WORKER, "this worker is stopping", retry_after_seconds=1.0)
        session = Session(self._gate, self._generations)
        self._sessions.add(session)
        try:
            await session.run(request_iterator, context.write)
        finally:
            self._sessions.discard(session)

    async def LoadAdapter(
        self,
        request: worker_pb2.LoadAdapterRequest,
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002  # gRPC's signature
    ) -> worker_pb2.LoadAdapterResponse:
        """Serves an adapter."""
        card = await self._adapters().load(request.name, request.path)
        return worker_pb2.LoadAdapterResponse(model=convert.model_card_to_proto(card))

    async def UnloadAdapter(
        self,
        request: worker_pb2.UnloadAdapterRequest,
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002  # gRPC's signature
    ) -> worker_pb2.UnloadAdapterResponse:
        """Serves an adapter no more."""
        await self._adapters().unload(request.name)
        return worker_pb2.UnloadAdapterResponse()

    async def Sleep(
        self,
        request: worker_pb2.SleepRequest,
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002  # gRPC's signature
    ) -> worker_pb2.SleepResponse:
        """Gives the GPU's memory back until Wake."""
        await self._lifecycle.sleep(request.level)
        return worker_pb2.SleepResponse()

    async def Wake(
        self,
        request: worker_pb2.WakeRequest,  # noqa: ARG002  # gRPC's signature
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002  # gRPC's signature
    ) -> worker_pb2.WakeResponse:
        """Takes the GPU's memory again."""
        await self._lifecycle.wake()
        return worker_pb2.WakeResponse()

    async def ReloadWeights(
        self,
        request: worker_pb2.ReloadWeightsRequest,
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002  # gRPC's signature
    ) -> worker_pb2.ReloadWeightsResponse:
        """Replaces the model's weights in place."""
        await self._lifecycle.reload(request.path)
        return worker_pb2.ReloadWeightsResponse()

    def _adapters(self) -> AdapterControl:
        if (adapters := self._gate.engine.adapters) is None:
            message = "this worker takes no adapters: its model has no setting adapters_dir, or its engine can't"
            raise MeshError(Reason.FAILED_PRECONDITION, message)
        return adapters

    def close(self) -> None:
        """Ends every session once what is waiting is written, and takes no new one."""
        self._closed = True
        for session in self._sessions:
            session.close()


def _priority(metadata: Mapping[str, str | bytes]) -> int:
    asked = metadata.get(PRIORITY_HEADER)
    own = convert.priority_from_metadata(str(metadata.get("x-tokenloom-priority", "")))
    return priority_of(None if asked is None else str(asked), own)


def register(server: grpc.aio.Server, inference: InferenceServicer, worker: WorkerServicer) -> list[str]:
    """Adds the services to a server; returns their names."""
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server)
    return [
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
        worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name,
    ]
