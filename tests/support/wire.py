"""A TCP connection with a middle: what goes through can be cut off, or held up without a word."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["Wire", "wire"]


class Wire:
    """What stands between clients and a server."""

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""

    def cut(self) -> None:
        """Ends every connection, on both sides, as when a process is killed."""
        for writer in self._writers:
            writer.transport.abort()

    def freeze(self) -> None:
        """Lets nothing through any more, and tells nobody, as when a machine is gone."""
        self._flows.clear()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Takes a connection in."""
        to_reader, to_writer = await asyncio.open_connection(self._host, int(self._port))
        self._writers += (writer, to_writer)
        for source, sink in ((reader, to_writer), (to_reader, writer)):
            task = asyncio.create_task(self._pass_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                await self._flows.wait()
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            return
        finally:
            sink.close()

    async def close(self) -> None:
        """Ends everything."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.cut()


@asynccontextmanager
async def wire(target: str) -> AsyncIterator[Wire]:
    """A wire to `host:port`; its `address` is where clients connect."""
    between = Wire(target)
    listener = await asyncio.start_server(between.take, "127.0.0.1", 0)
    between.address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with listener:
        try:
            yield between
        finally:
            await between.close()
