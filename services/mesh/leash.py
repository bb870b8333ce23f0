"""Runs a program that ends when the launcher does: `python leash.py LAUNCHER_PID PROGRAM ARGUMENT…`

Used as a script, so that nothing of the launcher's runs between fork and exec. It becomes the program, which keeps its
process id. Without it, killing the launcher would leave a mesh that nobody watches. Linux only; elsewhere the program
runs without a leash.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ties this process to its parent and becomes the program."""
    launcher, *command = sys.argv[1:]
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != int(launcher):
            # It ended before the kernel knew.
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606  # the launcher's own arguments, no shell


if __name__ == "__main__":
    main()
