"""The command line, run in this process: starting another one takes longer than most commands."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from services.mesh.__main__ import main
from tests.support.mesh import Mesh

__all__ = ["Ran", "command", "tokenloom"]


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command said, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: str) -> Ran:
    """Runs a command."""
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        code = main(arguments)
    return Ran(code, output.getvalue(), errors.getvalue())


def tokenloom(mesh: Mesh, *arguments: str) -> Ran:
    """Runs a command for a mesh."""
    return command(*arguments, "--state-dir", str(mesh.state_dir))
