"""Keys, usage and the audit trail over HTTP, for operators: /v1/admin/…"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from services.common import audit, ledger
from services.common.database import Database
from services.common.errors import MeshError, Reason
from services.common.keystore import KeyStore
from services.common.quota import KeyLimits
from services.gateway import answers_admin as answers
from services.gateway.caller import Caller
from services.gateway.decoding import decode, invalid
from services.gateway.identity import Identity
from services.gateway.request import Request
from services.gateway.response import Response
from services.gateway.routes import Route
from services.gateway.schema import ModelName
from services.gateway.stored import while_stored

__all__ = ["AdminApi", "KeyRequest", "RotateRequest"]

T = TypeVar("T")
_MAX_BODY_BYTES = 64 << 10
_MAX_ENTRIES = 10_000
_MAX_REQUESTS = 1000
_REQUEST_FILTERS = ("tenant", "model", "worker", "outcome")
Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]*\Z")]
Count = Annotated[int, Meta(ge=1, le=2**53)]
Endpoint = Literal[
    "admin",
    "batches",
    "chat",
    "completions",
    "embeddings",
    "files",
    "generate",
    "models",
    "responses",
    "score",
    "tokenize",
]


class KeyRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/admin/keys"""

    name: Name
    tenant: Name | None = None
    models: Annotated[list[ModelName], Meta(max_length=256)] | None = None
    endpoints: list[Endpoint] | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    allow_degrade: bool = False
    admin: bool = False
    debug: bool = False
    rpm: Count | None = None
    tpm: Count | None = None
    concurrency: Count | None = None
    budget: Annotated[float, Meta(gt=0)] | None = None
    expires_in_seconds: Annotated[float, Meta(gt=0, le=10 * 365 * 86_400)] | None = None


class RotateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/admin/keys/{key_id}/rotate"""

    grace_seconds: Annotated[float, Meta(ge=0, le=30 * 86_400)] = 0.0


class AdminApi:
    """What operators may do without a shell on the gateway's machine. Every call needs the admin right."""

    def __init__(self, database: str) -> None:
        """`database`: a file, or a URL."""
        self._where = database

    @property
    def routes(self) -> list[Route]:
        """What is served."""
        text = {"type": "string"}
        return [
            Route("POST", "/v1/admin/keys", self.create_key, body=KeyRequest, answer=answers.NewKey),
            Route("GET", "/v1/admin/keys", self.list_keys, answer=answers.KeyList),
            Route("DELETE", "/v1/admin/keys/{key_id}", self.revoke_key, answer=answers.Revoked),
            Route("POST", "/v1/admin/keys/{key_id}/rotate", self.rotate_key, body=RotateRequest, answer=answers.NewKey),
            Route(
                "GET",
                "/v1/admin/usage",
                self.usage,
                query={"tenant": text, "model": text, "month": text},
                answer=answers.UsageReport,
            ),
            Route(
                "DELETE",
                "/v1/admin/usage",
                self.erase_usage,
                query={"tenant": {**text, "minLength": 1}},
                needs=["tenant"],
                answer=answers.Erased,
            ),
            Route(
                "GET",
                "/v1/admin/requests",
                self.requests,
                query={
                    **dict.fromkeys(_REQUEST_FILTERS, text),
                    "limit": {"type": "integer", "minimum": 1, "maximum": _MAX_REQUESTS},
                },
                answer=answers.RequestList,
            ),
            Route("GET", "/v1/admin/requests/{request_id}", self.one_request, answer=answers.RequestRow),
            Route(
                "GET",
                "/v1/admin/audit",
                self.audit_trail,
                query={"limit": {"type": "integer", "minimum": 1, "maximum": _MAX_ENTRIES}},
                answer=answers.AuditTrail,
            ),
        ]

    async def create_key(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Makes a key, and shows it this once."""
        del caller
        identity.check_admin()
        asked = decode(await request.json_body(_MAX_BODY_BYTES), KeyRequest)
        limits = KeyLimits(rpm=asked.rpm, tpm=asked.tpm, concurrency=asked.concurrency, budget=asked.budget)
        expires_in = asked.expires_in_seconds

        def create(store: KeyStore) -> tuple[str, str]:
            return store.create(
                asked.name,
                tenant=asked.tenant,
                models=asked.models,
                endpoints=asked.endpoints,
                priority=asked.priority,
                allow_degrade=asked.allow_degrade,
                admin=asked.admin,
                debug=asked.debug,
                limits=limits,
                expires_at=None if expires_in is None else time.time() + expires_in,
                actor=identity.key_id,
            )

        key_id, key = await self._keys(create)
        await response.send_json(200, {"id": key_id, "key": key})

    async def list_keys(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Every key, not its secret."""
        del request, caller
        identity.check_admin()
        records = await self._keys(KeyStore.list)
        await response.send_json(200, {"object": "list", "data": [asdict(record) for record in records]})

    async def revoke_key(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Ends a key."""
        del caller
        identity.check_admin()
        key_id = request.parameters["key_id"]
        if not await self._keys(lambda store: store.revoke(key_id, actor=identity.key_id)):
            raise _unknown(key_id)
        await response.send_json(200, {"id": key_id, "revoked": True})

    async def rotate_key(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Gives a key a new secret, and shows it this once."""
        del caller
        identity.check_admin()
        asked = decode(await request.json_body(_MAX_BODY_BYTES), RotateRequest)
        key_id = request.parameters["key_id"]
        key = await self._keys(
            lambda store: store.rotate(key_id, grace_seconds=asked.grace_seconds, actor=identity.key_id)
        )
        if key is None:
            raise _unknown(key_id)
        await response.send_json(200, {"id": key_id, "key": key})

    async def usage(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Usage by month, tenant and model."""
        del caller
        identity.check_admin()
        query = request.query
        wanted = {name: query.get(name) for name in ("tenant", "model", "month")}
        lines = await self._database(lambda database: ledger.report(database, **wanted))
        await response.send_json(200, {"object": "list", "data": lines})

    async def erase_usage(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Deletes a tenant's usage."""
        del caller
        identity.check_admin()
        tenant = request.query.get("tenant")
        if not tenant:
            raise invalid("tenant", "missing required parameter: tenant", "missing_required_parameter")
        count = await self._database(lambda database: ledger.erase(database, tenant, actor=identity.key_id))
        await response.send_json(200, {"tenant": tenant, "erased": count})

    async def requests(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Requests that have ended, the newest first."""
        del caller
        identity.check_admin()
        query = request.query
        limit = _limit(query.get("limit", "50"), _MAX_REQUESTS)
        wanted = {name: query.get(name) for name in _REQUEST_FILTERS}
        rows = await self._database(lambda database: ledger.requests(database, limit=limit, **wanted))
        await response.send_json(200, {"object": "list", "data": rows})

    async def one_request(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """What a request took, once it has ended; a batch's lines are requests of their own."""
        del caller
        identity.check_admin()
        request_id = request.parameters["request_id"]
        rows = await self._database(lambda database: ledger.requests(database, limit=1, request_id=request_id))
        if not rows:
            message = f"no request {request_id[:128]!r} has ended"
            raise MeshError(Reason.NOT_FOUND, message, field="request_id")
        await response.send_json(200, rows[0])

    async def audit_trail(self, request: Request, response: Response, identity: Identity, caller: Caller) -> None:
        """Who changed what, the newest first."""
        del caller
        identity.check_admin()
        limit = _limit(request.query.get("limit", "1000"), _MAX_ENTRIES)
        entries = await self._database(lambda database: audit.read(database, limit=limit))
        await response.send_json(200, {"object": "list", "data": entries})

    async def _keys(self, work: Callable[[KeyStore], T]) -> T:
        def run() -> T:
            with KeyStore(self._where) as store:
                return work(store)

        with while_stored():
            return await asyncio.to_thread(run)

    async def _database(self, work: Callable[[Database], T]) -> T:
        def run() -> T:
            with Database(self._where) as database:
                return work(database)

        with while_stored():
            return await asyncio.to_thread(run)


def _limit(text: str, most: int) -> int:
    if not (text.isdecimal() and 1 <= int(text[:9]) <= most):
        raise invalid("limit", f"limit: expected 1 to {most}")
    return int(text)


def _unknown(key_id: str) -> MeshError:
    return MeshError(Reason.NOT_FOUND, f"there is no key {key_id[:128]!r}", field="key_id")
