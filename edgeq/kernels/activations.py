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

__all__ = ["embed", "gather", "prepare", "prepare_part"]


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

    def quantize(e: Emit, x: Value, *v: Value) -> None:
        quantize_row(e, e.pointer(x), v[:3], [e.pointer(p) for p in v[3:]], columns=columns)

    return (
        emitted(isa, squares, "ii", result=True),
        emitted(isa, norm, "iifii"),
        emitted(isa, gate, "iiii"),
        emitted(isa, quantize, "i" * 10),
    )


def prepare(isa: ModuleType, columns: int) -> Any:
    """Norm or gate, then int8 quantization into tiles of `columns` columns.

    Many tokens are split by token, few by position in the row. Where each thread gets a copy of its
    own (`private`) it does everything: for a norm that costs less than waiting for each other.
    """
    part = prepare_part(isa, columns)

    def kernel(args, thread, threads):
        tokens, groups = load(load(args, STATE), 0), (load(args, COLS) + 31) // 32
        own = load(args, PRIVATE) * thread
        if load(args, PRIVATE) != 0:
            thread, threads = 0, 1
        if tokens >= threads:
            first, last = tokens * thread // threads, tokens * (thread + 1) // threads
            part(args, own, first, last, 0, groups)
        else:
            low, high = groups * thread // threads, groups * (thread + 1) // threads
            part(args, own, 0, tokens, low, high)

    return kernel


def prepare_part(isa: ModuleType, columns: int) -> Any:
    """Numba function: the groups of 32 from `low` until `high` of the tokens from `first` until
    `last`; the copy to write is `own` bytes behind the first.
    """
    from numba import njit

    square_sum, norm, gate, quantize = _row_functions(isa, columns)
    unit = isa.UNIT

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def part(args, own, first, last, low, high):
        cols, mode = load(args, COLS), load(args, MODE)
        start, n = low * 32, smaller(high * 32, cols) - low * 32
        if n <= 0:
            return
        # Rows have an order of their own within whole steps of eight groups.
        middle = smaller(cols // 256 * 8, high) if columns == 1 else low
        middle = low if middle < low else middle
        for t in range(first, last):
            source = load(args, X) + t * load(args, X_STRIDE) * 4
            row = load(args, H) + own + t * cols * 4
            at = start * 4
            if mode == 1:
                mean = square_sum(source, cols) / cols
                scale = types.float32(1 / math.sqrt(mean + f32_at(args, 2 * EPS)))
                norm(source + at, load(args, WEIGHT) + at, scale, row + at, n)
            elif mode == 2:
                up = load(args, WEIGHT) + t * load(args, X_STRIDE) * 4
                gate(source + at, up + at, row + at, n)
            else:
                row = source
            if load(args, Q) != 0:
                column = t % columns
                g = t // columns * (cols // 32) * columns
                one, two = own + (g + column) * 4, own + (2 * g + column) * 4
                quantize(
                    row,
                    low,
                    middle,
                    high,
                    load(args, Q) + own + g * 32 + column * unit,
                    load(args, D) + one,
                    load(args, SUMS16) + two,
                    load(args, SUMS32) + one,
                    load(args, INTS16) + two,
                    load(args, INTS32) + one,
                )

    return part
