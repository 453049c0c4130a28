"""Activation kernels: embedding, what stands before a matrix product (norm, gate, quantization),
rope, copies.
"""

import math
from types import ModuleType
from typing import Any

from numba import types

from edgeq.blocks import BlockFormat
from edgeq.kernels.layout import PREPARE
from edgeq.kernels.llvm import Emit, Value
from edgeq.kernels.rows import decode_row, normalize, quantize_row, silu_gate, sum_squares
from edgeq.kernels.words import emitted, f32_at, f32_set, i32_at, load, smaller

__all__ = ["embed", "gather", "prepare"]


def embed(isa: ModuleType, fmt: BlockFormat) -> Any:
    """out[t] = decoded row ids[t] of the embedding matrix."""

    def emit(e: Emit, w: Value, out: Value, cols: Value) -> None:
        decode_row(e, fmt, e.pointer(w), e.pointer(out), cols)

    decode = emitted(isa, emit, "iii")

    def kernel(args, thread, threads):
        tokens, ids, w = load(load(args, 0), 0), load(args, 1), load(args, 2)
        row_bytes, cols, out = load(args, 3), load(args, 4), load(args, 5)
        for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            decode(w + i32_at(ids, t) * row_bytes, out + t * cols * 4, cols)

    return kernel


def gather(isa: ModuleType) -> Any:
    """out[i] = x[tokens - n + i] for the n tokens whose logits are wanted."""

    def kernel(args, thread, threads):
        tokens, n = load(load(args, 0), 0), load(load(args, 1), 0)
        x, out, cols = load(args, 2), load(args, 3), load(args, 4)
        for i in range(n * thread // threads, n * (thread + 1) // threads):
            for k in range(cols):
                f32_set(out, i * cols + k, f32_at(x, (tokens - n + i) * cols + k))

    return kernel


(
    STATE, MODE, X, X_STRIDE, WEIGHT, EPS, COLS, H, Q, D, SUMS16, SUMS32, INTS16, INTS32,
    PRIVATE,
) = range(len(PREPARE))  # fmt: skip


def _row_functions(isa: ModuleType, columns: int) -> tuple[Any, ...]:
    def squares(e: Emit, x: Value, n: Value) -> Value:
        return sum_squares(e, e.pointer(x), n)

    def norm(e: Emit, x: Value, weight: Value, scale: Value, out: Value, n: Value) -> None:
        normalize(e, e.pointer(x), e.pointer(weight), scale, e.pointer(out), n)

    def gate(e: Emit, g: Value, up: Value, out: Value, n: Value) -> None:
        silu_gate(e, e.pointer(g), e.pointer(up), e.pointer(out), n)

    def quantize(e: Emit, x: Value, groups: Value, *out: Value) -> None:
        quantize_row(e, e.pointer(x), groups, [e.pointer(p) for p in out], columns=columns)

    return (
        emitted(isa, squares, "ii", result=True),
        emitted(isa, norm, "iifii"),
        emitted(isa, gate, "iiii"),
        emitted(isa, quantize, "iiiiiiii"),
    )


def prepare(isa: ModuleType, columns: int) -> Any:
    """Norm or gate, then int8 quantization into tiles of `columns` columns.

    Many tokens are split by token, few by position in the row. Where each thread gets a copy of its
    own (`private`) it does everything: for a norm that costs less than waiting for each other.
    """

    square_sum, norm, gate, quantize = _row_functions(isa, columns)

    def kernel(args, thread, threads):
        tokens, cols, mode = load(load(args, STATE), 0), load(args, COLS), load(args, MODE)
        own = load(args, PRIVATE) * thread
        if load(args, PRIVATE) != 0:
            thread, threads = 0, 1
        by_token = tokens >= threads
        first = tokens * thread // threads if by_token else 0
        last = tokens * (thread + 1) // threads if by_token else tokens
        groups = (cols + 31) // 32
        # Whole steps of eight groups: rows have an order of their own within one.
        low = 0 if by_token else (groups + 7) // 8 * thread // threads * 8
        high = groups if by_token else (groups + 7) // 8 * (thread + 1) // threads * 8
        high = smaller(high, groups)
        start, n = low * 32, smaller(high * 32, cols) - low * 32
        if n <= 0:
            return
        for t in range(first, last):
            source = load(args, X) + t * load(args, X_STRIDE) * 4
            row = load(args, H) + own + (t * cols + start) * 4
            if mode == 1:
                mean = square_sum(source, cols) / cols
                scale = types.float32(1 / math.sqrt(mean + f32_at(args, 2 * EPS)))
                norm(source + start * 4, load(args, WEIGHT) + start * 4, scale, row, n)
            elif mode == 2:
                up = load(args, WEIGHT) + t * load(args, X_STRIDE) * 4
                gate(source + start * 4, up + start * 4, row, n)
            else:
                row = source + start * 4
            if load(args, Q) != 0:
                tile, column = t // columns, t % columns
                g = tile * (cols // 32) * columns
                one, two = g + low * columns + column, 2 * g + 2 * low * columns + column
                quantize(
                    row,
                    high - low,
                    load(args, Q) + own + (g * 32 + low * 32 * columns + column * 4),
                    load(args, D) + own + one * 4,
                    load(args, SUMS16) + own + two * 4,
                    load(args, SUMS32) + own + one * 4,
                    load(args, INTS16) + own + two * 4,
                    load(args, INTS32) + own + one * 4,
                )

    return kernel
