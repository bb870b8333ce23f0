"""llama.cpp's own HTTP server on the demo model: `python -m tests.support.llama_server MODEL PORT CONTEXT` runs it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.gguf_model import demo_gguf
from tests.support.ports import free_port
from tests.support.waiting import wait_until

__all__ = ["LlamaServer", "llama_server"]

_ROOT = Path(__file__).parents[2]
_SLOTS = 4


class LlamaServer:
    """A server that can be killed and started again, on the same port."""

    def __init__(self, folder: Path, context: int) -> None:
        self._model = demo_gguf(folder / "demo.gguf", context)
        self._log = folder / "llama.log"
        self._port = free_port()
        self._context = context
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Starts it; returns when it answers."""
        command = [sys.executable, "-m", "tests.support.llama_server", str(self._model), str(self._port)]
        command += [str(self._context)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=_ROOT, stdout=log, stderr=log)
        wait_until(self._answers, within=20)

    def hang(self) -> None:
        """Keeps it from doing anything."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Ends hang()."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kills it, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(5)
            self._process = None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"llama.cpp's server did not start:\n{self._log.read_text(errors='replace')[-2000:]}")
        try:
            return httpx.get(f"{self.url}/health", timeout=1).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def llama_server(folder: Path, *, context: int = 1024) -> Iterator[LlamaServer]:
    """One that runs; `context` tokens are the longest sequence."""
    server = LlamaServer(folder, context)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def _serve(model: str, port: int, context: int) -> None:
    import xllamacpp  # noqa: PLC0415  # only this process needs it

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.model_alias = {"demo"}
    parameters.port = port
    parameters.n_parallel = _SLOTS
    parameters.n_ctx = _SLOTS * context
    parameters.cpuparams.n_threads = 1
    parameters.use_jinja = True
    # It ends when it is collected.
    server = xllamacpp.Server(parameters)
    while server:
        signal.pause()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
