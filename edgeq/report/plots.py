"""Geometry of scatter plots: ticks, the front of the best points, labels that do not overlap."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Label", "Plot", "Point", "front", "linear_ticks", "log_ticks", "scatter"]

WIDTH, HEIGHT = 440.0, 320.0  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 74.0, 22.0, 12.0, 48.0  # margins around the plotting area
FONT, GLYPH = 12.0, 7.6  # height of a line, and a generous width of a character
RADIUS = 6.5  # of a dot that is chosen


@dataclass(frozen=True, slots=True)
class Point:
    """A named point; index: of the row that it stands for."""

    name: str
    x: float
    y: float
    index: int


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """Shared area."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(wide, 0.0) * max(high, 0.0)


AREA = Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)  # where points are drawn


@dataclass(frozen=True, slots=True)
class Label:
    """Text beside a dot, drawn from (x, y) to the right; far: a line must lead to it."""

    text: str
    box: Box
    far: bool

    @property
    def baseline(self) -> float:
        return self.box.bottom - 3

    @property
    def middle(self) -> float:
        return (self.box.left + self.box.right) / 2


@dataclass(frozen=True, slots=True)
class Plot:
    """What the page draws; all places in the units of the drawing."""

    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    dots: list[tuple[float, float, Point, Label]]
    front: list[tuple[float, float]]
    area: Box = AREA
    width: float = WIDTH
    height: float = HEIGHT


def scatter(
    points: Sequence[Point], x_title: str, y_title: str, *, larger_x_is_better: bool
) -> Plot | None:
    """A plot with a logarithmic y axis, on which less is better; None without two points above 0.

    >>> scatter([Point("one", 1, 1, 0)], "x", "y", larger_x_is_better=False) is None
    True
    """
    points = [p for p in points if p.y > 0 and math.isfinite(p.x) and math.isfinite(p.y)]
    if len(points) < 2:
        return None
    xs, ys = linear_ticks([p.x for p in points]), log_ticks([p.y for p in points])
    area = AREA

    def at(p: Point) -> tuple[float, float]:
        across = (p.x - xs[0]) / (xs[-1] - xs[0])
        up = math.log(p.y / ys[0]) / math.log(ys[-1] / ys[0])
        wide, high = area.right - area.left, area.bottom - area.top
        return area.left + across * wide, area.bottom - up * high

    places = [at(p) for p in points]
    labels = place([p.name for p in points], places, area)
    best = front(points, larger_x_is_better)
    return Plot(
        x_title=x_title,
        y_title=y_title,
        x_ticks=[(at(Point("", x, ys[0], 0))[0], f"{x:g}") for x in xs],
        y_ticks=[(at(Point("", xs[0], y, 0))[1], f"{y:g}") for y in ys],
        dots=[(*place, p, label) for place, p, label in zip(places, points, labels)],
        front=[at(p) for p in best],
    )


def front(points: Sequence[Point], larger_x_is_better: bool) -> list[Point]:
    """The points that none beats in both x and y, sorted by x.

    >>> points = [Point("a", 1, 3, 0), Point("b", 2, 1, 1), Point("c", 3, 2, 2)]
    >>> [p.name for p in front(points, larger_x_is_better=False)]
    ['a', 'b']
    """
    sign = -1 if larger_x_is_better else 1
    found: list[Point] = []
    for p in sorted(points, key=lambda p: (sign * p.x, p.y)):
        if not found or p.y < found[-1].y:
            found.append(p)
    return sorted(found, key=lambda p: p.x)


def linear_ticks(values: Sequence[float], count: int = 5) -> list[float]:
    """Round numbers at even distances, from below the least to above the largest.

    >>> linear_ticks([3.2, 7.9])
    [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    """
    low, high = min(values), max(values)
    rough = (high - low or abs(high) or 1.0) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten from below the least to above the largest; fewer, if many.

    >>> log_ticks([0.0011, 0.04])
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05]
    """
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    for steps in ((1, 2, 5), (1, 3), (1,)):
        marks = [float(f"{m}e{power}") for power in range(low, high + 1) for m in steps]
        first = max((m for m in marks if m <= min(values)), default=marks[0])
        last = min((m for m in marks if m >= max(values)), default=marks[-1])
        ticks = [m for m in marks if first <= m <= last]
        if len(ticks) <= 8:
            break
    return ticks if len(ticks) > 1 else [ticks[0], ticks[0] * 10]


def place(texts: Sequence[str], places: Sequence[tuple[float, float]], area: Box) -> list[Label]:
    """A label near each place; of all that fit, the nearest that covers no dot and no other label.

    Where there is no room, the least bad one is taken.
    """
    dots = [Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in places]
    taken: list[Box] = []
    labels: dict[int, Label] = {}
    # Those in a crowd choose first.
    for i in sorted(range(len(texts)), key=lambda i: _neighbours(i, places), reverse=True):
        blocked = [*taken, *dots]
        options = list(_around(*places[i], len(texts[i]) * GLYPH, area))
        costs = [sum(box.overlap(other) for other in blocked) for box, _ in options]
        box, far = options[costs.index(min(costs))]
        taken.append(box)
        labels[i] = Label(texts[i], box, far)
    return [labels[i] for i in range(len(texts))]


def _neighbours(index: int, places: Sequence[tuple[float, float]]) -> int:
    return sum(math.dist(places[index], other) < 60 for other in places)


def _around(x: float, y: float, width: float, area: Box) -> Iterator[tuple[Box, bool]]:
    """Boxes of a label around a dot inside the area, the nearest first; whether each is far."""
    for reach in (9.0, 20.0, 34.0, 50.0, 68.0, 90.0):
        for across, down in ((1, 0), (-1, 0), (1, -1), (1, 1), (-1, -1), (-1, 1), (0, -1), (0, 1)):
            tilt = 0.7 if across and down else 1.0
            middle_x = x + across * (reach * tilt + width / 2)
            middle_y = y + down * (reach * tilt + FONT / 2 - 2)
            left = min(max(middle_x - width / 2, area.left + 2), area.right - width)
            top = min(max(middle_y - FONT / 2, area.top), area.bottom - FONT)
            yield Box(left, top, left + width, top + FONT), reach > 9.0
