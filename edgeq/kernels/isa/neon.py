"""64-bit Arm without the dot-product extension (Cortex-A53, A72: Raspberry Pi 3, 4, Zero 2 W)."""

from collections.abc import Sequence

from llvmlite import ir

from edgeq.kernels.isa import portable
from edgeq.kernels.llvm import F16, F32, I8, I16, I32, Emit, Value, vector

NAME = "neon"
RANK = 10
NEEDS = frozenset({"neon"})
CPU = {"aarch64": "cortex-a72"}
WIDTH = 16
TILE_COLS = 8
OFFSET = 0

shifted = portable.shifted


def dot(e: Emit, acc: Value, w: Value, x: Value, signed: bool) -> Value:
    """smull, smull2, addp, sadalp. Two products fit 16 bits: |w| <= 128 and |x| <= 127."""
    if w.type.count != WIDTH:
        return portable.dot(e, acc, w, x, signed)
    halves = []
    for part in (range(8), range(8, 16)):
        args = [e.pick(w, part), e.pick(x, part)]
        halves.append(e.call("llvm.aarch64.neon.smull.v8i16", vector(I16, 8), args))
    pairs = e.call("llvm.aarch64.neon.addp.v8i16", vector(I16, 8), halves)
    quads = e.call("llvm.aarch64.neon.saddlp.v4i32.v8i16", vector(I32, 4), [pairs])
    return e.b.add(acc, quads)


def lookup(e: Emit, table: Sequence[int], index: Value) -> Value:
    """tbl."""
    if index.type.count != WIDTH:
        return portable.lookup(e, table, index)
    args = [e.const(I8, list(table)), index]
    return e.call("llvm.aarch64.neon.tbl1.v16i8", index.type, args)


def from_f16(e: Emit, v: Value) -> Value:
    """fcvtl: conversions need no half-precision arithmetic."""
    return e.b.fpext(v, vector(F32, v.type.count))


def to_f16(e: Emit, v: Value) -> Value:
    """fcvtn."""
    return e.b.fptrunc(v, vector(F16, v.type.count))


def pause(e: Emit) -> None:
    """yield is nothing on these cores; isb makes them wait a few cycles."""
    e.call("llvm.aarch64.isb", ir.VoidType(), [I32(15)])
