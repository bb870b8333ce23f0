"""The file that keeps the routing policy: read again whenever it changes, written when an operator sets another one."""

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Final

from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.common.policy import Policy, parse_policy, policy_json
from services.router.policy import Policies

__all__ = ["PolicyFile"]

_LOOK_SECONDS: Final = 0.25
_log = logging.getLogger(__name__)


class PolicyFile:
    """A policy on disk, JSON. Several routers may share one file; what one of them is told, all of them obey."""

    def __init__(self, path: Path | None, policies: Policies) -> None:
        """Without a path, what is set lasts as long as the process."""
        self._path = path
        self._policies = policies
        self._seen: tuple[int, int, int] | None = None

    def load(self) -> None:
        """Puts the policy of the file in force, when there is one and it has changed. An invalid one is only logged."""
        if self._path is None or (seen := _signature(self._path)) == self._seen:
            return
        self._seen = seen
        if seen is None:
            return
        try:
            self._policies.set(parse_policy(self._path.read_bytes(), where="routing"), by=str(self._path.name))
        except (OSError, ConfigError) as error:
            _log.error(
                "policy rejected; the old one stays in force", extra={"audit": "policy.reject", "cause": str(error)}
            )

    def set(self, policy: Policy, *, by: str) -> int:
        """Puts a policy in force, keeps it, and gives its number.

        Raises:
            ConfigError: it is not valid.
            MeshError: FAILED_PRECONDITION, it can't be kept; then it is not put in force, either.
        """
        self._policies.check(policy)
        if self._path is not None:
            self._save(policy, self._path)
        return self._policies.set(policy, by=by)

    async def watch(self) -> None:
        """Runs until cancelled: obeys the file."""
        while self._path is not None:
            await asyncio.sleep(_LOOK_SECONDS)
            self.load()

    def _save(self, policy: Policy, path: Path) -> None:
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            scratch.write_text(policy_json(policy) + "\n", encoding="utf-8")
            scratch.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            message = f"the policy can't be kept: {error.strerror}"
            raise MeshError(Reason.FAILED_PRECONDITION, message, field="policy_json") from error
        self._seen = _signature(path)


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
