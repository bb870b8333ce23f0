"""What the values of the commands' options may be; argparse says of a wrong one what was expected."""

import re
from collections.abc import Callable
from typing import Final, TypeVar

__all__ = [
    "address",
    "amount",
    "at_least_one",
    "count",
    "dns_label",
    "duration",
    "hours",
    "interval",
    "key_name",
    "length",
    "month",
    "pair",
    "port",
    "priority",
    "share",
    "url",
]

Value = TypeVar("Value", bound=Callable[[str], object])

_HIGHEST_PORT: Final = 65535
_HIGHEST_LIMIT: Final = 10**12
_HIGHEST_PRIORITY: Final = 1000
_LONGEST_NAME: Final = 128
_LAST_HOUR: Final = 23
_LONGEST_SEQUENCE: Final = 1 << 20
_SHORTEST_INTERVAL: Final = 0.1
_LONGEST_INTERVAL: Final = 60.0
_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def _expecting(what: str) -> Callable[[Value], Value]:
    def named(value: Value) -> Value:
        # argparse puts the name into what it says of a value that raises.
        value.__name__ = what
        return value

    return named


@_expecting("port")
def port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _HIGHEST_PORT:
        raise ValueError
    return int(text)


@_expecting("HOST:PORT")
def address(text: str) -> str:
    host, _, number = text.rpartition(":")
    if not host:
        raise ValueError
    port(number)
    return text


@_expecting("number of seconds from 0.1 to 60")
def interval(text: str) -> float:
    seconds = float(text)
    if not _SHORTEST_INTERVAL <= seconds <= _LONGEST_INTERVAL:
        raise ValueError
    return seconds


@_expecting("duration (90s, 15m, 12h, 30d)")
def duration(text: str) -> float:
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if found is None:
        raise ValueError
    return float(found[1]) * _UNIT_SECONDS[found[2]]


@_expecting("month (YYYY-MM)")
def month(text: str) -> str:
    if re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", text) is None:
        raise ValueError
    return text


@_expecting("URL (http://HOST:PORT)")
def url(text: str) -> str:
    scheme, _, rest = text.partition("://")
    if scheme not in ("http", "https") or not rest.strip("/"):
        raise ValueError
    return text


@_expecting("number from 1")
def at_least_one(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _HIGHEST_LIMIT:
        raise ValueError
    return int(text)


@_expecting("name (lower-case letters, digits, hyphens)")
def dns_label(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", text):
        raise ValueError
    return text


@_expecting("WORKER=RESOURCE")
def pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise ValueError
    return name, value


@_expecting("two hours, such as 7-19")
def hours(text: str) -> tuple[int, int]:
    first, last = map(int, text.split("-"))
    if not 0 <= first < last <= _LAST_HOUR:
        raise ValueError
    return first, last


@_expecting("number from 0")
def count(text: str) -> int:
    if not text.isdecimal() or int(text) > _HIGHEST_LIMIT:
        raise ValueError
    return int(text)


@_expecting("number of tokens (1 to 1048576)")
def length(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _LONGEST_SEQUENCE:
        raise ValueError
    return int(text)


@_expecting("share from 0 to 1")
def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


@_expecting("amount above 0")
def amount(text: str) -> float:
    value = float(text)
    if not 0 < value <= _HIGHEST_LIMIT:
        raise ValueError
    return value


@_expecting("number from -1000 to 1000")
def priority(text: str) -> int:
    value = int(text)
    if abs(value) > _HIGHEST_PRIORITY:
        raise ValueError
    return value


@_expecting("name (1 to 128 printable ASCII characters)")
def key_name(text: str) -> str:
    # It travels in a header.
    if not 1 <= len(text) <= _LONGEST_NAME or not (text.isascii() and text.isprintable()) or text != text.strip():
        raise ValueError
    return text
