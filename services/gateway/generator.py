"""Starts generations, and sees that each is ended."""

from types import TracebackType

from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.router.v1 import router_pb2

from services.common.errors import MeshError
from services.gateway.caller import Caller
from services.gateway.demand import estimated_prompt_tokens, most_output_tokens
from services.gateway.generation import Generation
from services.gateway.quarantine import Quarantine
from services.gateway.router_client import RouterClient
from services.gateway.worker_sessions import WorkerSessions

__all__ = ["Generator"]


class Generator:
    """Starts generations."""

    def __init__(self, routers: RouterClient, workers: WorkerSessions) -> None:
        self.routers = routers
        self.workers = workers
        self.quarantine = Quarantine()

    def run(self, request: pb.GenerateRequest, caller: Caller, *, keep_ids: bool = False) -> "_Running":
        """Runs a generation for as long as the block; leaving the block early stops it in the engine.

        `keep_ids`: every piece of the output has its tokens.

        Raises:
            MeshError: the key is over a limit, there is no worker, or the worker refuses.
        """
        return _Running(self, request, caller, keep_ids)


class _Running:
    """The block in which a generation runs. A generator's would take three times as long."""

    __slots__ = ("_caller", "_generation", "_generator", "_keep_ids", "_request")

    def __init__(self, generator: Generator, request: pb.GenerateRequest, caller: Caller, keep_ids: bool) -> None:
        self._generator = generator
        self._request = request
        self._caller = caller
        self._keep_ids = keep_ids

    async def __aenter__(self) -> Generation:
        request, caller = self._request, self._caller
        prompt_tokens = estimated_prompt_tokens(request)
        if caller.account is not None:
            await caller.account.enter(
                model=request.model, prompt_tokens=prompt_tokens, output_tokens=most_output_tokens(request)
            )
        if caller.guard is not None:
            await caller.guard.check(request)
            # It may have masked some of it.
            prompt_tokens = estimated_prompt_tokens(request)
        generation = self._generation = Generation(
            self._generator, request, caller, prompt_tokens=prompt_tokens, keep_ids=self._keep_ids
        )
        try:
            await generation.start()
        except BaseException as error:
            generation.finish(_outcome(error))
            raise
        return generation

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome = _outcome(error)
        if error is None and self._generation.ending:
            outcome = router_pb2.OUTCOME_COMPLETED
            self._generator.quarantine.clear(self._request)
        self._generation.finish(outcome)


def _outcome(error: BaseException | None) -> router_pb2.Outcome.ValueType:
    """Of a generation that is not complete."""
    if not isinstance(error, MeshError):
        return router_pb2.OUTCOME_CANCELLED
    return router_pb2.OUTCOME_REFUSED if error.row.http < 500 else router_pb2.OUTCOME_FAILED
