"""Row kernels for few columns: a row of weights times one column of activations, read once, in
order.

Activations are int8 with a scale per 32 (`xd`) and their sums times that scale per group (`xs`), or
plain f32 for float formats.
"""

from edgeq.blocks import BlockFormat
from edgeq.kernels.codes import Coding, codes, coding, plain, scales
from edgeq.kernels.llvm import F16, F32, I8, I16, I32, Emit, Value, vector

__all__ = ["PREFETCH", "floats_at", "row_dot"]

PREFETCH = 4096  # bytes ahead of the reader


def row_dot(
    e: Emit, fmt: BlockFormat, w: Value, x: Value, xd: Value, xs: Value, cols: Value
) -> Value:
    """Emit the f32 dot product of a row at pointer w with a column of `cols` (i64) activations.

    Quantized formats: x i8[cols], xd f32[cols/32], xs f32[cols/group]. Float formats: x f32[cols];
    xd and xs are not read.
    """
    if plain(fmt):
        return _float_dot(e, fmt, w, x, cols)
    main = coding(fmt, e.isa)
    steps = e.b.udiv(cols, e.i64(main.weights))
    total = _steps(e, main, w, x, xd, xs, steps)
    if fmt.block == main.weights:
        return total
    done = e.b.mul(steps, e.i64(main.weights))
    tail = coding(fmt, e.isa, tail=True)
    left = e.b.udiv(e.b.sub(cols, done), e.i64(fmt.block))
    w = e.at(w, e.b.mul(steps, e.i64(main.bytes)))
    x, xd = e.at(x, done), e.at(xd, e.b.udiv(done, e.i64(8)))
    xs = e.at(xs, e.b.udiv(done, e.i64(fmt.group // 4)))
    return e.b.fadd(total, _steps(e, tail, w, x, xd, xs, left))


def _steps(e: Emit, c: Coding, w: Value, x: Value, xd: Value, xs: Value, count: Value) -> Value:
    """Scalar sum over `count` steps."""
    width = min(e.isa.WIDTH, c.weights)
    unit = max(width, c.fmt.group)
    chains = min(c.weights // unit, 4)
    start = [e.fill(F32, width // 4, 0.0)] * chains
    if c.has_minimum:
        start = [*start, e.fill(F32, c.groups, 0.0)]

    def body(i: Value, sums: list[Value]) -> list[Value]:
        step = e.at(w, e.b.mul(i, e.i64(c.bytes)))
        e.prefetch(step, PREFETCH, c.bytes)
        xi = e.at(x, e.b.mul(i, e.i64(c.weights)))
        a, b = scales(e, c, step)
        scale = e.mul(a, _spread(e, c, e.at(xd, e.b.mul(i, e.i64(c.weights // 8)))))
        for n, first in enumerate(range(0, c.weights, unit)):
            part = _unit(e, c, step, xi, first, unit, width)
            lanes = [(first + 4 * k % unit) // c.fmt.group for k in range(width // 4)]
            sums[n % chains] = e.fma(part, e.pick(scale, lanes), sums[n % chains])
        if b is not None:
            group_sums = e.load(vector(F32, c.groups), xs, e.b.mul(i, e.i64(4 * c.groups)))
            sums[-1] = e.fma(b, group_sums, sums[-1])
        return sums

    sums = e.loop(count, start, body)
    total = e.halve_sum(_sum(e, sums[:chains]))
    return e.b.fadd(total, e.halve_sum(sums[-1])) if c.has_minimum else total


def _unit(e: Emit, c: Coding, step: Value, x: Value, first: int, unit: int, width: int) -> Value:
    """f32 lanes: exact integer dot products of `unit` neighbours, each lane within one group."""
    acc = e.fill(I32, width // 4, 0)
    for k in range(first, first + unit, width):
        xv = e.load(vector(I8, width), x, k)
        acc = e.isa.dot(e, acc, codes(e, c, step, k, width), xv, c.signed)
    return e.floats(acc)


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


def _float_dot(e: Emit, fmt: BlockFormat, w: Value, x: Value, cols: Value) -> Value:
    lanes, chains = e.isa.WIDTH // 4, 4
    step = lanes * chains
    steps = e.b.udiv(cols, e.i64(step))

    def body(i: Value, sums: list[Value]) -> list[Value]:
        first = e.b.mul(i, e.i64(step))
        wi = e.at(w, e.b.mul(first, e.i64(fmt.bytes)))
        xi = e.at(x, e.b.mul(first, e.i64(4)))
        e.prefetch(wi, PREFETCH, step * fmt.bytes)
        for k in range(chains):
            wv = floats_at(e, fmt, e.at(wi, k * lanes * fmt.bytes), lanes)
            sums[k] = e.fma(wv, e.load(vector(F32, lanes), xi, 4 * k * lanes), sums[k])
        return sums

    def rest(i: Value, sums: list[Value]) -> list[Value]:
        k = e.b.add(e.b.mul(steps, e.i64(step)), i)
        wv = floats_at(e, fmt, e.at(w, e.b.mul(k, e.i64(fmt.bytes))), 1)
        xv = e.load(vector(F32, 1), x, e.b.mul(k, e.i64(4)))
        return [e.fma(wv, xv, sums[0])]

    sums = e.loop(steps, [e.fill(F32, lanes, 0.0)] * chains, body)
    total = e.halve_sum(_sum(e, sums))
    tail = e.loop(e.b.urem(cols, e.i64(step)), [e.fill(F32, 1, 0.0)], rest)
    return e.b.fadd(total, e.lane(tail[0], 0))
