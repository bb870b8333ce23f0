"""The command line: tokenloom COMMAND."""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from services.common.config import ConfigError
from services.common.errors import MeshError
from services.mesh.options import command_line

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 2 for options or a configuration that can't be used, 1 for a refusal."""
    parsed = command_line().parse_args(arguments)
    run: Callable[[Namespace], int] = parsed.run
    try:
        return run(parsed)
    except ConfigError as error:
        sys.stderr.write(f"tokenloom: {error}\n")
        return 2
    except MeshError as error:
        sys.stderr.write(f"tokenloom: {error.message}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
