"""Blocks of groups, each with its own integer scale: value = d * sc * q.

First the scale of each group on its own; then d for all of them; then the integer scales by their
true error; then d again by least squares. Arrays with one lane row per group are `wish`, the scale
a group would like, `cost`, what missing it costs, and `sc`, the integer scale it gets.
"""

import numpy as np

from edgeq.quantizers.search.jit import helper, kernel
from edgeq.quantizers.search.lanes import (
    LANES,
    absolute,
    clip,
    fma,
    half,
    load,
    rint,
    select,
    splat,
    store,
    store_int8,
)
from edgeq.quantizers.search.scan import (
    UNBOUNDED,
    Plan,
    Rows,
    code,
    error,
    extreme,
    inverse,
    nearest,
    scan,
)
from edgeq.quantizers.search.tiles import (
    gather_tile,
    lane_rows,
    scatter,
    scatter_integers,
    scatter_scale,
)

SCALE_STEPS = 9
HALF_MIN = 2.0**-24
LOST = 1e6  # d / half(d) is this large where half(d) is 0, and only there
SCALE_CODES = 0.9  # how far the extreme scale is tried beyond the ends of the integers
PLAIN = 2  # trials: 0 as searched, 1 refitted, 2 plain rounding, which is taken as it is


@helper
def scan_scales(wish, cost, ends):
    """The f16 d with which the integers ends.low..ends.high come closest to the wishes.

    Too small for f16, d becomes its smallest number: small integers may still do.
    """
    spread = SCALE_CODES / max(ends.high, -ends.low)
    rows = Rows(wish, cost, wish.size // LANES)
    d = scan(rows, 0, ends, Plan(spread, SCALE_STEPS))[0]
    lost = absolute(d) > absolute(half(d)) * LOST
    return select(lost, HALF_MIN, half(d))


@helper
def choose(rows, d, wish, levels, ends, reach, sc):
    """Integer scales at most `reach` from wish / d with least error; returns the sum of errors."""
    inv = inverse(d)
    total = splat(0.0)
    for g in range(wish.size // LANES):
        middle = clip(rint(load(wish, g) * inv), ends.low, ends.high)
        best = middle
        least = error(rows, g, d * middle, levels)
        for k in range(1, 2 * reach + 1):
            step = (k + 1) // 2 if k % 2 else -(k // 2)
            trial = clip(middle + step, ends.low, ends.high)
            miss = error(rows, g, d * trial, levels)
            best = select(miss < least, trial, best)
            least = select(miss < least, miss, least)
        store(sc, g, best)
        total = total + least
    return total


@helper
def refit(rows, d, levels, sc):
    """Least-squares d, as f16, for the scales `sc` and the codes that follow from them."""
    xl = splat(0.0)
    ll = splat(0.0)
    for g in range(sc.size // LANES):
        s = load(sc, g)
        inv = inverse(d * s)
        for j in range(g * rows.n, (g + 1) * rows.n):
            v = load(rows.x, j)
            level = s * nearest(v * inv, levels)
            wl = load(rows.w, j) * level
            xl = fma(wl, v, xl)
            ll = fma(wl, level, ll)
    return half(select(ll > 0.0, xl / ll, d))


@helper
def keep(better, trial, best):
    """best = trial in the lanes where it is better."""
    for g in range(best.size // LANES):
        store(best, g, select(better, load(trial, g), load(best, g)))


@helper
def scale_all(sc, d, out):
    """out = sc * d."""
    for g in range(sc.size // LANES):
        store(out, g, load(sc, g) * d)


@helper
def plain_scales(rows, low, wish):
    """The scales that put the extreme element of each group at `low`."""
    for g in range(wish.size // LANES):
        store(wish, g, extreme(rows, g) / low)


@helper
def search_tile(rows, levels, ends, plan, reach, wish, trial_sc, sc):
    """Best d of 16 blocks, with `sc` filled: as searched, refitted, or by plain rounding."""
    for g in range(wish.size // LANES):
        scale, cost = scan(rows, g, levels, plan)
        store(wish, g, scale)
        store(trial_sc, g, cost)
    best, least = splat(0.0), splat(UNBOUNDED)
    for trial in range(PLAIN + 1):
        if trial == 0:
            d = scan_scales(wish, trial_sc, ends)
        elif trial == 1:
            d = refit(rows, best, levels, sc)
            scale_all(sc, best, wish)
        else:
            plain_scales(rows, levels.low, wish)
            d = half(extreme(Rows(wish, wish, wish.size // LANES), 0) / ends.low)
        depth = reach if trial < PLAIN else -1
        miss = choose(rows, d, wish, levels, ends, depth, trial_sc)
        keep(miss < least, trial_sc, sc)
        best = select(miss < least, d, best)
        least = select(miss < least, miss, least)
    return best


@kernel
def search_scales(x, power, importance, levels, ends, group, plan, reach, d, sc, q):
    """Fills d float32 [blocks, 1], sc int8 [blocks, groups] and q int8 [blocks, block].

    `x` is float32 [blocks * block]; the integer scales lie in ends.low..ends.high.
    """
    blocks, block = q.shape
    groups = block // group
    rows = Rows(lane_rows(block), lane_rows(block), group)
    wish, trial_sc, best_sc = lane_rows(groups), lane_rows(groups), lane_rows(groups)
    codes = np.empty(block * LANES, np.int8)
    for tile in range((blocks + LANES - 1) // LANES):
        gather_tile(x, power, importance, block, tile, blocks, rows.x, rows.w)
        best = search_tile(rows, levels, ends, plan, reach, wish, trial_sc, best_sc)
        for j in range(block):
            inv = inverse(best * load(best_sc, j // group))
            store_int8(codes, j, code(load(rows.x, j) * inv, levels))
        scatter(codes, tile, q)
        scatter_integers(best_sc, codes, tile, sc)
        scatter_scale(best, rows.w, tile, d)
