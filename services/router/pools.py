"""Where a request may go, in order: the policy's aliases, rules and smaller models, applied to one request."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from services.common.policy import Alias, Policy, Rule, Version, When
from services.router.request import Request

__all__ = ["Choice", "Serves", "choices"]

Serves = Callable[[str, str], bool]
"""Whether a pool (second) has or had workers with a model (first)."""
_HASHES: Final = float(1 << 64)


class Choice(NamedTuple):
    """One way to serve a request.

    Attributes:
        request: the request, for a model by its own name and for some pools.
        rule: the rule that chose the pools; empty where none did.
        backup: whether it is for when nobody of the choices before it is ready; else it is for when they are full, too.
        degraded: whether the model is a smaller one than was asked for.
    """

    request: Request
    rule: str = ""
    backup: bool = False
    degraded: bool = False


def choices(policy: Policy, request: Request, serves: Serves) -> tuple[Choice, ...]:
    """The ways to serve a request, best first; at least one."""
    if request.model is None or not (policy.aliases or policy.rules or policy.degrade):
        return (Choice(request),)
    return tuple(_choices(policy, request, request.model, serves))


def _choices(policy: Policy, request: Request, asked: str, serves: Serves) -> Iterator[Choice]:
    models = _resolve(policy, request, asked)
    for model in models:
        yield from _pools(policy, request, asked, model, serves, backup=model != models[0])
    # Vectors and scores of two models can't be compared.
    if request.allow_degrade and request.task == "generate":
        for smaller in policy.smaller(models[0]):
            yield from _pools(policy, request, asked, smaller, serves, degraded=True)


def _resolve(policy: Policy, request: Request, asked: str) -> list[str]:
    """The models that a name stands for: first the one whose turn it is, then those for when that one is away."""
    alias = policy.aliases.get(asked)
    if alias is None or isinstance(alias, str):
        return [alias or asked]
    if request.attempt > 1 and any(version.model == asked for version in alias.models):
        # The model that has begun goes on, though its name is an alias, too.
        return [asked]
    chosen = _version(alias, _place(alias, request, asked))
    others = sorted((version for version in alias.models if version is not chosen), key=lambda version: -version.weight)
    return [chosen.model, *(version.model for version in others)]


def _place(alias: Alias, request: Request, asked: str) -> float:
    """Where a request stands among all of an alias, from 0 to below 1: always the same for the same session."""
    who = "" if alias.sticky == "tenant" else request.session or request.request_id
    key = f"{asked}\0{request.tenant}\0{who}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / _HASHES


def _version(alias: Alias, place: float) -> Version:
    left = place * sum(version.weight for version in alias.models)
    weighty = [version for version in alias.models if version.weight]
    for version in weighty:
        left -= version.weight
        if left < 0:
            return version
    # Rounding may leave a crumb.
    return weighty[-1]


def _pools(
    policy: Policy,
    request: Request,
    asked: str,
    model: str,
    serves: Serves,
    *,
    backup: bool = False,
    degraded: bool = False,
) -> Iterator[Choice]:
    rule = _rule(policy, request, asked, model, serves)
    if rule is None:
        yield Choice(_narrowed(request, model, None), backup=backup, degraded=degraded)
        return
    for pool in rule.pools:
        yield Choice(_narrowed(request, model, pool), rule.name, backup, degraded)
    for pool in rule.backup_pools:
        yield Choice(_narrowed(request, model, pool), rule.name, True, degraded)


def _narrowed(request: Request, model: str, pool: str | None) -> Request:
    if pool is None:
        return request if model == request.model else request._replace(model=model)
    return request._replace(model=model, pools=frozenset((pool,)))


def _rule(policy: Policy, request: Request, asked: str, model: str, serves: Serves) -> Rule | None:
    for rule in policy.rules:
        if _fits(rule.when, request, asked, model) and any(
            serves(model, pool) for pool in (*rule.pools, *rule.backup_pools)
        ):
            return rule
    return None


def _fits(when: When, request: Request, asked: str, model: str) -> bool:
    # Without a limit the output may be of any length.
    output = request.max_output_tokens or float("inf")
    return (
        (not when.models or asked in when.models or model in when.models)
        and (not when.tasks or request.task in when.tasks)
        and (not when.tenants or request.tenant in when.tenants)
        and (not when.slo_classes or request.slo_class in when.slo_classes)
        and _within(request.prompt_tokens, when.min_prompt_tokens, when.max_prompt_tokens)
        and _within(output, when.min_output_tokens, when.max_output_tokens)
        and _within(request.priority, when.min_priority, when.max_priority)
    )


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)
