"""tokenloom render."""

from argparse import Namespace


def compose(arguments: Namespace) -> int:
    raise NotImplementedError


def envoy(arguments: Namespace) -> int:
    raise NotImplementedError
