"""Matrix products: out[token][row] (+)= w[row] · x[token] (+ bias[row])."""

from types import ModuleType
from typing import Any

from edgeq.blocks import BlockFormat
from edgeq.kernels.activations import prepare_part
from edgeq.kernels.codes import plain
from edgeq.kernels.dot import Column, Reader, row_dots
from edgeq.kernels.layout import COLUMNS, MATMUL, ROWS_AT_ONCE
from edgeq.kernels.llvm import F32, Emit, Value, vector
from edgeq.kernels.panel import lanes_of, quant_panel
from edgeq.kernels.rows import each
from edgeq.kernels.tile import float_panel, float_tile, quant_tile
from edgeq.kernels.words import add_at, emitted, load, smaller

__all__ = ["gated", "matmul", "matvec"]

ALONE = 3  # fewer than so many are faster one by one

(
    STATE, W, ROWS, COLS, ROW_BYTES, X, XD, XS, OUT, STRIDE, BIAS, ADD, SCRATCH, SCRATCH_BYTES,
    GROUP, AHEAD, CHUNK, TAKEN, PRIVATE,
) = range(len(MATMUL))  # fmt: skip


def matvec(isa: ModuleType, fmt: BlockFormat) -> Any:
    """Few columns: a thread takes a chunk of rows after the other and streams them once,
    ROWS_AT_ONCE for up to COLUMNS columns; further columns find them in L2.
    """
    stream = _stream(isa, fmt)

    def kernel(args, thread, threads):
        rows, chunk = load(args, ROWS), load(args, CHUNK)
        r = add_at(load(args, TAKEN), 0, chunk)
        while r < rows:
            stream(args, thread, r, smaller(r + chunk, rows))
            r = add_at(load(args, TAKEN), 0, chunk)

    return kernel


def gated(isa: ModuleType, gate: BlockFormat, up: BlockFormat) -> Any:
    """Few columns: a thread streams a chunk of rows of the gate, the same rows of the other matrix,
    and prepares at once what the two give: nobody waits for the whole of either.
    """
    stream_gate, stream_up, prepare = _stream(isa, gate), _stream(isa, up), prepare_part(isa, 1)

    def kernel(args, thread, threads):
        one, two, both = load(args, 0), load(args, 1), load(args, 2)
        tokens, rows, chunk = load(load(one, STATE), 0), load(one, ROWS), load(one, CHUNK)
        r = add_at(load(one, TAKEN), 0, chunk)
        while r < rows:
            end = smaller(r + chunk, rows)
            stream_gate(one, thread, r, end)
            stream_up(two, thread, r, end)
            prepare(both, 0, 0, tokens, r // 32, (end + 31) // 32)
            r = add_at(load(one, TAKEN), 0, chunk)

    return kernel


def _stream(isa: ModuleType, fmt: BlockFormat) -> Any:
    """Numba function: the products with rows from `r` until `end`, for all tokens."""
    from numba import njit

    one, several, write = _dots(isa, fmt, 1), _dots(isa, fmt, COLUMNS), _writer(isa)

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def stream(args, thread, r, end):
        tokens = load(load(args, STATE), 0)
        row_bytes, w = load(args, ROW_BYTES), load(args, W)
        x, xd, xs, cols = load(args, X), load(args, XD), load(args, XS), load(args, COLS)
        x += thread * load(args, PRIVATE)
        xd += thread * load(args, PRIVATE)
        xs += thread * load(args, PRIVATE)
        ahead, sums = load(args, AHEAD), load(args, SCRATCH) + thread * load(args, SCRATCH_BYTES)
        while r < end:
            n = smaller(ROWS_AT_ONCE, end - r)
            at = w + r * row_bytes
            t = 0
            while t < tokens:
                if tokens - t < ALONE:
                    done = 1
                    one(at, row_bytes, n, x, xd, xs, cols, t, tokens, ahead, sums)
                else:
                    done = smaller(COLUMNS, tokens - t)
                    several(at, row_bytes, n, x, xd, xs, cols, t, tokens, ahead, sums)
                write(args, sums, r, n, t, done, ROWS_AT_ONCE)
                t += done
            r += n

    return stream


def _dots(isa: ModuleType, fmt: BlockFormat, columns: int) -> Any:
    """Emitted function: products of some rows with `columns` columns of x from the first on, to
    sums [columns][ROWS_AT_ONCE].
    """
    x_bytes, group = (4, 32) if plain(fmt) else (1, fmt.group)

    def emit(e: Emit, *v: Value) -> None:
        stride, rows, cols, first, last = v[1], v[2], v[6], v[7], e.b.sub(v[8], e.i64(1))
        w, x, xd, xs, sums = (e.pointer(v[k]) for k in (0, 3, 4, 5, 10))
        wanted = []
        for k in range(columns):
            # There may be fewer columns than lanes: the last one takes their place.
            token = e.b.add(first, e.i64(k))
            token = e.b.select(e.b.icmp_signed("<", token, last), token, last)
            at = e.b.mul(token, cols)
            d, s = (e.b.mul(e.b.udiv(at, e.i64(n)), e.i64(4)) for n in (32, group))
            place = e.at(x, e.b.mul(at, e.i64(x_bytes)))
            wanted.append(Column(place, e.at(xd, d), e.at(xs, s)))

        def one_row(r: Value, _: list[Value]) -> list[Value]:
            row = Reader(e.at(w, e.b.mul(r, stride)), v[9])
            for k, total in enumerate(row_dots(e, fmt, row, wanted, cols)):
                e.store(total, e.at(sums, e.b.mul(r, e.i64(4))), 4 * ROWS_AT_ONCE * k)
            return []

        e.loop(rows, [], one_row)

    return emitted(isa, emit, "i" * 11)


def _writer(isa: ModuleType) -> Any:
    """Numba function: sums [tokens][stride] to out, `count` rows from `row` on, tokens from `token`
    on.
    """
    from numba import njit

    plainly, biased, added, both = (
        _write(isa, bias, add) for add in (False, True) for bias in (False, True)
    )

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def write(args, sums, row, count, token, tokens, stride):
        bias, add = load(args, BIAS), load(args, ADD)
        for t in range(tokens):
            source = sums + 4 * t * stride
            out = load(args, OUT) + 4 * ((token + t) * load(args, STRIDE) + row)
            if bias != 0 and add != 0:
                both(source, out, bias + 4 * row, count)
            elif bias != 0:
                biased(source, out, bias + 4 * row, count)
            elif add != 0:
                added(source, out, 0, count)
            else:
                plainly(source, out, 0, count)

    return write


def _write(isa: ModuleType, bias: bool, add: bool) -> Any:
    def emit(e: Emit, source: Value, out: Value, extra: Value, count: Value) -> None:
        s, o, b = (e.pointer(p) for p in (source, out, extra))

        def body(offset: Value, lanes: int) -> None:
            v = e.load(vector(F32, lanes), s, offset)
            v = e.add(v, e.load(vector(F32, lanes), b, offset)) if bias else v
            v = e.add(v, e.load(vector(F32, lanes), o, offset)) if add else v
            e.store(v, o, offset)

        each(e, count, body)

    return emitted(isa, emit, "iiii")


def matmul(isa: ModuleType, fmt: BlockFormat) -> Any:
    """Many columns: a thread takes a few panels of rows after the other, unpacks them into L2,
    multiplies them with each tile of columns and writes the sums.
    """
    write, ask = _writer(isa), _asker(isa)
    unpack, multiply = _float_parts(isa, fmt) if plain(fmt) else _quant_parts(isa, fmt)
    lanes, columns = isa.WIDTH // 4, isa.TILE_COLS
    per_word, per_scale, x_bytes = (1, 0, 4) if plain(fmt) else (4, fmt.group, 1)
    per_sum = 0 if plain(fmt) else lanes_of(fmt, isa).sum_group

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
        # What the next panels are unpacked from is asked for meanwhile, some with each tile.
        tiles = (tokens + columns - 1) // columns
        share = (group * lanes * row_bytes // tiles + 127) // 64 * 64
        first = add_at(load(args, TAKEN), 0, group)
        while first < panels:
            end = smaller(first + group, panels)
            following = add_at(load(args, TAKEN), 0, group)
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
            for t in range(tiles):
                d, s = xd + t * (cols // 32 * 4 * columns), xs
                if per_sum:
                    s = xs + t * (cols // per_sum * 4 * columns)
                if following < panels:
                    ask(w + following * lanes * row_bytes + t * share, share)
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
                    n = smaller(columns, tokens - t * columns)
                    write(
                        args,
                        sums,
                        p * lanes,
                        smaller(lanes, rows - p * lanes),
                        t * columns,
                        n,
                        lanes,
                    )
            first = following

    return kernel


def _asker(isa: ModuleType) -> Any:
    """Numba function: ask for so many bytes from an address on."""

    def emit(e: Emit, address: Value, nbytes: Value) -> None:
        def line(i: Value, _: list[Value]) -> list[Value]:
            e.prefetch(e.pointer(address), e.b.mul(i, e.i64(64)), 64)
            return []

        e.loop(e.b.udiv(nbytes, e.i64(64)), [], line)

    return emitted(isa, emit, "ii")


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
        panel, x, out = (e.pointer(v[k]) for k in (0, 3, 7))
        float_tile(e, panel, x, e.b.mul(v[6], e.i64(4)), v[6], out)

    return emitted(isa, panel, "i" * 8), emitted(isa, tile, "i" * 8)
