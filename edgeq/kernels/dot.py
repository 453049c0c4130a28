"""Row kernels for few columns: a row of weights times one column of activations, read once, in
order.

Activations are int8 with a scale per 32 (`xd`) and their sums times that scale per group (`xs`), or
plain f32 for float formats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from edgeq.blocks import BlockFormat
from edgeq.kernels.codes import Coding, codes, coding, plain, scales
from edgeq.kernels.llvm import F16, F32, I8, I16, I32, Emit, Value, vector

__all__ = ["PREFETCH", "Column", "floats_at", "row_dot", "row_dots"]

PREFETCH = 4096  # bytes ahead of the reader


@dataclass(frozen=True)
class Column:
    """Pointers to one column of activations: x i8[cols], xd f32[cols/32], xs f32[cols/group]; for
    float formats x f32[cols], and the others are not read.
    """

    x: Value
    xd: Value
    xs: Value


def row_dot(
    e: Emit, fmt: BlockFormat, w: Value, x: Value, xd: Value, xs: Value, cols: Value
) -> Value:
    """Emit the f32 dot product of a row at pointer w with a column of `cols` (i64) activations."""
    return row_dots(e, fmt, w, [Column(x, xd, xs)], cols)[0]


def row_dots(
    e: Emit, fmt: BlockFormat, w: Value, columns: Sequence[Column], cols: Value
) -> list[Value]:
    """Dot products of one row with several columns: weights are read and unpacked once.

    Each result is bit for bit what the column alone would give.
    """
    if plain(fmt):
        return _float_dots(e, fmt, w, [c.x for c in columns], cols)
    main = coding(fmt, e.isa)
    steps = e.b.udiv(cols, e.i64(main.weights))
    totals = _steps(e, main, w, columns, steps)
    if fmt.block == main.weights:
        return totals
    done = e.b.mul(steps, e.i64(main.weights))
    tail = coding(fmt, e.isa, tail=True)
    left = e.b.udiv(e.b.sub(cols, done), e.i64(fmt.block))
    w = e.at(w, e.b.mul(steps, e.i64(main.bytes)))
    d, s = (e.b.udiv(done, e.i64(n)) for n in (8, fmt.group // 4))
    rest = [Column(e.at(c.x, done), e.at(c.xd, d), e.at(c.xs, s)) for c in columns]
    pairs = zip(totals, _steps(e, tail, w, rest, left), strict=True)
    return [e.b.fadd(total, more) for total, more in pairs]


def _steps(e: Emit, c: Coding, w: Value, columns: Sequence[Column], count: Value) -> list[Value]:
    """Scalar sum over `count` steps, per column."""
    width = min(e.isa.WIDTH, c.weights)
    unit = max(width, c.fmt.group)
    chains = min(c.weights // unit, 2)  # independent sums per column: fma has a latency
    each = chains + c.has_minimum
    zeros = [e.fill(F32, width // 4, 0.0)] * chains + [e.fill(F32, c.groups, 0.0)] * c.has_minimum

    def body(i: Value, sums: list[Value]) -> list[Value]:
        step = e.at(w, e.b.mul(i, e.i64(c.bytes)))
        e.prefetch(step, PREFETCH, c.bytes)
        a, b = scales(e, c, step)
        offsets = [e.b.mul(i, e.i64(n)) for n in (c.weights, c.weights // 8, 4 * c.groups)]
        here = [
            Column(*(e.at(p, o) for p, o in zip((k.x, k.xd, k.xs), offsets, strict=True)))
            for k in columns
        ]
        factors = [e.mul(a, _spread(e, c, k.xd)) for k in here]
        for n, first in enumerate(range(0, c.weights, unit)):
            parts = _unit(e, c, step, [k.x for k in here], first, unit, width)
            lanes = [(first + 4 * k % unit) // c.fmt.group for k in range(width // 4)]
            for k, part in enumerate(parts):
                slot = k * each + n % chains
                sums[slot] = e.fma(part, e.pick(factors[k], lanes), sums[slot])
        if b is not None:
            for k, column in enumerate(here):
                group_sums = e.load(vector(F32, c.groups), column.xs)
                slot = k * each + chains
                sums[slot] = e.fma(b, group_sums, sums[slot])
        return sums

    sums = e.loop(count, zeros * len(columns), body)
    own = [sums[k * each : (k + 1) * each] for k in range(len(columns))]
    return [_total(e, s[:chains], s[chains:]) for s in own]


def _total(e: Emit, chains: list[Value], minimum: list[Value]) -> Value:
    total = e.halve_sum(_sum(e, chains))
    return e.b.fadd(total, e.halve_sum(minimum[0])) if minimum else total


def _unit(
    e: Emit, c: Coding, step: Value, xs: list[Value], first: int, unit: int, width: int
) -> list[Value]:
    """f32 lanes per column: exact integer dot products of `unit` neighbours within a group."""
    acc = [e.fill(I32, width // 4, 0)] * len(xs)
    for k in range(first, first + unit, width):
        w = codes(e, c, step, k, width)
        loaded = [e.load(vector(I8, width), x, k) for x in xs]
        acc = [e.isa.dot(e, a, w, x, c.signed) for a, x in zip(acc, loaded, strict=True)]
    return [e.floats(a) for a in acc]


def _spread(e: Emit, c: Coding, xd: Value) -> Value:
    """Activation scales (one per 32) → one per group."""
    n = c.weights // 32
    return e.pick(e.load(vector(F32, n), xd), [g * c.fmt.group // 32 for g in range(c.groups)])


def _sum(e: Emit, values: list[Value]) -> Value:
    total = values[0]
    for v in values[1:]:
        total = e.add(total, v)
    return total


# -- float formats ---------------------------------------------------------------------------------
def floats_at(e: Emit, fmt: BlockFormat, pointer: Value, lanes: int) -> Value:
    """f32[lanes] from stored F32, F16 or BF16."""
    kind = fmt.fields["x"].type
    if kind == "f32":
        return e.load(vector(F32, lanes), pointer)
    if kind == "f16":
        return e.isa.from_f16(e, e.load(vector(F16, lanes), pointer))
    wide = e.b.zext(e.load(vector(I16, lanes), pointer), vector(I32, lanes))
    return e.b.bitcast(e.b.shl(wide, e.fill(I32, lanes, 16)), vector(F32, lanes))


def _float_dots(e: Emit, fmt: BlockFormat, w: Value, xs: list[Value], cols: Value) -> list[Value]:
    lanes, chains = e.isa.WIDTH // 4, 4
    step = lanes * chains
    steps = e.b.udiv(cols, e.i64(step))

    def body(i: Value, sums: list[Value]) -> list[Value]:
        first = e.b.mul(i, e.i64(step))
        wi = e.at(w, e.b.mul(first, e.i64(fmt.bytes)))
        xi = [e.at(x, e.b.mul(first, e.i64(4))) for x in xs]
        e.prefetch(wi, PREFETCH, step * fmt.bytes)
        for k in range(chains):
            wv = floats_at(e, fmt, e.at(wi, k * lanes * fmt.bytes), lanes)
            for n, x in enumerate(xi):
                xv = e.load(vector(F32, lanes), x, 4 * k * lanes)
                sums[n * chains + k] = e.fma(wv, xv, sums[n * chains + k])
        return sums

    def rest(i: Value, sums: list[Value]) -> list[Value]:
        k = e.b.add(e.b.mul(steps, e.i64(step)), i)
        wv = floats_at(e, fmt, e.at(w, e.b.mul(k, e.i64(fmt.bytes))), 1)
        loaded = [e.load(vector(F32, 1), x, e.b.mul(k, e.i64(4))) for x in xs]
        return [e.fma(wv, xv, s) for xv, s in zip(loaded, sums, strict=True)]

    sums = e.loop(steps, [e.fill(F32, lanes, 0.0)] * chains * len(xs), body)
    own = [sums[k * chains : (k + 1) * chains] for k in range(len(xs))]
    totals = [e.halve_sum(_sum(e, s)) for s in own]
    tails = e.loop(e.b.urem(cols, e.i64(step)), [e.fill(F32, 1, 0.0)] * len(xs), rest)
    return [e.b.fadd(t, e.lane(tail, 0)) for t, tail in zip(totals, tails, strict=True)]
