"""Which GPUs this node has, and how each of them is, also while they don't answer."""

from dataclasses import dataclass

from services.telemetry.gpu import Card, DriverState, Gpu, Health, Reading, Sample, Scan
from services.telemetry.health import HEALTHY, Condition

__all__ = ["Roster"]

_NOTHING = Reading()


@dataclass(slots=True, kw_only=True)
class _Member:
    index: int
    name: str
    condition: Condition = HEALTHY
    reading: Reading = _NOTHING


class Roster:
    """Turns scans into samples; remembers each GPU's identity and condition between them."""

    def __init__(self, node: str) -> None:
        self._node = node
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
                _lose(member, scan.driver.message)
        else:
            self._take(scan.cards)
        members = sorted(self._members.items(), key=lambda item: (item[1].index, item[0]))
        return Sample(driver=scan.driver, gpus=tuple(self._gpu(uuid, member, time) for uuid, member in members))

    def _take(self, cards: tuple[Card, ...]) -> None:
        listed = {card.uuid for card in cards if card.uuid}
        for card in cards:
            uuid = card.uuid or self._uuid_at(card.index, without=listed)
            listed.add(uuid)
            self._take_card(uuid, card)
        for uuid in self._members.keys() - listed:
            member = self._members[uuid]
            if member.condition.health is Health.LOST and member.name:
                _lose(member, "the driver does not list it any more")
            else:
                del self._members[uuid]

    def _take_card(self, uuid: str, card: Card) -> None:
        member = self._members.setdefault(uuid, _Member(index=card.index, name=card.name))
        member.index = card.index
        if card.reading is None:
            _lose(member, card.problem)
        else:
            member.name = card.name
            member.condition = member.condition.after(card.reading)
            member.reading = card.reading

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
        )


def _lose(member: _Member, problem: str) -> None:
    member.condition = member.condition.after_silence(problem)
    member.reading = _NOTHING
