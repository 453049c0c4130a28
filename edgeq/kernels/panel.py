"""Panels of rows, unpacked once to be multiplied with every column and then discarded.

A panel holds R rows, one per 32-bit lane of a vector: codes [cols/UNIT][R][UNIT], where UNIT is
four (a word per lane), eight (for products of matrices) or 32 (all of a step), scales f32
[cols/span][R], and minimums or sub-scales f32 [cols/group][R].
"""

from dataclasses import dataclass
from types import ModuleType

from llvmlite import ir

from edgeq.blocks import BlockFormat
from edgeq.kernels.codes import Coding, block_scales, codes, coding, integers, scale_and_minimum
from edgeq.kernels.llvm import I8, I32, Emit, Value, vector

__all__ = ["Lanes", "lanes_of", "quant_panel", "row_at", "rows_of"]


@dataclass(frozen=True)
class Lanes:
    """What a panel's lanes stand for: w = scale · [sub-scale ·] (code - 2^shift) [+ minimum].

    Sub-scales for 16 weights would double the arithmetic on sums of 32. Where code times sub-scale
    fits eight bits they are folded into the codes; else two sums of 16, times theirs, become one of
    32 before the activations' scale is multiplied with it.
    """

    coding: Coding
    folded: int  # 1 or -1: codes are multiplied with the sub-scale, or with its negative
    signed: bool
    shift: int  # 0: codes are what they stand for

    @property
    def centred(self) -> bool:
        """Whether codes are unpacked without their offset, so that they are signed."""
        return not self.folded and not self.shift and self.coding.offset != 0

    @property
    def peak(self) -> int:
        """Largest magnitude of a signed lane."""
        fmt = self.coding.fmt
        return max(map(abs, _products(fmt) if self.folded else fmt.table or fmt.limits("q")))

    @property
    def nested(self) -> bool:
        """Whether sub-scales are kept apart."""
        fmt = self.coding.fmt
        return fmt.group == 16 and not self.folded

    @property
    def span(self) -> int:
        """Weights that share a scale."""
        fmt = self.coding.fmt
        return fmt.block if fmt.group == 16 else fmt.group

    @property
    def minimum(self) -> bool:
        return "m" in self.coding.fmt.fields

    @property
    def sums(self) -> str:
        """Which sums of activations a tile reads (see layout.PREPARE)."""
        return f"{'sums' if self.minimum else 'ints'}{self.sum_group}"

    @property
    def sum_group(self) -> int:
        """Codes per sum of activations."""
        return 16 if self.nested or (self.minimum and self.coding.fmt.group == 16) else 32


def lanes_of(fmt: BlockFormat, isa: ModuleType, *, tail: bool = False) -> Lanes:
    """How `fmt` is laid out in panels of an instruction set."""
    c = coding(fmt, isa, tail=tail)
    if fmt.group == 32:
        return _as_stored(c, isa)
    products = _products(fmt)
    if min(products) >= 0 and max(products) < 128:
        return Lanes(c, 1, False, 0)
    for sign in (1, -1):
        if all(-128 <= sign * p < 128 for p in products):
            return Lanes(c, sign, not isa.OFFSET, _log2(isa.OFFSET))
    return _as_stored(c, isa)


def _as_stored(c: Coding, isa: ModuleType) -> Lanes:
    """Codes without their sub-scales: unsigned, but on Arm, where both kinds multiply alike."""
    return Lanes(c, 0, True, 0) if isa.ACROSS else Lanes(c, 0, c.signed, _log2(-c.offset))


def _products(fmt: BlockFormat) -> list[int]:
    """Extremes of code times sub-scale."""
    return [q * sc for q in fmt.limits("q") for sc in fmt.limits("sc")]


def _log2(value: int) -> int:
    """Exponent of a power of two; 0 for 0."""
    assert value & (value - 1) == 0 <= value != 1
    return max(value.bit_length() - 1, 0)


def rows_of(e: Emit) -> int:
    """Rows of a panel: the 32-bit lanes of a vector."""
    return int(e.isa.WIDTH) // 4


def row_at(e: Emit, w: Value, stride: Value, row: Value, rows: Value) -> Value:
    """Pointer to a row; past the last one, to the last one again."""
    last = e.b.sub(rows, e.i64(1))
    index = e.b.select(e.b.icmp_unsigned("<", row, rows), row, last)
    return e.at(w, e.b.mul(index, stride))


def quant_panel(
    e: Emit,
    fmt: BlockFormat,
    w: Value,
    stride: Value,
    rows: Value,
    cols: Value,
    panel: Value,
    a: Value,
    b: Value,
    buf: Value,
) -> None:
    """Unpack min(rows, R) rows at w into panel, a, b; buf is R·256 bytes of scratch."""
    main = lanes_of(fmt, e.isa)
    steps = e.b.udiv(cols, e.i64(main.coding.weights))
    zero = e.i64(0)
    _unpack_steps(e, main, w, stride, rows, zero, zero, steps, (panel, a, b, buf))
    if fmt.block != main.coding.weights:
        tail = lanes_of(fmt, e.isa, tail=True)
        done = e.b.mul(steps, e.i64(main.coding.weights))
        left = e.b.udiv(e.b.sub(cols, done), e.i64(fmt.block))
        skip = e.b.mul(steps, e.i64(main.coding.bytes))
        _unpack_steps(e, tail, w, stride, rows, skip, done, left, (panel, a, b, buf))


def _unpack_steps(
    e: Emit,
    p: Lanes,
    w: Value,
    stride: Value,
    rows: Value,
    skip: Value,
    first: Value,
    count: Value,
    out: tuple[Value, ...],
) -> None:
    """`count` steps that start `skip` bytes into each row, at column `first`."""
    c, lanes, (panel, a, b, buf) = p.coding, rows_of(e), out
    group = c.fmt.group
    counts = c.weights // p.span, (c.weights // group if p.minimum or p.nested else 0)
    starts = 0, 4 * counts[0]

    def step(s: Value, _: list[Value]) -> list[Value]:
        column = e.b.add(first, e.b.mul(s, e.i64(c.weights)))
        places = [e.at(k, _scale_place(e, column, n, lanes)) for k, n in ((a, p.span), (b, group))]
        offset = e.b.add(skip, e.b.mul(s, e.i64(c.bytes)))

        def row_scales(r: Value, _: list[Value]) -> list[Value]:
            source = e.at(row_at(e, w, stride, r, rows), offset)
            spot = e.at(buf, e.b.mul(r, e.i64(c.weights)))
            for start, values in zip(starts, _scales(e, p, source), strict=True):
                if values is not None:
                    e.store(values, spot, start)
            return []

        e.loop(lanes, [], row_scales)
        for start, count, place in zip(starts, counts, places, strict=True):
            _transpose(e, e.at(buf, start), c.weights, count, place)

        def unpack(out: Value, apart: int, unit: int) -> None:
            """Rows `apart` bytes from each other, their units of 32 codes `unit` bytes."""

            def row_codes(r: Value, _: list[Value]) -> list[Value]:
                source = e.at(row_at(e, w, stride, r, rows), offset)
                _decode_row(e, p, source, e.at(out, e.b.mul(r, e.i64(apart))), unit)
                return []

            e.loop(lanes, [], row_codes)

        target = e.at(panel, e.b.mul(column, e.i64(lanes)))
        if e.isa.UNIT == 32:
            unpack(target, 32, 32 * lanes)
        else:
            unpack(buf, c.weights, 32)
            _transpose(e, buf, c.weights, c.weights // e.isa.UNIT, target, e.isa.UNIT)
        return []

    e.loop(count, [], step)


def _scale_place(e: Emit, column: Value, span: int, lanes: int) -> Value:
    """Byte offset of the scales for a column."""
    return e.b.mul(e.b.udiv(column, e.i64(span)), e.i64(4 * lanes))


def _scales(e: Emit, p: Lanes, source: Value) -> tuple[Value, Value | None]:
    """(scales, minimums or sub-scales or None), all f32, of one step of a row."""
    c = p.coding
    scale, minimum = scale_and_minimum(e, c, source)
    if c.fmt.group == 32:
        return scale, minimum
    d = block_scales(e, c, "d", source)
    if p.folded:
        return (e.b.fneg(d) if p.folded < 0 else d), minimum
    # Sums of 16 are seen alone, and in one with the next 16: the first with what it has more.
    sub = integers(e, c, "sc", source)
    n = sub.type.count
    order = [n if k % 2 else k + 1 for k in range(n)]
    return d, e.floats(e.b.sub(sub, e.pick(sub, order, e.fill(I32, n, 0))))


def _decode_row(e: Emit, p: Lanes, source: Value, out: Value, unit: int) -> None:
    """Codes of a step of a row, `unit` bytes from 32 of them to the next."""
    c = p.coding
    width = min(e.isa.WIDTH, c.weights)
    factors = integers(e, c, "sc", source) if p.folded else None
    for k in range(0, c.weights, width):
        v = codes(e, c, source, k, width)
        if factors is not None:
            v = _folded(e, p, v, e.pick(factors, [(k + i) // 16 for i in range(width)]))
        elif p.centred:
            v = e.b.add(v, e.fill(I8, width, c.offset))
        e.store(v, out, k // 32 * unit + k % 32)


def _folded(e: Emit, p: Lanes, v: Value, factors: Value) -> Value:
    """i8 codes times i32 sub-scales, as the lanes want them."""
    bias = e.fill(I8, v.type.count, p.coding.fmt.fields["q"].bias)
    small = e.b.mul(e.b.add(v, bias), e.b.trunc(factors, v.type))
    small = e.b.neg(small) if p.folded < 0 else small
    return e.b.xor(small, e.fill(I8, v.type.count, 128)) if p.shift else small


def _transpose(e: Emit, buf: Value, stride: int, count: int, panel: Value, unit: int = 4) -> None:
    """Units of 4 or 8 bytes [R][count], rows `stride` bytes apart → panel [count][R]."""
    if not count:
        return
    lanes = rows_of(e)
    square = min(lanes, count, e.isa.WIDTH // unit)
    word = vector(ir.IntType(8 * unit), square)

    def several(u: Value, _: list[Value]) -> list[Value]:
        column = e.at(buf, e.b.mul(u, e.i64(unit * square)))
        for first in range(0, lanes, square):
            rows = [e.load(word, column, (first + r) * stride) for r in range(square)]
            for k, v in enumerate(e.transpose(rows)):
                offset = e.b.mul(u, e.i64(unit * square * lanes))
                e.store(v, e.at(panel, offset), unit * (k * lanes + first))
        return []

    e.loop(count // square, [], several)
