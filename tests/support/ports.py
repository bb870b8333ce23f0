"""Free TCP ports."""

from typing import Final

from services.mesh.ports import PortPicker

__all__ = ["free_port"]

_PICKER: Final = PortPicker()


def free_port() -> int:
    """A port of the loopback address that nobody listens on at the moment, nor is given by the system by chance."""
    return _PICKER.pick()
