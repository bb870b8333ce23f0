"""A PostgreSQL server of its own for a test, on a port of its own, which it keeps when it is started again."""

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psycopg

from tests.support.ports import free_port

__all__ = ["PostgresServer", "postgres_server"]


class PostgresServer:
    """A server that may be killed, paused and started again; it keeps its data."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._data = folder / "data"
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What clients take."""
        return f"postgresql://tokenloom@127.0.0.1:{self.port}/postgres"

    def make(self) -> None:
        """Makes an empty cluster."""
        command = [
            _program("initdb"),
            "-D",
            str(self._data),
            "-U",
            "tokenloom",
            "--auth=trust",
            "--no-sync",
            "-E",
            "UTF8",
        ]
        subprocess.run(command, check=True, capture_output=True, **_as_somebody())

    def start(self, within: float = 15.0) -> None:
        """Starts it and waits until it answers."""
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": 30,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self._folder / "postgres.log").open("ab") as log:
            self.process = subprocess.Popen(
                [_program("postgres"), "-D", str(self._data), *options], stdout=log, stderr=log, **_as_somebody()
            )
        deadline = time.monotonic() + within
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError((self._folder / "postgres.log").read_text())
            time.sleep(0.05)

    def kill(self) -> None:
        """Ends it at once, its sessions with it."""
        if self.process is not None:
            # SIGQUIT is "immediate shutdown": nothing is finished, the next start recovers. After SIGKILL its children
            # would live on for a while and hold the data folder.
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(10)
            self.process = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops every process of it, without closing anything, for the block."""
        processes = self._processes()
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                os.kill(process, signal.SIGCONT)

    def set_read_only(self, read_only: bool) -> None:
        """Has new transactions refuse to write, as a standby does."""
        self.execute(f"ALTER SYSTEM SET default_transaction_read_only = {'on' if read_only else 'off'}")
        self.execute("SELECT pg_reload_conf()")

    def execute(self, statement: str) -> list[Any]:
        """Runs a statement of the test's own, and returns its rows."""
        with closing(psycopg.connect(self.url, connect_timeout=2, autocommit=True)) as connection:
            connection.execute("SET default_transaction_read_only = off")
            result = connection.execute(statement)
            return list(result.fetchall()) if result.description else []

    def _processes(self) -> list[int]:
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [self.process.pid, *map(int, children)]

    def _answers(self) -> bool:
        try:
            return self.execute("SELECT 1") == [(1,)]
        except psycopg.OperationalError:
            return False


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A running server with one empty database."""
    # Not below pytest's folders, which other users can't enter.
    folder = Path(mkdtemp(prefix="tokenloom-postgres-"))
    folder.chmod(0o755)
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
    server = PostgresServer(folder, free_port())
    try:
        server.make()
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _program(name: str) -> str:
    found = shutil.which(name) or max(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), default=None)
    assert found is not None, f"{name} is missing: scripts/system-packages installs it"
    return found


def _as_somebody() -> dict[str, Any]:
    # PostgreSQL refuses to run as root.
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
