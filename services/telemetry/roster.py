"""Which GPUs this node has, and how each of them is, also while they don't answer."""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from services.telemetry.gpu import (
    Card,
    DriverState,
    Event,
    EventKind,
    Gpu,
    Health,
    Incident,
    Node,
    Process,
    Reading,
    Sample,
    Scan,
)
from services.telemetry.health import HEALTHY, Condition
from services.telemetry.xid import words

__all__ = ["Roster"]

_NOTHING: Final = Reading()
_RECENT_EVENTS: Final = 8
# There are some hundred XIDs; a driver that makes numbers up fills no memory.
_MOST_XIDS: Final = 256
_WORDS: Final = {
    EventKind.UNCORRECTED_ECC_ERROR: "an ECC error could not be corrected",
    EventKind.MIG_CHANGED: "its instances have changed",
}


@dataclass(slots=True, kw_only=True)
class _Member:
    index: int
    name: str
    condition: Condition = HEALTHY
    reading: Reading = _NOTHING
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=_RECENT_EVENTS))
    xids: Counter[int] = field(default_factory=Counter)


class Roster:
    """Turns scans into samples; remembers each GPU's identity, condition and latest events between them."""

    def __init__(self, node: str, *, worker_of: Callable[[int], str] = lambda _: "") -> None:
        """`worker_of` says to which process of the mesh a process id belongs; empty: to none."""
        self._node = node
        self._worker_of = worker_of
        self._members: dict[str, _Member] = {}

    def update(self, scan: Scan, time: float) -> Sample:
        """The sample that a scan started at `time` (seconds since the epoch) makes.

        While the driver fails, the GPUs that it had are lost, not gone. A GPU that was lost stays so when the driver
        stops listing it; one that was well and isn't listed any more has been taken away.
        """
        if scan.driver.state is DriverState.ABSENT:
            self._members.clear()
        elif scan.driver.state is DriverState.FAILED:
            for member in self._members.values():
                _lose(member, scan.driver.message, time)
        else:
            self._take(scan.cards, time)
        members = sorted(self._members.items(), key=lambda item: (item[1].index, item[0]))
        return Sample(
            driver=scan.driver,
            gpus=tuple(self._gpu(uuid, member, time) for uuid, member in members),
            nodes=(Node(name=self._node, driver=scan.driver),),
        )

    def _take(self, cards: tuple[Card, ...], time: float) -> None:
        listed = {card.uuid for card in cards if card.uuid}
        for card in cards:
            uuid = card.uuid or self._uuid_at(card.index, without=listed)
            listed.add(uuid)
            self._take_card(uuid, card, time)
        for uuid in self._members.keys() - listed:
            member = self._members[uuid]
            if member.condition.health is Health.LOST and member.name:
                _lose(member, "the driver does not list it any more", time)
            else:
                del self._members[uuid]

    def _take_card(self, uuid: str, card: Card, time: float) -> None:
        member = self._members.setdefault(uuid, _Member(index=card.index, name=card.name))
        member.index = card.index
        for incident in card.incidents:
            _note(member, incident, time)
        if card.reading is None:
            _lose(member, card.problem, time)
            return
        if member.condition.lost:
            member.events.append(Event(time=time, kind=EventKind.RETURNED, message="it answers again"))
        member.name = card.name
        member.condition = member.condition.after(card.reading, card.incidents)
        member.reading = self._with_workers(card.reading)

    def _with_workers(self, reading: Reading) -> Reading:
        if not reading.processes and not reading.mig_instances:
            return reading
        instances = tuple(
            replace(each, processes=self._named(each.processes)) if each.processes else each
            for each in reading.mig_instances
        )
        return replace(reading, processes=self._named(reading.processes), mig_instances=instances)

    def _named(self, processes: tuple[Process, ...]) -> tuple[Process, ...]:
        return tuple(replace(each, worker=self._worker_of(each.pid)) for each in processes)

    def _uuid_at(self, index: int, *, without: set[str]) -> str:
        # A card that doesn't even tell its UUID is the one that was there before; a stranger gets a name of its place.
        for uuid, member in self._members.items():
            if member.index == index and uuid not in without:
                return uuid
        return f"unknown-{self._node}-{index}"

    def _gpu(self, uuid: str, member: _Member, time: float) -> Gpu:
        return Gpu(
            uuid=uuid,
            index=member.index,
            name=member.name,
            node=self._node,
            sample_time=time,
            health=member.condition.health,
            health_reason=member.condition.reason,
            reading=member.reading,
            events=tuple(member.events),
            xid_counts=tuple(sorted(member.xids.items())),
        )


def _lose(member: _Member, problem: str, time: float) -> None:
    before = member.condition
    member.condition = before.after_silence(problem)
    member.reading = _NOTHING
    if not before.lost:
        member.events.append(Event(time=time, kind=EventKind.LOST, message=member.condition.lost))


def _note(member: _Member, incident: Incident, time: float) -> None:
    if incident.xid is not None and (incident.xid in member.xids or len(member.xids) < _MOST_XIDS):
        member.xids[incident.xid] += 1
    message = words(incident.xid) if incident.xid is not None else _WORDS[incident.kind]
    member.events.append(Event(time=time, kind=incident.kind, xid=incident.xid, message=message))
