"""The policy in force: what it makes of a request, and how it is replaced."""

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

from services.common.errors import MeshError, Reason
from services.common.policy import BUILTIN_SLO_CLASSES, STANDARD, Policy
from services.router.degradation import Degradation, Level
from services.router.fleet import Clock, Fleet
from services.router.pools import Choice, choices
from services.router.request import Request

__all__ = ["Policies", "Resolution"]

_REFUSED_RETRY_SECONDS: Final = 10.0
_CHECK_SECONDS: Final = 0.25
_NONE: Final = Level.NONE
_log = logging.getLogger(__name__)


class Resolution(NamedTuple):
    """What the policy makes of a request.

    Attributes:
        choices: the ways to serve it, best first; at least one.
        output_token_limit: most tokens of output that the mesh allows at present; 0 where it does not limit them.
    """

    choices: tuple[Choice, ...]
    output_token_limit: int = 0


class Policies:
    """The policy in force, its number, and how far the mesh is degraded under it."""

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy | None = None,
        *,
        clock: Clock,
        pools: Collection[str] | None = None,
        models: Collection[str] | None = None,
        expected_workers: int = 0,
    ) -> None:
        """`pools` and `models` are those that the mesh has, None where that is not known; `expected_workers` how many
        workers it has when all is well, 0 for as many as have been seen.

        Raises:
            ConfigError: the policy does not fit these.
        """
        self._fleet = fleet
        self._clock = clock
        self._pools = pools
        self._models = models
        self._expected = expected_workers
        self._listeners: list[Callable[[], None]] = []
        self.degradation = Degradation()
        self._use(Policy() if policy is None else self._checked(policy))
        self.version = 1

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls `listener` whenever policy or degradation changed, until the returned function is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def check(self, policy: Policy) -> None:
        """Raises ConfigError when a policy does not fit the mesh."""
        self._checked(policy)

    def set(self, policy: Policy, *, by: str) -> int:
        """Puts a policy in force and gives its number; `by` says who did, for the log.

        Raises:
            ConfigError: it is not valid, and the old one stays in force.
        """
        if policy != self.current:
            self._use(self._checked(policy))
            self.version += 1
            _log.info("policy set", extra={"audit": "policy.set", "by": by, "policy_version": self.version})
            self.check_degradation()
            self._changed()
        return self.version

    @property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """The names that requests may use instead of a model's own, with the models behind each."""
        return {
            name: (alias,) if isinstance(alias, str) else tuple(version.model for version in alias.models)
            for name, alias in self.current.aliases.items()
        }

    def resolve(self, request: Request) -> Resolution:
        """What the policy makes of a request.

        Raises:
            MeshError: it names a class that there is none of, or the mesh is too degraded for it.
        """
        policy = self.current
        if self._is_plain and self.degradation.level is _NONE:
            # Nearly always, where nothing is configured.
            name = request.slo_class or policy.default_slo_class
            if name in self._standard:
                return Resolution((Choice(request),))
            if request.slo_class and (found := policy.slo_class(name)) is not None:
                return Resolution((Choice(request.with_slo(found)),))
        request = self._with_class(policy, request)
        limit = 0
        if self.degradation.level is not _NONE and request.occupies_slot:
            limit = self._limit(policy, request)
        return Resolution(choices(policy, request, self._fleet.has_served), limit)

    async def follow(self) -> None:
        """Runs until cancelled: keeps the degradation level up to date."""
        while True:
            self.check_degradation()
            await asyncio.sleep(_CHECK_SECONDS)

    def check_degradation(self) -> None:
        """Looks how many workers are healthy."""
        healthy, expected = self._fleet.health(self._expected)
        if self.degradation.observe(healthy, expected, self.current.degradation, self._clock()):
            level = self.degradation.level
            self._changed()
            say = _log.info if level is Level.NONE else _log.warning
            say(
                "degradation level changed",
                extra={"degradation_level": level.name, "healthy_workers": healthy, "expected_workers": expected},
            )

    def _use(self, policy: Policy) -> None:
        self.current = policy
        self._is_plain = not (policy.aliases or policy.rules or policy.degrade or policy.tenants)
        classes = {**BUILTIN_SLO_CLASSES, **policy.slo_classes}
        self._standard = frozenset(name for name, found in classes.items() if found == STANDARD)

    def _changed(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def _checked(self, policy: Policy) -> Policy:
        known = None if self._models is None else {*self._models, *self._fleet.known_models}
        return policy.check("routing", pools=self._pools, models=known)

    def _with_class(self, policy: Policy, request: Request) -> Request:
        tenant = policy.tenants.get(request.tenant)
        name = request.slo_class or (tenant.slo_class if tenant else None) or policy.default_slo_class
        found = policy.slo_class(name)
        if found is None:
            raise MeshError(Reason.INVALID_REQUEST, f"there is no SLO class {name[:64]!r}", field="slo_class")
        degrade = request.allow_degrade or (tenant is not None and tenant.allow_degrade)
        slo = None if found == STANDARD else found
        if (slo, name, degrade) == (None, request.slo_class, request.allow_degrade):
            return request
        if slo is None and not policy.rules and degrade == request.allow_degrade:
            # Nobody asks for the class then.
            return request
        if (name, degrade) == (request.slo_class, request.allow_degrade):
            return request.with_slo(slo)
        return request._replace(slo=slo, slo_class=name, allow_degrade=degrade)

    def _limit(self, policy: Policy, request: Request) -> int:
        bounds = policy.degradation
        if self.degradation.level is Level.REFUSING and request.priority > bounds.refuse_priorities_above:
            message = "too few workers are healthy: only requests of a higher priority are taken at present"
            raise MeshError(Reason.NO_READY_WORKER, message, retry_after_seconds=_REFUSED_RETRY_SECONDS)
        limit = bounds.output_token_limit
        return limit if not request.max_output_tokens or request.max_output_tokens > limit else 0
