"""The gateway process: python -m services.gateway --config FILE"""

import asyncio
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import grpc.aio
from envoy.service.accesslog.v3 import als_pb2_grpc
from envoy.service.auth.v3 import external_auth_pb2_grpc
from prometheus_client import CollectorRegistry

from services.common.entry import start
from services.common.keystore import KeyStore
from services.common.metrics import serve_metrics
from services.common.process import collect_rarely
from services.common.rpc import serve
from services.common.settings_gateway import GatewaySettings
from services.gateway.access_log import AccessLogServicer
from services.gateway.admin_api import AdminApi
from services.gateway.answers import ChatCompletion, Completion
from services.gateway.app import App
from services.gateway.audit_trail import AuditTrail
from services.gateway.authz import AuthorizationServicer, HttpAuthorization
from services.gateway.bookkeeping import bookkeeping
from services.gateway.conversations import Conversations, RedisShelf, connect
from services.gateway.endpoint import CHAT, COMPLETIONS, Endpoint, Limits
from services.gateway.fleet import FleetWatch
from services.gateway.generator import Generator
from services.gateway.guardrails import Guardrails
from services.gateway.identity import Authenticator, KeyDirectory
from services.gateway.inner_calls import InnerCalls
from services.gateway.jobs import Jobs
from services.gateway.jwt_tokens import JwtTokens
from services.gateway.metrics import GatewayMetrics
from services.gateway.models import Models, TypedModels
from services.gateway.placement import Placement
from services.gateway.pooling import pooling_routes
from services.gateway.refusals import Refusals
from services.gateway.responses import Responses
from services.gateway.router_client import RouterClient
from services.gateway.routes import Route, Routes
from services.gateway.server import serve_http
from services.gateway.stored import LateDatabase
from services.gateway.typed_lane import TypedAccounts
from services.gateway.worker_calls import WorkerCalls
from services.gateway.worker_sessions import WorkerSessions

_AUTHORIZATION = "envoy.service.auth.v3.Authorization"
_ACCESS_LOG = "envoy.service.accesslog.v3.AccessLogService"


async def main(settings: GatewaySettings, stop: asyncio.Event) -> int:
    """Serves until `stop` is set, then drains."""
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    async with AsyncExitStack() as resources:
        resources.enter_context(serve_metrics("gateway", settings, registry))
        keys = KeyDirectory(lambda: KeyStore(settings.database))
        tokens = None if settings.jwt is None else JwtTokens(settings.jwt)
        authenticator = Authenticator(keys, tokens)
        books = resources.enter_context(bookkeeping(settings, metrics))
        conversations = await _conversations(settings, resources)
        guardrails = await resources.enter_async_context(Guardrails(settings.guardrails))
        async with asyncio.TaskGroup() as tasks:
            inside = _Inside(settings, tasks)
            running = [tasks.create_task(each.run()) for each in (*inside.followed, keys, tokens, books) if each]
            database = resources.enter_context(LateDatabase(settings.database))
            jobs = Jobs(settings.batches, database, keys)
            routes = _routes(settings, inside, metrics, conversations, jobs)
            running.append(tasks.create_task(jobs.run(InnerCalls(routes, books.accounts, guardrails))))
            typed = TypedAccounts(books.accounts)
            resources.callback(typed.enter_now)
            authorization = HttpAuthorization(authenticator, guardrails, typed, trail=AuditTrail(database))
            refusals = Refusals(routes, authenticator, books.accounts, metrics, max_body_bytes=settings.max_body_bytes)
            app = App(
                routes=routes,
                authenticator=authenticator,
                accounts=books.accounts,
                guardrails=guardrails,
                authorization=authorization,
                metrics=metrics,
                is_ready=lambda: inside.routers.can_place and keys.is_loaded and not stop.is_set(),
                client_seconds=settings.client_timeout_seconds,
            )
            servicer = AuthorizationServicer(authenticator, guardrails)
            async with (
                serve(settings.listen, _checks(servicer, typed, TypedModels(inside.fleet))) as checks,
                serve_http(
                    app,
                    settings.http,
                    short_cuts=(authorization.known_answer, refusals.known_answer),
                    when_noted=books.accounts.journal.after,
                    drain_seconds=settings.drain_seconds,
                ),
            ):
                await checks.set_serving(True)
                # Each request is many small objects, and hardly a cycle.
                collect_rarely()
                await stop.wait()
            inside.close()
            for task in running:
                task.cancel()
    return 0


class _Inside:
    """The gateway's ends of what it speaks with: routers, and the workers that they place requests on."""

    def __init__(self, settings: GatewaySettings, tasks: asyncio.TaskGroup) -> None:
        placement = Placement(memory_seconds=settings.fleet_memory_seconds)
        self.routers = RouterClient(settings.routers, sessions=settings.router_sessions, placement=placement)
        self.fleet = FleetWatch(settings.routers, on_endpoints=self._keep, placement=placement)
        self.calls = WorkerCalls(self.routers, tasks)
        self._workers = WorkerSessions(tasks)
        self.generator = Generator(self.routers, self._workers)
        self.followed = (self.routers, self.fleet)
        """What has to run for as long as anything is asked of the others."""

    def close(self) -> None:
        """Ends what was begun with workers."""
        self._workers.close()
        self.calls.close()

    def _keep(self, endpoints: set[str]) -> None:
        self._workers.keep(endpoints)
        self.calls.keep(endpoints)


def _checks(
    authorization: AuthorizationServicer, typed: TypedAccounts, models: TypedModels
) -> Callable[[grpc.aio.Server], list[str]]:
    def register(server: grpc.aio.Server) -> list[str]:
        external_auth_pb2_grpc.add_AuthorizationServicer_to_server(authorization, server)
        als_pb2_grpc.add_AccessLogServiceServicer_to_server(AccessLogServicer(typed), server)
        return [_AUTHORIZATION, _ACCESS_LOG, models.register(server)]

    return register


async def _conversations(settings: GatewaySettings, resources: AsyncExitStack) -> Conversations:
    if settings.redis_url is None:
        return Conversations()
    redis = await resources.enter_async_context(connect(settings.redis_url))
    return Conversations(RedisShelf(redis))


def _routes(
    settings: GatewaySettings, inside: _Inside, metrics: GatewayMetrics, conversations: Conversations, jobs: Jobs
) -> Routes:
    limits = Limits(max_body_bytes=settings.max_body_bytes, timeout_seconds=settings.request_timeout_seconds)
    chat = Endpoint(CHAT, inside.generator, metrics, limits)
    completions = Endpoint(COMPLETIONS, inside.generator, metrics, limits)
    stream_route = partial(Route, "POST", streams=True, is_limited=True)
    generating = (
        stream_route("/v1/chat/completions", chat, body=CHAT.shape, answer=ChatCompletion),
        stream_route("/v1/completions", completions, body=COMPLETIONS.shape, answer=Completion),
        *Responses(inside.generator, metrics, limits, conversations).routes,
    )
    return Routes(
        # Those that generate may wait for a worker.
        *(jobs.put_off(route) if route.is_limited else route for route in generating),
        *pooling_routes(inside.calls, metrics, limits),
        *jobs.routes,
        *AdminApi(settings.database).routes,
        *Models(inside.fleet).routes,
    )


if __name__ == "__main__":
    sys.exit(start("gateway", GatewaySettings, main))
