"""A tile is 16 blocks side by side: moving between the blocks of a matrix and lane rows.

Lane l of tile t is block 16 t + l. Lanes past the last block repeat it, and write it once more.
"""

import numpy as np

from edgeq.quantizers.search.jit import helper
from edgeq.quantizers.search.lanes import LANES, fma, load, sqrt, store, store_int8
from edgeq.quantizers.search.scan import inverse
from edgeq.quantizers.search.squares import gather_square, scatter_square


@helper
def lane_rows(count):
    """Scratch for `count` lane rows."""
    return np.empty(count * LANES, np.float32)


@helper
def starts_of(tile, blocks, count, block):
    """Where each lane's block starts in an array of `count` blocks, which repeats: int64 [16]."""
    starts = np.empty(LANES, np.int64)
    for lane in range(LANES):
        starts[lane] = min(tile * LANES + lane, blocks - 1) % count * block
    return starts


@helper
def gather(source, block, tile, blocks, out):
    """Lane row j of `out` = element j of the 16 blocks of `tile`, of `blocks` in all.

    `source` float32 [k * block] repeats when it holds fewer blocks than there are.
    """
    starts = starts_of(tile, blocks, source.size // block, block)
    squares = block // LANES * LANES
    for j in range(0, squares, LANES):
        gather_square(source, starts, j, out)
    for j in range(squares, block):
        for lane in range(LANES):
            out[j * LANES + lane] = source[starts[lane] + j]


@helper
def gather_tile(x, power, importance, block, tile, blocks, xs, ws):
    """Elements and weights of a tile: w = importance * sqrt(1 + x x / power).

    `power` [blocks] is the mean of x x around a block; an empty `importance` counts as 1. This is
    llama.cpp's weight, divided by the block's own magnitude to keep the sums in range.
    """
    gather(x, block, tile, blocks, xs)
    gather(power, 1, tile, blocks, ws)
    inv = inverse(load(ws, 0))
    if importance.size:
        gather(importance, block, tile, blocks, ws)
    for j in range(block):
        v = load(xs, j)
        cost = sqrt(fma(v * inv, v, 1.0))
        store(ws, j, cost * load(ws, j) if importance.size else cost)


@helper
def scatter(lanes, tile, out):
    """out[b, j] = lane row j of `lanes`, for the blocks b of `tile`; both are int8."""
    blocks, count = out.shape
    starts = starts_of(tile, blocks, blocks, count)
    squares = count // LANES * LANES
    flat = out.reshape(-1)
    for j in range(0, squares, LANES):
        scatter_square(lanes, j, starts, flat)
    for j in range(squares, count):
        for lane in range(LANES):
            flat[starts[lane] + j] = lanes[j * LANES + lane]


@helper
def scatter_scale(value, row, tile, out):
    """out[b, 0] = the lane of `value`, for the blocks b of `tile`; `row` is scratch."""
    store(row, 0, value)
    for lane in range(min(LANES, len(out) - tile * LANES)):
        out[tile * LANES + lane, 0] = row[lane]


@helper
def scatter_integers(values, row, tile, out):
    """out[b, g] = the lanes of `values`, one lane row per group; `row` is int8 scratch."""
    for g in range(out.shape[1]):
        store_int8(row, g, load(values, g))
    scatter(row, tile, out)
