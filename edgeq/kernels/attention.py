"""Attention over the KV cache with online softmax.

A work item is a tile of queries and some ranges of KEYS keys. A prompt's items see all keys; those
of few tokens see one range each, so that one long sequence keeps all threads busy, and who finishes
the last item of a tile joins their parts. Ranges are at fixed positions and parts are joined in
order, so the result has the same bits for every number of threads, and for a token alone and among
others.
"""

from types import ModuleType
from typing import Any

from numba import types

from edgeq.kernels.hadamard import hadamard
from edgeq.kernels.keys import score_keys, store_query, turn_queries
from edgeq.kernels.layout import ATTEND, KEYS, KV_BITS, TILE_KEYS, kv_blocks
from edgeq.kernels.llvm import F32, Emit, Value, vector
from edgeq.kernels.rows import each, exp, softmax_row
from edgeq.kernels.values import weigh_values
from edgeq.kernels.words import add_at, emitted, f32_at, f32_set, load, poke, smaller

__all__ = ["attend"]

(
    STATE, Q, HEADS, KV_HEADS, DIM, V_TURN, K_CACHE, V_CACHE, K_SCALES, V_SCALES, CONTEXT, OUT,
    SCRATCH, SCRATCH_BYTES, SPAN, PARTS, DONE,
) = range(len(ATTEND))  # fmt: skip


def attend(isa: ModuleType, queries: int, k_kind: str, v_kind: str) -> Any:
    """Causal attention; a tile is `queries` (token, head of a group) pairs, which share each read
    of K, V.
    """
    begin, see, finish, join = _steps(isa, queries, k_kind, v_kind)

    def kernel(args, thread, threads):
        tokens, position = load(load(args, STATE), 0), load(load(args, STATE), 1)
        kv_heads, dim = load(args, KV_HEADS), load(args, DIM)
        share, wide = load(args, HEADS) // kv_heads, (dim + 31) // 32 * 32
        q = load(args, SCRATCH) + thread * load(args, SCRATCH_BYTES)
        s = q + queries * wide * 4
        own = s + 2 * queries * KEYS * 4
        part_bytes = queries * (wide + 4) * 4
        tiles = (tokens * share + queries - 1) // queries
        span = load(args, SPAN) * KEYS
        parts = (position + tokens + span - 1) // span
        item = thread - threads
        while item + threads < kv_heads * tiles * parts:  # range with a variable step can raise
            item += threads
            # Of prompts the heads go round fastest: later tiles take longer.
            part, head, tile = item % parts, item // parts % kv_heads, item // parts // kv_heads
            place = head * tiles + tile
            first = tile * queries
            n = smaller(queries, tokens * share - first)
            o = own if parts == 1 else load(args, PARTS) + (place * parts + part) * part_bytes
            begin(args, head, first, n, q, o, wide)
            end = smaller(position + (first + n - 1) // share + 1, (part + 1) * span)
            for k0 in range(part * span, end, KEYS):
                see(args, head, first, n, k0, smaller(KEYS, end - k0), q, s, o, wide)
            if parts == 1:
                finish(args, head, first, n, o, wide)
            elif add_at(load(args, DONE), place, 1) == parts - 1:
                poke(load(args, DONE), place, 0)
                for i in range(n):
                    join(o - part * part_bytes, part_bytes, parts, i, own, wide)
                finish(args, head, first, n, own, wide)

    return kernel


def _steps(isa: ModuleType, queries: int, k_kind: str, v_kind: str) -> tuple[Any, Any, Any, Any]:
    """Numba functions: start a tile, see a range of keys, write the result, join parts."""
    from numba import njit

    copy, fill, ask, flip, score, soften, weigh, merge = _parts(isa, queries, k_kind, v_kind)
    spread = hadamard(isa)
    k_blocks, k_bits, v_bits = kv_blocks(k_kind), KV_BITS[k_kind], KV_BITS[v_kind]
    k_unit, v_unit = (32 if kv_blocks(kind) else 16 for kind in (k_kind, v_kind))

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def row_of(args, head, row):
        """Offset in q and out of row (token, head of the group)."""
        heads = load(args, HEADS)
        share = heads // load(args, KV_HEADS)
        return (row // share * heads + head * share + row % share) * load(args, DIM) * 4

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def begin(args, head, first, n, q, o, wide):
        dim, blocks = load(args, DIM), wide // 32
        for i in range(queries):
            # Spare rows of a tile are computed like the last one and then forgotten.
            source = load(args, Q) + row_of(args, head, first + smaller(i, n - 1))
            if k_blocks:
                codes = q + i * wide
                scales = q + queries * wide + i * blocks * 4
                ask(source, dim, codes, scales, scales + queries * blocks * 4)
            else:
                copy(source, o + i * wide * 4, dim, types.float32(1.0))
        if not k_blocks:
            flip(o, wide, q)
        fill(o, queries * wide)
        stats = o + queries * wide * 4
        for i in range(queries):
            f32_set(stats, 4 * i, types.float32(-3.0e38))
            f32_set(stats, 4 * i + 1, types.float32(0.0))

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def see(args, head, first, n, k0, count, q, s, o, wide):
        dim, position = load(args, DIM), load(load(args, STATE), 1)
        share = load(args, HEADS) // load(args, KV_HEADS)
        k_wide = (dim + k_unit - 1) // k_unit * k_unit
        v_wide = (dim + v_unit - 1) // v_unit * v_unit
        tile = (head * load(args, CONTEXT) + k0) // TILE_KEYS
        keys = load(args, K_CACHE) + tile * TILE_KEYS * k_wide * k_bits // 8
        k_scales = load(args, K_SCALES) + tile * TILE_KEYS * (k_wide // 32) * 2
        for j in range((count + TILE_KEYS - 1) // TILE_KEYS):
            score(
                keys + j * TILE_KEYS * k_wide * k_bits // 8,
                k_scales + j * TILE_KEYS * (k_wide // 32) * 2,
                q,
                wide,
                dim,
                s + j * TILE_KEYS * 4,
            )
        stats = o + queries * wide * 4
        for i in range(n):
            valid = smaller(count, position + 1 - k0 + (first + i) // share)
            soften(s + i * KEYS * 4, valid if valid > 0 else 0, count, stats + i * 16)
            if k0 > 0:
                row = o + i * wide * 4
                copy(row, row, wide, f32_at(stats, 4 * i + 2))
        weigh(
            load(args, V_CACHE) + tile * TILE_KEYS * v_wide * v_bits // 8,
            load(args, V_SCALES) + tile * TILE_KEYS * (v_wide // 32) * 2,
            v_wide,
            s,
            s + queries * KEYS * 4,
            count,
            o,
            wide * 4,
        )

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def finish(args, head, first, n, o, wide):
        dim = load(args, DIM)
        for i in range(n):
            target = load(args, OUT) + row_of(args, head, first + i)
            total = f32_at(o, queries * wide + 4 * i + 1)
            copy(o + i * wide * 4, target, dim, types.float32(1) / total)
            spread(target, dim, load(args, V_TURN))

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def join(parts, part_bytes, count, i, o, wide):
        row = i * wide * 4
        stats = queries * wide * 4 + i * 16
        merge(parts + row, parts + stats, part_bytes, count, o + row, o + stats, wide)

    return begin, see, finish, join


def _parts(isa: ModuleType, queries: int, k_kind: str, v_kind: str) -> list[Any]:
    """Emitted functions of one tile."""

    def copy(e: Emit, x: Value, out: Value, n: Value, factor: Value) -> None:
        x, out = e.pointer(x), e.pointer(out)

        def body(offset: Value, lanes: int) -> None:
            v = e.load(vector(F32, lanes), x, offset)
            e.store(e.mul(v, e.splat(factor, lanes)), out, offset)

        each(e, n, body)

    def fill(e: Emit, x: Value, n: Value) -> None:
        x = e.pointer(x)
        each(e, n, lambda offset, lanes: e.store(e.fill(F32, lanes, 0.0), x, offset))

    def ask(e: Emit, x: Value, n: Value, codes: Value, d: Value, start: Value) -> None:
        store_query(e, k_kind, e.pointer(x), n, *(e.pointer(p) for p in (codes, d, start)))

    def flip(e: Emit, rows: Value, wide: Value, q: Value) -> None:
        turn_queries(e, queries, e.pointer(rows), wide, e.pointer(q))

    def score(e: Emit, k: Value, d: Value, q: Value, wide: Value, n: Value, s: Value) -> None:
        k, d, q, s = (e.pointer(p) for p in (k, d, q, s))
        score_keys(e, k_kind, queries, k, d, q, wide, n, s)

    def soften(e: Emit, s: Value, valid: Value, count: Value, stats: Value) -> None:
        s = e.pointer(s)
        softmax_row(e, s, valid, e.pointer(stats))
        rest = e.at(s, e.b.mul(valid, e.i64(4)))
        unseen = e.b.sub(count, valid)
        each(e, unseen, lambda offset, lanes: e.store(e.fill(F32, lanes, 0.0), rest, offset))

    def weigh(e: Emit, *args: Value) -> None:
        v, d, wide, p, folded, count, o, row = args
        rows, d, p, folded, o = (e.pointer(a) for a in (v, d, p, folded, o))
        weigh_values(e, v_kind, queries, rows, d, wide, p, folded, count, o, row)

    return [
        emitted(isa, copy, "iiif"),
        emitted(isa, fill, "ii"),
        emitted(isa, ask, "iiiii"),
        emitted(isa, flip, "iii"),
        emitted(isa, score, "iiiiii"),
        emitted(isa, soften, "iiii"),
        emitted(isa, weigh, "iiiiiiii"),
        emitted(isa, _merge, "iiiiiii"),
    ]


def _merge(
    e: Emit, o: Value, stats: Value, stride: Value, count: Value, out: Value, total: Value, n: Value
) -> None:
    """out f32[n] and the second word of `total` = sums of `count` parts, `stride` bytes apart, each
    of which was divided by e to the power of its own maximum.
    """
    o, stats, out, total = (e.pointer(p) for p in (o, stats, out, total))
    one = vector(F32, 1)

    def larger_of(i: Value, top: list[Value]) -> list[Value]:
        v = e.load(one, stats, e.b.mul(i, stride))
        return [e.b.select(e.b.fcmp_ordered(">", v, top[0]), v, top[0])]

    top = e.loop(count, [e.fill(F32, 1, -3.0e38)], larger_of)[0]

    def add(i: Value, sums: list[Value]) -> list[Value]:
        here = e.b.mul(i, stride)
        factor = exp(e, e.b.fsub(e.load(one, stats, here), top))
        row = e.at(o, here)

        def body(offset: Value, lanes: int) -> None:
            v = e.mul(e.load(vector(F32, lanes), row, offset), e.splat(e.lane(factor, 0), lanes))
            e.store(e.add(e.load(vector(F32, lanes), out, offset), v), out, offset)

        each(e, n, body)
        return [e.fma(factor, e.load(one, stats, e.b.add(here, e.i64(4))), sums[0])]

    each(e, n, lambda offset, lanes: e.store(e.fill(F32, lanes, 0.0), out, offset))
    sums = e.loop(count, [e.fill(F32, 1, 0.0)], add)
    e.store(sums[0], total, 4)
