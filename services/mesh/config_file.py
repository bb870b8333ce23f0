"""Reads a mesh.yaml, and what the command line says instead of one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from services.common import config
from services.common.config import ConfigError
from services.common.engine_args import check_engine_args
from services.common.policy import policy_from
from services.common.settings_gateway import JwtSettings
from services.common.settings_worker import ModelSettings, SimSettings
from services.mesh.config import EdgeConfig, MeshConfig
from services.mesh.config_rules import check_mesh

__all__ = ["load_mesh", "parse_engine_args", "parse_sim"]


def load_mesh(path: Path) -> MeshConfig:
    """Reads a mesh.yaml. A path of a model that begins with `.` or `~` is made absolute; `.` is the file's folder.

    Other files that it names are looked for beside it.

    Raises:
        ConfigError: it can't be used.
    """
    raw = config.read(path)
    if isinstance(raw, dict) and "routing" in raw:
        # It names the key at fault more exactly.
        policy_from(raw["routing"], where=f"{path}: routing")
    mesh = check_mesh(config.convert(raw, MeshConfig, where=str(path)), str(path))
    return msgspec.structs.replace(
        mesh,
        models=[_with_paths(model, path.parent) for model in mesh.models],
        model_cache=_resolved(mesh.model_cache, path.parent),
        edge=_with_tls_paths(mesh.edge, path.parent),
        jwt=_with_jwks_path(mesh.jwt, path.parent),
    )


def parse_sim(text: str) -> SimSettings:
    """The settings that `--sim key=value,…` asks for.

    Raises:
        ConfigError: a key is unknown or a value doesn't fit.
    """
    raw: dict[str, float | str] = {}
    for key, value in _pairs("--sim", text):
        if key not in SimSettings.__struct_fields__:
            known = ", ".join(SimSettings.__struct_fields__)
            raise ConfigError(f"--sim: there is no key {key!r}, got the value {value!r}; the keys are {known}")
        raw[key] = _number(value)
    return config.convert(raw, SimSettings, where="--sim")


def parse_engine_args(text: str) -> dict[str, Any]:
    """The engine_args that `--engine-args key=value,…` asks for; a value is written as in YAML, without a comma.

    Raises:
        ConfigError: vLLM has no such argument, or it can't have the value.
    """
    try:
        given = {key: yaml.safe_load(value) for key, value in _pairs("--engine-args", text)}
    except yaml.YAMLError as error:
        raise ConfigError(f"--engine-args: not as YAML has values: {text!r}") from error
    check_engine_args(given, "--engine-args")
    return given


def _pairs(option: str, text: str) -> Iterator[tuple[str, str]]:
    for part in filter(None, text.split(",")):
        key, separator, value = part.partition("=")
        if not separator:
            raise ConfigError(f"{option}: expected key=value, got the value {part!r}")
        yield key, value


def _number(text: str) -> float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _with_paths(model: ModelSettings, folder: Path) -> ModelSettings:
    adapters_dir = (
        None if model.adapters_dir is None else str((folder / Path(model.adapters_dir).expanduser()).resolve())
    )
    return msgspec.structs.replace(model, path=_resolved(model.path, folder), adapters_dir=adapters_dir)


def _with_tls_paths(edge: EdgeConfig, folder: Path) -> EdgeConfig:
    """Files of TLS are looked for beside the mesh.yaml, unless they are said to be elsewhere."""
    if edge.tls is None:
        return edge
    found = {name: str((folder / Path(path).expanduser()).resolve()) for name, path in edge.tls.files.items()}
    return msgspec.structs.replace(edge, tls=msgspec.structs.replace(edge.tls, **found))


def _with_jwks_path(jwt: JwtSettings | None, folder: Path) -> JwtSettings | None:
    """A file with a provider's keys is looked for beside the mesh.yaml, too."""
    if jwt is None or jwt.jwks.startswith(("http://", "https://")):
        return jwt
    return msgspec.structs.replace(jwt, jwks=str((folder / Path(jwt.jwks).expanduser()).resolve()))


def _resolved(path: str | None, folder: Path) -> str | None:
    if path is None or not path.startswith((".", "~")):
        return path
    return str((folder / Path(path).expanduser()).resolve())
