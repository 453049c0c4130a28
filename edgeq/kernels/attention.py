"""Rotary embedding into the KV cache, and attention over it with online softmax.

Cache of one layer, f16: K [kv_head][context/16][head_dim][16], so that 16 keys fill a vector; V
[kv_head][context][padded head_dim].
"""

import math
from types import ModuleType
from typing import Any

from numba import types

from edgeq.kernels.layout import ATTEND, KEYS, ROPE, TILE_KEYS
from edgeq.kernels.llvm import F16, F32, Emit, Value, vector
from edgeq.kernels.rows import each, softmax_row, sum_squares
from edgeq.kernels.tile import float_tile
from edgeq.kernels.words import emitted, f32_at, f32_set, load, smaller

__all__ = ["attend", "rope"]

(
    STATE, Q, K, V, HEADS, KV_HEADS, HEAD_DIM, PAIRS, STEP, GAP, COS, SIN, Q_NORM, K_NORM, EPS,
    SCALE, K_CACHE, V_CACHE, CONTEXT,
) = range(len(ROPE))  # fmt: skip


def _storers(isa: ModuleType) -> tuple[Any, Any]:
    def key(e: Emit, value: Value, address: Value) -> None:
        e.store(e.isa.to_f16(e, e.gather([value])), e.pointer(address))

    def row(e: Emit, source: Value, target: Value, n: Value) -> None:
        def body(offset: Value, lanes: int) -> None:
            v = e.load(vector(F32, lanes), e.pointer(source), offset)
            e.store(e.isa.to_f16(e, v), e.pointer(target), e.b.udiv(offset, e.i64(2)))

        each(e, n, body)

    return emitted(isa, key, "fi"), emitted(isa, row, "iii")


def rope(isa: ModuleType) -> Any:
    """Normalize heads (where the model does), rotate q and k, store k and v in the cache."""

    def squares(e: Emit, x: Value, n: Value) -> Value:
        return sum_squares(e, e.pointer(x), n)

    square_sum = emitted(isa, squares, "ii", result=True)
    store_key, store_row = _storers(isa)
    turn = _turner(square_sum)

    def kernel(args, thread, threads):
        tokens, position = load(load(args, STATE), 0), load(load(args, STATE), 1)
        heads, kv_heads, dim = load(args, HEADS), load(args, KV_HEADS), load(args, HEAD_DIM)
        context, scale = load(args, CONTEXT), f32_at(args, 2 * SCALE)
        wide = (dim + 15) // 16 * 16
        items = heads + 2 * kv_heads
        for item in range(
            tokens * items * thread // threads, tokens * items * (thread + 1) // threads
        ):
            t, h = item // items, item % items
            at = position + t
            if h < heads:
                turn(args, load(args, Q) + (t * heads + h) * dim * 4, t, load(args, Q_NORM), scale)
            elif h < heads + kv_heads:
                head = h - heads
                row = load(args, K) + (t * kv_heads + head) * dim * 4
                turn(args, row, t, load(args, K_NORM), types.float32(1.0))
                key = load(args, K_CACHE) + ((head * context + at // 16 * 16) * dim + at % 16) * 2
                for d in range(dim):
                    store_key(f32_at(row, d), key + d * 32)
            else:
                head = h - heads - kv_heads
                row = load(args, V) + (t * kv_heads + head) * dim * 4
                store_row(row, load(args, V_CACHE) + (head * context + at) * wide * 2, dim)

    return kernel


def _turner(square_sum: Any) -> Any:
    from numba import njit

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def turn(args, row, token, weight, scale):
        """Norm (weight != 0), rotation and scaling of one head in place."""
        dim, pairs, step, gap = (
            load(args, HEAD_DIM),
            load(args, PAIRS),
            load(args, STEP),
            load(args, GAP),
        )
        if weight != 0:
            factor = types.float32(
                1 / math.sqrt(square_sum(row, dim) / dim + f32_at(args, 2 * EPS))
            )
            for d in range(dim):
                f32_set(row, d, f32_at(row, d) * factor * f32_at(weight, d))
        for i in range(pairs):
            c, s = (
                f32_at(load(args, COS), token * pairs + i),
                f32_at(load(args, SIN), token * pairs + i),
            )
            a, b = f32_at(row, i * step), f32_at(row, i * step + gap)
            f32_set(row, i * step, a * c - b * s)
            f32_set(row, i * step + gap, a * s + b * c)
        if scale != types.float32(1.0):
            for d in range(dim):
                f32_set(row, d, f32_at(row, d) * scale)

    return turn


(
    A_STATE, A_Q, A_HEADS, A_KV_HEADS, A_DIM, A_K, A_V, A_CONTEXT, A_OUT, A_SCRATCH,
    A_SCRATCH_BYTES,
) = range(len(ATTEND))  # fmt: skip


def attend(isa: ModuleType, queries: int) -> Any:
    """Causal attention; a work item is one KV head and `queries` (token, head of its group) pairs,
    which share each read of K, V.
    """
    lanes = isa.WIDTH // 4
    scores, weigh, softmax = _attend_parts(isa, queries)
    begin, soften, finish = _tile_steps(softmax, queries)

    def kernel(args, thread, threads):
        tokens, position = load(load(args, A_STATE), 0), load(load(args, A_STATE), 1)
        heads, kv_heads, dim = load(args, A_HEADS), load(args, A_KV_HEADS), load(args, A_DIM)
        context = load(args, A_CONTEXT)
        share, wide = heads // kv_heads, (dim + 15) // 16 * 16
        q = load(args, A_SCRATCH) + thread * load(args, A_SCRATCH_BYTES)
        s = q + queries * dim * 4
        o = s + queries * KEYS * 4
        stats = o + queries * wide * 4
        tiles = (tokens * share + queries - 1) // queries
        item = thread - threads
        while item + threads < kv_heads * tiles:  # Numba's range with a variable step can raise
            item += threads
            head, first = item % kv_heads, item // kv_heads * queries
            n = smaller(queries, tokens * share - first)
            begin(args, head, first, n, q, o, stats)
            k, v = (
                load(args, A_K) + head * context * dim * 2,
                load(args, A_V) + head * context * wide * 2,
            )
            seen = position + (first + n - 1) // share + 1
            for k0 in range(0, seen, KEYS):
                count = smaller(KEYS, seen - k0)
                for j in range(0, count, lanes):
                    at = k0 + j
                    scores(k + (at // 16 * 16 * dim + at % 16) * 2, q, dim, s + j * 4)
                soften(position + 1 - k0, first, share, n, count, s, o, wide, stats)
                for d in range(0, wide, lanes):
                    weigh(v + (k0 * wide + d) * 2, wide * 2, s, count, o + d * 4)
            finish(args, head, first, n, o, stats)

    return kernel


def _attend_parts(isa: ModuleType, queries: int) -> tuple[Any, Any, Any]:
    """Emitted functions: 16-key scores, weighted sum of values, one softmax step."""

    def scores(e: Emit, k: Value, q: Value, dim: Value, s: Value) -> None:
        def read(p: Value, n: int) -> Value:
            return e.isa.from_f16(e, e.load(vector(F16, n), p))

        column = e.b.mul(dim, e.i64(4))
        float_tile(
            e,
            read,
            e.pointer(k),
            2 * TILE_KEYS,
            e.pointer(q),
            4,
            column,
            dim,
            e.pointer(s),
            4 * KEYS,
            columns=queries,
        )

    def weigh(e: Emit, v: Value, stride: Value, s: Value, count: Value, o: Value) -> None:
        def read(p: Value, n: int) -> Value:
            return e.isa.from_f16(e, e.load(vector(F16, n), p))

        column = e.b.mul(stride, e.i64(2))
        float_tile(
            e,
            read,
            e.pointer(v),
            stride,
            e.pointer(s),
            4,
            4 * KEYS,
            count,
            e.pointer(o),
            column,
            columns=queries,
            accumulate=True,
        )

    def softmax(e: Emit, s: Value, valid: Value, stats: Value) -> None:
        softmax_row(e, e.pointer(s), valid, e.pointer(stats))

    return emitted(isa, scores, "iiii"), emitted(isa, weigh, "iiiii"), emitted(isa, softmax, "iii")


def _tile_steps(softmax: Any, queries: int) -> tuple[Any, Any, Any]:
    """Numba functions around the keys: start a tile, softmax of a step, write the result."""
    from numba import njit

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def begin(args, head, first, n, q, o, stats):
        heads, dim = load(args, A_HEADS), load(args, A_DIM)
        share, wide = heads // load(args, A_KV_HEADS), (dim + 15) // 16 * 16
        for i in range(queries):
            row = first + i
            source = load(args, A_Q) + (row // share * heads + head * share + row % share) * dim * 4
            for d in range(dim):
                f32_set(q, i * dim + d, f32_at(source, d) if i < n else types.float32(0.0))
            for d in range(wide):
                f32_set(o, i * wide + d, types.float32(0.0))
            f32_set(stats, 4 * i, types.float32(-3.0e38))
            f32_set(stats, 4 * i + 1, types.float32(0.0))

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def soften(ahead, first, share, n, count, s, o, wide, stats):
        for i in range(n):
            valid = smaller(count, ahead + (first + i) // share)
            valid = valid if valid > 0 else 0
            softmax(s + i * KEYS * 4, valid, stats + i * 16)
            for k in range(valid, count):
                f32_set(s, i * KEYS + k, types.float32(0.0))
            factor = f32_at(stats, 4 * i + 2)
            for d in range(wide):
                f32_set(o, i * wide + d, f32_at(o, i * wide + d) * factor)

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def finish(args, head, first, n, o, stats):
        heads, dim = load(args, A_HEADS), load(args, A_DIM)
        share, wide = heads // load(args, A_KV_HEADS), (dim + 15) // 16 * 16
        for i in range(n):
            row = first + i
            target = (
                load(args, A_OUT) + (row // share * heads + head * share + row % share) * dim * 4
            )
            inverse = types.float32(1) / f32_at(stats, 4 * i + 1)
            for d in range(dim):
                f32_set(target, d, f32_at(o, i * wide + d) * inverse)

    return begin, soften, finish
