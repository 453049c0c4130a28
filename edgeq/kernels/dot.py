"""Row kernels for few columns: a row of weights times one column of activations, read once, in
order.

Activations are int8 (in the order of `kernels.order` unless sums go across lanes) with a scale per
32 (`xd`) and their sums per group (`xs`, see `sums_of`), or plain f32 for float formats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from edgeq.blocks import BlockFormat
from edgeq.kernels.codes import (
    Coding,
    block_scales,
    centred,
    codes,
    coding,
    has_top_bit,
    integers,
    plain,
    scale_and_minimum,
    scale_and_size,
    subtracted,
)
from edgeq.kernels.llvm import F16, F32, I8, I16, I32, Emit, Value, vector
from edgeq.kernels.order import QUARTER, STEP, codes_in_order, groups_of

__all__ = ["Column", "Reader", "floats_at", "row_dots", "sums_of"]


@dataclass(frozen=True)
class Column:
    """Pointers to one column of activations: x i8[cols], xd f32[cols/32], xs f32 or i32[cols/group]
    (see `sums_of`); for float formats x f32[cols], and the others are not read.
    """

    x: Value
    xd: Value
    xs: Value


@dataclass(frozen=True)
class Reader:
    """How a row is read: pointer to its first byte, bytes that are asked for ahead of the reader
    (i64).
    """

    w: Value
    ahead: Value

    def further(self, e: Emit, offset: Value) -> "Reader":
        return replace(self, w=e.at(self.w, offset))


def sums_of(fmt: BlockFormat, isa: ModuleType) -> str:
    """Which sums of activations a row reads (see layout.PREPARE)."""
    if isa.ACROSS and _counts_minimums(fmt):
        return f"ints{fmt.group}"
    return "sums16" if fmt.group == 16 else "sums32"


def _counts_minimums(fmt: BlockFormat) -> bool:
    """Whether minimums change within a scale of activations, of which there are half as many, and
    fit 16 bits when multiplied with a sum of activations.
    """
    nested = "dmin" in fmt.fields and fmt.group < 32
    return nested and 127 * fmt.group * fmt.limits("m")[1] < 1 << 15


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
    total_of = _steps_across if e.isa.ACROSS else _steps
    totals = total_of(e, main, row, columns, steps)
    if fmt.block == main.weights:
        return totals
    done = e.b.mul(steps, e.i64(main.weights))
    tail = coding(fmt, e.isa, tail=True)
    left = e.b.udiv(e.b.sub(cols, done), e.i64(fmt.block))
    row = row.further(e, e.b.mul(steps, e.i64(main.bytes)))
    d, s = (e.b.udiv(done, e.i64(n)) for n in (8, fmt.group // 4))
    rest = [Column(e.at(c.x, done), e.at(c.xd, d), e.at(c.xs, s)) for c in columns]
    pairs = zip(totals, total_of(e, tail, row, rest, left), strict=True)
    return [e.b.fadd(total, more) for total, more in pairs]


def _steps(e: Emit, c: Coding, row: Reader, columns: Sequence[Column], count: Value) -> list[Value]:
    """Scalar sum over `count` steps, per column.

    Vectors that hold words of the same groups are summed up as integers; then each lane is
    multiplied by the factor of its group.
    """
    width = min(e.isa.WIDTH, c.weights)
    plan = _vectors(c, width)
    minimums, sums = c.has_minimum * len(columns), len(columns) * len(plan)

    def body(i: Value, carried: list[Value]) -> list[Value]:
        step = e.at(row.w, e.b.mul(i, e.i64(c.bytes)))
        e.prefetch(step, row.ahead, c.bytes)
        here = _here(e, c, columns, i)
        a, m = scale_and_minimum(e, c, step)
        factors = [e.mul(a, _spread(e, c, column.xd)) for column in here]
        new = [
            e.fma(a if m is None else m, e.load(vector(F32, c.groups), column.xs), total)
            for column, total in zip(here, carried[:minimums])
        ]
        totals = iter(carried[minimums:])
        for groups, starts in plan.items():
            parts = _products(e, c, step, here, starts, width)
            for part, factor in zip(parts, factors, strict=True):
                new.append(e.fma(part, e.pick(factor, groups), next(totals)))
        return new

    zeros = [e.fill(F32, c.groups, 0.0)] * minimums + [e.fill(F32, width // 4, 0.0)] * sums
    found = e.loop(count, zeros, body)
    totals = [
        e.halve_sum(_sum(e, found[minimums + k :: len(columns)])) for k in range(len(columns))
    ]
    if not c.has_minimum:
        return totals
    more = [e.halve_sum(v) for v in found[:minimums]]
    more = [e.b.fmul(v, F32(c.offset)) for v in more] if c.offset else more
    return [e.b.fadd(total, m) for total, m in zip(totals, more, strict=True)]


def _vectors(c: Coding, width: int) -> dict[tuple[int, ...], list[int]]:
    """Where the vectors of a step start, by the groups of their words."""
    plan: dict[tuple[int, ...], list[int]] = {}
    for start in range(0, c.weights, width):
        groups = groups_of(c, start, width) if c.weights == STEP else (0,) * (width // 4)
        plan.setdefault(groups, []).append(start)
    return plan


def _here(e: Emit, c: Coding, columns: Sequence[Column], i: Value) -> list[Column]:
    """The columns from step i on."""
    offsets = [e.b.mul(i, e.i64(n)) for n in (c.weights, c.weights // 8, 4 * c.groups)]
    return [
        Column(*(e.at(p, o) for p, o in zip((k.x, k.xd, k.xs), offsets, strict=True)))
        for k in columns
    ]


def _products(
    e: Emit, c: Coding, step: Value, here: list[Column], starts: list[int], width: int
) -> list[Value]:
    """f32 lanes per column: exact integer dot products of some vectors of a step."""
    acc = [e.fill(I32, width // 4, 0)] * len(here)
    for start in starts:
        read = codes_in_order if c.weights == STEP else codes
        w = read(e, c, step, start, width)
        loaded = [e.load(vector(I8, width), column.x, start) for column in here]
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


# -- sums across lanes -----------------------------------------------------------------------------
def _steps_across(
    e: Emit, c: Coding, row: Reader, columns: Sequence[Column], count: Value
) -> list[Value]:
    """The same where groups are summed across lanes: a lane is a group then, and scales are vectors
    as they are stored. Sub-scales multiply integers, so that a step has few scales.
    """

    def body(i: Value, totals: list[Value]) -> list[Value]:
        step = e.at(row.w, e.b.mul(i, e.i64(c.bytes)))
        e.prefetch(step, row.ahead, c.bytes)
        if _counts_minimums(c.fmt):
            return _step_of_integers(e, c, step, _here(e, c, columns, i), totals)
        d, m = scale_and_size(e, c, step)
        sub = None
        if "sc" in c.fmt.fields:
            d = _block_scale(e, c, "d", step)
            sub = integers(e, c, "sc", step)
        w = _step_codes(e, c, step)
        new = []
        for column, total in zip(_here(e, c, columns, i), totals, strict=True):
            if m is not None:
                xs = e.load(m.type, column.xs)
                total = e.fma(m, e.b.fneg(xs) if subtracted(c) else xs, total)
            new.append(e.fma(_part(e, c, w, sub, column), d, total))
        return new

    found = e.loop(count, [e.fill(F32, c.weights // 32, 0.0)] * len(columns), body)
    return [e.halve_sum(total) for total in found]


def _step_of_integers(
    e: Emit, c: Coding, step: Value, columns: Sequence[Column], totals: list[Value]
) -> list[Value]:
    """A step whose minimums are summed up as integers, too, for each scale of activations."""
    d, dmin = (_block_scale(e, c, name, step) for name in ("d", "dmin"))
    sub, m = (integers(e, c, name, step) for name in ("sc", "m"))
    w = _step_codes(e, c, step)
    new = []
    for column, total in zip(columns, totals, strict=True):
        counts = _scaled(e, c, _counts(e, c, w, column, zeros=True), sub)
        small = (e.b.trunc(v, vector(I16, c.groups)) for v in (m, e.load(m.type, column.xs)))
        minimums = e.isa.neighbours(e, e.b.mul(*small))
        part = e.fma(e.floats(minimums), dmin, e.mul(e.floats(counts), d))
        new.append(e.fma(part, e.load(part.type, column.xd), total))
    return new


def _block_scale(e: Emit, c: Coding, name: str, step: Value) -> Value:
    """The scale of a step of one block, in a lane per 32 weights."""
    return e.splat(e.lane(block_scales(e, c, name, step), 0), c.weights // 32)


def _step_codes(e: Emit, c: Coding, step: Value) -> list[Value]:
    """From the end: the lowest bits of a byte are taken last, when the rest is not needed."""
    starts = range(0, c.weights, QUARTER)
    return [_centred(e, c, step, first) for first in reversed(starts)][::-1]


def _centred(e: Emit, c: Coding, step: Value, first: int) -> Value:
    """i8[16] codes; beside sub-scales without their offset, which would have to be scaled too."""
    if has_top_bit(c):
        return centred(e, c, step, first, QUARTER)
    v = codes(e, c, step, first, QUARTER)
    return e.b.add(v, e.fill(I8, QUARTER, c.offset)) if _own_offset(c) else v


def _own_offset(c: Coding) -> bool:
    return bool(c.offset) and "sc" in c.fmt.fields


def _behind(c: Coding) -> int:
    """What must be added to the numbers of `_centred`."""
    if has_top_bit(c):
        return c.offset + (1 << c.fmt.fields["q"].runs[0].bits)
    return 0 if _own_offset(c) else c.offset


def _part(e: Emit, c: Coding, w: list[Value], sub: Value | None, column: Column) -> Value:
    """f32 lane per 32 weights: everything but the scale d."""
    # In blocks of 32 loading and joining eight scales is what takes longest: no more loads there.
    counts = _counts(e, c, w, column, zeros=sub is not None)
    if sub is not None and not _behind(c):
        counts, sub = _scaled(e, c, counts, sub), None
    n = counts.type.count
    part = e.mul(e.floats(counts), e.load(vector(F32, n), column.xd))
    if _behind(c):
        part = e.fma(e.load(part.type, column.xs), e.fill(F32, n, _behind(c)), part)
    return part if sub is None else e.mul(part, e.floats(sub))


def _counts(e: Emit, c: Coding, w: list[Value], column: Column, *, zeros: bool) -> Value:
    """i32[groups]: sums of codes times activations."""
    pairs = [(v, e.load(v.type, column.x, QUARTER * k)) for k, v in enumerate(w)]
    per = c.fmt.group // QUARTER
    groups = [pairs[k : k + per] for k in range(0, len(pairs), per)]
    return e.isa.sums(e, groups, _peak(c), zeros=zeros)


def _scaled(e: Emit, c: Coding, counts: Value, sub: Value) -> Value:
    """i32 lane per 32 weights: counts times sub-scales."""
    counts = e.b.mul(counts, sub)
    if c.fmt.group == 32:
        return counts
    return e.b.add(*(e.pick(counts, range(k, c.groups, 2)) for k in (0, 1)))


def _peak(c: Coding) -> int:
    """Largest magnitude of a code that `_centred` gives."""
    if c.fmt.table:
        return max(map(abs, c.fmt.table))
    low, high = (limit - _behind(c) for limit in c.fmt.limits("q"))
    return max(-low, high)


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
