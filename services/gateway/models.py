"""The models that clients may name: GET /v1/models."""

from typing import Any

from services.common.errors import MeshError, Reason
from services.gateway import answers
from services.gateway.caller import Caller
from services.gateway.fleet import FleetWatch, Model
from services.gateway.identity import Identity
from services.gateway.request import Request
from services.gateway.response import Response
from services.gateway.routes import Route

__all__ = ["Models"]


class Models:
    """Lists what the fleet serves."""

    def __init__(self, fleet: FleetWatch) -> None:
        self._fleet = fleet

    @property
    def routes(self) -> list[Route]:
        """What is served."""
        return [
            Route("GET", "/v1/models", self.list, answer=answers.ModelList),
            Route("GET", "/v1/models/{model:path}", self.retrieve, answer=answers.Model),
        ]

    async def list(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """All models."""
        del request, identity, caller
        await response.send_json(200, {"object": "list", "data": [_body(model) for model in self._fleet.models]})

    async def retrieve(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """One model.

        Raises:
            MeshError: MODEL_NOT_FOUND.
        """
        del identity, caller
        name = request.parameters["model"]
        model = self._fleet.model(name)
        if model is None:
            raise MeshError(Reason.MODEL_NOT_FOUND, f"the model {name[:256]!r} does not exist", field="model")
        await response.send_json(200, _body(model))


def _body(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "tokenloom",
        "max_model_len": model.max_context_tokens,
    }
