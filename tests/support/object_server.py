"""A real S3 server that others wrote: moto's, which keeps objects in memory."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from obstore.store import S3Store

from tests.support.ports import free_port

__all__ = ["ObjectServer", "object_server"]


class ObjectServer:
    """A server on a port of its own, empty whenever it is started."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What AWS_ENDPOINT_URL is to say."""
        return f"http://127.0.0.1:{self._port}"

    def start(self, within: float = 60.0) -> None:
        """Starts it and waits until it answers."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + within
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(self._log.read_text())
            time.sleep(0.05)

    def kill(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def make_bucket(self, bucket: str) -> None:
        """Makes one, with nothing in it."""
        httpx.put(f"{self.url}/{bucket}").raise_for_status()

    def put(self, bucket: str, path: str, content: bytes) -> None:
        """Writes an object, by the credentials of the environment."""
        S3Store(bucket, client_options={"allow_http": True}).put(path, content)

    def put_folder(self, bucket: str, path: str, folder: Path) -> None:
        """Writes a folder's files."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(bucket, f"{path}/{file.relative_to(folder)}", file.read_bytes())

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/moto-api/", timeout=1).is_success
        except httpx.TransportError:
            return False


@contextmanager
def object_server(folder: Path) -> Iterator[ObjectServer]:
    """One that runs, with the environment that clients of it need."""
    server = ObjectServer(folder / "moto.log")
    server.start()
    try:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ENDPOINT_URL", server.url)
            environment.setenv("AWS_ACCESS_KEY_ID", "somebody")
            environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            environment.setenv("AWS_REGION", "us-east-1")
            yield server
    finally:
        server.kill()
