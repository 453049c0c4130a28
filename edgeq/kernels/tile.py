"""Register tiles: a panel of rows times a few columns, with all sums in registers.

A tile has R rows (see panel.py) and TILE_COLS columns, whose activations lie
[cols/UNIT][TILE_COLS][UNIT] as the panel's codes do.
"""

from llvmlite import ir

from edgeq.blocks import BlockFormat
from edgeq.kernels.dot import floats_at
from edgeq.kernels.llvm import F32, I8, I32, Emit, Value, vector
from edgeq.kernels.panel import Lanes, lanes_of, row_at, rows_of

__all__ = ["float_panel", "float_tile", "quant_tile"]


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
    """out f32[TILE_COLS][R] = panel times one tile of columns; xs: the sums that lanes_of names."""
    tile = _Tile(e, lanes_of(fmt, e.isa), panel, a, b, x, xd, xs)
    zeros = [e.fill(F32, tile.rows, 0.0)] * tile.columns
    if tile.lanes.span == 32:
        sums = e.loop(e.b.udiv(cols, e.i64(32)), zeros, tile.step)
    else:
        sums = e.loop(e.b.udiv(cols, e.i64(tile.lanes.span)), zeros, tile.block)
    for t, total in enumerate(sums):
        e.store(total, out, 4 * tile.rows * t)


class _Tile:
    """Emits the steps of a tile; see quant_tile for its pointers."""

    def __init__(self, e: Emit, lanes: Lanes, *pointers: Value) -> None:
        self.e, self.lanes = e, lanes
        self.rows, self.columns = rows_of(e), int(e.isa.TILE_COLS)
        self.panel, self.a, self.b, self.x, self.xd, self.xs = pointers

    def step(self, i: Value, sums: list[Value]) -> list[Value]:
        """32 weights that share a scale."""
        e = self.e
        scale = self._vector(F32, self.a, i)
        dots, xd = self._counts(i), self._spread(F32, self.xd, i)
        for t, (dot, x) in enumerate(zip(dots, xd, strict=True)):
            sums[t] = e.fma(dot, e.mul(scale, x), sums[t])
        return self._minimums(i, sums)

    def block(self, n: Value, sums: list[Value]) -> list[Value]:
        """A block of several steps that share a scale, which is applied at its end."""
        e, steps, columns = self.e, self.lanes.span // 32, self.columns

        def inner(k: Value, carried: list[Value]) -> list[Value]:
            i = e.b.add(e.b.mul(n, e.i64(steps)), k)
            given = zip(self._counts(i), self._spread(F32, self.xd, i), carried[:columns])
            parts = [e.fma(dot, x, part) for dot, x, part in given]
            return parts + self._minimums(i, carried[columns:])

        zeros = [e.fill(F32, self.rows, 0.0)] * columns
        carried = e.loop(steps, zeros + sums, inner)
        scale = self._vector(F32, self.a, n)
        return [
            e.fma(part, scale, total)
            for part, total in zip(carried[:columns], carried[columns:], strict=True)
        ]

    def _minimums(self, i: Value, sums: list[Value]) -> list[Value]:
        per = 32 // self.lanes.coding.fmt.group
        for g in range(per if self.lanes.minimum else 0):
            least = self._vector(F32, self.b, i, per, g)
            given = self._spread(F32, self.xs, i, per, g)
            sums = [self.e.fma(least, x, total) for x, total in zip(given, sums, strict=True)]
        return sums

    def _counts(self, i: Value) -> list[Value]:
        """f32[R] per column: integer sums over 32 weights, with their sub-scales."""
        e, count = self.e, self.e.isa.counted
        if not self.lanes.nested:
            return [count(e, dot) for dot in self._by_column(self._dots(i, self._starts(i), 1, 0))]
        first = self._dots(i, self._starts(i, 2), 2, 0)
        second = self._dots(i, self._starts(i, 2, 1, first), 2, 1)
        part, whole = self._by_column(first), self._by_column(second)
        change, factor = (self._vector(F32, self.b, i, 2, g) for g in range(2))
        scaled = [e.mul(count(e, dot), change) for dot in part]
        return [e.fma(count(e, dot), factor, low) for dot, low in zip(whole, scaled, strict=True)]

    def _dots(self, i: Value, acc: list[Value], per: int, g: int) -> list[Value]:
        """acc + dot products over part g of `per` of the step; for their order see _by_column."""
        e, n, rows = self.e, self.columns, self.rows
        if e.isa.UNIT == 32:
            return list(map(e.b.add, acc, self._sums(i, 32 // per, 32 // per * g)))
        if e.isa.UNIT == 8:
            return self._quads(i, acc, range(4 * g // per, 4 * (g + 1) // per))
        panel = e.at(self.panel, e.b.mul(i, e.i64(32 * rows)))
        x = e.at(self.x, e.b.mul(i, e.i64(32 * n)))
        for k in range(8 * g // per, 8 * (g + 1) // per):
            w = e.load(vector(I8, 4 * rows), panel, 4 * rows * k)
            words = e.isa.spread(e, I32, e.at(x, 4 * n * k), n, rows)
            acc = [
                e.isa.dot(e, total, w, e.b.bitcast(word, w.type), self.lanes.signed)
                for total, word in zip(acc, words, strict=True)
            ]
        return acc

    def _quads(self, i: Value, acc: list[Value], units: range) -> list[Value]:
        """The same by products of matrices, each sum of two rows and two columns."""
        e, n, rows = self.e, self.columns, self.rows
        for k in units:
            panel = e.at(self.panel, e.b.mul(i, e.i64(32 * rows)))
            x = e.at(self.x, e.b.mul(i, e.i64(32 * n)))
            ws = [e.load(vector(I8, 16), panel, 8 * (rows * k + r)) for r in range(0, rows, 2)]
            xs = [e.load(vector(I8, 16), x, 8 * (n * k + t)) for t in range(0, n, 2)]
            pairs = [(w, x) for x in xs for w in ws]
            acc = [e.isa.quads(e, total, *pair) for total, pair in zip(acc, pairs, strict=True)]
        return acc

    def _by_column(self, sums: list[Value]) -> list[Value]:
        """Sums of `_dots`, each with all rows of a column."""
        if self.e.isa.UNIT != 8:
            return sums
        pairs = zip(sums[::2], sums[1::2], strict=True)
        return [self.e.pick(a, range(k, 8, 2), b) for a, b in pairs for k in (0, 1)]

    def _sums(self, i: Value, count: int, first: int) -> list[Value]:
        """The same where codes of a row lie together: those from `first` on of the step."""
        e = self.e

        def codes(base: Value, n: int) -> list[list[Value]]:
            start = e.at(base, e.b.mul(i, e.i64(32 * n)))
            places = range(first, first + count, 16)
            return [[e.load(vector(I8, 16), start, 32 * k + at) for at in places] for k in range(n)]

        rows, columns = codes(self.panel, self.rows), codes(self.x, self.columns)
        each = [[list(zip(w, x, strict=True)) for w in rows] for x in columns]
        return [e.isa.sums(e, groups, self.lanes.peak) for groups in each]

    def _starts(
        self, i: Value, per: int = 1, g: int = 0, before: list[Value] | None = None
    ) -> list[Value]:
        """What makes up for codes that are shifted up: -2^shift times the sum of activations; to be
        added to the sum that went before.
        """
        e = self.e
        if self.lanes.shift:
            by = e.fill(I32, self.rows, self.lanes.shift)
            shifted = [e.b.shl(sums, by) for sums in self._spread(I32, self.xs, i, per, g)]
            return shifted if before is None else list(map(e.b.add, before, shifted))
        if before is not None:
            return before
        return list(e.isa.starts(e, self.columns, self.rows))

    def _vector(self, kind: ir.Type, base: Value, i: Value, per: int = 1, g: int = 0) -> Value:
        """One value per row: entry g of the `per` entries of step i."""
        e, size = self.e, 4 * self.rows
        return e.load(vector(kind, self.rows), e.at(base, e.b.mul(i, e.i64(per * size))), size * g)

    def _spread(
        self, kind: ir.Type, base: Value, i: Value, per: int = 1, g: int = 0
    ) -> list[Value]:
        """Of each column its value, in all lanes."""
        e, n = self.e, self.columns
        source = e.at(base, e.b.mul(i, e.i64(per * 4 * n)))
        return e.isa.spread(e, kind, e.at(source, 4 * n * g), n, self.rows)


# -- float formats ---------------------------------------------------------------------------------
def float_panel(
    e: Emit, fmt: BlockFormat, w: Value, stride: Value, rows: Value, cols: Value, panel: Value
) -> None:
    """f32[cols][R] of min(rows, R) rows stored as F32, F16 or BF16."""
    lanes = rows_of(e)

    def square(u: Value, _: list[Value]) -> list[Value]:
        first = e.b.mul(u, e.i64(lanes))
        source = [row_at(e, w, stride, e.i64(r), rows) for r in range(lanes)]
        at = e.b.mul(first, e.i64(fmt.bytes))
        vs = e.transpose([floats_at(e, fmt, e.at(s, at), lanes) for s in source])
        for k, v in enumerate(vs):
            e.store(v, e.at(panel, e.b.mul(first, e.i64(4 * lanes))), 4 * lanes * k)
        return []

    def rest(i: Value, _: list[Value]) -> list[Value]:
        k = e.b.add(e.b.sub(cols, e.b.urem(cols, e.i64(lanes))), i)

        def row(r: Value, _: list[Value]) -> list[Value]:
            source = row_at(e, w, stride, r, rows)
            v = floats_at(e, fmt, e.at(source, e.b.mul(k, e.i64(fmt.bytes))), 1)
            slot = e.b.add(e.b.mul(k, e.i64(lanes)), r)
            e.store(v, e.at(panel, e.b.mul(slot, e.i64(4))))
            return []

        e.loop(lanes, [], row)
        return []

    e.loop(e.b.udiv(cols, e.i64(lanes)), [], square)
    e.loop(e.b.urem(cols, e.i64(lanes)), [], rest)


def float_tile(
    e: Emit, panel: Value, x: Value, stride: int | Value, count: Value, out: Value
) -> None:
    """out[c][R] = sum over k of panel[k][R] · x[k], everything f32 in registers; columns of x are
    `stride` bytes apart.
    """
    lanes = rows_of(e)
    xs = [e.at(x, e.b.mul(e.i64(c), e.i64(stride))) for c in range(e.isa.TILE_COLS)]

    def some(first: Value, n: int, sums: list[Value]) -> list[Value]:
        at = e.at(panel, e.b.mul(first, e.i64(4 * lanes)))
        ws = [e.load(vector(F32, lanes), at, 4 * lanes * k) for k in range(n)]
        offset = e.b.mul(first, e.i64(4))
        given = [e.isa.spread(e, F32, e.at(x, offset), n, lanes) for x in xs]
        for w, vs in zip(ws, zip(*given, strict=True), strict=True):
            sums = [e.fma(w, v, total) for v, total in zip(vs, sums, strict=True)]
        return sums

    sums = e.steps(count, 4, [e.fill(F32, lanes, 0.0)] * len(xs), some)
    for c, total in enumerate(sums):
        e.store(total, out, 4 * lanes * c)
