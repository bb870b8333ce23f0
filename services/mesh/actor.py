"""Who uses the command line, for the audit trail."""

import getpass

__all__ = ["local_actor"]


def local_actor() -> str:
    """Who uses the command line."""
    try:
        return f"local:{getpass.getuser()}"
    except (KeyError, OSError):
        # A user id without a name, as containers have.
        return "local"
