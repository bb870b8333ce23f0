"""Who calls: API keys, looked up once and remembered until the store changes."""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Final

from services.common.errors import MeshError, Reason
from services.common.keystore import KeyRecord, KeyStore

__all__ = ["Authenticator", "Identity"]

_RECHECK_SECONDS: Final = 0.25
_MAX_REMEMBERED: Final = 10_000
_MAX_KEY_LENGTH: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A caller and what it may do."""

    key_id: str
    tenant: str
    models: frozenset[str] | None
    """The models it may use; None: all."""
    priority: int
    admin: bool
    debug: bool

    def check_model(self, name: str) -> None:
        """Raises MeshError (PERMISSION_DENIED) when this caller may not use a model."""
        if self.models is not None and name not in self.models:
            raise MeshError(Reason.PERMISSION_DENIED, f"this key may not use the model {name!r}", field="model")

    def check_admin(self) -> None:
        """Raises MeshError (PERMISSION_DENIED) when this caller is no operator."""
        if not self.admin:
            raise MeshError(Reason.PERMISSION_DENIED, "this key does not have the admin right")


class Authenticator:
    """Finds out who calls. A key works, and stops working, within a second of the store's change."""

    def __init__(self, store: KeyStore, *, clock: Callable[[], float] = monotonic) -> None:
        self._store = store
        self._clock = clock
        self._remembered: dict[str, Identity] = {}
        self._version = store.version()
        self._checked_at = clock()

    def identify(self, authorization: str | None) -> Identity:
        """The caller behind an `Authorization` header.

        Raises:
            MeshError: INVALID_API_KEY.
        """
        if not authorization:
            raise MeshError(Reason.INVALID_API_KEY, "no API key: send it as `Authorization: Bearer KEY`")
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key or len(key) > _MAX_KEY_LENGTH or not key.isascii():
            raise _bad_key()
        self._forget_if_changed()
        identity = self._remembered.get(key)
        if identity is None:
            identity = self._look_up(key)
        return identity

    def _look_up(self, key: str) -> Identity:
        record = self._store.find(key)
        if record is None:
            # Not remembered: a flood of made-up keys must not push the real ones out.
            raise _bad_key()
        if len(self._remembered) >= _MAX_REMEMBERED:
            self._remembered.clear()
        identity = self._remembered[key] = _identity(record)
        return identity

    def _forget_if_changed(self) -> None:
        now = self._clock()
        if now - self._checked_at < _RECHECK_SECONDS:
            return
        self._checked_at = now
        version = self._store.version()
        if version != self._version:
            self._version = version
            self._remembered.clear()


def _identity(record: KeyRecord) -> Identity:
    return Identity(
        key_id=record.id,
        tenant=record.tenant,
        models=None if record.models is None else frozenset(record.models),
        priority=record.priority,
        admin=record.admin,
        debug=record.debug,
    )


def _bad_key() -> MeshError:
    return MeshError(Reason.INVALID_API_KEY, "this API key is not valid")
