"""Line charts as SVG: small ones, without a library, for what `bench` measured.

    svg = line_chart(Axes("operations per second", "ms"), {"p50": [(100, 1.5), (900, 4.0)], "p99": …})

Both axes may be logarithmic. All text is escaped. Colours are those of Okabe and Ito, which most people can tell
apart, and each series has a mark of its own besides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain, cycle

WIDTH, HEIGHT = 820, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 230, 40, 50
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKS = ("●", "■", "▲", "◆", "▼", "○", "□")
TICKS_MAX = 8

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axes:
    """What the axes mean, and whether each is logarithmic."""

    x: str
    y: str
    title: str = ""
    log_x: bool = False
    log_y: bool = False


class Scale:
    """Places values between two pixels, linearly or by their logarithm; values must be above 0 for the latter."""

    def __init__(self, values: Sequence[float], pixels: tuple[float, float], *, log: bool) -> None:
        if log and min(values) <= 0:
            raise ValueError("a logarithmic axis shows values above 0 only")
        self._from, self._to = pixels
        self._log = log
        self.ticks = log_ticks(min(values), max(values)) if log else linear_ticks(max(*values, 0.0))
        self._least, self._greatest = self._position(self.ticks[0]), self._position(self.ticks[-1])

    def _position(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        share = (self._position(value) - self._least) / (self._greatest - self._least)
        return round(self._from + share * (self._to - self._from), 1)


def linear_ticks(greatest: float) -> list[float]:
    """Return round numbers from 0 to the first one that is not below `greatest`."""
    if greatest <= 0:
        return [0.0, 1.0]
    magnitude = 10.0 ** math.floor(math.log10(greatest))
    step = next(m * magnitude / 10 for m in (1, 2, 5, 10, 20) if greatest <= TICKS_MAX * m * magnitude / 10)
    return [step * i for i in range(math.ceil(greatest / step - 1e-9) + 1)]


def log_ticks(least: float, greatest: float) -> list[float]:
    """Return powers of ten from one not above `least` to one not below `greatest`, two at least."""
    first, last = math.floor(math.log10(least) + 1e-9), math.ceil(math.log10(greatest) - 1e-9)
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def line_chart(axes: Axes, series: Mapping[str, Points]) -> str:
    """Return an SVG document; ValueError without any point."""
    points = list(chain.from_iterable(series.values()))
    if not points:
        raise ValueError("a chart needs a point at least")
    x = Scale([point[0] for point in points], (LEFT, WIDTH - RIGHT), log=axes.log_x)
    y = Scale([point[1] for point in points], (HEIGHT - BOTTOM, TOP), log=axes.log_y)
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, TOP - 18, axes.title, "start", 14),
        *_grid(axes, x, y),
    ]
    for place, ((name, line), colour, mark) in enumerate(
        zip(series.items(), cycle(COLOURS), cycle(MARKS), strict=False)
    ):
        parts += _series(line, x, y, colour, mark)
        parts.append(_text(WIDTH - RIGHT + 14, TOP + 18 * place + 8, f"{mark} {name}", "start", 12, colour))
    return "\n".join([*parts, "</svg>", ""])


def _grid(axes: Axes, x: Scale, y: Scale) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in x.ticks:
        parts.append(f'<line x1="{x(tick)}" y1="{TOP}" x2="{x(tick)}" y2="{bottom}" stroke="#dddddd"/>')
        parts.append(_text(x(tick), bottom + 18, f"{tick:,.10g}", "middle"))
    for tick in y.ticks:
        parts.append(f'<line x1="{LEFT}" y1="{y(tick)}" x2="{right}" y2="{y(tick)}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 8, y(tick) + 4, f"{tick:,.10g}", "end"))
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 16 {middle})"'
    return [
        *parts,
        _text((LEFT + right) / 2, HEIGHT - 12, axes.x, "middle"),
        f'<text x="16" y="{middle}" text-anchor="middle" {turned}>{escape(axes.y)}</text>',
    ]


def _series(line: Points, x: Scale, y: Scale, colour: str, mark: str) -> list[str]:
    path = " ".join(f"{x(a)},{y(b)}" for a, b in line)
    marks = [_text(x(a), y(b) + 4, mark, "middle", 12, colour) for a, b in line]
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>', *marks]


def _text(x: float, y: float, text: str, anchor: str, size: int = 12, colour: str = "#333333") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
