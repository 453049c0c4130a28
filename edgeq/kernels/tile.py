"""Panel kernels for many columns: unpack a panel of rows once, multiply it with every column,
discard it.

A panel holds R rows, one per 32-bit lane of a vector: codes [cols/4][R] words of four, A and B f32
[cols/group][R]. A register tile multiplies it with TILE_COLS columns, whose activations lie
[cols/4][TILE_COLS] words of four.
"""

from collections.abc import Callable

from edgeq.blocks import BlockFormat
from edgeq.kernels.codes import Coding, codes, coding, scales
from edgeq.kernels.dot import floats_at
from edgeq.kernels.llvm import F32, I8, I32, Emit, Value, vector

__all__ = ["float_panel", "float_tile", "quant_panel", "quant_tile"]


def rows_of(e: Emit) -> int:
    """Rows of a panel: the 32-bit lanes of a vector."""
    return e.isa.WIDTH // 4


def _row(e: Emit, w: Value, stride: Value, row: Value, rows: Value) -> Value:
    """Pointer to a row; past the last one, to the last one again."""
    last = e.b.sub(rows, e.i64(1))
    index = e.b.select(e.b.icmp_unsigned("<", row, rows), row, last)
    return e.at(w, e.b.mul(index, stride))


# -- quantized formats -----------------------------------------------------------------------------
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
    main = coding(fmt, e.isa)
    steps = e.b.udiv(cols, e.i64(main.weights))
    zero = e.i64(0)
    _unpack_steps(e, main, w, stride, rows, zero, zero, steps, (panel, a, b, buf))
    if fmt.block != main.weights:
        tail = coding(fmt, e.isa, tail=True)
        done = e.b.mul(steps, e.i64(main.weights))
        left = e.b.udiv(e.b.sub(cols, done), e.i64(fmt.block))
        skip = e.b.mul(steps, e.i64(main.bytes))
        _unpack_steps(e, tail, w, stride, rows, skip, done, left, (panel, a, b, buf))


def _unpack_steps(
    e: Emit,
    c: Coding,
    w: Value,
    stride: Value,
    rows: Value,
    skip: Value,
    first: Value,
    count: Value,
    out: tuple[Value, ...],
) -> None:
    """`count` steps that start `skip` bytes into each row, at column `first`."""
    lanes, (panel, a, b, buf) = rows_of(e), out

    def step(s: Value, _: list[Value]) -> list[Value]:
        column = e.b.add(first, e.b.mul(s, e.i64(c.weights)))
        group = e.b.mul(e.b.udiv(column, e.i64(c.fmt.group)), e.i64(4 * lanes))
        offset = e.b.add(skip, e.b.mul(s, e.i64(c.bytes)))

        def row(r: Value, _: list[Value]) -> list[Value]:
            source = e.at(_row(e, w, stride, r, rows), offset)
            _decode_row(e, c, source, e.at(buf, e.b.mul(r, e.i64(c.weights))))
            where = e.b.add(group, e.b.mul(r, e.i64(4)))
            av, bv = scales(e, c, source)
            for g in range(c.groups):
                e.store(e.lane(av, g), e.at(a, where), 4 * lanes * g)
                if bv is not None:
                    e.store(e.lane(bv, g), e.at(b, where), 4 * lanes * g)
            return []

        e.loop(lanes, [], row)
        target = e.at(panel, e.b.mul(column, e.i64(lanes)))
        _transpose_words(e, buf, c.weights, target)
        return []

    e.loop(count, [], step)


def _decode_row(e: Emit, c: Coding, source: Value, buf: Value) -> None:
    width = min(e.isa.WIDTH, c.weights)
    for k in range(0, c.weights, width):
        e.store(codes(e, c, source, k, width), buf, k)


def _transpose_words(e: Emit, buf: Value, weights: int, panel: Value) -> None:
    """buf i32[R][weights/4] → panel i32[weights/4][R]."""
    lanes = rows_of(e)
    square = min(lanes, weights // 4)  # a tail of 32 weights has 8 words per row
    word = vector(I32, square)

    def unit(u: Value, _: list[Value]) -> list[Value]:
        column = e.at(buf, e.b.mul(u, e.i64(4 * square)))
        for first in range(0, lanes, square):
            rows = [e.load(word, column, (first + r) * weights) for r in range(square)]
            for k, v in enumerate(e.transpose(rows)):
                offset = e.b.mul(u, e.i64(4 * square * lanes))
                e.store(v, e.at(panel, offset), 4 * (k * lanes + first))
        return []

    e.loop(weights // 4 // square, [], unit)


def quant_tile(
    e: Emit,
    fmt: BlockFormat,
    panel: Value,
    a: Value,
    b: Value,
    x: Value,
    xd: Value,
    xs: Value,
    cols: Value,
    out: Value,
) -> None:
    """out f32[TILE_COLS][R] = panel times one tile of columns."""
    c, lanes, n = coding(fmt, e.isa), rows_of(e), e.isa.TILE_COLS
    per = 32 // fmt.group  # groups per activation scale

    def step(i: Value, sums: list[Value]) -> list[Value]:
        dots_at = e.at(panel, e.b.mul(i, e.i64(32 * lanes))), e.at(x, e.b.mul(i, e.i64(32 * n)))
        d = e.at(xd, e.b.mul(i, e.i64(4 * n)))
        for g in range(per):
            parts = _tile_dots(e, c, *dots_at, g * fmt.group)
            group = e.b.mul(i, e.i64(per * 4 * lanes))
            av = e.load(vector(F32, lanes), e.at(a, group), 4 * lanes * g)
            for t in range(n):
                scale = e.mul(av, e.splat(e.load(F32, d, 4 * t), lanes))
                sums[t] = e.fma(e.floats(parts[t]), scale, sums[t])
            if c.has_minimum:
                bv = e.load(vector(F32, lanes), e.at(b, group), 4 * lanes * g)
                s = e.at(xs, e.b.mul(i, e.i64(per * 4 * n)))
                for t in range(n):
                    sums[t] = e.fma(bv, e.splat(e.load(F32, s, 4 * (n * g + t)), lanes), sums[t])
        return sums

    sums = e.loop(e.b.udiv(cols, e.i64(32)), [e.fill(F32, lanes, 0.0)] * n, step)
    for t in range(n):
        e.store(sums[t], out, 4 * lanes * t)


def _tile_dots(e: Emit, c: Coding, panel: Value, x: Value, first: int) -> list[Value]:
    """i32[R] per column: dot products over one group, `first` weights into the step of 32."""
    lanes, n = rows_of(e), e.isa.TILE_COLS
    acc = [e.fill(I32, lanes, 0)] * n
    for k in range(first // 4, (first + c.fmt.group) // 4):
        w = e.load(vector(I8, 4 * lanes), panel, 4 * lanes * k)
        for t in range(n):
            word = e.splat(e.load(I32, x, 4 * (n * k + t)), lanes)
            acc[t] = e.isa.dot(e, acc[t], w, e.b.bitcast(word, w.type), c.signed)
    return acc


# -- float formats ---------------------------------------------------------------------------------
def float_panel(
    e: Emit, fmt: BlockFormat, w: Value, stride: Value, rows: Value, cols: Value, panel: Value
) -> None:
    """f32[cols][R] of min(rows, R) rows stored as F32, F16 or BF16."""
    lanes = rows_of(e)

    def square(u: Value, _: list[Value]) -> list[Value]:
        first = e.b.mul(u, e.i64(lanes))
        source = [_row(e, w, stride, e.i64(r), rows) for r in range(lanes)]
        at = e.b.mul(first, e.i64(fmt.bytes))
        vs = e.transpose([floats_at(e, fmt, e.at(s, at), lanes) for s in source])
        for k, v in enumerate(vs):
            e.store(v, e.at(panel, e.b.mul(first, e.i64(4 * lanes))), 4 * lanes * k)
        return []

    def rest(i: Value, _: list[Value]) -> list[Value]:
        k = e.b.add(e.b.sub(cols, e.b.urem(cols, e.i64(lanes))), i)

        def row(r: Value, _: list[Value]) -> list[Value]:
            source = _row(e, w, stride, r, rows)
            v = floats_at(e, fmt, e.at(source, e.b.mul(k, e.i64(fmt.bytes))), 1)
            slot = e.b.add(e.b.mul(k, e.i64(lanes)), r)
            e.store(v, e.at(panel, e.b.mul(slot, e.i64(4))))
            return []

        e.loop(lanes, [], row)
        return []

    e.loop(e.b.udiv(cols, e.i64(lanes)), [], square)
    e.loop(e.b.urem(cols, e.i64(lanes)), [], rest)


def float_tile(
    e: Emit,
    read: Callable[[Value, int], Value],
    panel: Value,
    stride: int | Value,
    x: Value,
    x_step: int | Value,
    x_col: int | Value,
    count: Value,
    out: Value,
    out_col: int | Value,
    *,
    columns: int,
    accumulate: bool = False,
) -> None:
    """out[c][lanes] (+)= sum over k of panel[k][lanes] · x[k][c], everything f32 in registers.

    `read(pointer, lanes)` gives the f32 lanes at panel + k·stride; x[k][c] is the f32 at x +
    k·x_step + c·x_col bytes; column c of the result is stored at out + c·out_col.
    """
    lanes = rows_of(e)
    xs = [e.at(x, e.b.mul(e.i64(c), e.i64(x_col))) for c in range(columns)]
    outs = [e.at(out, e.b.mul(e.i64(c), e.i64(out_col))) for c in range(columns)]
    zero = e.fill(F32, lanes, 0.0)
    start = [e.load(vector(F32, lanes), o) if accumulate else zero for o in outs]

    def body(k: Value, sums: list[Value]) -> list[Value]:
        v = read(e.at(panel, e.b.mul(k, e.i64(stride))), lanes)
        offset = e.b.mul(k, e.i64(x_step))
        return [e.fma(v, e.splat(e.load(F32, p, offset), lanes), s) for p, s in zip(xs, sums)]

    for o, total in zip(outs, e.loop(count, start, body)):
        e.store(total, o)
