"""gRPC plumbing: servers and channels with the mesh's options, and errors that every servicer may just raise."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common.errors import MeshError, Reason
from services.common.status import abort

__all__ = ["MAX_MESSAGE_BYTES", "Server", "channel", "connected", "metadata_of", "serve", "timeout_seconds"]

MAX_MESSAGE_BYTES: Final = 4 << 20
_TIMEOUT_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_MOST_TIMEOUT_DIGITS: Final = 8
_log = logging.getLogger(__name__)

_KEEPALIVE: Final[list[tuple[str, Any]]] = [
    ("grpc.max_send_message_length", 4 * MAX_MESSAGE_BYTES),
    # A peer that vanished without a FIN is noticed within 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
_SERVER_OPTIONS: Final[list[tuple[str, Any]]] = [
    *_KEEPALIVE,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Two processes on one port would share its connections, and half the calls would go to a ghost.
    ("grpc.so_reuseport", 0),
    # Gateways ask workers that are silent every second whether they are there.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.max_metadata_size", 16 << 10),
]
_CHANNEL_OPTIONS: Final[list[tuple[str, Any]]] = [
    *_KEEPALIVE,
    # Processes come back on the port that they had; a second of backoff is a second without service.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


def metadata_of(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str | bytes]:
    """The metadata that a call came with. Of a repeated key the last value."""
    return {str(key): value for key, value in context.invocation_metadata() or ()}


def channel(target: str, *, max_receive_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
    """A channel to another process of the mesh. Use it as an async context manager."""
    options = [*_CHANNEL_OPTIONS, ("grpc.max_receive_message_length", max_receive_bytes)]
    return grpc.aio.insecure_channel(target, options=options)


def timeout_seconds(text: str) -> float | None:
    """The value of a `grpc-timeout` header; None when it is none."""
    digits, unit = text[:-1], text[-1:]
    if not digits.isdecimal() or len(digits) > _MOST_TIMEOUT_DIGITS or unit not in _TIMEOUT_UNITS:
        return None
    return int(digits) * _TIMEOUT_UNITS[unit]


async def connected(connection: grpc.aio.Channel, *, within: float) -> None:
    """Waits until a channel is connected, and no longer than until it is plain that it won't be.

    Raises:
        TimeoutError: nobody listens there, or nobody answers for `within` seconds.
    """
    async with asyncio.timeout(within):
        while (state := connection.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                raise TimeoutError("no connection")
            await connection.wait_for_state_change(state)


class Server:
    """A running gRPC server: its port, and the health that it reports."""

    def __init__(self, port: int, health_servicer: health.aio.HealthServicer, names: Sequence[str]) -> None:
        self.port = port
        self._health = health_servicer
        self._names = ("", *names)

    async def set_serving(self, serving: bool) -> None:
        """Reports every service of this server as serving or not."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)


@asynccontextmanager
async def serve(
    address: str,
    register: Callable[[grpc.aio.Server], Sequence[str]],
    *,
    grace_seconds: float = 5.0,
    max_streams: int = 10_000,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    health_names: Sequence[str] = (),
) -> AsyncIterator[Server]:
    """Serves gRPC on `host:port` (port 0: any free one) until the block is left.

    `register` adds the servicers and returns their full service names. grpc.health.v1 is served beside them and says
    NOT_SERVING until set_serving(True); it knows `health_names` beside the services. A servicer may raise MeshError;
    anything else that it raises becomes INTERNAL with its text in the log only.

    Raises:
        OSError: the address is in use or not ours.
    """
    server = grpc.aio.server(
        options=list({**dict(_SERVER_OPTIONS), "grpc.max_receive_message_length": max_message_bytes}.items()),
        interceptors=[_ErrorInterceptor()],
        maximum_concurrent_rpcs=max_streams,
    )
    names = list(register(server))
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"can't listen on {address}: {error}") from error
    running = Server(port, health_servicer, [*names, *health_names])
    await running.set_serving(False)
    await server.start()
    try:
        yield running
    finally:
        await running.set_serving(False)
        await asyncio.shield(server.stop(grace_seconds))


class _ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what servicers raise into rich statuses."""

    def __init__(self) -> None:
        # By method; gRPC asks for each call, and knows a method that is served by one handler all the time.
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        known = self._wrapped.get(handler_call_details.method)
        if known is None or known[0] is not handler:
            known = self._wrapped[handler_call_details.method] = (handler, _wrap(handler))
        return known[1]


def _wrap(handler: Any) -> Any:
    serializers = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(_guard_unary(handler.unary_unary), **serializers)
    if handler.stream_unary:
        return grpc.stream_unary_rpc_method_handler(_guard_unary(handler.stream_unary), **serializers)
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(_guard_stream(handler.unary_stream), **serializers)
    return grpc.stream_stream_rpc_method_handler(_guard_stream(handler.stream_stream), **serializers)


def _guard_unary(behaviour: Any) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await behaviour(request, context)
        except Exception as error:  # noqa: BLE001  # the last line of defence: whatever it is becomes a status
            await _fail(context, error)

    return guarded


def _guard_stream(behaviour: Any) -> Any:
    if inspect.iscoroutinefunction(behaviour):
        # It writes to the context itself, and a call that is cancelled reaches it at once, also within a write.
        return _guard_unary(behaviour)

    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:  # noqa: BLE001  # the last line of defence: whatever it is becomes a status
            await _fail(context, error)

    return guarded


async def _fail(context: Any, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError | grpc.aio.BaseError):
        raise error
    if not isinstance(error, MeshError):
        _log.error("a servicer failed", exc_info=error)
        error = MeshError(Reason.INTERNAL, "internal error")
    await abort(context, error)
