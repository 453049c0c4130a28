"""Loops over columns, compiled: error feedback, then descent over codes and scales.

Every format is written the same way here: value = (A a) level + (B b), where A and B are one number
of f16 per block, a and b a whole number per group (or 1), and the levels a table in rising order.
"""

import numpy as np

from edgeq.quantizers.search.jit import helper, kernel

TINY = np.float32(1e-30)
HALF_MAX = np.float32(65504.0)
HALF_NORMAL = np.float32(2.0**-14)
SPLIT = np.float32(8193.0)  # 2^13 + 1: a product with it leaves 11 bits
SHIFT = np.float32(0.75)  # its last place is 2^-24, f16's smallest step


@helper
def half(x):
    """Nearest f16 number, as f32 (Veltkamp's splitting)."""
    x = min(max(x, -HALF_MAX), HALF_MAX)
    if abs(x) < HALF_NORMAL:
        return (x + SHIFT) - SHIFT
    wide = x * SPLIT
    return wide - (wide - x)


@helper
def nearest(value, step, base, table, even):
    """Index of the level whose step * level + base is nearest; even: levels one apart."""
    v = (value - base) / step if abs(step) > TINY else np.float32(0)
    last = len(table) - 1
    if even:
        return int(min(max(np.rint(v - table[0]), np.float32(0)), np.float32(last)))
    at = 0
    for i in range(1, last + 1):
        at += v > np.float32(0.5) * (table[i - 1] + table[i])
    return at


@kernel
def feed_back(w, step, base, table, even, factor, codes, miss):
    """Round columns one at a time, pushing what each misses into those to its right.

    w float32 [rows, n] is compensated in place; step, base float32 [rows, groups]; factor float32
    [n, n], upper. Fills codes int32 [rows, n], and miss float32 [rows, n]: the misses in units of
    factor's diagonal.
    """
    rows, n = w.shape
    group = n // step.shape[1]
    for r in range(rows):
        row = w[r]
        for j in range(n):
            s, b = step[r, j // group], base[r, j // group]
            c = nearest(row[j], s, b, table, even)
            codes[r, j] = c
            e = (row[j] - (s * table[c] + b)) / factor[j, j]
            miss[r, j] = e
            for k in range(j + 1, n):
                row[k] -= e * factor[j, k]


@kernel
def descend_codes(codes, gradient, step, base, table, even, hessian):
    """One sweep over the columns: each code becomes the best one, given all others.

    gradient float32 [rows, n] = (w - values) H. Changes codes and gradient.
    """
    rows, n = codes.shape
    group = n // step.shape[1]
    for r in range(rows):
        g = gradient[r]
        for j in range(n):
            s, b = step[r, j // group], base[r, j // group]
            value = s * table[codes[r, j]] + b
            c = nearest(value + g[j] / hessian[j, j], s, b, table, even)
            if c != codes[r, j]:
                change = s * (table[c] - table[codes[r, j]])
                codes[r, j] = c
                for k in range(n):
                    g[k] -= change * hessian[j, k]


@helper
def best_move(g, direction, start, hessian):
    """How far to go along `direction`, which acts on the columns from `start` on, for the least
    error; 0 where it leads nowhere.
    """
    n = len(direction)
    bent = np.zeros(n, np.float32)
    for j in range(n):  # row by row: sums across a vector would not be vectorized
        for k in range(n):
            bent[k] += direction[j] * hessian[start + j, start + k]
    along = np.float32(0)
    curvature = np.float32(0)
    for j in range(n):
        along += direction[j] * g[start + j]
        curvature += direction[j] * bent[j]
    return along / curvature if curvature > TINY else np.float32(0)


@helper
def move(g, direction, start, far, hessian):
    """Keep the gradient right after going `far` along `direction`."""
    for j in range(len(direction)):
        change = far * direction[j]
        if change != 0:
            for k in range(len(g)):
                g[k] -= change * hessian[start + j, k]


@helper
def refit_groups(g, start, directions, whole, low, high, hessian):
    """Whole numbers of one block's groups, each moved to the best one, given all others.

    directions [groups, group]: what 1 more does.
    """
    groups, group = directions.shape
    for i in range(groups):
        at = start + i * group
        wish = np.rint(whole[i] + best_move(g, directions[i], at, hessian))
        found = min(max(wish, low), high)
        if found != whole[i]:
            move(g, directions[i], at, found - whole[i], hessian)
            whole[i] = found


@helper
def refit_block(g, start, direction, scale, hessian):
    """The f16 number of a block, moved to the best one, given all else."""
    found = half(scale + best_move(g, direction, start, hessian))
    if found != scale:
        move(g, direction, start, found - scale, hessian)
    return found


@kernel
def descend_scales(codes, gradient, scale, whole, low, high, table, leveled, hessian):
    """One sweep over the groups and blocks: A and a (leveled), or B and b, given all else.

    scale float32 [rows, blocks] and whole float32 [rows, groups] are changed, and gradient with
    them; whole stays as it is where low = high.
    """
    rows, n = codes.shape
    blocks = scale.shape[1]
    block, groups = n // blocks, whole.shape[1] // blocks
    group = block // groups
    levels = np.ones(block, np.float32)
    for r in range(rows):
        g = gradient[r]
        for b in range(blocks):
            if leveled:
                for j in range(block):
                    levels[j] = table[codes[r, b * block + j]]
            own = whole[r, b * groups : (b + 1) * groups]
            if low < high:
                units = (levels * scale[r, b]).reshape(groups, group)
                refit_groups(g, b * block, units, own, low, high, hessian)
            direction = levels.copy()
            for j in range(block):
                direction[j] *= own[j // group]
            scale[r, b] = refit_block(g, b * block, direction, scale[r, b], hessian)
