"""Where vLLM's engine processes come from, and how to get rid of one.

Forked from the worker itself an engine would inherit the locks of threads that it hasn't, gRPC's and ZeroMQ's among
them, and now and then hang. So, without CUDA, it is forked from a server process that has imported vLLM and never has
a second thread: an engine is there in a second or two. A worker forks that server off before it has threads itself.
With CUDA every engine is a new process.
"""

import atexit
import gc
import importlib
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, Final

from services.common import logs
from services.common.settings_worker import WorkerSettings
from services.inference.vllm_environment import has_cuda, prepare_environment, vllm_version
from services.inference.vllm_plugin import tie

__all__ = ["Nursery", "import_vllm", "plant", "prepare_process"]

_log = logging.getLogger(__name__)
_PRELOAD: Final = "services.inference.vllm_preload"
_MODULES: Final = (
    "services.inference.vllm_start",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.models.llama",
)
_server: Any = forkserver._forkserver  # a server that is forked has no public way in


def prepare_process(settings: WorkerSettings) -> None:
    """Has engines start fast and safely in this process, which has no second thread yet; takes seconds.

    Without it they start all the same, from a server process that has to import vLLM itself.

    Raises:
        ConfigError: there is no vLLM.
    """
    vllm_version()
    if has_cuda():
        return
    prepare_environment(settings)
    import_vllm()
    plant()


def import_vllm() -> None:
    """Imports what an engine without CUDA needs; what is there by now is never looked at by the collector again."""
    # Little of what imports make is garbage, and looking for it again and again takes a sixth of the time.
    gc.disable()
    try:
        for name in _MODULES:
            importlib.import_module(name)
    finally:
        gc.enable()
    # Collections would copy every page that processes share.
    gc.collect()
    gc.freeze()


def plant() -> None:
    """Forks the server process off this one, which has imported vLLM and must not have a second thread; but once."""
    if _server._forkserver_pid is not None:
        return
    with socket.socket(socket.AF_UNIX) as listener:
        address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
        listener.bind(address)
        os.chmod(address, 0o600)  # noqa: PTH101  # it is no path where sockets have names of their own
        listener.listen()
        alive_r, alive_w = os.pipe()
        pid = os.fork()
        if pid == 0:
            _serve(listener, alive_r, alive_w)
        os.close(alive_r)
    _server._forkserver_address = address
    _server._forkserver_alive_fd = alive_w
    _server._forkserver_pid = pid
    atexit.register(_stop_server)


def _serve(listener: socket.socket, alive_r: int, alive_w: int) -> None:
    code = 1
    try:
        os.close(alive_w)
        tie()
        forkserver.main(listener.detach(), alive_r, None)  # type: ignore[arg-type]
    except SystemExit:
        code = 0
    finally:
        os._exit(code)


def _stop_server() -> None:
    # Left to themselves they would outlive this process for a moment.
    _server._stop()
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


class Nursery:
    """Starts engine processes for vLLM, which takes it for one of multiprocessing's contexts."""

    def __init__(self, *, forks: bool) -> None:
        """`forks` has engines forked from a server process; else each starts from nothing."""
        self._forks = forks
        self._context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        self._processes: list[BaseProcess] = []

    def open(self) -> None:
        """Starts a server process unless there is one. In the thread that is to outlive engines.

        The environment has to be prepared.
        """
        if self._forks and _server._forkserver_pid is None:
            multiprocessing.set_forkserver_preload([_PRELOAD])
            forkserver.ensure_running()
            atexit.register(_stop_server)

    def close(self) -> None:
        """Kills what engine process is left."""
        self.kill()

    @contextmanager
    def lent_to(self, module: Any) -> Iterator[None]:
        """Has a module of vLLM's take its processes from here for as long as the block."""
        theirs = module.get_mp_context
        module.get_mp_context = lambda: self
        try:
            yield
        finally:
            module.get_mp_context = theirs

    def Process(self, *, target: Callable[..., None], name: str, kwargs: Mapping[str, Any]) -> BaseProcess:
        """A process that is to run an engine, not yet started."""
        self._processes = [process for process in self._processes if process.exitcode is None]
        born = {
            "environment": dict(os.environ),
            "log_levels": {name: logging.getLogger(name).level for name in ("", "vllm")},
            "target": target,
            "arguments": dict(kwargs),
        }
        process: BaseProcess = self._context.Process(target=_live, name=name, kwargs=born)
        self._processes.append(process)
        return process

    def __getattr__(self, name: str) -> Any:
        """Whatever else vLLM wants of a context."""
        return getattr(self._context, name)

    @property
    def pids(self) -> list[int]:
        """The engine processes that live."""
        return [process.pid for process in self._processes if process.pid is not None and process.exitcode is None]

    def kill(self) -> None:
        """Ends every engine process, however it is stuck. What it started ends with it."""
        for pid in self.pids:
            _log.warning("killing the engine process", extra={"engine_pid": pid})
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _live(
    environment: Mapping[str, str],
    log_levels: Mapping[str, int],
    target: Callable[..., None],
    arguments: Mapping[str, Any],
) -> None:
    # The server's own is from before vLLM read its configuration. What is equal stays in its place, where the process's
    # title is made from it.
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
    tie()
    if log_levels[""]:
        logs.setup("inference")
    for name, level in log_levels.items():
        logging.getLogger(name).setLevel(level)
    target(**arguments)
