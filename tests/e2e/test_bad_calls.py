"""Bad gRPC over the whole mesh: each call is refused with a status that fits, at once, and harms nobody."""

import struct
from collections.abc import Iterator
from typing import Any, Final

import grpc
import pytest
from google.rpc import status_pb2
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from services.common.errors import Reason
from services.common.status import DETAILS_KEY, error_from_status
from tests.support.bad_inputs import Bad, assert_answered, assert_harmless
from tests.support.mesh import Mesh

_GENERATE: Final = "/tokenloom.inference.v1.InferenceService/Generate"


def _good(**changed: Any) -> pb.GenerateRequest:
    fields = {"model": "sim", "text": "hi", "sampling": pb.SamplingParameters(max_tokens=1)}
    return pb.GenerateRequest(**{**fields, **changed})


def _sampling(**values: Any) -> bytes:
    return _good(sampling=pb.SamplingParameters(**{"max_tokens": 1, **values})).SerializeToString()


def _nested_groups(depth: int) -> bytes:
    """An unknown field of groups in groups."""
    return _good().SerializeToString() + b"\xa3\x06" * depth + b"\xa4\x06" * depth


_WIRE = _good().SerializeToString()
_INVALID: Final = grpc.StatusCode.INVALID_ARGUMENT
_EXHAUSTED: Final = grpc.StatusCode.RESOURCE_EXHAUSTED

# Which kind of bad input, the message, the status, its reason and field, and whether it takes a worker to find it bad.
CALLS: list[tuple[int, bytes, grpc.StatusCode, Reason, str | None, bool]] = [
    (87, _WIRE + b"\x12" + b"\x80\x80\xc0\x02" + b"x" * (5 << 20), _EXHAUSTED, Reason.REQUEST_TOO_LARGE, None, False),
    (88, b"\xff\xff\xff\xff", _INVALID, Reason.INVALID_REQUEST, None, False),
    (88, b"garbage", _INVALID, Reason.INVALID_REQUEST, None, False),
    (88, _WIRE[:-1], _INVALID, Reason.INVALID_REQUEST, None, False),
    (88, _nested_groups(10_000), _INVALID, Reason.INVALID_REQUEST, None, False),
    (94, b"", _INVALID, Reason.INVALID_REQUEST, "model", False),
    (94, _good(model="nope").SerializeToString(), grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND, "model", False),
    (94, _sampling(temperature=float("nan")), _INVALID, Reason.INVALID_REQUEST, "sampling.temperature", True),
    (94, _sampling(top_p=float("inf")), _INVALID, Reason.INVALID_REQUEST, "sampling.top_p", True),
    (94, _sampling(min_p=-1), _INVALID, Reason.INVALID_REQUEST, "sampling.min_p", True),
    (94, _sampling(max_tokens=0), _INVALID, Reason.INVALID_REQUEST, "sampling.max_tokens", True),
    (94, _sampling(logprob_count=129), _INVALID, Reason.INVALID_REQUEST, "sampling.logprob_count", True),
    (94, _sampling(stop=["a"] * 1000), _INVALID, Reason.INVALID_REQUEST, "sampling.stop", True),
    (
        94,
        pb.GenerateRequest(model="sim", token_ids=pb.TokenIds(ids=[5] * 1_000_000)).SerializeToString(),
        _INVALID,
        Reason.CONTEXT_LENGTH_EXCEEDED,
        None,
        False,
    ),
    (
        94,
        pb.GenerateRequest(model="sim", token_ids=pb.TokenIds(ids=[2**32 - 1])).SerializeToString(),
        _INVALID,
        Reason.INVALID_REQUEST,
        "token_ids.ids[0]",
        True,
    ),
]


@pytest.fixture
def channel(sim_mesh: Mesh) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(sim_mesh.edge_target, options=[("grpc.max_send_message_length", -1)]) as opened:
        yield opened


def _call(channel: grpc.Channel, method: str, message: bytes, **options: Any) -> grpc.RpcError:
    """What a call with these bytes fails with."""
    send: Any = channel.unary_stream(method)  # Any: its types tell of messages, and these are bytes that may be none
    with pytest.raises(grpc.RpcError) as caught:
        list(send(message, **{"timeout": 5, **options}))
    return caught.value


def test_bad_messages_are_refused_by_name_and_harm_nobody(sim_mesh: Mesh, channel: grpc.Channel) -> None:
    wrong = []
    with assert_harmless(sim_mesh) as asked:
        for number, message, code, reason, field, by_worker in CALLS:
            error = _call(channel, _GENERATE, message, metadata=sim_mesh.metadata)
            asked.by_worker += by_worker
            details = [entry.value for entry in error.trailing_metadata() or () if entry.key == DETAILS_KEY]
            found = [error_from_status(status_pb2.Status.FromString(each)) for each in details]
            told = [(each.reason, each.field) for each in found]
            if error.code() != code or told != [(reason, field)]:
                wrong.append(f"{number}: {message[:50]!r}: {error.code()} {error.details()!r}, {told}")
    assert not wrong, "\n".join(["", *wrong])


def test_a_call_that_is_too_late_begins_nothing(sim_mesh: Mesh, channel: grpc.Channel) -> None:
    with assert_harmless(sim_mesh) as asked:
        asked.may_reach = True
        for number in range(3):
            error = _call(channel, _GENERATE, _WIRE, metadata=sim_mesh.metadata, timeout=0.0 if number else 1e-4)
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_odd_metadata_and_methods_are_refused(sim_mesh: Mesh, channel: grpc.Channel) -> None:
    large = (("x-large", "y" * (1 << 20)),)
    many = tuple((f"x-{index}", "y") for index in range(10_000))
    with assert_harmless(sim_mesh):
        for metadata in (large, many):
            # The edge resets the stream, as HTTP/2 has no other way before it has read the headers.
            error = _call(channel, _GENERATE, _WIRE, metadata=(*sim_mesh.metadata, *metadata))
            assert error.code() in (
                _EXHAUSTED,
                grpc.StatusCode.INTERNAL,
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.UNKNOWN,
            )
        for method in ("/tokenloom.inference.v1.InferenceService/Nope", "/nope.Nope/Nope"):
            error = _call(channel, method, b"", metadata=sim_mesh.metadata)
            assert error.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_storm_of_cancelled_calls_leaves_idle_engines(sim_mesh: Mesh, channel: grpc.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = _good(sampling=pb.SamplingParameters(max_tokens=500, ignore_eos=True))
    with assert_harmless(sim_mesh) as asked:
        for after in (0, 0, 0, 1, 1, 5):
            calls = [stub.Generate(request, metadata=sim_mesh.metadata, timeout=20) for _ in range(8)]
            for call in calls:
                for _ in range(after):
                    next(call)
                call.cancel()
        asked.may_begin = True


def _web(number: int, status: int, content: bytes, headers: dict[str, str] | None = None) -> Bad:
    """A call over HTTP/1.1, byte by byte as it is here, whose refusal has this HTTP status."""
    headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1", **(headers or {})}
    return Bad(number=number, path=_GENERATE, content=content, headers=headers, status=status, is_web=True)


def _frame(message: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    return struct.pack(">BI", flag, len(message) if length is None else length) + message


FRAMES = [
    _web(87, 413, _frame(_WIRE, length=0xFFFFFFFF)),
    _web(87, 400, _frame(_WIRE, length=len(_WIRE) + 1)),
    _web(88, 400, b"\0\0"),
    _web(89, 400, _frame(_WIRE, flag=1)),
    _web(89, 400, _frame(_WIRE, flag=1), {"grpc-encoding": "nonsense"}),
    _web(89, 400, _frame(_WIRE, flag=7)),
    _web(90, 504, _frame(_WIRE), {"grpc-timeout": "0m"}),
    Bad(number=93, path=_GENERATE, content=_frame(_WIRE), status=415, code="unsupported_media_type"),
    Bad(
        number=93,
        path=_GENERATE,
        content=b"{}",
        headers={"content-type": ""},
        status=415,
        code="unsupported_media_type",
    ),
]


def test_bad_frames_are_refused_and_harm_nobody(sim_mesh: Mesh) -> None:
    assert_answered(sim_mesh, FRAMES)
