"""What the edge, the gateways and the router tell each other of calls of the typed lane; clients can't set these."""

from typing import Final

__all__ = ["ACCOUNT_HEADER", "EDGE_ACCOUNT", "REMEMBER_HEADER", "TOLD", "TOLD_NAMESPACE"]

ACCOUNT_HEADER: Final = "x-tokenloom-account"
"""On a call that was let in: the id of its account, which begins with its gateway's name and a dot."""
EDGE_ACCOUNT: Final = "edge-"
"""How an account's id goes on where the edge has let the call in itself; what follows is the request's id."""
REMEMBER_HEADER: Final = "x-edge-remember"
"""In a gateway's answer to a check: for how many milliseconds the edge may go by it without asking again. It is for the
edge alone, and goes no further."""
TOLD_NAMESPACE: Final = "tokenloom.told"
"""The metadata in which the router tells the edge what the client may know of who answers."""
TOLD: Final = ("worker", "route", "degraded")
"""What it may have; the client gets each as a header `x-tokenloom-NAME` of the answer."""
