"""What the edge and the gateways tell each other of calls of the typed lane, in headers; clients can't set these."""

from typing import Final

__all__ = ["ACCOUNT_HEADER", "EDGE_ACCOUNT", "REMEMBER_HEADER"]

ACCOUNT_HEADER: Final = "x-tokenloom-account"
"""On a call that was let in: the id of its account, which begins with its gateway's name and a dot."""
EDGE_ACCOUNT: Final = "edge-"
"""How an account's id goes on where the edge has let the call in itself; what follows is the request's id."""
REMEMBER_HEADER: Final = "x-edge-remember"
"""In a gateway's answer to a check: for how many milliseconds the edge may go by it without asking again. It is for the
edge alone, and goes no further."""
