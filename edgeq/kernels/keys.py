"""Keys in the cache: how one is stored, and the scores of a tile of queries against TILE_KEYS of
them.

Float keys lie [value][TILE_KEYS], so that they fill vectors as they are. Codes lie in words of
four, and queries are quantized too: one dot product then takes four values of many keys.
"""

from edgeq.kernels.cached import (
    BLOCK,
    bytes_of,
    each_block,
    from_stored,
    quantize,
    rounded,
    signed_max,
    to_stored,
)
from edgeq.kernels.layout import KEYS, KV_BITS, TILE_KEYS, kv_blocks
from edgeq.kernels.llvm import F16, F32, I8, I32, Emit, Value, vector
from edgeq.kernels.rows import each, sum_of

__all__ = ["float_rows", "score_keys", "store_key", "store_query", "turn_queries"]

WORD = 4 * TILE_KEYS  # bytes of one word of every key of a tile


# -- storing ---------------------------------------------------------------------------------------
def store_key(e: Emit, kind: str, row: Value, n: Value, key: Value, scale: Value) -> None:
    """f32[n] at row becomes the key whose first value (or word) is at `key`, its scale at
    `scale`.
    """
    if not kv_blocks(kind):
        step = TILE_KEYS * KV_BITS[kind] // 8

        def body(offset: Value, lanes: int) -> None:
            v = to_stored(e, kind, e.load(vector(F32, lanes), row, offset))
            first = e.at(key, e.b.mul(offset, e.i64(step // 4)))
            for k in range(lanes):
                e.store(e.lane(v, k), first, k * step)

        each(e, n, body)
        return

    def block(g: Value, parts: list[Value]) -> None:
        codes, d = quantize(e, kind, parts)
        words = _key_words(e, kind, codes)
        first = e.at(key, e.b.mul(g, e.i64(WORD * words.type.count)))
        for k in range(words.type.count):
            e.store(e.lane(words, k), first, WORD * k)
        e.store(d, scale, e.b.mul(g, e.i64(2 * TILE_KEYS)))

    each_block(e, row, n, block)


def _key_words(e: Emit, kind: str, codes: list[Value]) -> Value:
    """i32[8] or, two codes to a byte, i32[4]: the words of a block."""
    if kind == "q8_0":  # shifted up where the dot product wants unsigned codes
        shifted = [e.b.add(c, e.fill(I32, 16, e.isa.OFFSET)) for c in codes]
        return e.b.bitcast(bytes_of(e, shifted), vector(I32, 8))
    words = e.b.bitcast(bytes_of(e, codes), vector(I32, 8))
    low, high = e.pick(words, range(0, 8, 2)), e.pick(words, range(1, 8, 2))
    return e.b.or_(low, e.b.shl(high, e.fill(I32, 4, 4)))


def store_query(
    e: Emit, kind: str, row: Value, n: Value, codes: Value, d: Value, start: Value
) -> None:
    """f32[n] as score_keys wants a query for keys of blocks: codes i8, per block a scale f32 and
    the i32 from which its sums start, which makes up for the offset of the keys' codes.
    """
    offset = 8 if kind == "q4_0" else e.isa.OFFSET

    def block(g: Value, parts: list[Value]) -> None:
        peak = e.lane(signed_max(e, parts)[0], 0)
        safe = e.b.fcmp_ordered(">", peak, F32(1e-30))
        inverse = e.b.select(safe, e.b.fdiv(F32(127.0), peak), F32(0.0))
        q = rounded(e, parts, inverse, -127, 127)
        e.store(bytes_of(e, q), codes, e.b.mul(g, e.i64(BLOCK)))
        e.store(e.b.fmul(peak, F32(1 / 127)), d, e.b.mul(g, e.i64(4)))
        e.store(e.b.mul(sum_of(e, e.b.add(*q)), I32(-offset)), start, e.b.mul(g, e.i64(4)))

    each_block(e, row, n, block)


def turn_queries(e: Emit, queries: int, rows: Value, wide: Value, q: Value) -> None:
    """q f32[wide][queries] of f32[queries][wide] at rows: what is read together lies together."""
    square = min(queries, e.isa.WIDTH // 4)

    def step(i: Value, _: list[Value]) -> list[Value]:
        first = e.b.mul(i, e.i64(4 * square))
        for query in range(0, queries, square):
            starts = [e.at(rows, e.b.mul(wide, e.i64(4 * (query + k)))) for k in range(square)]
            loaded = [e.load(vector(F32, square), start, first) for start in starts]
            for k, v in enumerate(e.transpose(loaded)):
                target = e.at(q, e.b.mul(first, e.i64(queries)))
                e.store(v, target, 4 * (k * queries + query))
        return []

    e.loop(e.b.udiv(wide, e.i64(square)), [], step)


# -- scores ----------------------------------------------------------------------------------------
def float_rows(e: Emit, queries: int) -> int:
    """Queries whose f32 sums are held in registers at once. AVX-512 multiplies by a number that it
    reads from memory itself: many queries and one vector are faster there than fewer and two.
    """
    return min(queries, 16 if e.isa.WIDTH == 64 else e.isa.TILE_COLS)


def score_keys(
    e: Emit,
    kind: str,
    queries: int,
    keys: Value,
    scales: Value,
    q: Value,
    wide: Value,
    n: Value,
    s: Value,
) -> None:
    """s f32[queries][KEYS], its first TILE_KEYS columns = scores of a tile of keys of n values.

    q: floats f32[wide][queries], see turn_queries; blocks codes i8[queries][wide], then scales
    f32[queries][wide/32], then starts i32 of the same shape, see store_query.
    """
    lanes, tile = e.isa.WIDTH // 4, float_rows(e, queries)
    vectors = 1 if tile * lanes >= 128 else min(TILE_KEYS // lanes, max(2, 8 // queries))
    if kv_blocks(kind):
        tile = min(queries, e.isa.TILE_COLS)
        vectors = 1 if tile >= 4 else min(2, TILE_KEYS // lanes)
    for first in range(0, TILE_KEYS, lanes * vectors):
        for query in range(0, queries, tile):
            columns = [first + k * lanes for k in range(vectors)]
            rows = list(range(query, query + tile))
            if kv_blocks(kind):
                sums = _block_scores(e, kind, queries, keys, scales, q, wide, rows, columns)
            else:
                sums = _float_scores(e, kind, queries, keys, q, n, rows, columns)
            for i, total in enumerate(sums):
                row, column = rows[i // vectors], columns[i % vectors]
                e.store(total, s, 4 * (row * KEYS + column))


def _float_scores(
    e: Emit,
    kind: str,
    queries: int,
    keys: Value,
    q: Value,
    n: Value,
    rows: list[int],
    columns: list[int],
) -> list[Value]:
    lanes, size = e.isa.WIDTH // 4, KV_BITS[kind] // 8

    def body(d: Value, sums: list[Value]) -> list[Value]:
        line = e.at(keys, e.b.mul(d, e.i64(TILE_KEYS * size)))
        ks = [from_stored(e, kind, e.at(line, size * column), lanes) for column in columns]
        at = e.at(q, e.b.add(e.b.mul(d, e.i64(4 * queries)), e.i64(4 * rows[0])))
        pairs = [(x, k) for x in e.isa.spread(e, F32, at, len(rows), lanes) for k in ks]
        return [e.fma(k, x, total) for (x, k), total in zip(pairs, sums, strict=True)]

    return e.loop(n, [e.fill(F32, lanes, 0.0)] * len(rows) * len(columns), body)


def _block_scores(
    e: Emit,
    kind: str,
    queries: int,
    keys: Value,
    scales: Value,
    q: Value,
    wide: Value,
    rows: list[int],
    columns: list[int],
) -> list[Value]:
    lanes, count = e.isa.WIDTH // 4, len(columns)
    blocks = e.b.udiv(wide, e.i64(BLOCK))
    ds = e.at(q, e.b.mul(wide, e.i64(queries)))
    starts = e.at(ds, e.b.mul(blocks, e.i64(4 * queries)))

    def block(g: Value, sums: list[Value]) -> list[Value]:
        per_block = WORD * BLOCK * KV_BITS[kind] // 32
        line = e.at(keys, e.b.mul(g, e.i64(per_block)))
        places = [e.b.mul(e.b.add(e.b.mul(blocks, e.i64(r)), g), e.i64(4)) for r in rows]
        acc = [e.splat(e.load(I32, starts, p), lanes) for p in places for _ in columns]
        xs = [e.at(q, e.b.mul(p, e.i64(BLOCK // 4))) for p in places]
        for word in range(BLOCK // 4):
            ks = [_codes(e, kind, e.at(line, 4 * column), word) for column in columns]
            for i, x in enumerate(xs):
                v = e.b.bitcast(e.splat(e.load(I32, x, 4 * word), lanes), vector(I8, 4 * lanes))
                for j, k in enumerate(ks):
                    slot = i * count + j
                    signed = kind == "q8_0" and not e.isa.OFFSET
                    acc[slot] = e.isa.dot(e, acc[slot], k, v, signed)
        tile = e.at(scales, e.b.mul(g, e.i64(2 * TILE_KEYS)))
        halves = [e.load(vector(F16, lanes), tile, 2 * column) for column in columns]
        k_scales = [e.isa.from_f16(e, h) for h in halves]
        out = []
        for slot, total in enumerate(acc):
            d = e.splat(e.load(F32, ds, places[slot // count]), lanes)
            out.append(e.fma(e.mul(e.floats(total), d), k_scales[slot % count], sums[slot]))
        return out

    return e.loop(blocks, [e.fill(F32, lanes, 0.0)] * len(rows) * count, block)


def _codes(e: Emit, kind: str, line: Value, word: int) -> Value:
    """i8 lanes: the codes of a word of as many keys as fill a vector."""
    row = vector(I8, e.isa.WIDTH)
    if kind == "q8_0":
        return e.load(row, line, WORD * word)
    return e.bits(e.load(row, line, WORD * (word // 2)), 4 * (word % 2), 15)
