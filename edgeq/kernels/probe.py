"""Limits of the machine, measured with the instructions that the kernels use: read bandwidth, byte
dot products.
"""

from types import ModuleType
from typing import Any

from edgeq.kernels.layout import DOT_CHAINS, PREFETCH
from edgeq.kernels.llvm import I8, I32, Emit, Value, vector
from edgeq.kernels.words import emitted, load

__all__ = ["probe_dot", "probe_read"]

LINES = 8  # cache lines per step


def probe_read(isa: ModuleType) -> Any:
    """Each thread sums its share of memory: args [address, bytes, sums (64 bytes each)]."""

    def emit(e: Emit, memory: Value, steps: Value, out: Value) -> None:
        lane, width = vector(I32, e.isa.WIDTH // 4), e.isa.WIDTH
        source = e.pointer(memory)

        def step(i: Value, sums: list[Value]) -> list[Value]:
            at = e.at(source, e.b.mul(i, e.i64(64 * LINES)))
            e.prefetch(at, PREFETCH, 64 * LINES)
            loaded = [e.load(lane, at, k) for k in range(0, 64 * LINES, width)]
            return [e.b.add(s, _sum(e, loaded[k :: len(sums)])) for k, s in enumerate(sums)]

        zero = e.fill(I32, e.isa.WIDTH // 4, 0)
        e.store(_sum(e, e.loop(steps, [zero] * 4, step)), e.pointer(out))

    read = emitted(isa, emit, "iii")

    def kernel(args, thread, threads):
        steps = load(args, 1) // (64 * LINES)
        first, last = steps * thread // threads, steps * (thread + 1) // threads
        read(load(args, 0) + first * 64 * LINES, last - first, load(args, 2) + 64 * thread)

    return kernel


def _sum(e: Emit, values: list[Value]) -> Value:
    total = values[0]
    for v in values[1:]:
        total = e.b.add(total, v)
    return total


def probe_dot(isa: ModuleType) -> Any:
    """Each thread: args [steps, operands (64 bytes for each chain, and 64 more), sums as above]; a
    step is DOT_CHAINS independent dot products with one operand in a register and one in L1.
    """

    def emit(e: Emit, steps: Value, operands: Value, out: Value) -> None:
        lanes = e.isa.WIDTH // 4
        kind, source = vector(I8, 4 * lanes), e.pointer(operands)
        w = e.load(kind, source, 64 * DOT_CHAINS)

        def step(i: Value, acc: list[Value]) -> list[Value]:
            e.forget_memory()  # else what does not depend on acc is multiplied only once
            xs = [e.load(kind, source, 64 * k) for k in range(DOT_CHAINS)]
            return [e.isa.dot(e, a, w, x, False) for a, x in zip(acc, xs, strict=True)]

        start = [e.fill(I32, lanes, k) for k in range(DOT_CHAINS)]
        e.store(_sum(e, e.loop(steps, start, step)), e.pointer(out))

    run = emitted(isa, emit, "iii")

    def kernel(args, thread, threads):
        run(load(args, 0), load(args, 1), load(args, 2) + 64 * thread)

    return kernel
