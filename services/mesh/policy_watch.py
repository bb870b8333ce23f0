"""Hands the routing policy of a mesh.yaml on to the running mesh, whenever the file changes."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

from services.common.config import ConfigError
from services.common.policy import Policy, policy_json
from services.mesh.config import MeshConfig
from services.mesh.config_file import load_mesh
from services.mesh.state import State, write_private

__all__ = ["PolicyWatch"]

_LOOK_SECONDS: Final = 0.5


class PolicyWatch:
    """A mesh.yaml that is looked at again and again. Only its `routing` counts while the mesh runs."""

    def __init__(self, path: Path, mesh: MeshConfig, state: State, *, say: Callable[[str], None]) -> None:
        self._path = path
        self._mesh = mesh
        self._state = state
        self._say = say
        self._policy = mesh.routing
        self._seen = self._signature()

    async def run(self) -> None:
        """Watches until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self.look()

    def look(self) -> None:
        """Hands the policy on if the file has changed and says something else; one that is wrong is only told of."""
        seen = self._signature()
        if seen in (None, self._seen):
            return
        self._seen = seen
        try:
            policy = self._read()
        except ConfigError as error:
            self._say(f"tokenloom: {error}\nthe routing policy stays as it was")
            return
        if policy != self._policy:
            self._policy = policy
            write_private(self._state.policy, policy_json(policy) + "\n")
            self._say(f"the routing policy of {self._path} is in force")

    def _read(self) -> Policy:
        changed = load_mesh(self._path)
        # It must fit what runs, not what the file may say beside it now.
        return changed.routing.check(
            f"{self._path}: routing", pools=self._mesh.pool_names, models=self._mesh.model_names
        )

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size
