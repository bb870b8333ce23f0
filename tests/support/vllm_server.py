"""vLLM's own HTTP server on the demo model or another, to compare with."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from tests.support.demo_model import demo_model
from tests.support.ports import free_port

__all__ = ["VllmServer", "vllm_server"]

_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ENABLE_RESPONSES_API_STORE": "1",
}


class VllmServer:
    """A server that may still be starting."""

    def __init__(self, url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.url = url
        self._process = process
        self._log = log

    def wait(self, *, within: float) -> "VllmServer":
        """Waits until it answers, and returns itself."""
        deadline = time.monotonic() + within
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"vLLM's server did not start:\n{self._log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.1)
        return self

    def engine_core(self) -> psutil.Process:
        """The engine's own process, of a server that has one."""
        children = psutil.Process(self._process.pid).children(recursive=True)
        return next(child for child in children if "EngineCore" in child.name())

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=1).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def vllm_server(
    folder: Path, *arguments: str, model: Path | None = None, own_process: bool = False, forks: bool = False
) -> Iterator[VllmServer]:
    """Starts it, on `model` instead and with further arguments; it is not ready yet.

    `own_process`: the engine has a process of its own, as it has by default, and takes longer to start. `forks`: that
    process is forked from one that has imported vLLM, as ours is, and takes less long.
    """
    port = free_port()
    program = "tests.support.stock_server" if forks else "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-W", "ignore", "-m", program]
    command += [
        "--model",
        str(model or demo_model()),
        "--served-model-name",
        "demo",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--enforce-eager", "--dtype", "float32", "--block-size", "32"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), *arguments]
    log = folder / "vllm-server.log"
    split = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own_process))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **_ENVIRONMENT, **split}, start_new_session=True
        )
    try:
        yield VllmServer(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)
