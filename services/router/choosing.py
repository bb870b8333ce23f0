"""The scheduler over the ways that the policy leaves a request: the first one with room is taken."""

from collections.abc import Iterable, Sequence
from typing import Final

from services.router.looks import Look, Looks
from services.router.pools import Choice
from services.router.scheduler import OUTSIDE_POOL, Decision, Scheduler, Verdict

__all__ = ["Chooser"]

# What becomes of a request that none of its ways takes now: the most hopeful of their verdicts.
_HOPE: Final = (Verdict.FULL, Verdict.NOT_READY, Verdict.TOO_LONG, Verdict.UNABLE, Verdict.UNKNOWN_MODEL)


class Chooser:
    """Picks among choices, in their order."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def pick(self, ways: Sequence[Choice], *, asked_at: float, spare: bool = False) -> tuple[Decision, Choice]:
        """The worker that a request gets now, and which way that is; without a worker the way is the first one.

        `spare`: only a worker that has capacity to spare is taken.
        """
        if len(ways) == 1:
            return self._scheduler.pick(ways[0].request, asked_at=asked_at, spare=spare), ways[0]
        tried: list[Decision] = []
        for way in ways:
            if way.backup and any(decision.verdict is Verdict.FULL for decision in tried):
                continue
            decision = self._scheduler.pick(way.request, asked_at=asked_at, spare=spare)
            tried.append(decision)
            if decision.verdict is Verdict.PICKED:
                return _together(decision, tried), way
        verdict = _most_hopeful(decision.verdict for decision in tried)
        return _together(Decision(verdict=verdict), tried), ways[0]

    def judge(self, ways: Sequence[Choice], *, asked_at: float) -> Verdict:
        """Whether waiting makes sense: FULL when a worker would take the request once it has room."""
        if len(ways) == 1:
            return self._scheduler.judge(ways[0].request, asked_at=asked_at)
        return _most_hopeful(self._scheduler.judge(way.request, asked_at=asked_at) for way in ways)


def _most_hopeful(verdicts: Iterable[Verdict]) -> Verdict:
    return min(verdicts, key=_HOPE.index)


def _together(decision: Decision, tried: Sequence[Decision]) -> Decision:
    """A decision with everything that was looked at on the way to it, each worker once."""
    if len(tried) == 1 and tried[0] is decision:
        return decision
    looks: dict[str, Look] = {}
    for one in tried:
        for look in one.looked_at:
            if look[0] not in looks or looks[look[0]][1] == OUTSIDE_POOL:
                looks[look[0]] = look
    return Decision(
        verdict=decision.verdict,
        worker=decision.worker,
        prediction=decision.prediction,
        output_tokens=decision.output_tokens,
        looked_at=Looks.of(looks.values()),
    )
