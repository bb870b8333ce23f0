"""What a worker's time costs, and how much of it a request had."""

from collections.abc import Mapping

from services.common.settings_gateway import LedgerSettings
from services.gateway.pieces import Spent

__all__ = ["Prices"]


class Prices:
    """What a worker's time costs."""

    def __init__(self, settings: LedgerSettings) -> None:
        self._prices: Mapping[str, float] = settings.gpu_hour_prices
        self._default = settings.default_gpu_hour_price
        self._parts: dict[str, float] = {}

    def gpu_seconds(self, spent: Spent) -> float:
        """A generation's part of its worker's time; guessed by the last that it told when it was cut off."""
        if spent.gpu_seconds is None:
            return spent.running_seconds * self._parts.get(spent.worker, 1.0)
        if spent.running_seconds > 0:
            self._parts[spent.worker] = min(1.0, spent.gpu_seconds / spent.running_seconds)
        return spent.gpu_seconds

    def cost(self, worker: str, gpu_seconds: float) -> float:
        """In the currency of the prices."""
        return gpu_seconds * self._prices.get(worker, self._default) / 3600
