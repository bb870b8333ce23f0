"""What one end of a call has to say, as far as its peer takes it; and how an outbox is emptied into it."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from services.common.http2_frames import MAX_FRAME_BYTES, Kind, frame
from services.common.http2_messages import prefixed
from services.common.outbox import Outbox

__all__ = ["Connection", "Outgoing", "send_from"]

M = TypeVar("M")
T_contra = TypeVar("T_contra", contravariant=True)


class Connection(Protocol[T_contra]):
    """What is said goes through this."""

    is_full: bool
    """Whether the system takes no more for now."""

    def write(self, stream: T_contra) -> None:
        """Writes what a stream has to say; nothing, once it is over."""


class Outgoing:
    """The half of a call that is sent."""

    def __init__(self, stream_id: int, window: int) -> None:
        self.stream_id = stream_id
        self.window = window
        """How much more the peer takes."""
        self.unread = 0
        """How much came that the peer was not told to be taken."""
        self.on_room: Callable[[], None] | None = None
        """Is called when there is room again."""
        self._unsent = bytearray()
        self._waits = False

    @property
    def is_held_up(self) -> bool:
        """Whether something waits for the peer to take it."""
        return bool(self._unsent)

    @property
    def has_room(self) -> bool:
        """Whether what is sent now goes out at once. Whatever is sent without room is kept, however much it is."""
        return not self._unsent

    def more_room(self) -> None:
        """The peer takes more."""
        if self.on_room is not None and self.has_room:
            self.on_room()

    def _add(self, message: bytes) -> None:
        self._unsent += prefixed(message)

    def _data(self, window: int) -> tuple[bytes, int]:
        """The frames that the peer takes, and how much they take of the connection's `window`."""
        unsent = self._unsent
        taken = max(0, min(len(unsent), self.window, window))
        out = bytearray()
        for start in range(0, taken, MAX_FRAME_BYTES):
            out += frame(Kind.DATA, 0, self.stream_id, bytes(unsent[start : min(start + MAX_FRAME_BYTES, taken)]))
        del unsent[:taken]
        self.window -= taken
        if unsent:
            self._waits = True
        elif self._waits:
            self._waits = False
            asyncio.get_running_loop().call_soon(self.more_room)
        return bytes(out), taken


class _Sink(Protocol):
    on_room: Callable[[], None] | None

    @property
    def has_room(self) -> bool: ...

    def send(self, message: bytes) -> None: ...

    def finish(self) -> None: ...

    def give_up(self, error: Exception) -> None: ...


def send_from(outbox: Outbox[M], call: _Sink, encode: Callable[[M], Iterable[bytes]]) -> None:
    """Sends what is put into an outbox, in messages, whenever the peer takes more; ends what is said with it."""
    loop = asyncio.get_running_loop()
    is_due = False

    def soon() -> None:
        nonlocal is_due
        if not is_due:
            is_due = True
            # What else is added within this turn goes out with it.
            loop.call_soon(send)

    def send() -> None:
        nonlocal is_due
        is_due = False
        try:
            while call.has_room and (edited := outbox.take()) is not None:
                for message in encode(edited):
                    call.send(message)
        except Exception as error:  # noqa: BLE001  # it is what the call ends with
            call.give_up(error)
        if outbox.is_done:
            call.finish()

    call.on_room = soon
    outbox.drive(soon)
