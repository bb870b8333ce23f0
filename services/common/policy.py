"""The routing policy, as mesh.yaml has it under `routing` and the router obeys it: its shape, and what is valid."""

from collections.abc import Collection, Iterator
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from services.common import config
from services.common.config import ConfigError

__all__ = [
    "BUILTIN_SLO_CLASSES",
    "MAX_POLICY_BYTES",
    "STANDARD",
    "Alias",
    "DegradationPolicy",
    "Policy",
    "Rule",
    "SloClass",
    "TenantPolicy",
    "Version",
    "When",
    "parse_policy",
    "policy_from",
    "policy_json",
]

MAX_POLICY_BYTES: Final = 1 << 20

_Model = Annotated[str, Meta(min_length=1, max_length=256)]
_Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
_Tokens = Annotated[int, Meta(ge=0, le=2**32 - 1)]
_Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Seconds = Annotated[float, Meta(gt=0, le=3600)]


class _Struct(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Version(_Struct, kw_only=True, frozen=True):
    """One of the models behind an alias."""

    model: _Model
    weight: Annotated[float, Meta(ge=0, le=1_000_000)] = 1.0
    """Its share of the requests, relative to the others'. 0: only while no worker of the others is ready."""


class Alias(_Struct, kw_only=True, frozen=True):
    """A name that stands for one or several models."""

    models: Annotated[list[Version], Meta(min_length=1, max_length=64)]
    sticky: Literal["session", "tenant"] = "session"
    """Who keeps to one version: each session (requests without one are spread), or each tenant as a whole."""


class When(_Struct, kw_only=True, frozen=True):
    """What a rule is for: requests that meet all of this. Bounds are inclusive; what is left out does not matter."""

    models: list[_Model] = []
    """As the client named them, or as an alias resolved them."""
    tasks: list[Literal["generate", "embed", "score", "tokenize"]] = []
    tenants: list[str] = []
    slo_classes: list[_Name] = []
    min_prompt_tokens: _Tokens = 0
    max_prompt_tokens: _Tokens | None = None
    min_output_tokens: _Tokens = 0
    """A request that sets no limit may have any number of output tokens."""
    max_output_tokens: _Tokens | None = None
    min_priority: _Priority | None = None
    max_priority: _Priority | None = None


class Rule(_Struct, kw_only=True, frozen=True):
    """Which pools some requests go to. The first rule that fits counts, of those whose pools have the model at all."""

    name: _Name
    when: When = When()
    pools: Annotated[list[_Name], Meta(min_length=1, max_length=64)]
    """The first one with room takes the request."""
    backup_pools: list[_Name] = []
    """Used only while no worker of `pools` is ready."""


class SloClass(_Struct, kw_only=True, frozen=True):
    """What requests of a class may wait for, as far as it decides between workers; null: whatever it takes.

    The worker with the least predicted time gets a request; a worker that is predicted to miss a target is reckoned
    with more time than it takes.
    """

    ttft_seconds: _Seconds | None = None
    tpot_seconds: _Seconds | None = None
    weight: Annotated[float, Meta(ge=0, le=1000)] = 1.0
    """What a second beyond a target counts on top, in seconds."""
    output_weight: Annotated[float, Meta(ge=0, le=1)] = 0.01
    """What a second of output counts, against one before the first token. 1: the whole answer counts alike."""
    max_wait_seconds: _Seconds | None = None
    """A request that would wait longer for a worker is refused at once; null: whatever the router allows at most."""


class TenantPolicy(_Struct, kw_only=True, frozen=True):
    """What counts for a tenant's requests that do not say it themselves."""

    slo_class: _Name | None = None
    allow_degrade: bool = False


class DegradationPolicy(_Struct, kw_only=True, frozen=True):
    """What the mesh gives up when workers are missing, by the share of them that is healthy. 0: never."""

    short_outputs_below: _Share = 0.0
    refusing_below: _Share = 0.0
    output_token_limit: Annotated[int, Meta(ge=1, le=2**32 - 1)] = 256
    """Most tokens of output while outputs are kept short."""
    refuse_priorities_above: _Priority = -1
    """While the mesh refuses, requests of a priority number above this are; a lower number is more important."""
    worsen_after_seconds: Annotated[float, Meta(ge=0, le=3600)] = 5.0
    recover_after_seconds: Annotated[float, Meta(ge=0, le=3600)] = 15.0
    recover_margin: _Share = 0.05
    """How far the share must be above a bound again before its level ends."""


STANDARD: Final = SloClass(max_wait_seconds=10.0)
"""What counts where nothing else is said."""
BUILTIN_SLO_CLASSES: Final = {
    "interactive": SloClass(ttft_seconds=1.0, tpot_seconds=0.1, weight=4.0, max_wait_seconds=0.4),
    "standard": STANDARD,
    "batch": SloClass(output_weight=1.0),
}


class Policy(_Struct, kw_only=True, frozen=True):
    """Which model, which pools, and how well, by what a request is."""

    aliases: dict[_Model, _Model | Alias] = {}
    """Names that requests may use; just a model's name is short for an alias of that one."""
    rules: Annotated[list[Rule], Meta(max_length=1000)] = []
    slo_classes: dict[_Name, SloClass] = {}
    """In addition to interactive, standard and batch, or instead of these."""
    default_slo_class: _Name = "standard"
    tenants: dict[str, TenantPolicy] = {}
    degrade: dict[_Model, _Model] = {}
    """The smaller model that stands in for a model which has no room, for requests that allow it."""
    degradation: DegradationPolicy = DegradationPolicy()

    def slo_class(self, name: str) -> SloClass | None:
        """A class by name; None when there is none."""
        return self.slo_classes.get(name) or BUILTIN_SLO_CLASSES.get(name)

    def smaller(self, model: str) -> Iterator[str]:
        """The models that may stand in for a model, largest first."""
        while model in self.degrade:
            model = self.degrade[model]
            yield model

    def check(
        self, where: str, *, pools: Collection[str] | None = None, models: Collection[str] | None = None
    ) -> "Policy":
        """Checks what one key says about another one, and returns itself. `pools` and `models`: those that there are.

        Raises:
            ConfigError: they don't fit.
        """
        self._check_aliases(where, models)
        self._check_rules(where, pools)
        self._check_classes(where)
        self._check_degrade(where, models)
        bounds = self.degradation
        if bounds.refusing_below > bounds.short_outputs_below > 0:
            raise ConfigError(
                f"{where}.degradation.refusing_below: expected at most short_outputs_below, which is "
                f"{bounds.short_outputs_below:g}, got the value {bounds.refusing_below:g}"
            )
        return self

    def _check_aliases(self, where: str, models: Collection[str] | None) -> None:
        for name, alias in self.aliases.items():
            if isinstance(alias, str):
                _check_model(f"{where}.aliases.{name}", alias, models)
                self._check_no_alias(f"{where}.aliases.{name}", alias)
                continue
            for index, version in enumerate(alias.models):
                self._check_no_alias(f"{where}.aliases.{name}.models[{index}].model", version.model)
                _check_model(f"{where}.aliases.{name}.models[{index}].model", version.model, models)
            listed = [version.model for version in alias.models]
            _check_once(f"{where}.aliases.{name}.models", listed)
            if not any(version.weight for version in alias.models):
                raise ConfigError(f"{where}.aliases.{name}.models: expected a weight above 0 for at least one of them")

    def _check_no_alias(self, where: str, target: str) -> None:
        # One that includes the model of its own name is the one exception: a canary beside it.
        other = self.aliases.get(target)
        if other is not None and (isinstance(other, str) or all(version.model != target for version in other.models)):
            raise ConfigError(f"{where}: {target!r} is an alias itself, and stands for something else")

    def _check_rules(self, where: str, pools: Collection[str] | None) -> None:
        _check_once(f"{where}.rules", [rule.name for rule in self.rules])
        for index, rule in enumerate(self.rules):
            at = f"{where}.rules[{index}]"
            _check_once(f"{at}.pools and backup_pools", [*rule.pools, *rule.backup_pools])
            for key, listed in (("pools", rule.pools), ("backup_pools", rule.backup_pools)):
                for place, pool in enumerate(listed):
                    if pools is not None and pool not in pools:
                        raise ConfigError(f"{at}.{key}[{place}]: there is no pool {pool!r} among {_list(pools)}")
            _check_when(f"{at}.when", rule.when)

    def _check_classes(self, where: str) -> None:
        known = {*self.slo_classes, *BUILTIN_SLO_CLASSES}
        named = [("default_slo_class", self.default_slo_class)]
        named += [
            (f"tenants.{name}.slo_class", tenant.slo_class) for name, tenant in self.tenants.items() if tenant.slo_class
        ]
        for index, rule in enumerate(self.rules):
            named += [
                (f"rules[{index}].when.slo_classes[{place}]", name) for place, name in enumerate(rule.when.slo_classes)
            ]
        for key, name in named:
            if name not in known:
                raise ConfigError(f"{where}.{key}: there is no class {name!r} among {_list(known)}")

    def _check_degrade(self, where: str, models: Collection[str] | None) -> None:
        for model in self.degrade:
            _check_model(f"{where}.degrade.{model}", model, models)
            _check_model(f"{where}.degrade.{model}", self.degrade[model], models)
            seen = {model}
            smaller = self.degrade.get(model)
            while smaller is not None:
                if smaller in seen:
                    raise ConfigError(f"{where}.degrade.{model}: leads back to {smaller!r}")
                seen.add(smaller)
                smaller = self.degrade.get(smaller)


def parse_policy(text: str | bytes, *, where: str = "policy") -> Policy:
    """The policy that JSON says, not checked against the fleet yet.

    Raises:
        ConfigError: it is too long, no JSON, or not of the shape.
    """
    if len(text) > MAX_POLICY_BYTES:
        raise ConfigError(f"{where}: has more than {MAX_POLICY_BYTES} bytes")
    try:
        raw = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    except RecursionError:
        raise ConfigError(f"{where}: not JSON: nested too deeply") from None
    return policy_from(raw, where=where)


def policy_from(raw: Any, *, where: str) -> Policy:
    """The policy that plain data says, not checked yet.

    Raises:
        ConfigError: it is not of the shape.
    """
    if isinstance(raw, dict):
        # One by one, since the whole would not say which of the names it is.
        for key, shape in _BY_NAME.items():
            entries = raw.get(key)
            for name, value in entries.items() if isinstance(entries, dict) else ():
                config.convert(value, shape, where=f"{where}.{key}.{name}")
    return config.convert(raw, Policy, where=where)


_BY_NAME: Final[dict[str, Any]] = {"aliases": _Model | Alias, "slo_classes": SloClass, "tenants": TenantPolicy}


def policy_json(policy: Policy) -> str:
    """A policy as JSON; what it leaves to the defaults is left out."""
    return msgspec.json.format(msgspec.json.encode(policy), indent=2).decode()


def _check_model(where: str, model: str, models: Collection[str] | None) -> None:
    if models is not None and model not in models:
        raise ConfigError(f"{where}: there is no model {model!r} among {_list(models)}")


def _check_once(where: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{where}: the name {twice[0]!r} is there twice")


def _check_when(where: str, when: When) -> None:
    bounds = (
        ("prompt_tokens", when.min_prompt_tokens, when.max_prompt_tokens),
        ("output_tokens", when.min_output_tokens, when.max_output_tokens),
        ("priority", when.min_priority, when.max_priority),
    )
    for name, low, high in bounds:
        if low is not None and high is not None and low > high:
            raise ConfigError(f"{where}.max_{name}: expected at least min_{name}, which is {low}, got the value {high}")


def _list(names: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(names)[:50])) or "none"
