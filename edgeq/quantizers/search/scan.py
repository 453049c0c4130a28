"""Scales for groups of elements, x = scale * level: 16 groups at once, one per lane.

All sums are weighted. What comes back as `cost` is the curvature of the error in the scale.
"""

from typing import Any, NamedTuple

from edgeq.quantizers.search.jit import helper
from edgeq.quantizers.search.lanes import absolute, clip, fma, load, rint, select, splat

TINY = 1e-30
UNBOUNDED = 3e38


class Rows(NamedTuple):
    """Lane rows (see `lanes`): rows g n .. g n + n - 1 hold the elements of the 16 groups g."""

    x: Any  # elements, float32 [16 * rows]
    w: Any  # weights, float32 [16 * rows]
    n: int  # elements of a group


class Levels(NamedTuple):
    """What a scale is multiplied with: whole numbers low..high, or those of a table."""

    low: float
    high: float
    table: Any  # None, or float32 [2, levels]: the levels and the midpoint below each


class Plan(NamedTuple):
    """How scales are tried."""

    spread: float  # relative change of the scale tried, both ways
    steps: int  # scales tried for either end of the levels, at least 2


@helper
def nearest_of(v, low, high, table):
    """Level nearest to `v`; `table` is an argument so that Numba drops one of the branches."""
    if table is None:
        return clip(rint(v), low, high)
    level = splat(table[0, 0])
    for i in range(1, table.shape[1]):
        level = select(v > table[1, i], table[0, i], level)
    return level


@helper
def code_of(v, low, high, table):
    """What a block stores for the level nearest to `v`: the level, or its index in the table."""
    if table is None:
        return clip(rint(v), low, high)
    index = splat(0.0)
    for i in range(1, table.shape[1]):
        index = select(v > table[1, i], i, index)
    return index


@helper
def nearest(v, levels):
    return nearest_of(v, levels.low, levels.high, levels.table)


@helper
def code(v, levels):
    return code_of(v, levels.low, levels.high, levels.table)


@helper
def inverse(scale):
    """1 / scale, and 0 where the scale is too small to mean anything."""
    return select(absolute(scale) > TINY, 1.0 / scale, 0.0)


@helper
def extreme(rows, g):
    """The element of largest magnitude, with its sign."""
    top = splat(0.0)
    for j in range(g * rows.n, (g + 1) * rows.n):
        v = load(rows.x, j)
        top = select(absolute(v) > absolute(top), v, top)
    return top


@helper
def fit(rows, g, inv, levels):
    """Sums of x l and of l l over the levels l nearest to x * inv."""
    xl = splat(0.0)
    ll = splat(0.0)
    for j in range(g * rows.n, (g + 1) * rows.n):
        v = load(rows.x, j)
        level = nearest(v * inv, levels)
        wl = load(rows.w, j) * level
        xl = fma(wl, v, xl)
        ll = fma(wl, level, ll)
    return xl, ll


@helper
def climb(rows, g, scale, levels):
    """Sums of x l and of l l once levels have moved by one where the least-squares fit gains.

    From the levels nearest to x / scale on, each element in turn tries the one on its other side:
    the coordinate ascent of ik_llama.cpp (pull request 295), one sweep without choosing the order.
    """
    inv = inverse(scale)
    xl, ll = fit(rows, g, inv, levels)
    for j in range(g * rows.n, (g + 1) * rows.n):
        v = load(rows.x, j)
        exact = v * inv
        level = nearest(exact, levels)
        other = nearest(level + select(exact > level, splat(1.0), splat(-1.0)), levels)
        move = load(rows.w, j) * (other - level)
        xl2, ll2 = fma(move, v, xl), fma(move, other + level, ll)
        gains = xl2 * xl2 * ll > xl * xl * ll2
        xl, ll = select(gains, xl2, xl), select(gains, ll2, ll)
    return xl, ll


@helper
def scan(rows, g, levels, plan):
    """Scale of least error and its cost.

    Rounds by scales that put the extreme element at, below and above either end of the levels, and
    takes the least-squares scale of each rounding; from the best one, `climb` goes on.
    """
    inv_top = inverse(extreme(rows, g))
    best = splat(0.0)
    scale = splat(0.0)
    cost = splat(0.0)
    for trial in range(2 * plan.steps):
        end = levels.low if trial < plan.steps else levels.high
        change = plan.spread * (2.0 * (trial % plan.steps) / (plan.steps - 1) - 1.0)
        xl, ll = fit(rows, g, inv_top * (end * (1.0 + change)), levels)
        s = xl / ll
        better = s * xl > best
        best = select(better, s * xl, best)
        scale = select(better, s, scale)
        cost = select(better, ll, cost)
    if levels.table is None:  # levels that are a step apart
        xl, ll = climb(rows, g, scale, levels)
        better = xl * xl > best * ll
        scale = select(better, xl / ll, scale)
        cost = select(better, ll, cost)
    return scale, cost


@helper
def error(rows, g, scale, levels):
    """Sum of squared distances from x to the nearest scale * level."""
    inv = inverse(scale)
    total = splat(0.0)
    for j in range(g * rows.n, (g + 1) * rows.n):
        v = load(rows.x, j)
        miss = v - scale * nearest(v * inv, levels)
        total = fma(load(rows.w, j) * miss, miss, total)
    return total
