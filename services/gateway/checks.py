"""uvicorn's HTTP protocol, with short cuts for what can be answered at once: the edge's checks of keys, which come with
each typed request, and refusals of keys that are over a limit.

And with one write less for each answer: its head goes out together with the beginning of its body.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.exchange import Exchange, WhenNoted, target_of
from services.gateway.http import ABORT, ENDS_WHEN_NOTED, WATCH, WRITE, Headers

if TYPE_CHECKING:
    from uvicorn.protocols.http.flow_control import FlowControl
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

__all__ = ["KnownAnswer", "ShortCut", "protocol_with"]

KnownAnswer = tuple[bytes, Callable[[], None]]
"""A whole HTTP answer, and what is done in the same turn once it is written: nobody need wait until it is noted."""
ShortCut = Callable[[bytes, bytes, Headers], KnownAnswer | None]
"""Answers a request by its method, target and headers, without waiting; None: it goes the usual way."""
_CONTINUE: Final = b"HTTP/1.1 100 "


class _HeldHead:
    """The transport of one answer until its body begins: keeps the head back until then, or the loop's next turn."""

    def __init__(self, cycle: "RequestResponseCycle", transport: asyncio.Transport) -> None:
        self._cycle = cycle
        self._transport = transport
        self._head = b""

    def write(self, data: bytes) -> None:
        """The head, and then what is first behind it."""
        if self._head:
            self._let_go(data)
        elif data.startswith(_CONTINUE):
            self._transport.write(data)
        else:
            self._head = data
            asyncio.get_running_loop().call_soon(self._let_go)

    def close(self) -> None:
        """Closes the connection behind what was written."""
        self._let_go()
        self._transport.close()

    def _let_go(self, more: bytes = b"") -> None:
        if self._head or more:
            self._transport.write(self._head + more)
            self._head = b""
        # The rest goes its usual way.
        self._cycle.transport = self._transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _write_chunk(cycle: "RequestResponseCycle", flow: "FlowControl", events: bytes) -> bool:
    """Writes a part of an answer's body, as uvicorn does, but without a coroutine."""
    if flow.write_paused or not cycle.chunked_encoding:
        return False
    if events and not cycle.disconnected:
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(events), events))
    return True


class _WithShortCuts(HttpToolsProtocol):
    """One connection."""

    short_cuts: Sequence[ShortCut]
    when_noted: WhenNoted
    _held: list[bytes] | None = None
    """What has come of the body of a request that may be answered at once, if all of it comes at once."""
    _left: Callable[[], None] | None = None
    _idle_since: float | None = None
    """When the last answer was complete; None: something has come since."""
    _idle_timer: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._left is not None:
            self._left()
        if self._idle_timer is not None:
            self._idle_timer.cancel()

    def _watch(self, left: Callable[[], None]) -> Callable[[], None]:
        self._left = left
        if self.transport.is_closing():
            self.loop.call_soon(left)
        return self._watch_no_more

    def _watch_no_more(self) -> None:
        self._left = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._held is not None and not self.transport.is_closing():
            # The rest is yet to come, and may take its time.
            try:
                self._begin()
            except (httptools.HttpParserError, ValueError):
                self.send_400_response("Invalid HTTP request received.")

    def on_headers_complete(self) -> None:
        is_next = self.cycle is None or self.cycle.response_complete
        if is_next and self.parser.should_keep_alive() and not self.flow.write_paused:
            self._held = []
        else:
            self._begin()

    def _begin(self) -> None:
        """Has the application answer, with what of the body is there."""
        held, self._held = self._held, None
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self._extend(self.cycle)
        if held:
            super().on_body(b"".join(held))

    def _extend(self, cycle: "RequestResponseCycle") -> None:
        held: Any = _HeldHead(cycle, self.transport)
        cycle.transport = held
        write = partial(_write_chunk, cycle, self.flow)
        extensions: Any = {ABORT: self.transport.abort, WATCH: self._watch, WRITE: write}
        cycle.scope["extensions"] = extensions

    def on_body(self, body: bytes) -> None:
        if self._held is None:
            super().on_body(body)
        else:
            self._held.append(body)

    def on_message_complete(self) -> None:
        if self._held is None:
            super().on_message_complete()
            return
        known = self._known_answer()
        if known is None:
            if self._is_usual():
                self._exchange()
            else:
                self._begin()
                super().on_message_complete()
            return
        self._held = None
        answer, then = known
        self.transport.write(answer)
        then()
        self.on_response_complete()

    def _is_usual(self) -> bool:
        return (
            self.parser.get_http_version() == "1.1"
            and not self.expect_100_continue
            and not self.parser.should_upgrade()
            and self.parser.get_method() != b"HEAD"
        )

    def _exchange(self) -> None:
        """Has the application answer a request that came whole, in the usual way."""
        held, self._held = self._held, None
        scope: Any = self.scope
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["path"], scope["raw_path"], scope["query_string"] = target_of(self.url)
        exchange = Exchange(
            scope,
            b"".join(held or ()),
            self.transport,
            self.flow,
            on_response=self.on_response_complete,
            when_noted=self.when_noted,
        )
        scope["extensions"] = {
            ABORT: self.transport.abort,
            ENDS_WHEN_NOTED: True,
            WATCH: self._watch,
            WRITE: exchange.write,
        }
        self.cycle = cast("RequestResponseCycle", exchange)
        # The server waits for these before it ends.
        task = self.loop.create_task(exchange.run(self.app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def on_response_complete(self) -> None:
        """Goes on with the next request, or waits for one: as uvicorn does, but for one timer a connection."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._close_idle)

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def _close_idle(self) -> None:
        wait: float = self.timeout_keep_alive
        if self._idle_since is not None:
            wait -= self.loop.time() - self._idle_since
        if wait > 0:
            self._idle_timer = self.loop.call_later(wait, self._close_idle)
        else:
            self.timeout_keep_alive_handler()

    def _known_answer(self) -> KnownAnswer | None:
        method = self.parser.get_method()
        for short_cut in self.short_cuts:
            known = short_cut(method, self.url, self.headers)
            if known is not None:
                return known
        return None


def protocol_with(short_cuts: Sequence[ShortCut], when_noted: WhenNoted) -> type[HttpToolsProtocol]:
    """The protocol that takes short cuts, without a task. What is unusual is as uvicorn has it."""
    own = {"short_cuts": tuple(short_cuts), "when_noted": staticmethod(when_noted)}
    return type("WithShortCuts", (_WithShortCuts,), own)
