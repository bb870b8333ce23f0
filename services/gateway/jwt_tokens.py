"""JSON Web Tokens of an identity provider: checked against its published keys, their claims turned into rights."""

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic, time
from typing import Any, Final
from urllib.error import URLError
from urllib.request import urlopen

import jwt

from services.common.errors import MeshError, Reason
from services.common.quota import KeyLimits
from services.common.settings_gateway import GrantSettings, JwtSettings
from services.gateway.identity import Identity

__all__ = ["JwtTokens"]

_log = logging.getLogger(__name__)
_MAX_TOKEN_LENGTH: Final = 8192
_MAX_REMEMBERED: Final = 10_000
_MAX_KEYS_BYTES: Final = 1 << 20
_FETCH_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 5.0
# A token that names an unknown key makes us look for it, but not more often than this.
_LOOK_AGAIN_SECONDS: Final = 10.0
_MAX_TENANT_LENGTH: Final = 128


class JwtTokens:
    """Tells who is behind a token. Keys are fetched ahead, and kept while the provider is away."""

    def __init__(self, settings: JwtSettings, *, clock: Callable[[], float] = time) -> None:
        """`clock` gives seconds since the epoch."""
        self._settings = settings
        self._clock = clock
        self._keys: dict[str, jwt.PyJWK] = {}
        self._remembered: dict[bytes, tuple[Identity, float]] = {}
        self._fetching = asyncio.Lock()
        self._fetched_at = -_LOOK_AGAIN_SECONDS

    async def run(self) -> None:
        """Keeps the keys current until cancelled."""
        while True:
            ok = await self._fetch()
            await asyncio.sleep(self._settings.refresh_seconds if ok else _RETRY_SECONDS)

    async def identify(self, token: str) -> Identity:
        """The caller that a token speaks of.

        Raises:
            MeshError: INVALID_API_KEY: not signed by the provider, expired, or for somebody else.
        """
        if len(token) > _MAX_TOKEN_LENGTH:
            raise _bad_token("it is too long")
        digest = hashlib.sha256(token.encode()).digest()
        known = self._remembered.get(digest)
        if known is not None and self._clock() < known[1]:
            return known[0]
        claims = self._claims(token, await self._key(token))
        identity = _identity(claims, self._settings)
        if len(self._remembered) >= _MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered[digest] = (identity, float(claims["exp"]))
        return identity

    async def _key(self, token: str) -> jwt.PyJWK:
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
        except jwt.PyJWTError as error:
            raise _bad_token("it can't be read") from error
        if key_id not in self._keys and monotonic() - self._fetched_at >= _LOOK_AGAIN_SECONDS:
            await self._fetch()
        key = self._keys.get(key_id or "")
        if key is None:
            raise _bad_token("its key is not one of the provider's")
        return key

    def _claims(self, token: str, key: jwt.PyJWK) -> Mapping[str, Any]:
        try:
            claims: Mapping[str, Any] = jwt.decode(
                token,
                key,
                algorithms=list(self._settings.algorithms),
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                leeway=self._settings.leeway_seconds,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.ExpiredSignatureError as error:
            raise _bad_token("it has expired") from error
        except jwt.PyJWTError as error:
            raise _bad_token("it does not pass the checks") from error
        return claims

    async def _fetch(self) -> bool:
        async with self._fetching:
            self._fetched_at = monotonic()
            try:
                self._keys = await asyncio.to_thread(_read_keys, self._settings.jwks)
            except (OSError, URLError, ValueError, jwt.PyJWTError) as error:
                _log.warning("the identity provider's keys can't be read", extra={"cause": type(error).__name__})
                return False
        # A key that was withdrawn must not live on in what is remembered.
        self._remembered.clear()
        return True


def _read_keys(where: str) -> dict[str, jwt.PyJWK]:
    if where.startswith(("https://", "http://")):
        with urlopen(where, timeout=_FETCH_SECONDS) as answer:  # noqa: S310  # the scheme is checked above
            text = answer.read(_MAX_KEYS_BYTES)
    else:
        text = Path(where).read_bytes()[:_MAX_KEYS_BYTES]
    keys = jwt.PyJWKSet.from_dict(json.loads(text)).keys
    # Whoever signs with a public key as an HMAC secret must find no symmetric keys among them.
    return {key.key_id or "": key for key in keys if key.key_type != "oct"}


def _identity(claims: Mapping[str, Any], settings: JwtSettings) -> Identity:
    tenant, subject = claims.get(settings.tenant_claim), claims.get("sub", claims.get(settings.tenant_claim))
    if not isinstance(tenant, str) or not 0 < len(tenant) <= _MAX_TENANT_LENGTH or not tenant.isprintable():
        raise _bad_token(f"its claim {settings.tenant_claim!r} is not a name")
    grant = _grant(claims.get(settings.role_claim), settings)
    digest = hashlib.sha256(f"{settings.issuer}\n{subject}".encode()).hexdigest()
    return Identity(
        key_id=f"jwt-{digest[:12]}",
        tenant=tenant,
        models=None if grant.models is None else frozenset(grant.models),
        endpoints=None if grant.endpoints is None else frozenset(grant.endpoints),
        priority=grant.priority,
        admin=grant.admin,
        debug=grant.debug,
        allow_degrade=grant.allow_degrade,
        limits=KeyLimits(rpm=grant.rpm, tpm=grant.tpm, concurrency=grant.concurrency, budget=grant.budget),
    )


def _grant(claimed: object, settings: JwtSettings) -> GrantSettings:
    roles = claimed.split() if isinstance(claimed, str) else claimed if isinstance(claimed, list) else []
    for role, grant in settings.roles.items():
        if role in roles:
            return grant
    if settings.default is None:
        raise MeshError(Reason.PERMISSION_DENIED, "this token carries none of the roles that may use this service")
    return settings.default


def _bad_token(why: str) -> MeshError:
    return MeshError(Reason.INVALID_API_KEY, f"this token is not valid: {why}")
