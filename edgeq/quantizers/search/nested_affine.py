"""Blocks of groups, each with an integer scale and minimum: value = d * sc * q - dmin * m.

As in `nested`, for two numbers: a minimum is an offset below 0, stored without its sign.
"""

from typing import Any, NamedTuple

import numpy as np

from edgeq.quantizers.search.affine import ends, error_affine, moments, scan_affine, totals
from edgeq.quantizers.search.jit import helper, kernel
from edgeq.quantizers.search.lanes import (
    LANES,
    clip,
    fma,
    half,
    larger,
    load,
    rint,
    select,
    smaller,
    splat,
    store,
    store_int8,
)
from edgeq.quantizers.search.nested import PLAIN, keep, scale_all, scan_scales
from edgeq.quantizers.search.scan import UNBOUNDED, Levels, Rows, extreme, inverse
from edgeq.quantizers.search.tiles import (
    gather_tile,
    lane_rows,
    scatter,
    scatter_integers,
    scatter_scale,
)

SINGULAR = 1e-6  # d and dmin are not told apart when the determinant is below this share


class Pairs(NamedTuple):
    """Lane rows per group for scales and minima: wishes, or integers."""

    sc: Any  # float32 [16 * groups]
    m: Any  # float32 [16 * groups]


class Tops(NamedTuple):
    """Largest integer of each field; the smallest is 0."""

    q: float
    sc: float
    m: float


@helper
def choose_group(rows, g, d, dmin, scale, low, tops, reach):
    """Integer scale, at most `reach` from `scale`, and minimum with least error; the error.

    Each scale comes with the minimum that its codes want: those nearest to x with the minimum
    `low`. Sums of these codes, relative to that minimum, tell what each choice would cost.
    """
    if reach >= 0:
        offset = dmin * low * -1.0
        one, sx = totals(rows, g, offset)
        inv_m = inverse(dmin)
        middle, start, least = scale, low, splat(UNBOUNDED)
        for step in range(-reach, reach + 1):
            trial = clip(middle + step, 0.0, tops.sc)
            s = d * trial
            sl, ll, xl = moments(rows, g, offset, inverse(s), splat(0.0), tops.q)
            want = (s * sl - sx) / one * inv_m
            trial_m = clip(rint(start + want), 0.0, tops.m)
            o = (start - trial_m) * dmin
            miss = s * (s * ll - 2.0 * (xl - o * sl)) + o * (o * one - 2.0 * sx)
            scale = select(miss < least, trial, scale)
            low = select(miss < least, trial_m, low)
            least = select(miss < least, miss, least)
    return scale, low, error_affine(rows, g, d * scale, dmin * low * -1.0, tops.q)


@helper
def choose(rows, d, dmin, wish, tops, reach, best):
    """Integers of least error near the wishes, for all groups; returns the sum of errors."""
    inv, inv_m = inverse(d), inverse(dmin)
    total = splat(0.0)
    for g in range(best.sc.size // LANES):
        scale = clip(rint(load(wish.sc, g) * inv), 0.0, tops.sc)
        low = clip(rint(load(wish.m, g) * inv_m), 0.0, tops.m)
        scale, low, miss = choose_group(rows, g, d, dmin, scale, low, tops, reach)
        store(best.sc, g, scale)
        store(best.m, g, low)
        total = total + miss
    return total


@helper
def refit(rows, d, dmin, tops, best):
    """Least-squares d and dmin, as f16, for fixed integers and the codes that follow from them."""
    zero = splat(0.0)
    aa, ab, bb, xa, xb = zero, zero, zero, zero, zero
    for g in range(best.sc.size // LANES):
        s, m = load(best.sc, g), load(best.m, g)
        one, sx = totals(rows, g, zero)
        sl, ll, xl = moments(rows, g, zero, inverse(d * s), dmin * m * -1.0, tops.q)
        aa = fma(s * s, ll, aa)
        ab = fma(s * m, sl, ab)
        bb = fma(m * m, one, bb)
        xa = fma(s, xl, xa)
        xb = fma(m, sx, xb)
    det = aa * bb - ab * ab
    known = det > aa * bb * SINGULAR
    d = select(known, (xa * bb - xb * ab) / det, d)
    dmin = select(known, (xa * ab - xb * aa) / det, dmin)
    return half(larger(d, 0.0)), half(larger(dmin, 0.0))


@helper
def plain_pairs(rows, top, wish):
    """The scales and minima that span each group from its smallest element, or 0, up."""
    for g in range(wish.sc.size // LANES):
        low, high = ends(rows, g)
        low = smaller(low, 0.0)
        store(wish.sc, g, (high - low) / top)
        store(wish.m, g, low * -1.0)


@helper
def scan_groups(rows, tops, plan, wish, cost):
    """Scale and minimum of each group on its own, and the cost of missing them."""
    for g in range(wish.sc.size // LANES):
        scale, offset, cost_sc, cost_m = scan_affine(rows, g, tops.q, False, plan)
        store(wish.sc, g, scale)
        store(wish.m, g, offset * -1.0)
        store(cost.sc, g, cost_sc)
        store(cost.m, g, cost_m)


@helper
def search_tile(rows, tops, plan, reach, wish, trial, best):
    """Best d and dmin of 16 blocks, with `best` filled: searched, refitted, or plain rounding."""
    scan_groups(rows, tops, plan, wish, trial)
    groups = wish.sc.size // LANES
    best_d, best_dmin, least = splat(0.0), splat(0.0), splat(UNBOUNDED)
    for k in range(PLAIN + 1):
        if k == 0:
            d = scan_scales(wish.sc, trial.sc, Levels(0.0, tops.sc, None))
            dmin = scan_scales(wish.m, trial.m, Levels(0.0, tops.m, None))
        elif k == 1:
            d, dmin = refit(rows, best_d, best_dmin, tops, best)
            scale_all(best.sc, best_d, wish.sc)
            scale_all(best.m, best_dmin, wish.m)
        else:
            plain_pairs(rows, tops.q, wish)
            d = half(extreme(Rows(wish.sc, wish.sc, groups), 0) / tops.sc)
            dmin = half(extreme(Rows(wish.m, wish.m, groups), 0) / tops.m)
        depth = reach if k < PLAIN else -1
        miss = choose(rows, d, dmin, wish, tops, depth, trial)
        better = miss < least
        keep(better, trial.sc, best.sc)
        keep(better, trial.m, best.m)
        best_d, best_dmin = select(better, d, best_d), select(better, dmin, best_dmin)
        least = select(better, miss, least)
    return best_d, best_dmin


@kernel
def search_pairs(x, power, importance, tops, group, plan, reach, d, dmin, sc, m, q):
    """Fills d, dmin float32 [blocks, 1], sc, m int8 [blocks, groups] and q int8 [blocks, block].

    `x` is float32 [blocks * block].
    """
    blocks, block = q.shape
    groups = block // group
    rows = Rows(lane_rows(block), lane_rows(block), group)
    wish = Pairs(lane_rows(groups), lane_rows(groups))
    trial = Pairs(lane_rows(groups), lane_rows(groups))
    best = Pairs(lane_rows(groups), lane_rows(groups))
    codes = np.empty(block * LANES, np.int8)
    for tile in range((blocks + LANES - 1) // LANES):
        gather_tile(x, power, importance, block, tile, blocks, rows.x, rows.w)
        best_d, best_dmin = search_tile(rows, tops, plan, reach, wish, trial, best)
        for j in range(block):
            inv = inverse(best_d * load(best.sc, j // group))
            v = load(rows.x, j) + best_dmin * load(best.m, j // group)
            store_int8(codes, j, clip(rint(v * inv), 0.0, tops.q))
        scatter(codes, tile, q)
        scatter_integers(best.sc, codes, tile, sc)
        scatter_integers(best.m, codes, tile, m)
        scatter_scale(best_d, rows.w, tile, d)
        scatter_scale(best_dmin, rows.w, tile, dmin)
