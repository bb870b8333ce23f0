"""What several commands' options are made of: the command, where its mesh is, what it does when given no action."""

from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from services.mesh import option_values as values
from services.mesh.edge_client import KEY_VARIABLE

__all__ = ["DEFAULT_STATE", "add_command", "add_door", "add_listing", "add_state"]

DEFAULT_STATE: Final = Path(".tokenloom")


def add_command(commands: Any, name: str, run: Callable[[Namespace], int] | None, about: str) -> ArgumentParser:
    """A command; without `run` it is one of its actions that is run."""
    command: ArgumentParser = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
    if run is not None:
        command.set_defaults(run=run)
    return command


def add_listing(commands: Any, name: str, run: Callable[[Namespace], int], about: str) -> Any:
    """A command that lists when it is given no action; returns its actions, whose options inherit."""
    command = add_command(commands, name, run, about)
    command.add_argument("--json", action="store_true")
    add_door(command)
    actions = command.add_subparsers(metavar="ACTION")
    listing = add_command(actions, "list", run, "the same")
    listing.add_argument("--json", action="store_true", default=SUPPRESS)
    add_door(listing, inherits=True)
    return actions


def add_state(command: ArgumentParser, *, inherits: bool = False) -> None:
    """Which mesh of this machine; `inherits`: what was said before the action counts where the action says nothing."""
    default = SUPPRESS if inherits else DEFAULT_STATE
    about = f"default: {DEFAULT_STATE}"
    command.add_argument("--state-dir", type=Path, default=default, metavar="DIR", help=about)


def add_door(command: ArgumentParser, *, inherits: bool = False) -> None:
    """Which mesh, of this machine or elsewhere; `inherits` as for add_state()."""
    add_state(command, inherits=inherits)
    command.add_argument(
        "--edge",
        type=values.url,
        default=SUPPRESS if inherits else None,
        metavar="URL",
        help=f"a mesh that runs elsewhere; its admin key is read from {KEY_VARIABLE}",
    )
