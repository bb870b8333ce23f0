"""The two shapes that an Envoy configuration repeats everywhere."""

from typing import Any

__all__ = ["any_of", "socket_address"]


def any_of(type_name: str, **fields: Any) -> dict[str, Any]:
    """A google.protobuf.Any in its JSON form."""
    return {"@type": f"type.googleapis.com/{type_name}", **fields}


def socket_address(address: str) -> dict[str, Any]:
    """A TCP address from `host:port`."""
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}
