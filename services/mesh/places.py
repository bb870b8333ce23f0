"""Where a model is to run: cards and how much memory each has, or the processor and the machine's memory."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from services.common.config import ConfigError
from services.common.cpu_cache import free_memory
from services.mesh.fit import parse_memory

__all__ = ["Place", "Places", "cards_here"]

_FIRST: Final = "0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one engine is to run."""

    kind: Literal["gpu", "cpu"]
    bytes: int | None
    """Memory of each of its cards, of the smallest where they differ; or what is free of the machine's; None: not
    known."""


class Places:
    """What is known of cards, by the command line or else by NVML of this machine, and of the processor's memory."""

    def __init__(self, arguments: Namespace) -> None:
        """Raises ConfigError: an option is no size."""
        self._given = arguments.gpu_memory is not None
        self._cards = _given_cards(arguments.gpu_memory) if self._given else cards_here()
        cpu = arguments.cpu_memory
        self._memory = free_memory() if cpu is None else parse_memory(cpu, "--cpu-memory")

    def for_model(self, cards: int) -> list[Place]:
        """Every different one that a model may be given, when it is spread over so many cards.

        Raises:
            ConfigError: there are fewer.
        """
        sizes = sorted(self._by_index.values(), reverse=True)
        if not sizes:
            return [Place(kind="cpu", bytes=self._memory)]
        if self._is_one_for_all:
            return [Place(kind="gpu", bytes=sizes[0])]
        if cards > len(sizes):
            raise ConfigError(f"--gpu-memory: the model is spread over {cards} GPUs, and {len(sizes)} are known")
        if cards > 1:
            return [Place(kind="gpu", bytes=sizes[cards - 1])]
        return [Place(kind="gpu", bytes=size) for size in sorted(set(sizes), reverse=True)]

    def for_worker(self, gpu: int | str | None, cards: int) -> Place:
        """Where a worker of a mesh.yaml runs.

        Raises:
            ConfigError: sizes are given, but not of its card.
        """
        if gpu is None and not self._cards:
            return Place(kind="cpu", bytes=self._memory)
        names = [name.strip() for name in str(gpu).split(",")] if gpu is not None else list(map(str, range(cards)))
        sizes = [self._size(name) for name in names]
        known = [size for size in sizes if size is not None]
        return Place(kind="gpu", bytes=min(known) if len(known) == len(sizes) else None)

    @property
    def _by_index(self) -> dict[str, int]:
        return {name: size for name, size in self._cards.items() if name.isdecimal()}

    @property
    def _is_one_for_all(self) -> bool:
        return self._given and len(self._cards) == 1

    def _size(self, name: str) -> int | None:
        if self._is_one_for_all:
            return self._cards[_FIRST]
        if self._given and name not in self._cards:
            raise ConfigError(f"--gpu-memory: has {len(self._cards)} sizes, and none for gpu {name}")
        return self._cards.get(name)


def cards_here() -> Mapping[str, int]:
    """Bytes of each card of this machine, by its index and by its UUID; empty where NVML knows none."""
    import pynvml  # noqa: PLC0415  # loads the driver's library, where there is one

    found: dict[str, int] = {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return found
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                card = pynvml.nvmlDeviceGetHandleByIndex(index)
                size = int(pynvml.nvmlDeviceGetMemoryInfo(card).total)
                found[str(index)] = found[str(pynvml.nvmlDeviceGetUUID(card))] = size
            except pynvml.NVMLError:
                # One that is lost doesn't keep others from being known; what is to run on it isn't answered for.
                continue
    finally:
        pynvml.nvmlShutdown()
    return found


def _given_cards(text: str) -> dict[str, int]:
    return {str(index): parse_memory(part) for index, part in enumerate(text.split(","))}
