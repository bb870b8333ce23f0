"""Envoy's end of the external processing stream of one HTTP request."""

import asyncio
import base64
from typing import Any

import grpc.aio
from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc
from google.protobuf.message import Message
from google.rpc import status_pb2

from services.common.errors import MeshError
from services.common.status import DETAILS_KEY, error_from_status

__all__ = ["BUFFERED", "DESTINATION", "FULL_DUPLEX", "NO_BODY", "Envoy", "body_message", "framed", "reply_headers"]

FULL_DUPLEX = processing_mode_pb2.ProcessingMode.FULL_DUPLEX_STREAMED
NO_BODY = processing_mode_pb2.ProcessingMode.NONE
BUFFERED = processing_mode_pb2.ProcessingMode.BUFFERED
DESTINATION = "x-gateway-destination-endpoint"
_SERVICE = "/tokenloom.inference.v1.InferenceService/"


def framed(message: Message) -> bytes:
    """A message as gRPC frames it."""
    data = message.SerializeToString()
    return b"\0" + len(data).to_bytes(4, "big") + data


def body_message(method: str, body: bytes, *, mode: int, ended: bool = True, **headers: str) -> Any:
    """A request's body as the first message, with the headers that the picker reads as attributes."""
    named = {":path": _SERVICE + method, "content-type": "application/grpc"}
    named |= {key.replace("_", "-"): value for key, value in headers.items()}
    message = ext_proc.ProcessingRequest(
        request_body=ext_proc.HttpBody(body=body, end_of_stream=ended),
        protocol_config=ext_proc.ProtocolConfiguration(request_body_mode=mode),
    )
    for name, value in named.items():
        shown = message.attributes["envoy.filters.http.ext_proc"].fields[f"request.headers['{name}']"]
        shown.string_value = value
    return message


class Envoy:
    """One HTTP request that Envoy shows to the picker."""

    def __init__(self, to_router: grpc.aio.Channel, *, mode: int = FULL_DUPLEX, metadata: Any = ()) -> None:
        self._mode = mode
        self.call: Any = external_processor_pb2_grpc.ExternalProcessorStub(to_router).Process(metadata=metadata)

    async def headers(
        self, method: str = "Generate", *, path: str = "", ended: bool = False, subset: Any = None, **headers: str
    ) -> None:
        """Sends the request's headers: gRPC's to a method of InferenceService, or JSON's to `path`."""
        kind = "application/json" if path else "application/grpc"
        named = {":path": path or _SERVICE + method, "content-type": kind}
        named |= {key.replace("_", "-"): value for key, value in headers.items()}
        message = ext_proc.ProcessingRequest(
            request_headers=ext_proc.HttpHeaders(headers=_map(named), end_of_stream=ended),
            protocol_config=ext_proc.ProtocolConfiguration(request_body_mode=self._mode),
        )
        if subset is not None:
            hint = message.metadata_context.filter_metadata["envoy.lb.subset_hint"]
            hint[f"{DESTINATION}-subset"] = subset
        await self.call.write(message)

    async def body_alone(self, method: str, body: bytes, *, ended: bool = True, **headers: str) -> None:
        """Sends the request's body as the first message, with the headers that the picker reads as attributes."""
        await self.call.write(body_message(method, body, mode=self._mode, ended=ended, **headers))

    async def body(self, body: bytes, *, ended: bool = True) -> None:
        """Sends a piece of the request's body."""
        await self.send(request_body=ext_proc.HttpBody(body=body, end_of_stream=ended))

    async def send(self, **message: Any) -> None:
        """Sends any message."""
        await self.call.write(ext_proc.ProcessingRequest(**message))

    async def send_response(self, **trailers: str) -> None:
        """Sends the headers and trailers of the worker's answer."""
        await self.send(response_headers=ext_proc.HttpHeaders(headers=_map({":status": "200"})))
        named = {key.replace("_", "-"): value for key, value in trailers.items()}
        await self.send(response_trailers=ext_proc.HttpTrailers(trailers=_map(named)))

    async def answer(self) -> Any:
        """The next answer that is more than a plea for patience."""
        async with asyncio.timeout(5):
            while (answer := await self.call.read()) is not grpc.aio.EOF and answer.WhichOneof("response") is None:
                assert answer.HasField("override_message_timeout")
        return answer

    async def picked(self) -> str:
        """The endpoint in the next answer, which must be the same in the header and in the metadata."""
        answer = await self.answer()
        kind = answer.WhichOneof("response")
        assert kind in ("request_headers", "request_body"), answer
        (option,) = getattr(answer, kind).response.header_mutation.set_headers
        endpoint: str = option.header.raw_value.decode()
        assert option.header.key == DESTINATION
        assert option.append_action == base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
        assert answer.dynamic_metadata["envoy.lb"][DESTINATION] == endpoint
        return endpoint

    async def refused(self) -> Any:
        """The immediate response in the next answer."""
        answer = await self.answer()
        assert answer.WhichOneof("response") == "immediate_response", answer
        return answer.immediate_response

    async def error(self) -> MeshError:
        """The rich error that a gRPC client gets out of the immediate response."""
        details = reply_headers(await self.refused())[DETAILS_KEY]
        assert not details.endswith("=")
        decoded = base64.b64decode(details + "=" * (-len(details) % 4))
        return error_from_status(status_pb2.Status.FromString(decoded))


def reply_headers(response: Any) -> dict[str, str]:
    """The headers that an immediate response sets."""
    return {option.header.key: option.header.raw_value.decode() for option in response.headers.set_headers}


def _map(headers: dict[str, str]) -> Any:
    values = [base_pb2.HeaderValue(key=key, raw_value=value.encode()) for key, value in headers.items()]
    return base_pb2.HeaderMap(headers=values)
