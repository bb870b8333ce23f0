"""The Responses API: POST /v1/responses, and what it remembers."""

import time
import uuid
from contextlib import nullcontext
from typing import Any

import msgspec
from opentelemetry import trace

from services.common.errors import MeshError, Reason
from services.gateway.answers import Deleted
from services.gateway.answers_responses import ItemList, ResponseObject
from services.gateway.caller import Caller
from services.gateway.conversations import Conversations, Turn
from services.gateway.convert import in_openai_terms
from services.gateway.convert_chat import from_chat
from services.gateway.convert_responses import chat_request, in_response_terms, input_items
from services.gateway.decoding import decode
from services.gateway.endpoint import Limits
from services.gateway.generation import Generation
from services.gateway.generator import Generator
from services.gateway.http import QUEUE_HEADER
from services.gateway.identity import Identity
from services.gateway.metrics import GatewayMetrics
from services.gateway.recording import describe, record, show_route
from services.gateway.rendering_responses import ResponsesRenderer
from services.gateway.request import Request
from services.gateway.response import Response
from services.gateway.routes import Route
from services.gateway.schema_responses import ResponsesRequest, items_of
from services.gateway.waiting import kept_alive, while_connected

__all__ = ["Responses"]


class Responses:
    """Answers, and remembers its answers unless told not to."""

    def __init__(
        self, generator: Generator, metrics: GatewayMetrics, limits: Limits, conversations: Conversations
    ) -> None:
        self._generator = generator
        self._metrics = metrics
        self._limits = limits
        self._conversations = conversations

    @property
    def routes(self) -> list[Route]:
        """What is served."""
        return [
            Route(
                "POST",
                "/v1/responses",
                self.create,
                body=ResponsesRequest,
                answer=ResponseObject,
                streams=True,
                is_limited=True,
            ),
            Route("GET", "/v1/responses/{response_id}", self.retrieve, answer=ResponseObject),
            Route("DELETE", "/v1/responses/{response_id}", self.delete, answer=Deleted),
            Route("POST", "/v1/responses/{response_id}/cancel", self.cancel, answer=ResponseObject),
            Route("GET", "/v1/responses/{response_id}/input_items", self.list_input, answer=ItemList),
        ]

    async def create(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Answers one request.

        Raises:
            MeshError: it failed; what was sent so far stays unfinished.
            ClientLeftError: the client left, and the generation is stopped.
        """
        body = decode(await self._limits.body_of(request, caller), ResponsesRequest)
        body.check()
        identity.check_model(body.model)
        new = input_items(body)
        earlier, history = await self._history(body, identity)
        asked = chat_request(body, [*items_of(history), *new])
        (generate,) = from_chat(asked)
        describe("chat", asked, caller)
        if body.previous_response_id is not None:
            trace.get_current_span().set_attribute("gen_ai.request.previous_response.id", body.previous_response_id)
        renderer = ResponsesRenderer(answer_id=uuid.uuid4().hex, created=int(time.time()), request=body)
        tell_queue = request.header(QUEUE_HEADER) == "1"
        with while_connected(request, response, self._limits.timeout_seconds):
            try:
                with kept_alive(response, tell_queue=tell_queue) if body.stream else nullcontext():
                    async with self._generator.run(generate, caller) as running:
                        try:
                            answer, closing = await self._answer(body, running, renderer, response, identity)
                        finally:
                            record(
                                running,
                                body.model,
                                response,
                                self._metrics,
                                answer_id=renderer.id,
                                streamed=body.stream,
                            )
                if body.store is not False:
                    turn = Turn(response=msgspec.Raw(answer), input=_stored_input(body), earlier=earlier)
                    await self._conversations.save(identity.tenant, renderer.id, turn)
                # Only now: who is told that it is complete may ask what comes next at once.
                if body.stream:
                    await response.end(closing)
                else:
                    await response.send_json(200, answer)
            except MeshError as error:
                if response.started:
                    await response.send_events(renderer.failed(error))
                raise in_response_terms(in_openai_terms(error)) from error

    async def _history(self, body: ResponsesRequest, identity: Identity) -> tuple[list[str], list[msgspec.Raw]]:
        if body.previous_response_id is None:
            return [], []
        try:
            return await self._conversations.history(identity.tenant, body.previous_response_id)
        except MeshError as error:
            if error.reason is not Reason.NOT_FOUND:
                raise
            raise MeshError(
                Reason.NOT_FOUND,
                f"previous_response_id: {error.message}",
                field="previous_response_id",
                code="previous_response_not_found",
            ) from None

    async def retrieve(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """An earlier answer."""
        del caller
        turn = await self._conversations.turn(identity.tenant, request.parameters["response_id"])
        await response.send_json(200, bytes(turn.response))

    async def delete(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Forgets an earlier answer."""
        del caller
        response_id = request.parameters["response_id"]
        await self._conversations.forget(identity.tenant, response_id)
        await response.send_json(200, {"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Refuses: only answers that are made in the background can be cancelled, and none is."""
        del response, caller
        await self._conversations.turn(identity.tenant, request.parameters["response_id"])
        raise MeshError(
            Reason.INVALID_REQUEST, "only a background response can be cancelled; this one is complete", field=None
        )

    async def list_input(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """The items that an earlier answer was made from."""
        del caller
        turn = await self._conversations.turn(identity.tenant, request.parameters["response_id"])
        items: list[dict[str, Any]] = [msgspec.json.decode(item) for item in turn.input]
        first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
        body = {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": False}
        await response.send_json(200, body)

    async def _answer(
        self,
        body: ResponsesRequest,
        running: Generation,
        renderer: ResponsesRenderer,
        response: Response,
        identity: Identity,
    ) -> tuple[bytes, bytes]:
        """Generates, and sends all of a stream but its last events; returns the response object and these events."""
        if not body.stream:
            pieces = await running.take_whole()
            show_route(running, response, identity)
            renderer.answered_by(running.model)
            assert running.ending is not None
            return msgspec.json.encode(renderer.whole(pieces, running.ending)), b""
        pieces = await running.take()
        show_route(running, response, identity)
        renderer.answered_by(running.model)
        if not response.started:
            await response.start_events()
        head = renderer.first()
        while pieces:
            await response.send_events(head + renderer.pieces(pieces))
            head = b""
            running.write_to(renderer.writer(response.write_events))
            pieces = await running.take()
        assert running.ending is not None
        closing = head + renderer.last(running.ending)
        return msgspec.json.encode(renderer.final), closing


def _stored_input(body: ResponsesRequest) -> list[msgspec.Raw]:
    if isinstance(body.input, str):
        items: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "input_text", "text": body.input}]}]
    else:
        items = [msgspec.json.decode(raw) for raw in body.input]
    return [
        msgspec.Raw(msgspec.json.encode({"type": "message", "id": f"item_{uuid.uuid4().hex}", **item}))
        for item in items
    ]
