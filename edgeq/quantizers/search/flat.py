"""Blocks with one scale, value = d * q, and with a scale and an offset, value = d * q + m."""

import numpy as np

from edgeq.quantizers.search.affine import ends, error_affine, scan_affine
from edgeq.quantizers.search.jit import helper, kernel
from edgeq.quantizers.search.lanes import LANES, clip, half, load, rint, select, store_int8
from edgeq.quantizers.search.scan import Rows, code, error, extreme, inverse, scan
from edgeq.quantizers.search.tiles import gather_tile, lane_rows, scatter, scatter_scale


@helper
def best_scale(rows, levels, plan):
    """The f16 scale found by `scan`, or that of plain rounding where it is better."""
    best = half(scan(rows, 0, levels, plan)[0])
    least = error(rows, 0, best, levels)
    top = extreme(rows, 0)
    for side in range(2):
        trial = half(top / (levels.low if side == 0 else levels.high))
        miss = error(rows, 0, trial, levels)
        best = select(miss < least, trial, best)
        least = select(miss < least, miss, least)
    return best


@kernel
def search_scale(x, power, importance, levels, plan, d, q):
    """Fills d float32 [blocks, 1] and q int8 [blocks, block] for x float32 [blocks * block]."""
    blocks, block = q.shape
    rows = Rows(lane_rows(block), lane_rows(block), block)
    codes = np.empty(block * LANES, np.int8)
    for tile in range((blocks + LANES - 1) // LANES):
        gather_tile(x, power, importance, block, tile, blocks, rows.x, rows.w)
        scale = best_scale(rows, levels, plan)
        inv = inverse(scale)
        for j in range(block):
            store_int8(codes, j, code(load(rows.x, j) * inv, levels))
        scatter_scale(scale, rows.w, tile, d)
        scatter(codes, tile, q)


@helper
def best_pair(rows, top, plan):
    """The f16 scale and offset found by `scan_affine`, or those of plain rounding."""
    found, found_m, _, _ = scan_affine(rows, 0, top, True, plan)
    found, found_m = half(found), half(found_m)
    low, high = ends(rows, 0)
    plain, plain_m = half((high - low) / top), half(low)
    better = error_affine(rows, 0, found, found_m, top) < error_affine(rows, 0, plain, plain_m, top)
    return select(better, found, plain), select(better, found_m, plain_m)


@kernel
def search_pair(x, power, importance, top, plan, d, m, q):
    """Fills d, m float32 [blocks, 1] and q int8 [blocks, block] for x float32 [blocks * block]."""
    blocks, block = q.shape
    rows = Rows(lane_rows(block), lane_rows(block), block)
    codes = np.empty(block * LANES, np.int8)
    for tile in range((blocks + LANES - 1) // LANES):
        gather_tile(x, power, importance, block, tile, blocks, rows.x, rows.w)
        scale, offset = best_pair(rows, top, plan)
        inv = inverse(scale)
        for j in range(block):
            store_int8(codes, j, clip(rint((load(rows.x, j) - offset) * inv), 0.0, top))
        scatter_scale(scale, rows.w, tile, d)
        scatter_scale(offset, rows.w, tile, m)
        scatter(codes, tile, q)
