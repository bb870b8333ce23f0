"""Which database has a mesh's keys, usage and audit. It is known, or refused: a key made elsewhere opens nothing."""

import os
import sys
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from services.common import config
from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.mesh.state import State

__all__ = ["SETTINGS_VARIABLE", "database_of_folder", "find_database", "shown"]

SETTINGS_VARIABLE: Final = "TOKENLOOM_GATEWAY_SETTINGS"
"""Names the settings file of the gateway beside which a command runs, as in a container."""


def find_database(state: State, *, may_begin: bool = False) -> str:
    """The database of the mesh that runs here; says which one it takes where no mesh does.

    `may_begin`: where no mesh has run yet, the one that a mesh has there unless it is told another, made if need be.

    Raises:
        MeshError: nothing says which it is, or two things do.
        ConfigError: the file that the environment names can't be used.
    """
    settings, runs = os.environ.get(SETTINGS_VARIABLE), state.running_pid() is not None
    if settings is None:
        if may_begin and not runs and state.read_database() is None and not state.keys.exists():
            return _begun(state)
        found = database_of_folder(state)
        if not runs:
            said = f"no mesh runs in {state.folder}; these are the books of the one that ran last: {shown(found)}"
            sys.stderr.write(f"tokenloom: {said}\n")
        return found
    if runs:
        message = f"whose keys? A mesh runs in {state.folder}, and {SETTINGS_VARIABLE} names {settings}: unset that"
        raise MeshError(Reason.FAILED_PRECONDITION, message)
    return _of_gateway(Path(settings))


def database_of_folder(state: State) -> str:
    """The database of the mesh that runs in a folder, or ran there last.

    Raises:
        MeshError: nothing says which it is.
    """
    said, launcher = state.read_database(), state.running_pid()
    if said is not None and launcher in (None, said[1]):
        return said[0]
    if launcher is not None:
        # What the last one was told may be another database.
        message = f"the mesh in {state.folder} does not say yet where its keys are: it is starting, try again"
        raise MeshError(Reason.FAILED_PRECONDITION, message)
    if state.keys.exists():
        return str(state.keys)
    message = (
        f"no mesh runs in {state.folder} or has run there, so that nothing says where its keys are. On the machine "
        f"that runs it, name its folder with --state-dir; beside a gateway, as in its container, "
        f"{SETTINGS_VARIABLE} names the gateway's settings file"
    )
    raise MeshError(Reason.FAILED_PRECONDITION, message)


def shown(where: str) -> str:
    """A database's file or URL as it may be shown: without its password."""
    if "://" not in where:
        return where
    parts = urlsplit(where)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.password else where


def _begun(state: State) -> str:
    state.make()
    said = f"no mesh has run in {state.folder} yet; one takes this from {state.keys}, unless it has a database_url"
    sys.stderr.write(f"tokenloom: {said}\n")
    return str(state.keys)


def _of_gateway(path: Path) -> str:
    where = f"{SETTINGS_VARIABLE}={path}"
    settings = config.read(path)
    found = settings.get("database") if isinstance(settings, dict) else None
    if not isinstance(found, str) or not found:
        raise ConfigError(f"{where}: these are no settings of a gateway: there is no database in them")
    return found
