"""Who calls: API keys, all of them in memory and read again when they change, and tokens of an identity provider."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import time
from typing import Final, Protocol

from services.common.database import DatabaseError
from services.common.errors import MeshError, Reason
from services.common.keystore import KeyRecord, KeyStore, hash_of
from services.common.quota import NO_LIMITS, KeyLimits

__all__ = ["Authenticator", "Identity", "KeyDirectory", "Tokens"]

_log = logging.getLogger(__name__)
_POLL_SECONDS: Final = 0.25
_STOP_SECONDS: Final = 2.0
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
    endpoints: frozenset[str] | None = None
    """What it may ask for; None: everything."""
    allow_degrade: bool = False
    limits: KeyLimits = NO_LIMITS

    def check_model(self, name: str) -> None:
        """Raises MeshError (PERMISSION_DENIED) when this caller may not use a model."""
        if not self.may_name(name):
            raise MeshError(Reason.PERMISSION_DENIED, f"this key may not use the model {name!r}", field="model")

    def may_name(self, model: str) -> bool:
        """Whether this caller may use a model."""
        return self.models is None or model in self.models

    def check_endpoint(self, name: str) -> None:
        """Raises MeshError (PERMISSION_DENIED) when this caller may not ask for this."""
        if not self.may_use(name):
            raise MeshError(Reason.PERMISSION_DENIED, f"this key may not use {name}")

    def may_use(self, endpoint: str) -> bool:
        """Whether this caller may ask for that, by the names in services/common/endpoints.py."""
        return self.endpoints is None or endpoint in self.endpoints

    def check_admin(self) -> None:
        """Raises MeshError (PERMISSION_DENIED) when this caller is no operator."""
        if not self.admin:
            raise MeshError(Reason.PERMISSION_DENIED, "this key does not have the admin right")


class KeyDirectory:
    """Every key of the store, by the hash of its secret. What it knows stays when the store is away."""

    def __init__(self, open_store: Callable[[], KeyStore], *, clock: Callable[[], float] = time) -> None:
        """`clock` gives seconds since the epoch."""
        self._open_store = open_store
        self._clock = clock
        self._store: KeyStore | None = None
        self._version = -1
        self._known: Mapping[bytes, tuple[Identity, float | None]] = {}

    @property
    def is_loaded(self) -> bool:
        """Whether the store was ever read."""
        return self._version >= 0

    def find(self, key: str) -> Identity | None:
        """The owner of a key; None when it is not, or no longer, one of ours.

        Keys are compared by their hashes alone, so that time tells nothing about how much of a guess is right.
        """
        found = self._known.get(hash_of(key))
        if found is None:
            return None
        identity, until = found
        return identity if until is None or self._clock() < until else None

    def stays(self, key: str, seconds: float) -> bool:
        """Whether a key will still be one of ours after so long, if nobody changes it meanwhile."""
        found = self._known.get(hash_of(key))
        return found is not None and (found[1] is None or self._clock() + seconds < found[1])

    def by_id(self, key_id: str) -> Identity | None:
        """The owner of a key that is known by its id; None when it is not, or no longer, one of ours."""
        now = self._clock()
        for identity, until in self._known.values():
            if identity.key_id == key_id and (until is None or now < until):
                return identity
        return None

    def refresh(self) -> None:
        """Reads the store again if it has changed. Blocking.

        Raises:
            DatabaseError: the store can't be read.
        """
        if self._store is None:
            self._store = self._open_store()
        version = self._store.version()
        if version != self._version:
            self._known = {
                digest: (_identity(record), until) for digest, (record, until) in self._store.secrets().items()
            }
            self._version = version

    async def run(self) -> None:
        """Keeps up with the store until cancelled; a change is known a quarter of a second later."""
        is_away = False
        reading: asyncio.Future[None] | None = None
        try:
            while True:
                try:
                    reading = asyncio.ensure_future(asyncio.to_thread(self.refresh))
                    await asyncio.shield(reading)
                except DatabaseError as error:
                    if not is_away:
                        _log.warning("keys can't be read", extra={"cause": type(error).__name__})
                    is_away = True
                else:
                    if is_away:
                        _log.info("keys are read again")
                    is_away = False
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            # A connection that is in use can't be closed; one that a server left hanging is left to the process's end.
            if reading is not None:
                await asyncio.wait((reading,), timeout=_STOP_SECONDS)
            if self._store is not None:
                self._store.close()


class Tokens(Protocol):
    """Tells who is behind a JSON Web Token."""

    async def identify(self, token: str) -> Identity:
        """Raises MeshError (INVALID_API_KEY)."""


class Authenticator:
    """Finds out who calls."""

    def __init__(self, keys: KeyDirectory, tokens: Tokens | None = None) -> None:
        self._keys = keys
        self._tokens = tokens

    async def identify(self, authorization: str | None) -> Identity:
        """The caller behind an `Authorization` header.

        Raises:
            MeshError: INVALID_API_KEY; NO_READY_WORKER while the keys were never read.
        """
        if not authorization:
            raise MeshError(Reason.INVALID_API_KEY, "no API key: send it as `Authorization: Bearer KEY`")
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key or not key.isascii():
            raise _bad_key()
        if self._tokens is not None and key.count(".") == 2:
            return await self._tokens.identify(key)
        if len(key) > _MAX_KEY_LENGTH:
            raise _bad_key()
        identity = self._keys.find(key)
        if identity is None:
            if not self._keys.is_loaded:
                raise MeshError(Reason.NO_READY_WORKER, "keys can't be checked yet: try again", retry_after_seconds=1.0)
            raise _bad_key()
        return identity

    def known(self, authorization: str | None) -> Identity | None:
        """The caller behind an `Authorization` header with an API key; None where it is not as simple as that."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.isascii() or len(key) > _MAX_KEY_LENGTH:
            return None
        return self._keys.find(key)

    def stays(self, authorization: str, seconds: float) -> bool:
        """Whether who is `known` by this header will be so after so long, if nobody changes the key meanwhile."""
        return self._keys.stays(authorization.partition(" ")[2], seconds)


def _identity(record: KeyRecord) -> Identity:
    return Identity(
        key_id=record.id,
        tenant=record.tenant,
        models=None if record.models is None else frozenset(record.models),
        endpoints=None if record.endpoints is None else frozenset(record.endpoints),
        priority=record.priority,
        admin=record.admin,
        debug=record.debug,
        allow_degrade=record.allow_degrade,
        limits=record.limits,
    )


def _bad_key() -> MeshError:
    return MeshError(Reason.INVALID_API_KEY, "this API key is not valid")
