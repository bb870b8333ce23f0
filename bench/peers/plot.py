"""A picture of how times to first token are spread, as SVG."""

import math
from collections.abc import Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

__all__ = ["svg"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 400, 60, 50, 40
_COLOURS: Final = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#7f7f7f")
_POINTS: Final = 200


def svg(title: str, curves: Mapping[str, Sequence[float]]) -> str:
    """Of each name, the share of its values (seconds, above 0) that are at most so large; the axis is logarithmic."""
    values = [value for several in curves.values() for value in several if value > 0]
    least, most = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def x(value: float) -> float:
        return _LEFT + (math.log10(value) - least) / (most - least) * (_WIDTH - _LEFT - 20)

    def y(share: float) -> float:
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}">',
        '<style>text {font: 12px sans-serif}</style><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="20">{escape(title)}</text>',
    ]
    for power in range(least, most + 1):
        at = x(10.0**power)
        parts.append(f'<path d="M{at:.1f} {y(0):.1f}V{y(1):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{at:.1f}" y="{y(0) + 18:.1f}" text-anchor="middle">{10.0**power:g} s</text>')
    for share in (0.0, 0.5, 0.9, 0.95, 1.0):
        parts.append(f'<path d="M{_LEFT} {y(share):.1f}H{_WIDTH - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    parts.append(f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 10}" text-anchor="middle">time to first token</text>')
    for number, (name, several) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        line = " ".join(f"{x(value):.1f},{y(share):.1f}" for value, share in _curve(several))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{_LEFT + 10}" y="{_TOP + 16 + 16 * number}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _curve(values: Sequence[float]) -> list[tuple[float, float]]:
    ordered = sorted(value for value in values if value > 0)
    step = max(1, len(ordered) // _POINTS)
    return [(value, (place + 1) / len(ordered)) for place, value in enumerate(ordered) if place % step == 0]
