"""A rotation that spreads outliers over a head before it is quantized: the Hadamard matrix.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456): with H orthonormal, symmetric and its own inverse,
(H q) · (H k) = q · k, and H (sum of p · H v) = sum of p · v.
"""

import math
from types import ModuleType
from typing import Any

from numba import types

from edgeq.kernels.llvm import F32, Emit, Value, vector
from edgeq.kernels.words import emitted

__all__ = ["hadamard"]


def hadamard(isa: ModuleType) -> Any:
    """Numba function turn(x, dim, size): blocks of `size` (a power of two that divides dim) of
    f32[dim] times H, in place, by log2(size) rounds of sums and differences.
    """
    from numba import njit

    lanes = isa.WIDTH // 4

    def within(e: Emit, x: Value, dim: Value, factor: Value) -> None:
        _within(e, e.pointer(x), dim, factor, lanes)

    def scaled(e: Emit, x: Value, dim: Value, factor: Value) -> None:
        _within(e, e.pointer(x), dim, factor, 1)

    def across(e: Emit, x: Value, dim: Value, gap: Value) -> None:
        _across(e, e.pointer(x), dim, gap, lanes)

    def singly(e: Emit, x: Value, dim: Value, gap: Value) -> None:
        _across(e, e.pointer(x), dim, gap, 1)

    first, first_single = emitted(isa, within, "iif"), emitted(isa, scaled, "iif")
    later, later_single = emitted(isa, across, "iii"), emitted(isa, singly, "iii")

    @njit(nogil=True, error_model="numpy", forceinline=True)
    def turn(x, dim, size):
        if size < 2:
            return
        factor = types.float32(1 / math.sqrt(size))
        if size >= lanes:
            first(x, dim, factor)
            gap = lanes
            while gap < size:
                later(x, dim, gap)
                gap *= 2
        else:
            first_single(x, dim, factor)
            gap = 1
            while gap < size:
                later_single(x, dim, gap)
                gap *= 2

    return turn


def _within(e: Emit, x: Value, dim: Value, factor: Value, lanes: int) -> None:
    """x · factor, and the rounds whose pairs lie in one vector."""

    def step(i: Value, _: list[Value]) -> list[Value]:
        at = e.b.mul(i, e.i64(4 * lanes))
        v = e.b.fmul(e.load(vector(F32, lanes), x, at), e.splat(factor, lanes))
        gap = 1
        while gap < lanes:
            signs = e.const(F32, [-1.0 if k & gap else 1.0 for k in range(lanes)])
            v = e.fma(v, signs, e.pick(v, [k ^ gap for k in range(lanes)]))
            gap *= 2
        e.store(v, x, at)
        return []

    e.loop(e.b.udiv(dim, e.i64(lanes)), [], step)


def _across(e: Emit, x: Value, dim: Value, gap: Value, lanes: int) -> None:
    """One round: (a, b) become (a + b, a - b) for pairs `gap` apart."""

    def step(i: Value, _: list[Value]) -> list[Value]:
        index = e.b.mul(i, e.i64(lanes))
        at = e.b.add(e.b.mul(e.b.udiv(index, gap), gap), index)
        low = e.at(x, e.b.mul(at, e.i64(4)))
        high = e.at(low, e.b.mul(gap, e.i64(4)))
        a, b = (e.load(vector(F32, lanes), p) for p in (low, high))
        e.store(e.b.fadd(a, b), low)
        e.store(e.b.fsub(a, b), high)
        return []

    e.loop(e.b.udiv(dim, e.i64(2 * lanes)), [], step)
