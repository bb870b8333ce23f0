"""The models that clients may name: GET /v1/models, and ListModels of the typed lane."""

from typing import Any, Final

import grpc
import grpc.aio
from tokenloom.inference.v1 import inference_pb2

from services.common.allowed_models import MODELS_HEADER, allows
from services.common.errors import MeshError, Reason
from services.common.rpc import metadata_of
from services.gateway import answers
from services.gateway.caller import Caller
from services.gateway.fleet import FleetWatch, Model
from services.gateway.identity import Identity
from services.gateway.request import Request
from services.gateway.response import Response
from services.gateway.routes import Route

__all__ = ["Models", "TypedModels"]

_SERVICE: Final = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


class Models:
    """Lists what the fleet serves, of which each key is shown what it may use."""

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
        del request, caller
        data = [_body(model) for model in self._fleet.models if identity.may_name(model.name)]
        await response.send_json(200, {"object": "list", "data": data})

    async def retrieve(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """One model.

        Raises:
            MeshError: MODEL_NOT_FOUND, or PERMISSION_DENIED where the key may not use it.
        """
        del caller
        name = request.parameters["model"]
        model = self._fleet.model(name)
        if model is None:
            raise MeshError(Reason.MODEL_NOT_FOUND, f"the model {name[:256]!r} does not exist", field="model")
        identity.check_model(name)
        await response.send_json(200, _body(model))


class TypedModels:
    """ListModels of the typed lane, as the edge asks for it; workers do everything else of that service."""

    def __init__(self, fleet: FleetWatch) -> None:
        self._fleet = fleet

    def register(self, server: grpc.aio.Server) -> str:
        """Adds it to a server; returns the service's name."""
        listing = grpc.unary_unary_rpc_method_handler(
            self.list,
            request_deserializer=inference_pb2.ListModelsRequest.FromString,
            response_serializer=inference_pb2.ListModelsResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {"ListModels": listing}),))
        return _SERVICE

    async def list(
        self,
        request: inference_pb2.ListModelsRequest,  # noqa: ARG002  # gRPC's signature
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> inference_pb2.ListModelsResponse:
        """The models and aliases that the caller's key may use, as the edge tells."""
        allowed = metadata_of(context).get(MODELS_HEADER)
        names = None if allowed is None else str(allowed)
        listed = [model.card for model in self._fleet.models if allows(names, model.name)]
        return inference_pb2.ListModelsResponse(models=listed)


def _body(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "tokenloom",
        "max_model_len": model.max_context_tokens,
    }
