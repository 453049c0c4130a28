"""Rotary embedding of queries and keys, and their way into the KV cache, values with them."""

import math
from types import ModuleType
from typing import Any

from numba import types

from edgeq.kernels.hadamard import hadamard
from edgeq.kernels.keys import store_key
from edgeq.kernels.layout import KV_BITS, ROPE, TILE_KEYS, kv_blocks
from edgeq.kernels.llvm import F32, Emit, Value, vector
from edgeq.kernels.rows import each, normalize, sum_squares
from edgeq.kernels.values import store_value
from edgeq.kernels.words import emitted, f32_at, load

__all__ = ["rope"]

(
    STATE, Q, K, V, HEADS, KV_HEADS, HEAD_DIM, PAIRS, STEP, GAP, COS, SIN, Q_NORM, K_NORM, EPS,
    SCALE, K_TURN, V_TURN, K_CACHE, V_CACHE, K_SCALES, V_SCALES, CONTEXT,
) = range(len(ROPE))  # fmt: skip


def rope(isa: ModuleType, k_kind: str, v_kind: str) -> Any:
    """Normalize heads (where the model does), rotate q and k, store k and v in a cache of the given
    types; q, k and v are overwritten.
    """
    turn, spread = _turner(isa), hadamard(isa)
    put_key, put_value = _storers(isa, k_kind, v_kind)
    k_unit, v_unit = (32 if kv_blocks(kind) else 16 for kind in (k_kind, v_kind))
    k_bits, v_bits = KV_BITS[k_kind], KV_BITS[v_kind]
    # Bytes from one key of a tile to the next: one value, or a word of codes.
    k_step = 4 if kv_blocks(k_kind) else k_bits // 8

    def kernel(args, thread, threads):
        tokens, position = load(load(args, STATE), 0), load(load(args, STATE), 1)
        heads, kv_heads, dim = load(args, HEADS), load(args, KV_HEADS), load(args, HEAD_DIM)
        context, scale = load(args, CONTEXT), f32_at(args, 2 * SCALE)
        k_wide = (dim + k_unit - 1) // k_unit * k_unit
        v_wide = (dim + v_unit - 1) // v_unit * v_unit
        items = heads + 2 * kv_heads
        for item in range(
            tokens * items * thread // threads, tokens * items * (thread + 1) // threads
        ):
            t, h = item // items, item % items
            at = position + t
            if h < heads:
                row = load(args, Q) + (t * heads + h) * dim * 4
                turn(args, row, t, load(args, Q_NORM), scale)
                spread(row, dim, load(args, K_TURN))
                continue
            head = (h - heads) % kv_heads
            tile = head * (context // TILE_KEYS) + at // TILE_KEYS
            key = at % TILE_KEYS
            if h < heads + kv_heads:
                row = load(args, K) + (t * kv_heads + head) * dim * 4
                turn(args, row, t, load(args, K_NORM), types.float32(1.0))
                spread(row, dim, load(args, K_TURN))
                put_key(
                    row,
                    dim,
                    load(args, K_CACHE) + tile * TILE_KEYS * k_wide * k_bits // 8 + key * k_step,
                    load(args, K_SCALES) + (tile * (k_wide // 32) * TILE_KEYS + key) * 2,
                )
            else:
                row = load(args, V) + (t * kv_heads + head) * dim * 4
                spread(row, dim, load(args, V_TURN))
                put_value(
                    row,
                    dim,
                    load(args, V_CACHE) + (tile * TILE_KEYS + key) * v_wide * v_bits // 8,
                    load(args, V_SCALES) + (tile * (v_wide // 32) * TILE_KEYS + key) * 2,
                )

    return kernel


def _storers(isa: ModuleType, k_kind: str, v_kind: str) -> tuple[Any, Any]:
    def key(e: Emit, row: Value, n: Value, place: Value, scale: Value) -> None:
        store_key(e, k_kind, e.pointer(row), n, e.pointer(place), e.pointer(scale))

    def value(e: Emit, row: Value, n: Value, place: Value, scale: Value) -> None:
        store_value(e, v_kind, e.pointer(row), n, e.pointer(place), e.pointer(scale))

    return emitted(isa, key, "iiii"), emitted(isa, value, "iiii")


def _turner(isa: ModuleType) -> Any:
    """Numba function: norm (weight != 0), rotation and scaling of one head in place."""
    from numba import njit

    def squares(e: Emit, x: Value, n: Value) -> Value:
        return sum_squares(e, e.pointer(x), n)

    def norm(e: Emit, x: Value, weight: Value, factor: Value, n: Value) -> None:
        normalize(e, e.pointer(x), e.pointer(weight), factor, e.pointer(x), n)

    def times(e: Emit, x: Value, factor: Value, n: Value) -> None:
        x = e.pointer(x)

        def body(offset: Value, lanes: int) -> None:
            v = e.load(vector(F32, lanes), x, offset)
            e.store(e.mul(v, e.splat(factor, lanes)), x, offset)

        each(e, n, body)

    square_sum = emitted(isa, squares, "ii", result=True)
    normed, scaled = emitted(isa, norm, "iifi"), emitted(isa, times, "ifi")
    halves, neighbours = emitted(isa, _turn_halves, "iiiii"), emitted(isa, _turn_neighbours, "iiii")

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def turn(args, row, token, weight, scale):
        dim, pairs = load(args, HEAD_DIM), load(args, PAIRS)
        if weight != 0:
            mean = square_sum(row, dim) / dim
            normed(row, weight, types.float32(1 / math.sqrt(mean + f32_at(args, 2 * EPS))), dim)
        cos = load(args, COS) + token * pairs * 4
        sin = load(args, SIN) + token * pairs * 4
        if load(args, STEP) == 1:
            halves(row, load(args, GAP), pairs, cos, sin)
        else:
            neighbours(row, pairs, cos, sin)
        if scale != types.float32(1.0):
            scaled(row, scale, dim)

    return turn


def _turned(e: Emit, a: Value, b: Value, cos: Value, sin: Value) -> tuple[Value, Value]:
    return e.sub(e.mul(a, cos), e.mul(b, sin)), e.add(e.mul(a, sin), e.mul(b, cos))


def _turn_halves(e: Emit, row: Value, gap: Value, pairs: Value, cos: Value, sin: Value) -> None:
    """Pair i is (i, i + gap)."""
    low, cos, sin = (e.pointer(p) for p in (row, cos, sin))
    high = e.at(low, e.b.mul(gap, e.i64(4)))

    def body(offset: Value, lanes: int) -> None:
        a, b, c, s = (e.load(vector(F32, lanes), p, offset) for p in (low, high, cos, sin))
        for v, p in zip(_turned(e, a, b, c, s), (low, high), strict=True):
            e.store(v, p, offset)

    each(e, pairs, body)


def _turn_neighbours(e: Emit, row: Value, pairs: Value, cos: Value, sin: Value) -> None:
    """Pair i is (2i, 2i + 1)."""
    row, cos, sin = (e.pointer(p) for p in (row, cos, sin))

    def body(offset: Value, lanes: int) -> None:
        place = e.at(row, e.b.mul(offset, e.i64(2)))
        both = e.load(vector(F32, 2 * lanes), place)
        a, b = (e.pick(both, range(k, 2 * lanes, 2)) for k in (0, 1))
        a, b = _turned(e, a, b, *(e.load(vector(F32, lanes), p, offset) for p in (cos, sin)))
        e.store(e.pick(a, [k // 2 + lanes * (k % 2) for k in range(2 * lanes)], b), place)

    each(e, pairs, body)
