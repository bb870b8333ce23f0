"""Does what a mesh.yaml names exist, and can it be reached?"""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from services.common.config import ConfigError
from services.common.errors import MeshError
from services.common.object_store import is_in_store
from services.mesh.books import database_of_folder, shown
from services.mesh.checkpoint import read_checkpoint
from services.mesh.config import MeshConfig
from services.mesh.config_file import load_mesh
from services.mesh.config_rules import advice_on, check_folders
from services.mesh.finding import Finding, Level
from services.mesh.ports import check_free
from services.mesh.state import State

__all__ = ["config_findings", "database_finding", "folder_finding", "port_finding", "redis_finding"]

_WAIT_SECONDS: Final = 3.0


def config_findings(path: Path, *, runs: bool) -> Iterator[Finding]:
    """Looks at a mesh.yaml and at what it names. `runs`: its mesh does, so that its port is rightly taken."""
    try:
        mesh = check_folders(load_mesh(path), str(path))
    except ConfigError as error:
        yield Finding(Level.TROUBLE, "configuration", str(error), "mend that key; tokenloom plan --config checks more")
        return
    pools, workers = len(mesh.pools), mesh.worker_count
    yield Finding(Level.OK, "configuration", f"{path}: {pools} pools, {workers} workers")
    for note in advice_on(mesh):
        subject, _, said = note.partition(": ")
        yield Finding(Level.NOTE, subject, said, "set redis_url, or have one gateway")
    yield from _models(mesh)
    yield from _upstreams(mesh)
    if not runs:
        yield port_finding(mesh.edge.host, mesh.edge.port)
    if mesh.redis_url is not None:
        yield redis_finding(mesh.redis_url)
    if mesh.database_url is not None:
        yield database_finding(mesh.database_url)


def port_finding(host: str, port: int) -> Finding:
    """Is the edge's port free?"""
    try:
        check_free(host, port)
    except ConfigError as error:
        advice = f"see who has it: ss -ltnp 'sport = :{port}'"
        return Finding(Level.TROUBLE, "port", str(error).removeprefix("--edge-port: "), advice)
    return Finding(Level.OK, "port", f"{port} of {host} is free")


def redis_finding(url: str) -> Finding:
    """Does Redis answer?"""
    import redis  # noqa: PLC0415  # needed here alone

    where = shown(url)
    client = redis.Redis.from_url(url, socket_timeout=_WAIT_SECONDS, socket_connect_timeout=_WAIT_SECONDS)
    try:
        client.ping()
    except (redis.RedisError, OSError, ValueError) as error:
        advice = "start it, or mend redis_url; without it gateways share no limits and forget conversations"
        return Finding(Level.TROUBLE, "Redis", f"{where} does not answer: {error}", advice)
    finally:
        client.close()
    return Finding(Level.OK, "Redis", f"{where} answers")


def database_finding(where: str) -> Finding:
    """Can the database of keys and usage be read? One that is not there is not made."""
    from services.common.database import Database, DatabaseError  # noqa: PLC0415  # slow to import
    from services.common.tables import KEYS  # noqa: PLC0415  # slow to import

    name = shown(where)
    if "://" not in where and not Path(where).exists():
        return Finding(Level.OK, "database", f"{name} is made at the first start")
    try:
        with Database(where) as database, database.reading() as connection:
            count = len(connection.execute(KEYS.select()).fetchall())
    except DatabaseError as error:
        said = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        advice = "keys can't be checked without it: start it, or mend database_url and the rights of its user"
        return Finding(Level.TROUBLE, "database", f"{name}: {said}", advice)
    return Finding(Level.OK, "database", f"{name}: {count} key{'' if count == 1 else 's'}")


def folder_finding(state: State) -> Finding:
    """The same of the mesh that runs in a folder, or ran there last."""
    try:
        return database_finding(database_of_folder(state))
    except MeshError as error:
        if state.running_pid() is None:
            return Finding(Level.OK, "database", f"{state.keys} is made at the first start")
        return Finding(Level.TROUBLE, "database", error.message, "wait for it, or see what its launcher says")


def _models(mesh: MeshConfig) -> Iterator[Finding]:
    real = {pool.model_of(worker) for pool in mesh.pools for worker in pool.workers if worker.engine == "vllm"}
    for model in mesh.models:
        if model.name not in real:
            continue
        if model.path is None:
            yield Finding(Level.OK, f"model {model.name}", "the demo model, made at the first start")
            continue
        try:
            found = read_checkpoint(model.path)
        except ConfigError as error:
            yield _missing(model.name, model.path, error)
        else:
            if found.is_here:
                yield _weights(model.name, model.path, has_files=found.has_files)
            else:
                yield Finding(Level.OK, f"model {model.name}", f"{model.path} is fetched at the first start")


def _upstreams(mesh: MeshConfig) -> Iterator[Finding]:
    for pool in mesh.pools:
        for worker in pool.workers:
            if worker.upstream is not None:
                yield _upstream(worker.name, worker.upstream.url)


def _upstream(worker: str, url: str) -> Finding:
    """Does anybody listen there? What the server says is the worker's matter, which has its key."""
    parts, subject = urlsplit(url), f"server behind {worker}"
    where = shown(url)
    try:
        address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection(address, timeout=_WAIT_SECONDS).close()
    except (OSError, ValueError) as error:
        advice = "start it, or mend the url of the worker's upstream"
        return Finding(Level.TROUBLE, subject, f"{where} can't be reached: {error}", advice)
    return Finding(Level.OK, subject, f"{where} can be reached")


def _missing(name: str, path: str, error: ConfigError) -> Finding:
    advice = "mend that, or give the model as a folder"
    if path.startswith("/"):
        advice = "copy the whole model there: config.json, tokenizer and *.safetensors"
    elif not is_in_store(path):
        # Whoever runs the worker may well reach it.
        return Finding(
            Level.NOTE, f"model {name}", f"{path} is not here yet: {error}", "workers download it, if they can"
        )
    return Finding(Level.TROUBLE, f"model {name}", str(error), advice)


def _weights(name: str, path: str, *, has_files: bool) -> Finding:
    if has_files:
        return Finding(Level.OK, f"model {name}", f"{path} is there, weights included")
    return Finding(Level.NOTE, f"model {name}", f"{path} has no safetensors files", "vLLM may find other weights there")
