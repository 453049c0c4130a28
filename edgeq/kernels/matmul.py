"""Matrix products: out[token][row] (+)= w[row] · x[token] (+ bias[row])."""

from types import ModuleType
from typing import Any

from edgeq.blocks import BlockFormat
from edgeq.kernels.codes import plain
from edgeq.kernels.dot import Column, row_dots
from edgeq.kernels.layout import COLUMNS, MATMUL
from edgeq.kernels.llvm import F32, Emit, Value, vector
from edgeq.kernels.tile import float_panel, float_tile, quant_panel, quant_tile, rows_of
from edgeq.kernels.words import emitted, f32_at, f32_set, load, smaller

__all__ = ["matmul", "matvec"]

ALONE = 3  # fewer than so many are faster one by one

(
    STATE, W, ROWS, COLS, ROW_BYTES, X, XD, XS, OUT, STRIDE, BIAS, ADD, SCRATCH, SCRATCH_BYTES,
    GROUP,
) = range(len(MATMUL))  # fmt: skip


def matvec(isa: ModuleType, fmt: BlockFormat) -> Any:
    """Few columns: a thread streams its share of the rows once, for up to COLUMNS of them at a
    time; further columns find the row in L1.
    """
    one, several = _dots(isa, fmt, 1), _dots(isa, fmt, COLUMNS)

    def kernel(args, thread, threads):
        tokens = load(load(args, STATE), 0)
        rows, cols, row_bytes = load(args, ROWS), load(args, COLS), load(args, ROW_BYTES)
        w, x, xd, xs = load(args, W), load(args, X), load(args, XD), load(args, XS)
        sums = load(args, SCRATCH) + thread * load(args, SCRATCH_BYTES)
        for r in range(rows * thread // threads, rows * (thread + 1) // threads):
            row = w + r * row_bytes
            t = 0
            while t < tokens:
                if tokens - t < ALONE:
                    n = 1
                    one(row, x, xd, xs, cols, t, tokens, sums)
                else:
                    n = smaller(COLUMNS, tokens - t)
                    several(row, x, xd, xs, cols, t, tokens, sums)
                finish(args, sums, r, t, n, 1)
                t += n

    return kernel


def _dots(isa: ModuleType, fmt: BlockFormat, columns: int) -> Any:
    """Emitted function: products of a row with `columns` columns of x from the first on."""
    x_bytes, group = (4, 32) if plain(fmt) else (1, fmt.group)

    def emit(e: Emit, *v: Value) -> None:
        w, x, xd, xs = (e.pointer(address) for address in v[:4])
        cols, first, last, out = v[4], v[5], e.b.sub(v[6], e.i64(1)), e.pointer(v[7])
        wanted = []
        for k in range(columns):
            # There may be fewer columns than lanes: the last one takes their place.
            token = e.b.add(first, e.i64(k))
            token = e.b.select(e.b.icmp_signed("<", token, last), token, last)
            at = e.b.mul(token, cols)
            d, s = (e.b.mul(e.b.udiv(at, e.i64(n)), e.i64(4)) for n in (32, group))
            place = e.at(x, e.b.mul(at, e.i64(x_bytes)))
            wanted.append(Column(place, e.at(xd, d), e.at(xs, s)))
        for k, total in enumerate(row_dots(e, fmt, w, wanted, cols)):
            e.store(total, out, 4 * k)

    return emitted(isa, emit, "i" * 8)


def matmul(isa: ModuleType, fmt: BlockFormat) -> Any:
    """Many columns: unpack a few panels of rows into L2, multiply them with each tile of columns,
    write the sums.
    """
    unpack, multiply = _float_parts(isa, fmt) if plain(fmt) else _quant_parts(isa, fmt)
    lanes, columns = isa.WIDTH // 4, isa.TILE_COLS
    per_word, per_scale, x_bytes = (1, 0, 4) if plain(fmt) else (4, fmt.group, 1)

    def kernel(args, thread, threads):
        tokens = load(load(args, STATE), 0)
        rows, cols, row_bytes = load(args, ROWS), load(args, COLS), load(args, ROW_BYTES)
        x, xd, xs, w = load(args, X), load(args, XD), load(args, XS), load(args, W)
        group = load(args, GROUP)
        words = cols // per_word * lanes * 4
        scale_words = cols // per_scale * lanes * 4 if per_scale else 0
        size = words + 2 * scale_words
        base = load(args, SCRATCH) + thread * load(args, SCRATCH_BYTES)
        buf = base + group * size
        sums = buf + 256 * lanes
        panels = (rows + lanes - 1) // lanes
        first, last = panels * thread // threads, panels * (thread + 1) // threads
        while first < last:
            end = smaller(first + group, last)
            for p in range(first, end):
                at = base + (p - first) * size
                left = smaller(lanes, rows - p * lanes)
                unpack(
                    w + p * lanes * row_bytes,
                    row_bytes,
                    left,
                    cols,
                    at,
                    at + words,
                    at + words + scale_words,
                    buf,
                )
            for t in range((tokens + columns - 1) // columns):
                d, s = xd + t * (cols // 32 * 4 * columns), xs
                if per_scale:
                    s = xs + t * (cols // per_scale * 4 * columns)
                for p in range(first, end):
                    at = base + (p - first) * size
                    multiply(
                        at,
                        at + words,
                        at + words + scale_words,
                        x + t * cols * columns * x_bytes,
                        d,
                        s,
                        cols,
                        sums,
                    )
                    finish(
                        args,
                        sums,
                        p * lanes,
                        t * columns,
                        smaller(columns, tokens - t * columns),
                        lanes,
                    )
            first = end

    return kernel


def _finisher() -> Any:
    from numba import njit

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def finish(args, sums, first, token, tokens, lanes):
        """Write sums [tokens][lanes] to out: rows from `first` on, tokens from `token` on."""
        rows, out, stride = load(args, ROWS), load(args, OUT), load(args, STRIDE)
        bias, add = load(args, BIAS), load(args, ADD)
        for t in range(tokens):
            for r in range(smaller(lanes, rows - first)):
                value = f32_at(sums, t * lanes + r)
                slot = (token + t) * stride + first + r
                if bias != 0:
                    value += f32_at(bias, first + r)
                if add != 0:
                    value += f32_at(out, slot)
                f32_set(out, slot, value)

    return finish


finish = _finisher()


def _quant_parts(isa: ModuleType, fmt: BlockFormat) -> tuple[Any, Any]:
    def panel(e: Emit, w: Value, stride: Value, rows: Value, cols: Value, *out: Value) -> None:
        quant_panel(e, fmt, e.pointer(w), stride, rows, cols, *(e.pointer(p) for p in out))

    def tile(e: Emit, *v: Value) -> None:
        panel, a, b, x, d, s, _, out = (e.pointer(address) for address in v)
        quant_tile(e, fmt, panel, a, b, x, d, s, v[6], out)

    return emitted(isa, panel, "i" * 8), emitted(isa, tile, "i" * 8)


def _float_parts(isa: ModuleType, fmt: BlockFormat) -> tuple[Any, Any]:
    def panel(
        e: Emit, w: Value, stride: Value, rows: Value, cols: Value, out: Value, *_: Value
    ) -> None:
        float_panel(e, fmt, e.pointer(w), stride, rows, cols, e.pointer(out))

    def tile(e: Emit, *v: Value) -> None:
        panel, x, cols, out = v[0], v[3], v[6], v[7]
        lanes = rows_of(e)
        column = e.b.mul(cols, e.i64(4))

        def read(p: Value, n: int) -> Value:
            return e.load(vector(F32, n), p)

        float_tile(
            e,
            read,
            e.pointer(panel),
            4 * lanes,
            e.pointer(x),
            4,
            column,
            cols,
            e.pointer(out),
            4 * lanes,
            columns=isa.TILE_COLS,
        )

    return emitted(isa, panel, "i" * 8), emitted(isa, tile, "i" * 8)
