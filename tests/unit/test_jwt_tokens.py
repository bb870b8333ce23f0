"""Tokens of an identity provider: whose are taken, and what they may do."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from services.common.errors import MeshError, Reason
from services.common.settings_gateway import GrantSettings, JwtSettings
from services.gateway import jwt_tokens
from services.gateway.jwt_tokens import JwtTokens

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ISSUER, AUDIENCE = "https://login.example", "tokenloom"


def publish(folder: Path, **keys: Any) -> str:
    """Writes the provider's keys as it publishes them."""
    published = []
    for key_id, key in keys.items():
        algorithm: Any = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
        published.append({**json.loads(algorithm.to_jwk(key.public_key())), "kid": key_id, "use": "sig"})
    (folder / "jwks.json").write_text(json.dumps({"keys": published}))
    return str(folder / "jwks.json")


def settings(jwks: str, **changes: Any) -> JwtSettings:
    roles = {"ml": GrantSettings(models=["a"], rpm=5, allow_degrade=True), "ops": GrantSettings(admin=True)}
    return JwtSettings(**{"jwks": jwks, "issuer": ISSUER, "audience": AUDIENCE, "roles": roles, **changes})


def token(key: Any = RSA_KEY, *, kid: str = "one", algorithm: str = "RS256", **claims: Any) -> str:
    given = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": time.time() + 60, "roles": ["ml", "ops"], **claims}
    return jwt.encode({k: v for k, v in given.items() if v is not None}, key, algorithm, headers={"kid": kid})


async def test_claims_become_tenant_rights_and_limits(tmp_path: Path) -> None:
    tokens = JwtTokens(settings(publish(tmp_path, one=RSA_KEY)))
    identity = await tokens.identify(token())
    assert (identity.tenant, identity.models, identity.limits.rpm) == ("ada", frozenset({"a"}), 5)
    assert (identity.allow_degrade, identity.admin) == (True, False)
    assert identity.key_id == (await tokens.identify(token(jti="another"))).key_id
    assert (await tokens.identify(token(roles="x ops"))).admin


async def test_a_bearer_without_a_role_may_nothing_unless_told_otherwise(tmp_path: Path) -> None:
    jwks = publish(tmp_path, one=RSA_KEY)
    with pytest.raises(MeshError) as caught:
        await JwtTokens(settings(jwks)).identify(token(roles=[]))
    assert caught.value.reason is Reason.PERMISSION_DENIED
    identity = await JwtTokens(settings(jwks, default=GrantSettings(rpm=1))).identify(token(roles=None))
    assert identity.limits.rpm == 1


def hmac_with_the_public_key() -> str:
    public = RSA_KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    # PyJWT refuses to make it, so it is made by hand.
    import base64  # noqa: PLC0415
    import hmac  # noqa: PLC0415

    head, body, _ = token().split(".")
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT","kid":"one"}').rstrip(b"=").decode()
    signature = hmac.new(public, f"{head}.{body}".encode(), "sha256").digest()
    return f"{head}.{body}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


@pytest.mark.parametrize(
    "bad",
    [
        token(exp=time.time() - 60),
        token(exp=None),
        token(iss="https://evil.example"),
        token(aud="somebody else"),
        token(OTHER_KEY),
        token(kid="unknown"),
        token(sub=5),
        token(sub="x" * 129),
        token(sub="a\nb"),
        token(EC_KEY, kid="two", algorithm="ES256")[:-4] + "AAAA",
        jwt.encode({"sub": "ada", "iss": ISSUER, "aud": AUDIENCE, "exp": 4e9}, "", "none", headers={"kid": "one"}),
        hmac_with_the_public_key(),
        "a.b.c",
        "..",
        "e30.e30." + "x" * 10_000,
    ],
)
async def test_what_the_provider_did_not_sign_for_us_is_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(MeshError) as caught:
        await JwtTokens(settings(publish(tmp_path, one=RSA_KEY, two=EC_KEY))).identify(bad)
    assert caught.value.reason is Reason.INVALID_API_KEY
    assert "x" * 200 not in caught.value.message


async def test_a_token_is_refused_as_soon_as_it_has_expired_although_it_is_remembered(tmp_path: Path) -> None:
    now = time.time()
    tokens = JwtTokens(settings(publish(tmp_path, one=RSA_KEY), leeway_seconds=0), clock=lambda: now)
    short = token(exp=time.time() + 1)
    await tokens.identify(short)
    now += 1.5
    await asyncio.sleep(max(0.0, now - time.time()))
    with pytest.raises(MeshError, match="expired"):
        await tokens.identify(short)


async def test_a_new_key_is_looked_for_at_once_and_a_withdrawn_one_ends_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwt_tokens, "_LOOK_AGAIN_SECONDS", 0.0)
    tokens = JwtTokens(settings(publish(tmp_path, one=RSA_KEY)))
    old = token()
    await tokens.identify(old)
    publish(tmp_path, two=OTHER_KEY)
    await tokens.identify(token(OTHER_KEY, kid="two"))
    with pytest.raises(MeshError):
        await tokens.identify(old)


async def test_while_the_provider_is_away_the_keys_that_are_known_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwt_tokens, "_LOOK_AGAIN_SECONDS", 0.0)
    tokens = JwtTokens(settings(publish(tmp_path, one=RSA_KEY)))
    await tokens.identify(token())
    (tmp_path / "jwks.json").unlink()
    with pytest.raises(MeshError):
        await tokens.identify(token(OTHER_KEY, kid="two"))
    await tokens.identify(token(jti="next"))
