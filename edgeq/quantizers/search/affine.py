"""Scales and offsets for groups of elements, x = scale * code + offset: 16 groups at once.

Rows, weights and cost as in `scan`; codes are 0..top. Elements are taken relative to a `base` near
the smallest, so that a large common offset costs no precision.
"""

from typing import NamedTuple

from edgeq.quantizers.search.jit import helper
from edgeq.quantizers.search.lanes import clip, fma, larger, load, rint, select, smaller, splat
from edgeq.quantizers.search.scan import UNBOUNDED, inverse


class AffinePlan(NamedTuple):
    """How scales and offsets are tried, in codes: 1 is the distance between two levels."""

    first: float  # codes beyond `top` that the largest element gets at first,
    step: float  # and how many more at each of
    steps: int  # these trials
    shift: float  # codes that the smallest element lies below 0, more at each of
    shifts: int  # these trials (times `steps`)


@helper
def ends(rows, g):
    """Smallest and largest element."""
    low = load(rows.x, g * rows.n)
    high = low
    for j in range(g * rows.n + 1, (g + 1) * rows.n):
        v = load(rows.x, j)
        low = smaller(v, low)
        high = larger(v, high)
    return low, high


@helper
def totals(rows, g, base):
    """Sums of w and of x - base."""
    one = splat(0.0)
    sx = splat(0.0)
    for j in range(g * rows.n, (g + 1) * rows.n):
        one = one + load(rows.w, j)
        sx = fma(load(rows.w, j), load(rows.x, j) - base, sx)
    return one, sx


@helper
def moments(rows, g, base, inv, start, top):
    """Sums of l, l l and (x - base) l over the codes l = (x - base - start) * inv."""
    shift = start * inv
    sl = splat(0.0)
    ll = splat(0.0)
    xl = splat(0.0)
    for j in range(g * rows.n, (g + 1) * rows.n):
        v = load(rows.x, j) - base
        level = clip(rint(v * inv - shift), 0.0, top)
        wl = load(rows.w, j) * level
        sl = sl + wl
        ll = fma(wl, level, ll)
        xl = fma(wl, v, xl)
    return sl, ll, xl


@helper
def solve(one, sx, sl, ll, xl, limit):
    """Least-squares scale and offset <= limit for fixed codes, and the error that they save."""
    scale = (one * xl - sx * sl) / (one * ll - sl * sl)
    offset = (sx - scale * sl) / one
    scale = select(offset > limit, (xl - limit * sl) / ll, scale)
    offset = smaller(offset, limit)
    return scale, offset, scale * (xl - offset * sl) + offset * (2.0 * sx - offset * one)


@helper
def climb(rows, g, base, scale, offset, top, one, sx):
    """Sums of l, l l and (x - base) l once codes have moved by one where the fit gains.

    From the codes nearest to (x - base - offset) / scale on, each element in turn tries the one on
    its other side, and keeps it if the least-squares solution then has less error.
    """
    inv = inverse(scale)
    sl, ll, xl = moments(rows, g, base, inv, offset, top)
    mean, mean_x = 1.0 / one, sx / one
    square, product = ll - sl * sl * mean, xl - sl * mean_x
    for j in range(g * rows.n, (g + 1) * rows.n):
        v = load(rows.x, j) - base
        exact = (v - offset) * inv
        level = clip(rint(exact), 0.0, top)
        other = clip(level + select(exact > level, splat(1.0), splat(-1.0)), 0.0, top)
        move = load(rows.w, j) * (other - level)
        sl2, ll2, xl2 = sl + move, fma(move, other + level, ll), fma(move, v, xl)
        square2, product2 = ll2 - sl2 * sl2 * mean, xl2 - sl2 * mean_x
        gains = product2 * product2 * square > product * product * square2
        sl, ll, xl = select(gains, sl2, sl), select(gains, ll2, ll), select(gains, xl2, xl)
        square, product = select(gains, square2, square), select(gains, product2, product)
    return sl, ll, xl


@helper
def scan_affine(rows, g, top, signed, plan):
    """Scale and offset of least error, and the cost of each.

    Codes start at the smallest element or a little above, and end above, at or below the largest;
    each rounding is solved by least squares, and from the best one `climb` goes on. Unless
    `signed`, the offset may not be above 0.
    """
    base, high = ends(rows, g)
    base = base if signed else smaller(base, 0.0)
    limit = splat(UNBOUNDED) if signed else base * -1.0
    inv_span = inverse(high - base)
    one, sx = totals(rows, g, base)
    offset = smaller(sx / one, limit)
    best = offset * (2.0 * sx - offset * one)
    scale = splat(0.0)
    cost = splat(0.0)
    tries = plan.shifts * plan.steps
    for trial in range(tries + 1):
        if trial < tries:
            inv = inv_span * (top + plan.first + plan.step * (trial % plan.steps))
            start = (high - base) * (plan.shift / top * (trial // plan.steps))
            sl, ll, xl = moments(rows, g, base, inv, start, top)
        else:
            sl, ll, xl = climb(rows, g, base, scale, offset, top, one, sx)
        s, o, gain = solve(one, sx, sl, ll, xl, limit)
        better = gain > best
        best = select(better, gain, best)
        scale = select(better, s, scale)
        offset = select(better, o, offset)
        cost = select(better, ll - sl * sl / one, cost)
    return scale, base + offset, cost, one


@helper
def error_affine(rows, g, scale, offset, top):
    """Sum of squared distances from x to the nearest scale * code + offset."""
    inv = inverse(scale)
    total = splat(0.0)
    for j in range(g * rows.n, (g + 1) * rows.n):
        v = load(rows.x, j) - offset
        miss = v - scale * clip(rint(v * inv), 0.0, top)
        total = fma(load(rows.w, j) * miss, miss, total)
    return total
