"""Values in the cache: how a row of them is stored, and the sum of rows weighted by the softmax of
a tile of queries.

A row is worked on in pieces of 32 values, of which two are looked at that are 16 apart: so lie the
low and high halves of the bytes of q4_0.
"""

from functools import partial

from edgeq.kernels.cached import BLOCK, HALF, bytes_of, each_block, from_stored, quantize, to_stored
from edgeq.kernels.keys import float_rows
from edgeq.kernels.layout import KEYS, KV_BITS, TILE_KEYS, kv_blocks
from edgeq.kernels.llvm import F16, F32, I8, I32, Emit, Value, vector
from edgeq.kernels.rows import each

__all__ = ["store_value", "weigh_values"]


def store_value(e: Emit, kind: str, row: Value, n: Value, value: Value, scale: Value) -> None:
    """f32[n] at row becomes the row at `value`, the scale of its first block at `scale`."""
    if not kv_blocks(kind):
        size = KV_BITS[kind] // 8

        def body(offset: Value, lanes: int) -> None:
            v = to_stored(e, kind, e.load(vector(F32, lanes), row, offset))
            e.store(v, value, e.b.mul(e.b.udiv(offset, e.i64(4)), e.i64(size)))

        each(e, n, body)
        return

    def block(g: Value, parts: list[Value]) -> None:
        codes, d = quantize(e, kind, parts)
        if kind == "q8_0":
            e.store(bytes_of(e, codes), value, e.b.mul(g, e.i64(BLOCK)))
        else:
            both = e.b.or_(codes[0], e.b.shl(codes[1], e.fill(I32, HALF, 4)))
            e.store(e.b.trunc(both, vector(I8, HALF)), value, e.b.mul(g, e.i64(HALF)))
        e.store(d, scale, e.b.mul(g, e.i64(2 * TILE_KEYS)))

    each_block(e, row, n, block)


def weigh_values(
    e: Emit,
    kind: str,
    queries: int,
    values: Value,
    scales: Value,
    wide: Value,
    p: Value,
    folded: Value,
    count: Value,
    o: Value,
    o_row: Value,
) -> None:
    """o f32[queries][o_row/4] += p f32[queries][KEYS] times `count` rows of `wide` values.

    folded: room for p times a block's scales, of p's shape.
    """
    row = e.b.udiv(e.b.mul(wide, e.i64(KV_BITS[kind])), e.i64(8))

    def block(g: Value, _: list[Value]) -> list[Value]:
        weights = p
        if kv_blocks(kind):
            _fold(
                e, queries, e.at(scales, e.b.mul(g, e.i64(2 * TILE_KEYS))), wide, p, folded, count
            )
            weights = folded
        source = e.at(values, e.b.mul(g, e.i64(BLOCK * KV_BITS[kind] // 8)))
        target = e.at(o, e.b.mul(g, e.i64(4 * BLOCK)))
        _piece(e, kind, queries, (0, 1), source, row, weights, count, target, o_row)
        return []

    def half(_: Value, __: list[Value]) -> list[Value]:
        done = e.b.sub(wide, e.i64(HALF))
        source = e.at(values, e.b.mul(done, e.i64(KV_BITS[kind] // 8)))
        target = e.at(o, e.b.mul(done, e.i64(4)))
        _piece(e, kind, queries, (0,), source, row, p, count, target, o_row)
        return []

    e.loop(e.b.udiv(wide, e.i64(BLOCK)), [], block)
    if not kv_blocks(kind):
        e.loop(e.b.udiv(e.b.urem(wide, e.i64(BLOCK)), e.i64(HALF)), [], half)


def _fold(
    e: Emit, queries: int, scales: Value, wide: Value, p: Value, folded: Value, count: Value
) -> None:
    """folded[query][key] = p[query][key] · scale of the key's block, in whole vectors."""
    lanes = e.isa.WIDTH // 4
    tile = e.b.mul(e.b.udiv(wide, e.i64(BLOCK)), e.i64(2 * TILE_KEYS))

    def step(i: Value, _: list[Value]) -> list[Value]:
        key = e.b.mul(i, e.i64(lanes))
        place = e.b.mul(e.b.udiv(key, e.i64(TILE_KEYS)), tile)
        inside = e.b.mul(e.b.urem(key, e.i64(TILE_KEYS)), e.i64(2))
        d = e.isa.from_f16(e, e.load(vector(F16, lanes), e.at(scales, place), inside))
        for query in range(queries):
            at = e.b.add(e.b.mul(key, e.i64(4)), e.i64(4 * KEYS * query))
            e.store(e.mul(e.load(vector(F32, lanes), p, at), d), folded, at)
        return []

    e.loop(e.b.udiv(e.b.add(count, e.i64(lanes - 1)), e.i64(lanes)), [], step)


def _piece(
    e: Emit,
    kind: str,
    queries: int,
    halves: tuple[int, ...],
    values: Value,
    row: Value,
    p: Value,
    count: Value,
    o: Value,
    o_row: Value,
) -> None:
    """Sums of the low (0), high (1) or both halves of 32 values, in registers over all rows."""
    lanes, tile = e.isa.WIDTH // 4, float_rows(e, queries)
    together = [(half,) for half in halves] if tile * lanes >= 128 else [halves]
    for first in range(0, HALF, lanes):
        for query in range(0, queries, tile):
            for part in together:
                starts = [first + HALF * half for half in part]
                rows = range(query, query + tile)
                slots = [
                    e.at(e.at(o, e.b.mul(o_row, e.i64(i))), 4 * start)
                    for i in rows
                    for start in starts
                ]

                loaded = [e.load(vector(F32, lanes), slot) for slot in slots]
                read = partial(_weighed, e, kind, values, row, p, rows, starts)
                for slot, total in zip(slots, e.steps(count, 4, loaded, read), strict=True):
                    e.store(total, slot)


def _weighed(
    e: Emit,
    kind: str,
    values: Value,
    row: Value,
    p: Value,
    rows: range,
    starts: list[int],
    first: Value,
    count: int,
    sums: list[Value],
) -> list[Value]:
    """sums + those of `count` rows of values, from row `first` on."""
    lanes = e.isa.WIDTH // 4
    at = e.at(p, e.b.mul(first, e.i64(4)))
    given = [e.isa.spread(e, F32, e.at(at, 4 * KEYS * i), count, lanes) for i in rows]
    for k in range(count):
        line = e.at(values, e.b.mul(e.b.add(first, e.i64(k)), row))
        vs = [_values(e, kind, line, start, lanes) for start in starts]
        pairs = [(xs[k], v) for xs in given for v in vs]
        sums = [e.fma(v, x, total) for (x, v), total in zip(pairs, sums, strict=True)]
    return sums


def _values(e: Emit, kind: str, line: Value, start: int, lanes: int) -> Value:
    """f32 lanes `start`.. of 32 values; codes without their scale."""
    if not kv_blocks(kind):
        return from_stored(e, kind, e.at(line, start * KV_BITS[kind] // 8), lanes)
    part = vector(I8, lanes)
    if kind == "q8_0":
        return e.floats(e.widen(e.load(part, line, start), I32, signed=True))
    both = e.widen(e.load(part, line, start % HALF), I32, signed=False)
    codes = e.bits(both, 4 * (start // HALF), 15)
    return e.floats(e.b.sub(codes, e.fill(I32, lanes, 8)))
