"""tokenloom bench: puts a load on any endpoint of OpenAI's API or of the mesh's own, and says how it was served."""

from argparse import Namespace

__all__ = ["bench"]


def bench(arguments: Namespace) -> int:
    """Runs the load and prints the report, also when it is interrupted; 1 where no request was answered."""
    # What sends requests takes longer to import than most commands take.
    from services.mesh.bench_run import run_bench  # noqa: PLC0415

    return run_bench(arguments)
