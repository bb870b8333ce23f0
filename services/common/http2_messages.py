"""gRPC's messages in the bytes of a stream: cut out of what comes, framed for what goes."""

from collections.abc import Iterator
from typing import Final

from services.common.errors import MeshError, Reason

__all__ = ["MessageReader", "prefixed"]

_PREFIX_BYTES: Final = 5


def prefixed(message: bytes) -> bytes:
    """A message as it goes into a stream: not compressed, behind its length."""
    return b"\0" + len(message).to_bytes(4, "big") + message


class MessageReader:
    """Cuts what a peer sends into messages."""

    def __init__(self, max_bytes: int) -> None:
        """Of one message."""
        self._max_bytes = max_bytes
        self._incoming = bytearray()

    def __len__(self) -> int:
        """The bytes that are no whole message yet."""
        return len(self._incoming)

    def clear(self) -> None:
        """Forgets them."""
        self._incoming.clear()

    def read(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete with `data`; read them all, or clear().

        Raises:
            MeshError: what comes is compressed, or too large.
        """
        if not self._incoming and len(data) >= _PREFIX_BYTES and len(data) == _PREFIX_BYTES + self._size_of(data):
            # One frame, one message: nearly always.
            yield data[_PREFIX_BYTES:]
            return
        incoming = self._incoming
        incoming += data
        while len(incoming) >= _PREFIX_BYTES:
            end = _PREFIX_BYTES + self._size_of(incoming)
            if len(incoming) < end:
                return
            message = bytes(memoryview(incoming)[_PREFIX_BYTES:end])
            del incoming[:end]
            yield message

    def _size_of(self, data: bytes | bytearray) -> int:
        size = int.from_bytes(data[1:_PREFIX_BYTES], "big")
        if data[0] != 0:
            raise MeshError(Reason.UNIMPLEMENTED, "compressed messages are not taken")
        if size > self._max_bytes:
            raise MeshError(Reason.REQUEST_TOO_LARGE, f"the message has more than {self._max_bytes} bytes")
        return size
