"""Envoy's access log service: how each call of the typed lane went, without anybody standing in its way.

Of a call that the edge let in without asking, since it remembered the key, it also tells that it has begun.

The worker ends a call with what it took in trailing metadata, and the edge sends that on when the call is over. A call
that its client left has no such end: what it took is told by the messages that passed, one for the start and then one a
token.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import grpc.aio
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.extensions.filters.http.grpc_stats.v3 import config_pb2 as grpc_stats_pb2
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc

from services.common.errors import TABLE, Reason
from services.common.status import REASON_OF_CODE
from services.common.typed_calls import ACCOUNT_HEADER
from services.gateway.caller import LONGEST_SESSION
from services.gateway.pieces import Spent
from services.gateway.typed_lane import Begun, Call, TypedAccounts

__all__ = ["AccessLogServicer"]

_STATS: Final = "envoy.filters.http.grpc_stats"
_USAGE: Final = "x-tokenloom-usage-"
_BYTES_A_TOKEN: Final = 4
_AT_A_TIME: Final = 16
_CODES: Final = {str(code.value[0]): code.name for code in grpc.StatusCode}
_REASONS: Final = frozenset(reason.value.lower() for reason in Reason)
_OF_HTTP: Final = {row.http: reason for reason, row in reversed(TABLE.items())}


class AccessLogServicer(als_pb2_grpc.AccessLogServiceServicer):
    """Opens the accounts of calls that the edge has let in itself, and settles those of calls that are over."""

    def __init__(self, accounts: TypedAccounts) -> None:
        self._accounts = accounts

    async def StreamAccessLogs(
        self,
        request_iterator: AsyncIterator[als_pb2.StreamAccessLogsMessage],
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002  # gRPC's signature
    ) -> als_pb2.StreamAccessLogsResponse:
        """Reads the edge's log for as long as it sends it."""
        async for message in request_iterator:
            for number, entry in enumerate(message.http_logs.log_entry, 1):
                if number % _AT_A_TIME == 0:
                    # Many come at once after this process was away.
                    await asyncio.sleep(0)
                if ACCOUNT_HEADER not in entry.request.request_headers:
                    continue
                if entry.common_properties.access_log_type == accesslog_pb2.UpstreamPoolReady:
                    self._accounts.begun(Begun(**_begun(entry)))
                else:
                    self._accounts.settle(_call(entry))
        return als_pb2.StreamAccessLogsResponse()


def _begun(entry: accesslog_pb2.HTTPAccessLogEntry) -> dict[str, Any]:
    common, headers = entry.common_properties, entry.request.request_headers
    return {
        "account_id": headers[ACCOUNT_HEADER],
        "request_id": entry.request.request_id,
        "time": common.start_time.ToNanoseconds() / 1e9,
        "path": entry.request.original_path or entry.request.path,
        "tenant": headers.get("x-tokenloom-tenant", ""),
        "key_id": headers.get("x-tokenloom-key", ""),
    }


def _call(entry: accesslog_pb2.HTTPAccessLogEntry) -> Call:
    common, headers = entry.common_properties, entry.request.request_headers
    first = common.time_to_first_downstream_tx_byte
    duration = common.duration.ToNanoseconds() / 1e9
    has_first = common.HasField("time_to_first_downstream_tx_byte")
    return Call(
        **_begun(entry),
        outcome=_outcome(entry),
        duration_seconds=duration,
        ttft_seconds=first.ToNanoseconds() / 1e9 if has_first else None,
        spent=_spent(entry, duration) if common.HasField("upstream_remote_address") else None,
        status=entry.response.response_code.value,
        trace_id=_trace_id(headers.get("traceparent", "")),
        session=headers.get("x-session-id", "")[:LONGEST_SESSION],
    )


def _trace_id(traceparent: str) -> str:
    # The edge's own: it makes one, or has checked the client's.
    parts = traceparent.split("-")
    return parts[1] if len(parts) == 4 else ""


def _outcome(entry: accesslog_pb2.HTTPAccessLogEntry) -> str:
    flags, answer = entry.common_properties.response_flags, entry.response
    status: str | None = answer.response_trailers.get("grpc-status") or answer.response_headers.get("grpc-status")
    if status == "0":
        return "ok"
    if flags.downstream_connection_termination or flags.downstream_remote_reset:
        return "client_left"
    details: str = answer.response_code_details.lower()
    if details in _REASONS:
        return details
    if status is not None:
        reason = REASON_OF_CODE.get(_CODES.get(status, ""), Reason.INTERNAL)
        return reason.value.lower()
    if answer.response_code.value == 200:
        return "ok"
    return _OF_HTTP.get(answer.response_code.value, Reason.INTERNAL).value.lower()


def _spent(entry: accesslog_pb2.HTTPAccessLogEntry, duration: float) -> Spent:
    common, trailers = entry.common_properties, entry.response.response_trailers
    address = common.upstream_remote_address.socket_address
    spent = Spent(worker=trailers.get(f"{_USAGE}worker") or f"{address.address}:{address.port_value}")
    spent.model = trailers.get(f"{_USAGE}model", "")
    # Its own time at the worker, as far as the edge can see it.
    asked = common.time_to_first_upstream_tx_byte.ToNanoseconds() / 1e9
    spent.running_seconds = max(0.0, duration - asked)
    if common.HasField("time_to_first_downstream_tx_byte"):
        spent.ttft_seconds = common.time_to_first_downstream_tx_byte.ToNanoseconds() / 1e9
    if f"{_USAGE}prompt-tokens" in trailers:
        _read_usage(spent, trailers, duration)
    else:
        _guess_usage(spent, entry)
    return spent


def _read_usage(spent: Spent, trailers: Mapping[str, str], duration: float) -> None:
    spent.prompt_tokens = _number(trailers, "prompt-tokens")
    spent.cached_tokens = _number(trailers, "cached-tokens")
    spent.output_tokens = _number(trailers, "output-tokens")
    spent.queue_seconds = _number(trailers, "queue-us") / 1e6
    spent.prefill_seconds = _number(trailers, "prefill-us") / 1e6
    if f"{_USAGE}gpu-us" in trailers:
        spent.gpu_seconds = _number(trailers, "gpu-us") / 1e6
    if spent.ttft_seconds is not None and spent.output_tokens > 1:
        spent.tpot_seconds = max(0.0, duration - spent.ttft_seconds) / (spent.output_tokens - 1)


def _guess_usage(spent: Spent, entry: accesslog_pb2.HTTPAccessLogEntry) -> None:
    stats = grpc_stats_pb2.FilterObject()
    packed = entry.common_properties.filter_state_objects.get(_STATS)
    if packed is not None and packed.Unpack(stats) and stats.response_message_count:
        spent.output_tokens = stats.response_message_count - 1
        spent.prompt_tokens = entry.request.request_body_bytes // _BYTES_A_TOKEN


def _number(trailers: Mapping[str, str], name: str) -> int:
    value = trailers.get(_USAGE + name, "")
    return int(value) if value.isdecimal() and len(value) < 16 else 0
