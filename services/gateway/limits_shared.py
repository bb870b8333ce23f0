"""Limits that all gateways share through Redis; while it is slow or away, each gives away its own part of them."""

import asyncio
import logging
import secrets
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from services.common.quota import KeyLimits
from services.gateway.limits import Decision, KeyState, Level, LocalLimits, Reservation, Which
from services.gateway.standing import Standing, standing

__all__ = ["SharedLimits"]

_log = logging.getLogger(__name__)
_SCRIPT: Final = Path(__file__).with_name("limits.lua")
# The longest that a request waits for Redis; who has waited so long is why nobody else will.
_DEADLINE_SECONDS: Final = 0.004
_BATCH_SECONDS: Final = 0.25
_PROBE_SECONDS: Final = 0.1
_HELLO_SECONDS: Final = 2.0
_MAX_WAITING: Final = 10_000
_BATCH_CALLS: Final = 20
_MAX_STANDING: Final = 10_000
_LOOKS: Final = 3
_NO_LIMIT: Final = -1
_RESTORED_AT_ONCE: Final = 100
_ALIVE_KEY: Final = "tokenloom:gateways"
# A bucket that Redis has not, of a key that has used more than this part of it, was lost there.
_LOST: Final = 0.95


@dataclass(slots=True)
class _Call:
    key_id: str
    arguments: tuple[object, ...]
    answer: "asyncio.Future[Any] | None" = None


class SharedLimits:
    """Asks Redis, in one round trip and for a few milliseconds at most, and decides alone when it doesn't answer.

    Requests that come while one round trip is under way share the next one. What was decided alone is told to Redis
    when it is back.
    """

    def __init__(self, url: str, name: str, *, replicas: int = 1) -> None:
        """`name` of this gateway; `replicas`: how many gateways there are, until Redis has told."""
        self._redis = Redis.from_url(
            url,
            socket_timeout=_BATCH_SECONDS,
            socket_connect_timeout=_BATCH_SECONDS,
            retry=Retry(NoBackoff(), 0),
            max_connections=2,
        )
        self._name = f"{name}-{secrets.token_hex(4)}"
        self._script = _SCRIPT.read_text(encoding="utf-8")
        self._digest = ""
        self._local = LocalLimits()
        self._local.share = 1 / max(1, replicas)
        self._waiting: list[_Call] = []
        self._sent: list[_Call] = []
        self._wake = asyncio.Event()
        self._run_id = ""
        self._standing: dict[str, Standing] = {}
        self.is_shared = False
        """Whether Redis answers."""

    async def run(self) -> None:
        """Talks to Redis until cancelled."""
        try:
            while True:
                try:
                    await self._connect()
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(self._send_batches())
                        tasks.create_task(self._say_hello())
                except* (RedisError, OSError, TimeoutError, _SlowError) as errors:
                    self._trip(errors.exceptions[0])
                await asyncio.sleep(_PROBE_SECONDS)
        finally:
            self._trip(_SlowError("this gateway stops"))
            await self._redis.aclose()

    async def admit(self, key_id: str, limits: KeyLimits, tokens: float) -> tuple[Decision, Reservation]:
        """As a Limiter."""
        state = self._local.state(key_id, limits)
        if not self.is_shared or limits == KeyLimits(budget=limits.budget):
            return self._local.take(key_id, limits, tokens)
        answer = asyncio.get_running_loop().create_future()
        given = (_or_none(limits.rpm), _or_none(limits.tpm), _or_none(limits.concurrency), round(tokens))
        self._push(_Call(key_id, ("admit", *given), answer))
        asked_at = monotonic()
        told = await answer
        if told is None:
            return self._local.take(key_id, limits, tokens)
        decision, reservation = self._decide(key_id, limits, tokens, state, told)
        self._note_refusal(key_id, standing(decision, limits, asked_at=asked_at, heard_at=monotonic()))
        return decision, reservation

    def refusal(self, key_id: str, limits: KeyLimits) -> Decision | None:
        """As a Limiter: what is shared is for Redis to say, and what it has said lately may stand."""
        if not self.is_shared:
            return self._local.refusal(key_id, limits)
        refused = self._standing.get(key_id)
        decision = None if refused is None else refused.decision_at(monotonic(), limits)
        if decision is None:
            self._standing.pop(key_id, None)
        return decision

    def _note_refusal(self, key_id: str, refused: Standing | None) -> None:
        if refused is None:
            self._standing.pop(key_id, None)
            return
        if len(self._standing) >= _MAX_STANDING:
            self._standing.clear()
        self._standing[key_id] = refused

    def settle(self, reservation: Reservation, used: float) -> None:
        """As a Limiter."""
        self._local.settle(reservation, used)
        limits = reservation.limits
        if self.is_shared and reservation.is_shared:
            back = reservation.tokens - used if limits.tpm is not None else 0
            counted = int(limits.concurrency is not None)
            given = (_or_none(limits.rpm), _or_none(limits.tpm), round(back), counted)
            self._push(_Call(reservation.key_id, ("settle", *given)))

    def _decide(
        self, key_id: str, limits: KeyLimits, tokens: float, state: KeyState, told: list[Any]
    ) -> tuple[Decision, Reservation]:
        allowed, which, wait_ms, requests, left, fresh = told
        taken = min(tokens, limits.tpm) if limits.tpm is not None else 0.0
        if fresh and self._was_used(state):
            # Emptied behind our back; what is known here is set there again.
            self._push(self._restoring(key_id, state, kept=False))
        else:
            self._local.mirror(state, float(requests), float(left))
        if allowed:
            state.busy += 1
        decision = Decision(
            allowed=bool(allowed),
            which=cast("Which", which.decode()),
            wait_seconds=wait_ms / 1000,
            requests=None if limits.rpm is None else Level(limits.rpm, float(requests)),
            tokens=None if limits.tpm is None else Level(limits.tpm, float(left)),
        )
        return decision, Reservation(key_id, limits, taken, is_shared=True)

    def _was_used(self, state: KeyState) -> bool:
        limits = state.limits
        requests, tokens = self._local.levels(state)
        return (limits.rpm is not None and requests < _LOST * limits.rpm) or (
            limits.tpm is not None and tokens < _LOST * limits.tpm
        )

    def _push(self, call: _Call) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            self._trip(_SlowError("too much waits for it"))
        self._waiting.append(call)
        self._wake.set()

    def _trip(self, cause: BaseException) -> None:
        if self.is_shared:
            _log.warning("limits are not shared", extra={"cause": f"{type(cause).__name__}: {cause}"})
            for state in self._local.keys.values():
                state.used_requests = state.used_tokens = 0.0
            self._standing.clear()
        self.is_shared = False
        unanswered, self._sent, self._waiting = [*self._sent, *self._waiting], [], []
        for call in unanswered:
            if call.answer is not None and not call.answer.done():
                call.answer.set_result(None)
        self._wake.set()

    async def _connect(self) -> None:
        async with asyncio.timeout(_BATCH_SECONDS):
            self._digest = await self._redis.script_load(self._script)
            run_id = str((await self._redis.info("server"))["run_id"])
            await self._hello()
        kept, self._run_id = run_id == self._run_id, run_id
        used = [(key, state) for key, state in self._local.keys.items() if state.busy or self._was_used(state)]
        for start in range(0, len(used), _RESTORED_AT_ONCE):
            async with asyncio.timeout(_BATCH_SECONDS):
                part = used[start : start + _RESTORED_AT_ONCE]
                await self._execute([self._restoring(key, state, kept=kept) for key, state in part])
        self.is_shared = True
        _log.info("limits are shared", extra={"gateways": round(1 / self._local.share)})

    async def _send_batches(self) -> None:
        while True:
            await self._wake.wait()
            calls, self._waiting = self._waiting[:_BATCH_CALLS], self._waiting[_BATCH_CALLS:]
            if not self._waiting:
                self._wake.clear()
            if calls:
                self._sent = calls
                for call, told in zip(calls, await self._in_time(calls), strict=True):
                    self._hand_over(call, told)

    def _hand_over(self, call: _Call, told: Any) -> None:
        if call.answer is None:
            return
        if not call.answer.done():
            call.answer.set_result(told)
        elif call.answer.cancelled() and told[0]:
            # Let in after it had left.
            _, rpm, tpm, concurrency, tokens = call.arguments
            self._push(_Call(call.key_id, ("settle", rpm, tpm, tokens, int(concurrency != _NO_LIMIT))))

    async def _in_time(self, calls: list[_Call]) -> list[Any]:
        """One round trip; once it takes too long nobody waits for it any more, nor asks again before it is over."""
        asking = asyncio.ensure_future(self._execute(calls))
        try:
            await asyncio.wait((asking,), timeout=_DEADLINE_SECONDS)
            for _ in range(_LOOKS):
                # It may be this process that was slow: what has arrived by now is still to be read.
                if not asking.done():
                    await asyncio.sleep(0)
            if not asking.done():
                slow = _SlowError("no answer in time")
                self._trip(slow)
                await asking
                raise slow
            return asking.result()
        finally:
            asking.cancel()

    async def _execute(self, calls: list[_Call]) -> list[Any]:
        try:
            answers = await self._evaluate(calls)
        except NoScriptError:
            # Flushed, or another server: nothing of the batch was done.
            self._digest = await self._redis.script_load(self._script)
            answers = await self._evaluate(calls)
        return answers

    async def _evaluate(self, calls: list[_Call]) -> list[Any]:
        # What goes wrong with one goes wrong with all: read-only, out of memory, gone.
        async with self._redis.pipeline(transaction=False) as pipeline:
            for call in calls:
                keys = (f"tokenloom:limit:{call.key_id}", f"tokenloom:busy:{call.key_id}", _ALIVE_KEY)
                pipeline.evalsha(self._digest, 3, *keys, self._name, *call.arguments)  # type: ignore[arg-type]  # redis encodes numbers
            answers: list[Any] = await pipeline.execute()
        return answers

    async def _say_hello(self) -> None:
        while True:
            await asyncio.sleep(_HELLO_SECONDS)
            async with asyncio.timeout(_BATCH_SECONDS):
                await self._hello()

    async def _hello(self) -> None:
        gateways = (await self._execute([_Call("", ("hello",))]))[0]
        self._local.share = 1 / max(1, gateways)

    def _restoring(self, key_id: str, state: KeyState, *, kept: bool) -> _Call:
        limits = state.limits
        requests, tokens = self._local.levels(state)
        levels = (round(requests, 3), round(tokens, 3), state.busy if limits.concurrency is not None else 0)
        used = (round(state.used_requests, 3), round(state.used_tokens, 3))
        return _Call(key_id, ("restore", _or_none(limits.rpm), _or_none(limits.tpm), *levels, int(kept), *used))


class _SlowError(Exception):
    """Redis did not answer in time."""


def _or_none(limit: int | None) -> int:
    return _NO_LIMIT if limit is None else limit
