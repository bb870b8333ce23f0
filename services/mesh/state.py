"""The state folder of a mesh: what it leaves on disk, and who may use it."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["MeshRunningError", "State"]

_KEEP_LOG_BYTES: Final = 16 << 20
_LOCK_TRIES: Final = 5
_LOCK_WAIT_SECONDS: Final = 0.02


class MeshRunningError(Exception):
    """Another launcher uses the folder."""


@dataclass(frozen=True, slots=True)
class State:
    """The folder, `.tokenloom` unless told otherwise."""

    folder: Path

    @property
    def mesh_file(self) -> Path:
        """What runs; there once everything is ready."""
        return self.folder / "mesh.json"

    @property
    def targets_file(self) -> Path:
        """The same for Prometheus, as its file_sd_configs take it."""
        return self.folder / "targets.json"

    @property
    def keys(self) -> Path:
        """The database of keys, usage and audit, unless the mesh has another one."""
        return self.folder / "keys.db"

    @property
    def database_file(self) -> Path:
        """Which database the mesh that runs told its gateways, or the one that ran last."""
        return self.folder / "database.json"

    @property
    def policy(self) -> Path:
        """The routing policy that was set while the mesh runs."""
        return self.folder / "policy.json"

    @property
    def demo_model(self) -> Path:
        """The model that the launcher makes."""
        return self.folder / "models" / "demo"

    def config(self, name: str) -> Path:
        """The configuration of a process."""
        return self.folder / "config" / f"{name}.json"

    def log(self, name: str) -> Path:
        """The log of a process, JSON lines."""
        return self.folder / "logs" / f"{name}.jsonl"

    def make(self) -> None:
        """Makes the folder, for its owner alone: it holds keys."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("config", "logs", "models"):
            (self.folder / name).mkdir(exist_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other launchers out until the block is left, however the process ends.

        Raises:
            MeshRunningError: one is in.
        """
        descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _take(descriptor):
                raise MeshRunningError(f"a mesh runs in {self.folder} already (process {self.running_pid()})")
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            yield
        finally:
            os.close(descriptor)

    def running_pid(self) -> int | None:
        """The process id of the launcher that uses the folder; None when there is none."""
        try:
            descriptor = os.open(self._lock_file, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            written = os.read(descriptor, 32)
            # Just taken, and not signed yet.
            return int(written) if written.isdigit() else 0
        else:
            return None
        finally:
            os.close(descriptor)

    def write_mesh(self, mesh: dict[str, Any]) -> None:
        """Replaces mesh.json in one step. It holds the admin key."""
        write_private(self.mesh_file, json.dumps(mesh, indent=2) + "\n")

    def read_mesh(self) -> dict[str, Any] | None:
        """What mesh.json says; None when there is none."""
        try:
            mesh: dict[str, Any] = json.loads(self.mesh_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return mesh

    def write_database(self, where: str) -> None:
        """Says which database the gateways of this launcher are told. Its URL may hold a password."""
        write_private(self.database_file, json.dumps({"database": where, "launcher": os.getpid()}) + "\n")

    def read_database(self) -> tuple[str, int] | None:
        """What was said of it last, and by which launcher (its process id); None when nothing was."""
        try:
            said: dict[str, Any] = json.loads(self.database_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return said["database"], said["launcher"]

    def admin_key(self, database: str) -> str:
        """The key with every right, made at the first call and the same ever after unless it is revoked."""
        # Importing SQLAlchemy takes longer than most commands: only those that need it do.
        from services.common.keystore import KeyStore  # noqa: PLC0415

        kept = self.folder / "admin_key"
        with KeyStore(database) as store:
            if kept.exists() and store.find(kept.read_text(encoding="utf-8").strip()) is not None:
                return kept.read_text(encoding="utf-8").strip()
            _, key = store.create("admin", admin=True, debug=True, actor="launcher")
        write_private(kept, key + "\n")
        return key

    def rotate(self, name: str) -> None:
        """Puts a log that has grown large aside; the one before it is forgotten."""
        log = self.log(name)
        if log.exists() and log.stat().st_size > _KEEP_LOG_BYTES:
            log.replace(log.with_suffix(".jsonl.1"))

    @property
    def _lock_file(self) -> Path:
        return self.folder / "lock"


def _take(descriptor: int) -> bool:
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Somebody who only asks whether a mesh runs holds the lock for an instant.
            time.sleep(_LOCK_WAIT_SECONDS)
        else:
            return True
    return False


def write_private(path: Path, text: str) -> None:
    """Replaces a file in one step; only its owner may read it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    scratch.replace(path)
