"""The options of `tokenloom workers` and `adapters`."""

from typing import Any

from services.mesh import adapters, workers
from services.mesh.option_parts import add_command, add_door, add_listing

__all__ = ["add_adapters", "add_workers"]


def add_workers(commands: Any) -> None:
    """Adds `workers`."""
    about = "the workers; what the router knows of each, and why some are slow"
    actions = add_listing(commands, "workers", workers.list_workers, about)
    for name, run, about in (
        ("drain", workers.drain, "have one finish what it has and take nothing new"),
        ("undrain", workers.undrain, "give one that was drained or cordoned work again"),
        ("cordon", workers.cordon, "give one no new work, without telling it"),
    ):
        action = add_command(actions, name, run, about)
        action.add_argument("worker", metavar="WORKER")
        add_door(action, inherits=True)
    _add_rolled(actions)


def _add_rolled(actions: Any) -> None:
    sleeping = add_command(actions, "sleep", workers.sleep, "have some give their GPUs' memory back, in turn")
    waking = add_command(actions, "wake", workers.wake, "have some take their GPUs' memory again, in turn")
    reloading = add_command(actions, "reload", workers.reload, "have some replace their weights, in turn")
    for action in (sleeping, waking, reloading):
        which = action.add_mutually_exclusive_group(required=True)
        which.add_argument("worker", nargs="?", metavar="WORKER")
        _add_several(which)
        add_door(action, inherits=True)
    about = "1 keeps the weights in main memory, 2 drops them; default: 1"
    sleeping.add_argument("--level", type=int, choices=(1, 2), default=1, help=about)
    about = "a checkpoint of the same shape, where the workers run; default: where their weights came from"
    reloading.add_argument("--path", default="", metavar="FOLDER", help=about)


def _add_several(which: Any) -> None:
    which.add_argument("--all", action="store_true", help="every worker")
    which.add_argument("--pool", metavar="POOL", help="those of a pool")
    which.add_argument("--model", metavar="MODEL", help="those that serve a model")


def add_adapters(commands: Any) -> None:
    """Adds `adapters`."""
    about = "LoRA adapters; those that are served, and by whom"
    actions = add_listing(commands, "adapters", adapters.list_adapters, about)
    loading = add_command(actions, "load", adapters.load, "have workers serve one, in turn")
    loading.add_argument("name", metavar="NAME", help="what requests use as their model")
    loading.add_argument("path", metavar="FOLDER", help="where the workers run, inside their model's adapters_dir")
    which = loading.add_mutually_exclusive_group(required=True)
    which.add_argument("--worker", metavar="WORKER", help="one worker")
    _add_several(which)
    unloading = add_command(actions, "unload", adapters.unload, "have workers serve one no more, in turn")
    unloading.add_argument("name", metavar="NAME")
    unloading.add_argument("--worker", metavar="WORKER", help="one worker; default: all that serve it")
    unloading.set_defaults(all=False, pool=None, model=None)
    for action in (loading, unloading):
        add_door(action, inherits=True)
