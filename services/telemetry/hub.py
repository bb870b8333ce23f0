"""Joins the GPUs of several machines: one hub that follows every machine's agent."""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import aclosing
from ipaddress import ip_address
from typing import Final

import grpc
from tokenloom.telemetry.v1 import telemetry_pb2

from services.common.gpu_watch import follow_gpus
from services.telemetry.board import Board
from services.telemetry.convert import gpu_from, nodes_from
from services.telemetry.gpu import Driver, DriverState, Gpu, Node, Sample
from services.telemetry.sampler import Sampler

__all__ = ["Hub"]

# What an agent said is told for so long after it is gone; a restart takes less.
_KEPT_SECONDS: Final = 3.0
_LOOK_UP_SECONDS: Final = 5.0
_LONGEST_BACKOFF_SECONDS: Final = 1.0
_UNKNOWN: Final = Driver(state=DriverState.FAILED, message="its telemetry agent does not answer")
_log = logging.getLogger(__name__)


class Hub(Board):
    """A board with the latest sample of all machines. An agent that is away holds nobody up."""

    def __init__(
        self, agents: Sequence[str], *, local: Sampler | None = None, kept_seconds: float = _KEPT_SECONDS
    ) -> None:
        """`agents` are addresses, of which a name may stand for several, as that of a headless Kubernetes service does.

        `local` samples this machine, if that is to be among them.
        """
        super().__init__()
        self._local = local
        self._kept_seconds = kept_seconds
        self._agents: dict[str, _Agent] = {}
        self._addresses = dict.fromkeys(agents)
        for address in self._addresses:
            self._add(address)

    @property
    def agents(self) -> dict[str, bool]:
        """Whether each agent answers, by its address."""
        return {address: agent.here for address, agent in self._agents.items()}

    async def run(self) -> None:
        """Follows them until cancelled; then every watch ends."""
        try:
            async with asyncio.TaskGroup() as tasks:
                if self._local is not None:
                    tasks.create_task(self._follow_local(self._local))
                else:
                    self._join()
                for address in self._addresses:
                    tasks.create_task(self._agents[address].run() if _is_ip(address) else self._follow_name(address))
        finally:
            self.close()

    def _add(self, address: str) -> "_Agent":
        agent = self._agents[address] = _Agent(address, self._join, kept_seconds=self._kept_seconds)
        return agent

    async def _follow_name(self, name: str) -> None:
        """Follows whoever a name stands for. While that is nobody, the name itself is an agent that is away."""
        running: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            while True:
                found = await _addresses_of(name)
                for address in found - running.keys():
                    running[address] = tasks.create_task(self._add(address).run())
                # One that still answers is only not named any more: a resolver may be wrong for a moment.
                for address in [one for one in running.keys() - found if not self._agents[one].here]:
                    running.pop(address).cancel()
                    del self._agents[address]
                if running:
                    self._agents.pop(name, None)
                elif name not in self._agents:
                    self._add(name)
                self._join()
                await asyncio.sleep(_LOOK_UP_SECONDS)

    async def _follow_local(self, local: Sampler) -> None:
        async with aclosing(local.samples()) as samples:
            async for _ in samples:
                self._join()

    def _join(self) -> None:
        own = None if self._local is None else self._local.latest
        if self._local is not None and own is None:
            return
        # Of a GPU that two agents tell of, the later one in the configuration counts.
        gpus: dict[str, Gpu] = {}
        nodes: dict[str, Node] = {}
        for part in [own, *(agent.sample for agent in self._agents.values())]:
            if part is not None:
                gpus.update({gpu.uuid: gpu for gpu in part.gpus})
                nodes.update({node.name: node for node in part.nodes})
        ordered = tuple(sorted(gpus.values(), key=lambda gpu: (gpu.node, gpu.index, gpu.uuid)))
        joined = tuple(sorted(nodes.values(), key=lambda node: node.name))
        self.publish(Sample(driver=_worst(joined), gpus=ordered, nodes=joined))


class _Agent:
    """One agent, followed until cancelled, and what it said."""

    def __init__(self, address: str, tell: Callable[[], None], *, kept_seconds: float) -> None:
        self.address = address
        self.here = False
        self._tell = tell
        self._kept_seconds = kept_seconds
        self._gpus: dict[str, Gpu] = {}
        self._nodes: tuple[Node, ...] = (Node(name=address, driver=_UNKNOWN, away=True),)
        self._forgetting: asyncio.TimerHandle | None = None

    @property
    def sample(self) -> Sample:
        """What it said last."""
        return Sample(driver=_UNKNOWN, gpus=tuple(self._gpus.values()), nodes=self._nodes)

    async def run(self) -> None:
        await follow_gpus(self.address, self, longest_backoff_seconds=_LONGEST_BACKOFF_SECONDS)

    def away(self, code: grpc.StatusCode) -> None:
        _log.warning("an agent is away", extra={"address": self.address, "code": code.name})

    def heard(self, message: telemetry_pb2.WatchGpusResponse, *, first: bool) -> None:
        if first:
            self._gpus.clear()
            self._stop_forgetting()
        self.here = True
        self._gpus.update({gpu.uuid: gpu_from(gpu) for gpu in message.gpus})
        for uuid in message.removed_uuids:
            self._gpus.pop(uuid, None)
        self._nodes = nodes_from(message.nodes)
        self._tell()

    def left(self) -> None:
        self.here = False
        self._forgetting = asyncio.get_running_loop().call_later(self._kept_seconds, self._forget)
        self._nodes = tuple(Node(name=node.name, driver=_UNKNOWN, away=True) for node in self._nodes)
        self._tell()

    def _forget(self) -> None:
        self._gpus.clear()
        self._tell()

    def _stop_forgetting(self) -> None:
        if self._forgetting is not None:
            self._forgetting.cancel()
            self._forgetting = None


def _is_ip(address: str) -> bool:
    try:
        ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    return True


async def _addresses_of(name: str) -> set[str]:
    """What a name with a port stands for now; nothing where nobody knows it."""
    host, _, port = name.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {
        f"[{where[0]}]:{port}" if family == socket.AF_INET6 else f"{where[0]}:{port}" for family, *_, where in found
    }


def _worst(nodes: Sequence[Node]) -> Driver:
    for node in nodes:
        if node.driver.state is not DriverState.READY:
            return Driver(state=node.driver.state, message=f"{node.name}: {node.driver.message}")
    return nodes[0].driver if nodes else _UNKNOWN
