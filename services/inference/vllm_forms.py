"""Whether forms of outputs can be compiled, found out where it harms nobody. Imports nothing of vLLM."""

import asyncio
import hashlib
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from services.common.errors import MeshError, Reason
from services.inference.checks import invalid
from services.inference.request import StructuredOutput

__all__ = ["Forms"]

_MAX_REMEMBERED: Final = 1024
# Each may take its second.
_MAX_WAITING: Final = 8
# One tenant leaves places to others.
_MAX_TENANT_WAITING: Final = 4
_MAX_TENANTS: Final = 10_000
_NEW_PER_MINUTE: Final = 120
# Reading a large vocabulary takes a second; a form has its own bounds.
_ANSWER_SECONDS: Final = 30.0
_CHECKER: Final = "services.inference.vllm_form_check"
_FIELDS: Final = {
    "json_schema": "structured_output.json_schema",
    "json_object": "structured_output.json_object",
    "regex": "structured_output.regex",
    "grammar": "structured_output.grammar",
    "choice": "structured_output.choices",
}


class Forms:
    """Checks forms one after another in a process of its own, and remembers what it found. One event loop owns it."""

    def __init__(
        self,
        tokenizer: Mapping[str, Any],
        *,
        new_per_minute: int = _NEW_PER_MINUTE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tokenizer` is the checker's first line: `tokenizer`, `vocabulary`, `end_id` and `any_whitespace`.

        `new_per_minute`: how many forms that are not known one tenant may bring along. `clock` gives seconds.
        """
        self._tokenizer = tokenizer
        self._new_per_minute = new_per_minute
        self._clock = clock
        self._allowances: OrderedDict[str, _Allowance] = OrderedDict()
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        self._asked: dict[bytes, asyncio.Event] = {}
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._process: asyncio.subprocess.Process | None = None

    async def check(self, form: StructuredOutput, *, tenant: str = "", field: str | None = None) -> None:
        """Returns when the engine can compile the form.

        Raises:
            MeshError: INVALID_REQUEST on `field`, by default the form's own; NO_CAPACITY while too many wait;
                RATE_LIMIT_EXCEEDED when the tenant had too many new ones.
        """
        value = json.dumps(list(form.choices)) if form.kind == "choice" else form.value
        key = hashlib.sha256(f"{form.kind}\n{value}".encode()).digest()
        error = await self._found(key, form.kind, value, tenant)
        if error is not None:
            raise invalid(field or _FIELDS[form.kind], error)

    async def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _found(self, key: bytes, kind: str, value: str, tenant: str) -> str | None:
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        if key in self._asked:
            # Many ask for one form at once, and it is tried out once: they take no place that others could have.
            await self._asked[key].wait()
            return await self._found(key, kind, value, tenant)
        allowance = self._allowance(tenant)
        if self._waiting == _MAX_WAITING or (tenant and allowance.waiting == _MAX_TENANT_WAITING):
            raise MeshError(Reason.NO_CAPACITY, "too many structured outputs are new", retry_after_seconds=1.0)
        if tenant:
            # Whoever is none of ours answers for its own.
            allowance.take(self._clock(), self._new_per_minute)
        over = self._asked[key] = asyncio.Event()
        self._waiting += 1
        allowance.waiting += 1
        try:
            async with self._turn:
                self._remember(key, await self._ask(kind, value))
                return self._known[key]
        finally:
            self._waiting -= 1
            allowance.waiting -= 1
            del self._asked[key]
            over.set()

    def _allowance(self, tenant: str) -> "_Allowance":
        known = self._allowances.get(tenant)
        if known is None:
            known = self._allowances[tenant] = _Allowance(float(self._new_per_minute), self._clock())
            if len(self._allowances) > _MAX_TENANTS:
                self._allowances.popitem(last=False)
        self._allowances.move_to_end(tenant)
        return known

    def _remember(self, key: bytes, error: str | None) -> None:
        self._known[key] = error
        if len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)

    async def _ask(self, kind: str, value: str) -> str | None:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                process = await self._running()
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps({"kind": kind, "value": value}).encode() + b"\n")
                await process.stdin.drain()
                answer = await process.stdout.readline()
        except BaseException as error:
            # A late answer would be taken for the next one's.
            await self.close()
            if isinstance(error, TimeoutError | OSError):
                raise MeshError(Reason.INTERNAL, "structured outputs can't be checked") from error
            raise
        if not answer:
            await self.close()
            raise MeshError(Reason.INTERNAL, "structured outputs can't be checked")
        found: str | None = json.loads(answer)
        return found

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        # It ends with this process: its standard input does.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", _CHECKER),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._tokenizer).encode() + b"\n")
        return self._process


@dataclass(slots=True)
class _Allowance:
    """How many new forms a tenant may still bring along: a minute's worth at once, and evenly from then on."""

    left: float
    at: float
    waiting: int = 0

    def take(self, now: float, per_minute: int) -> None:
        """Takes one. Raises MeshError (RATE_LIMIT_EXCEEDED)."""
        self.left = min(float(per_minute), self.left + (now - self.at) * per_minute / 60)
        self.at = now
        if self.left < 1:
            message = f"more than {per_minute} new structured outputs a minute: use the same ones again"
            raise MeshError(Reason.RATE_LIMIT_EXCEEDED, message, retry_after_seconds=(1 - self.left) * 60 / per_minute)
        self.left -= 1
