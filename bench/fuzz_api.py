"""Tries the API out from its own description: `python -m bench.fuzz_api [--examples 30] [--seed 1] [-- OPTION…]`.

schemathesis, in an environment that `uvx` makes for it, reads /openapi.json of a mesh with simulated workers, sends
what the document allows and what it doesn't, and checks every answer with all of its checks: no 5xx, only documented
statuses, answers as they are described, good requests taken, bad ones refused, `Allow` with each 405, and so on.
Options after `--` are its own. Exits with 1 when anything fails.

What it is told beside the document:
- The names of models, which differ from mesh to mesh.
- That a good request may be refused with 400: JSON Schema can't say what fields say of each other, nor how long a
  model's context is.
- That what is too large may be refused with 413.
- Its own key's id, so that it doesn't revoke that.
- That QUERY is no method: the edge refuses methods that it doesn't know as malformed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import httpx

from services.common.keystore import KeyStore
from tests.support.mesh import Mesh, running_mesh

_SCHEMATHESIS: Final = "schemathesis==4.32.5"
_CONFIG: Final = """\
models: [{name: sim}, {name: sim-embed}]
pools:
  - name: talk
    serves: [sim]
    workers: [{name: talk-0, engine: sim, sim: {decode_step_ms: 1, max_model_len: 2048}}]
  - name: embed
    serves: [sim-embed]
    workers: [{name: embed-0, engine: sim, sim: {runner: pooling, max_model_len: 2048}}]
"""
_EMBEDDING: Final = ("EmbeddingsRequest", "RerankRequest", "ScoreRequest")
_TAKEN: Final = ["2xx", 400, 401, 403, 404, 409, 429]
_REFUSED: Final = [400, 401, 403, 404, 405, 409, 413, 415, 429]
_METHODS: Final = ["get", "put", "post", "delete", "options", "patch", "trace"]
_SETTINGS: Final = f"""\
[checks.positive_data_acceptance]
expected-statuses = {json.dumps(_TAKEN)}
[checks.negative_data_rejection]
expected-statuses = {json.dumps(_REFUSED)}
[phases.coverage]
unexpected-methods = {json.dumps(_METHODS)}
"""


_HOOKS: Final = """\
import schemathesis


@schemathesis.hook
def filter_case(context, case):
    return (case.path_parameters or {{}}).get("key_id") != {key_id!r}
"""


def described(mesh: Mesh) -> dict[str, Any]:
    """The document of a mesh, with the names of its models."""
    document: dict[str, Any] = httpx.get(f"{mesh.edge}/openapi.json").raise_for_status().json()
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Request") and "model" in schema["properties"]:
            schema["properties"]["model"] = {"enum": ["sim-embed" if name in _EMBEDDING else "sim"]}
    return document


def fuzz(mesh: Mesh, folder: Path, options: list[str]) -> int:
    """Runs it; returns its exit status."""
    with KeyStore(mesh.state_dir / "keys.db") as store:
        key_id, key = store.create("fuzz", admin=True, debug=True)
    document, settings, hooks = (folder / name for name in ("openapi.json", "schemathesis.toml", "own_key.py"))
    document.write_text(json.dumps(described(mesh)))
    hooks.write_text(_HOOKS.format(key_id=key_id))
    settings.write_text(f"hooks = {json.dumps(str(hooks))}\n{_SETTINGS}")
    command = ["uvx", "--quiet", "--python", sys.executable, "--from", _SCHEMATHESIS, "schemathesis"]
    command += ["--config-file", str(settings), "run", str(document), "--url", mesh.edge, "--checks", "all"]
    command += ["--header", f"Authorization: Bearer {key}", *options]
    return subprocess.run(command, cwd=folder, check=False).returncode


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=30, help="at most, for each operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("options", nargs="*", help="of schemathesis, after --")
    given = parser.parse_args()
    options = ["--max-examples", str(given.examples), "--seed", str(given.seed), *given.options]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "mesh.yaml"
        config.write_text(_CONFIG)
        with running_mesh(folder / "state", "--config", str(config)) as mesh:
            sys.exit(fuzz(mesh, folder, options))


if __name__ == "__main__":
    main()
