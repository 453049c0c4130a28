"""Row kernels for few columns: a row of weights times one column of activations, read once, in
order.

Activations are int8 with a scale per 32 (`xd`) and their sums times that scale per group (`xs`), or
plain f32 for float formats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgeq.blocks import BlockFormat
from edgeq.kernels.codes import Coding, codes, coding, plain, scale_and_minimum
from edgeq.kernels.llvm import F16, F32, I8, I16, I32, Emit, Value, vector

__all__ = ["Column", "Reader", "floats_at", "row_dots"]

CHAINS = 2  # independent sums of a column: fma has a latency


@dataclass(frozen=True)
class Column:
    """Pointers to one column of activations: x i8[cols], xd f32[cols/32], xs f32[cols/group]; for
    float formats x f32[cols], and the others are not read.
    """

    x: Value
    xd: Value
    xs: Value


@dataclass(frozen=True)
class Reader:
    """How a row is read: pointer to its first byte, bytes that are asked for ahead of the reader
    (i64 or integer), and 64 bytes of scratch per column.
    """

    w: Value
    ahead: Value
    spare: Value

    def further(self, e: Emit, offset: Value) -> "Reader":
        return replace(self, w=e.at(self.w, offset))


def row_dots(
    e: Emit, fmt: BlockFormat, row: Reader, columns: Sequence[Column], cols: Value
) -> list[Value]:
    """f32 dot products of a row with several columns of `cols` (i64) activations: weights are read
    and unpacked once.

    Each result is bit for bit what the column alone would give.
    """
    if plain(fmt):
        return _float_dots(e, fmt, row, [c.x for c in columns], cols)
    main = coding(fmt, e.isa)
    steps = e.b.udiv(cols, e.i64(main.weights))
    totals = _steps(e, main, row, columns, steps)
    if fmt.block == main.weights:
        return totals
    done = e.b.mul(steps, e.i64(main.weights))
    tail = coding(fmt, e.isa, tail=True)
    left = e.b.udiv(e.b.sub(cols, done), e.i64(fmt.block))
    row = row.further(e, e.b.mul(steps, e.i64(main.bytes)))
    d, s = (e.b.udiv(done, e.i64(n)) for n in (8, fmt.group // 4))
    rest = [Column(e.at(c.x, done), e.at(c.xd, d), e.at(c.xs, s)) for c in columns]
    pairs = zip(totals, _steps(e, tail, row, rest, left), strict=True)
    return [e.b.fadd(total, more) for total, more in pairs]


def _steps(e: Emit, c: Coding, row: Reader, columns: Sequence[Column], count: Value) -> list[Value]:
    """Scalar sum over `count` steps, per column.

    Two passes: the first turns scales into factors in scratch memory, from where the second one
    loads each into all lanes, which costs less than moving lanes about.
    """
    room = e.b.mul(count, e.i64(4 * len(_order(e, c))))
    kept = [e.at(row.spare, e.b.mul(room, e.i64(k))) for k in range(len(columns))]
    minimums = _factors(e, c, row, columns, count, kept)
    sums = _products(e, c, row, columns, count, kept)
    if c.has_minimum:
        sums = [e.b.fadd(total, m) for total, m in zip(sums, minimums, strict=True)]
    return sums


def _here(e: Emit, c: Coding, columns: Sequence[Column], i: Value) -> list[Column]:
    """The columns from step i on."""
    offsets = [e.b.mul(i, e.i64(n)) for n in (c.weights, c.weights // 8, 4 * c.groups)]
    return [
        Column(*(e.at(p, o) for p, o in zip((k.x, k.xd, k.xs), offsets, strict=True)))
        for k in columns
    ]


def _factors(
    e: Emit, c: Coding, row: Reader, columns: Sequence[Column], count: Value, kept: list[Value]
) -> list[Value]:
    """Write f32[count · groups] per column: scale of the weights times that of the activations.

    Returns f32[groups] per column: sums of what B adds, or nothing.
    """

    order = _order(e, c)

    def body(i: Value, sums: list[Value]) -> list[Value]:
        step = e.at(row.w, e.b.mul(i, e.i64(c.bytes)))
        e.prefetch(step, row.ahead, c.bytes)
        a, m = scale_and_minimum(e, c, step)
        target = e.b.mul(i, e.i64(4 * len(order)))
        here = _here(e, c, columns, i)
        for column, place in zip(here, kept, strict=True):
            factors = e.mul(a, _spread(e, c, column.xd))
            e.store(e.pick(factors, order), e.at(place, target))
        if not c.has_minimum:
            return []
        xs = [e.load(vector(F32, c.groups), column.xs) for column in here]
        return [e.fma(a if m is None else m, x, s) for x, s in zip(xs, sums, strict=True)]

    zeros = [e.fill(F32, c.groups, 0.0)] * len(columns) * c.has_minimum
    sums = [e.halve_sum(s) for s in e.loop(count, zeros, body)]
    return [e.b.fmul(s, F32(c.offset)) for s in sums] if c.offset else sums


def _width(e: Emit, c: Coding) -> int:
    """Bytes of codes that are multiplied at once."""
    return int(min(e.isa.ROW_WIDTH, c.weights))


def _order(e: Emit, c: Coding) -> list[int]:
    """Group whose factor stands at each place of a step's factors in memory.

    Where a vector of sums spans several groups, the factors of its quarters (four lanes, 16
    weights) lie four places apart, and those of the next vectors between them: a shuffle within
    quarters then gives each lane its own.
    """
    width = _width(e, c)
    if width <= c.fmt.group:
        return list(range(c.groups))
    quarters, vectors = width // 16, c.weights // width
    return [
        (16 * quarter + width * (first + k)) // c.fmt.group
        for first in range(0, vectors, 4)
        for quarter in range(quarters)
        for k in range(4)
    ]


def _products(
    e: Emit, c: Coding, row: Reader, columns: Sequence[Column], count: Value, kept: list[Value]
) -> list[Value]:
    """Scalar sum per column of integer dot products times their factors."""
    width = _width(e, c)
    unit = max(width, c.fmt.group)
    chains = min(c.weights // unit, CHAINS)
    size = 4 * len(_order(e, c))

    def body(i: Value, sums: list[Value]) -> list[Value]:
        step = e.at(row.w, e.b.mul(i, e.i64(c.bytes)))
        xs = [column.x for column in _here(e, c, columns, i)]
        factors = [e.at(place, e.b.mul(i, e.i64(size))) for place in kept]
        for n, first in enumerate(range(0, c.weights, unit)):
            for k, part in enumerate(_unit(e, c, step, xs, first, unit, width)):
                slot = k * chains + n % chains
                sums[slot] = e.fma(part, _spread_out(e, c, factors[k], first, width), sums[slot])
        return sums

    sums = e.loop(count, [e.fill(F32, width // 4, 0.0)] * chains * len(columns), body)
    return [e.halve_sum(_sum(e, sums[k * chains : (k + 1) * chains])) for k in range(len(columns))]


def _spread_out(e: Emit, c: Coding, factors: Value, first: int, width: int) -> Value:
    """f32 lanes: for each the factor of its group, in the vector that starts at weight `first`."""
    lanes = width // 4
    if width <= c.fmt.group:
        return e.splat(e.load(F32, factors, 4 * (first // c.fmt.group)), lanes)
    vectors, k = divmod(first // width, 4)
    loaded = e.load(vector(F32, lanes), factors, 4 * lanes * vectors)
    return e.pick(loaded, [4 * (lane // 4) + k for lane in range(lanes)])


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


def _float_dots(
    e: Emit, fmt: BlockFormat, row: Reader, xs: list[Value], cols: Value
) -> list[Value]:
    lanes, chains = e.isa.WIDTH // 4, 4
    step = lanes * chains
    steps = e.b.udiv(cols, e.i64(step))

    def body(i: Value, sums: list[Value]) -> list[Value]:
        first = e.b.mul(i, e.i64(step))
        wi = e.at(row.w, e.b.mul(first, e.i64(fmt.bytes)))
        xi = [e.at(x, e.b.mul(first, e.i64(4))) for x in xs]
        e.prefetch(wi, row.ahead, step * fmt.bytes)
        for k in range(chains):
            wv = floats_at(e, fmt, e.at(wi, k * lanes * fmt.bytes), lanes)
            for n, x in enumerate(xi):
                xv = e.load(vector(F32, lanes), x, 4 * k * lanes)
                sums[n * chains + k] = e.fma(wv, xv, sums[n * chains + k])
        return sums

    def rest(i: Value, sums: list[Value]) -> list[Value]:
        k = e.b.add(e.b.mul(steps, e.i64(step)), i)
        wv = floats_at(e, fmt, e.at(row.w, e.b.mul(k, e.i64(fmt.bytes))), 1)
        loaded = [e.load(vector(F32, 1), x, e.b.mul(k, e.i64(4))) for x in xs]
        return [e.fma(wv, xv, s) for xv, s in zip(loaded, sums, strict=True)]

    sums = e.loop(steps, [e.fill(F32, lanes, 0.0)] * chains * len(xs), body)
    own = [sums[k * chains : (k + 1) * chains] for k in range(len(xs))]
    totals = [e.halve_sum(_sum(e, s)) for s in own]
    tails = e.loop(e.b.urem(cols, e.i64(step)), [e.fill(F32, 1, 0.0)] * len(xs), rest)
    return [e.b.fadd(t, e.lane(tail, 0)) for t, tail in zip(totals, tails, strict=True)]
