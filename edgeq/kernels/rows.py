"""Row kernels over f32: decode a row of weights, RMS norm, SiLU gate, softmax, quantization of
activations.
"""

import math
from collections.abc import Callable, Sequence

from edgeq.blocks import BlockFormat
from edgeq.kernels.codes import Coding, codes, coding, plain, scales
from edgeq.kernels.dot import floats_at
from edgeq.kernels.llvm import F32, I8, I32, Emit, Value, vector
from edgeq.kernels.order import part_offset, word_offset

__all__ = [
    "decode_row",
    "normalize",
    "quantize_row",
    "silu_gate",
    "softmax_row",
    "sum_of",
    "sum_squares",
]


def each(e: Emit, count: Value, body: Callable[[Value, int], None]) -> None:
    """body(byte offset of the first f32, lanes) over `count` values: vectors, then one by one."""
    lanes = e.isa.WIDTH // 4

    def wide(i: Value, _: list[Value]) -> list[Value]:
        body(e.b.mul(i, e.i64(4 * lanes)), lanes)
        return []

    def single(i: Value, _: list[Value]) -> list[Value]:
        done = e.b.sub(count, e.b.urem(count, e.i64(lanes)))
        body(e.b.mul(e.b.add(done, i), e.i64(4)), 1)
        return []

    e.loop(e.b.udiv(count, e.i64(lanes)), [], wide)
    e.loop(e.b.urem(count, e.i64(lanes)), [], single)


def reduce(
    e: Emit,
    count: Value,
    start: float,
    step: Callable[[Value, Value, int], Value],
    merge: Callable[[Value, Value], Value],
) -> Value:
    """Scalar reduction: step(accumulator lanes, byte offset, lanes); merge joins lanes."""
    lanes = e.isa.WIDTH // 4

    def wide(i: Value, acc: list[Value]) -> list[Value]:
        return [step(acc[0], e.b.mul(i, e.i64(4 * lanes)), lanes)]

    def single(i: Value, acc: list[Value]) -> list[Value]:
        done = e.b.sub(count, e.b.urem(count, e.i64(lanes)))
        return [step(acc[0], e.b.mul(e.b.add(done, i), e.i64(4)), 1)]

    acc = e.loop(e.b.udiv(count, e.i64(lanes)), [e.fill(F32, lanes, start)], wide)[0]
    while acc.type.count > 1:
        half = acc.type.count // 2
        acc = merge(e.pick(acc, range(half)), e.pick(acc, range(half, 2 * half)))
    return e.lane(e.loop(e.b.urem(count, e.i64(lanes)), [acc], single)[0], 0)


def larger(e: Emit, a: Value, b: Value) -> Value:
    """Lane-wise maximum that keeps a NaN of either side."""
    keep = e.b.fcmp_unordered(">", a, b)
    nan = e.b.fcmp_unordered("uno", b, b)
    return e.b.select(nan, b, e.b.select(keep, a, b))


def exp(e: Emit, v: Value, *, negative: bool = False) -> Value:
    """e^v for f32 lanes, relative error below 3e-7; 2^n from the exponent bits, the rest by a
    polynomial of degree 6. negative: v is never above 0.
    """
    n = v.type.count
    low, high, magic = (e.fill(F32, n, c) for c in (-87.0, 88.0, 12582912.0))
    v = e.b.select(e.b.fcmp_ordered("<", v, low), low, v)
    if not negative:
        v = e.b.select(e.b.fcmp_ordered(">", v, high), high, v)
    # Adding 1.5·2^23 rounds to an integer that then stands in the low bits.
    shifted = e.b.fadd(e.b.fmul(v, e.fill(F32, n, math.log2(math.e))), magic)
    whole = e.b.fsub(shifted, magic)
    rest = e.fma(whole, e.fill(F32, n, -0.693145751953125), v)
    rest = e.fma(whole, e.fill(F32, n, -1.428606765330187e-06), rest)
    total = e.fill(F32, n, 1 / 720)
    for k in (120, 24, 6, 2, 1, 1):
        total = e.fma(total, rest, e.fill(F32, n, 1 / k))
    power = e.b.shl(e.b.bitcast(shifted, vector(I32, n)), e.fill(I32, n, 23))
    # A product, not a sum of exponents, which could turn a NaN into a number.
    power = e.b.add(power, e.fill(I32, n, 127 << 23))
    return e.b.fmul(total, e.b.bitcast(power, v.type))


def decode_row(e: Emit, fmt: BlockFormat, w: Value, out: Value, cols: Value) -> None:
    """f32[cols] of one stored row."""
    if plain(fmt):

        def copy(offset: Value, lanes: int) -> None:
            source = e.at(w, e.b.mul(e.b.udiv(offset, e.i64(4)), e.i64(fmt.bytes)))
            e.store(floats_at(e, fmt, source, lanes), out, offset)

        each(e, cols, copy)
        return
    main, tail = coding(fmt, e.isa), coding(fmt, e.isa, tail=True)
    steps = e.b.udiv(cols, e.i64(main.weights))
    _decode_steps(e, main, w, out, steps)
    if fmt.block != main.weights:
        done = e.b.mul(steps, e.i64(main.weights))
        left = e.b.udiv(e.b.sub(cols, done), e.i64(fmt.block))
        w = e.at(w, e.b.mul(steps, e.i64(main.bytes)))
        _decode_steps(e, tail, w, e.at(out, e.b.mul(done, e.i64(4))), left)


def _decode_steps(e: Emit, c: Coding, w: Value, out: Value, count: Value) -> None:
    lanes = 16

    def step(i: Value, _: list[Value]) -> list[Value]:
        source = e.at(w, e.b.mul(i, e.i64(c.bytes)))
        target = e.at(out, e.b.mul(i, e.i64(4 * c.weights)))
        a, b = scales(e, c, source)
        for first in range(0, c.weights, 32):
            u = e.widen(codes(e, c, source, first, 32), I32, c.signed)
            for k in range(0, 32, lanes):
                group = [(first + k) // c.fmt.group] * lanes
                v = e.mul(e.floats(e.pick(u, range(k, k + lanes))), e.pick(a, group))
                v = v if b is None else e.add(v, e.pick(b, group))
                e.store(v, target, 4 * (first + k))
        return []

    e.loop(count, [], step)


def sum_squares(e: Emit, x: Value, count: Value) -> Value:
    """Scalar sum of x² over f32[count]."""

    def step(acc: Value, offset: Value, lanes: int) -> Value:
        v = e.load(vector(F32, lanes), x, offset)
        return e.fma(v, v, acc)

    return reduce(e, count, 0.0, step, e.add)


def normalize(e: Emit, x: Value, weight: Value, scale: Value, out: Value, count: Value) -> None:
    """out = x · scale · weight, f32[count]."""

    def body(offset: Value, lanes: int) -> None:
        v = e.mul(e.load(vector(F32, lanes), x, offset), e.splat(scale, lanes))
        e.store(e.mul(v, e.load(vector(F32, lanes), weight, offset)), out, offset)

    each(e, count, body)


def silu_gate(e: Emit, gate: Value, up: Value, out: Value, count: Value) -> None:
    """out = gate · sigmoid(gate) · up, f32[count]."""

    def body(offset: Value, lanes: int) -> None:
        g, u = (e.load(vector(F32, lanes), p, offset) for p in (gate, up))
        one = e.fill(F32, lanes, 1.0)
        below = e.b.fadd(one, exp(e, e.b.fneg(g)))
        e.store(e.b.fdiv(e.mul(g, u), below), out, offset)

    each(e, count, body)


def softmax_row(e: Emit, s: Value, valid: Value, stats: Value) -> None:
    """One step of online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) over f32 scores
    s[valid].

    stats is f32[3]: running maximum, running sum, and (out) the factor for what was summed before.
    s becomes exp(s - maximum).
    """

    def higher(a: Value, b: Value) -> Value:  # may lose a NaN: it comes back in the sum
        return e.b.select(e.b.fcmp_ordered(">", a, b), a, b)

    def peak(acc: Value, offset: Value, lanes: int) -> Value:
        return higher(acc, e.load(vector(F32, lanes), s, offset))

    top = reduce(e, valid, -3.0e38, peak, higher)
    old = e.load(vector(F32, 1), stats)
    new = higher(old, e.gather([top]))
    factor = exp(e, e.b.fsub(old, new), negative=True)
    best = e.lane(new, 0)

    def weigh(acc: Value, offset: Value, lanes: int) -> Value:
        v = e.b.fsub(e.load(vector(F32, lanes), s, offset), e.splat(best, lanes))
        v = exp(e, v, negative=True)
        e.store(v, s, offset)
        return e.add(acc, v)

    total = reduce(e, valid, 0.0, weigh, e.add)
    before = e.load(vector(F32, 1), stats, 4)
    e.store(new, stats)
    e.store(e.fma(before, factor, e.gather([total])), stats, 4)
    e.store(factor, stats, 8)


def quantize_row(
    e: Emit, x: Value, span: Sequence[Value], out: Sequence[Value], *, columns: int
) -> None:
    """f32[32·groups] → int8 with one scale per 32 (largest magnitude / 127, round half to even).

    span = (low, middle, high): of a row, the groups low .. high - 1; with one column, those before
    `middle` are in whole steps of 256, whose words `kernels.order` permutes unless sums go across
    lanes. out: pointers (q, d, sums16, sums32, ints16, ints32), interleaved for tiles of `columns`
    columns and standing at this row's column: q [cols/UNIT][columns][UNIT]; d f32
    [cols/32][columns]; sums of 16 and of 32 codes [cols/16 or cols/32][columns], as f32 times their
    scale and as i32 with the sign turned.
    """
    q, d, *sums = out
    low, middle, high = span

    def group(i: Value, words: Value, offsets: Sequence[int]) -> None:
        start = e.at(x, e.b.mul(i, e.i64(128)))
        codes, scale = _quantize32(e, [e.load(vector(F32, 16), start, 64 * k) for k in (0, 1)])
        _store_words(e, codes, words, offsets)
        e.store(scale, e.at(d, e.b.mul(i, e.i64(4 * columns))))
        halves = [sum_of(e, v) for v in codes]
        parts = [halves, [e.b.add(*halves)]] * 2
        for k, (place, totals) in enumerate(zip(sums, parts, strict=True)):
            for n, total in enumerate(totals):
                value = e.b.neg(total) if k > 1 else e.mul(e.b.sitofp(total, F32), scale)
                at = e.b.mul(i, e.i64(4 * columns * len(totals)))
                e.store(value, e.at(place, at), 4 * columns * n)

    def in_order(i: Value, _: list[Value]) -> list[Value]:
        i = e.b.add(low, i)
        part = e.b.and_(i, e.i64(7))
        step = e.b.mul(e.b.sub(i, part), e.i64(32))
        words = e.at(q, e.b.add(step, part_offset(e, part)))
        group(i, words, [word_offset(half, word) for half in (0, 1) for word in range(4)])
        return []

    def as_it_is(i: Value, _: list[Value]) -> list[Value]:
        i = e.b.add(middle, i)
        unit = e.isa.UNIT
        words = [k // unit * unit * columns + k % unit for k in range(0, 32, 4)]
        group(i, e.at(q, e.b.mul(i, e.i64(32 * columns))), words)
        return []

    if e.isa.ACROSS:
        middle = low
    elif columns == 1:
        e.loop(e.b.sub(middle, low), [], in_order)
    e.loop(e.b.sub(high, middle), [], as_it_is)


def _quantize32(e: Emit, parts: list[Value]) -> tuple[list[Value], Value]:
    """(two i32[16] of codes, f32 scale)."""
    top = larger(e, *(e.unary("fabs", p) for p in parts))
    while top.type.count > 1:
        half = top.type.count // 2
        top = larger(e, e.pick(top, range(half)), e.pick(top, range(half, 2 * half)))
    peak = e.lane(top, 0)
    scale = e.b.fmul(peak, F32(1 / 127))
    safe = e.b.fcmp_ordered(">", peak, F32(1e-30))
    inverse = e.splat(e.b.select(safe, e.b.fdiv(F32(127.0), peak), F32(0.0)), 16)
    magic = e.fill(F32, 16, 12582912.0)
    rounded = [e.b.fadd(e.b.fmul(p, inverse), magic) for p in parts]
    words = [e.b.bitcast(r, vector(I32, 16)) for r in rounded]
    base = e.fill(I32, 16, 0x4B400000)
    return [e.b.sub(w, base) for w in words], scale


def sum_of(e: Emit, v: Value) -> Value:
    """i32 sum of lanes."""
    while v.type.count > 1:
        half = v.type.count // 2
        v = e.b.add(e.pick(v, range(half)), e.pick(v, range(half, 2 * half)))
    return e.lane(v, 0)


def _store_words(e: Emit, codes: list[Value], q: Value, offsets: Sequence[int]) -> None:
    """Words of four codes, each at its offset."""
    words = e.b.bitcast(e.join([e.b.trunc(v, vector(I8, 16)) for v in codes]), vector(I32, 8))
    for k, offset in enumerate(offsets):
        e.store(e.lane(words, k), q, offset)
