"""x86-64 with AVX2, FMA and F16C (Haswell 2013, Zen 2017 and later)."""

from collections.abc import Sequence

from llvmlite import ir

from edgeq.kernels.isa import portable
from edgeq.kernels.llvm import F16, F32, I8, I16, I32, Emit, Value, vector

NAME = "avx2"
RANK = 20
NEEDS = frozenset({"avx2", "fma", "f16c"})
CPU = {"x86_64": "haswell"}
WIDTH = 32
TILE_COLS = 4
UNIT = 4
OFFSET = 0
ACROSS = False

flags, shifted, stacked = portable.flags, portable.shifted, portable.stacked
spread, starts, counted = portable.spread, portable.starts, portable.counted


def dot(e: Emit, acc: Value, w: Value, x: Value, signed: bool) -> Value:
    """vpmaddubsw + vpmaddwd. Unsigned codes stay below 128, so the 16-bit pair sums cannot
    saturate.
    """
    if w.type.count != WIDTH:
        return portable.dot(e, acc, w, x, signed)
    if signed:
        x = e.call("llvm.x86.avx2.psign.b", x.type, [x, w])
        w = e.call("llvm.abs.v32i8", w.type, [w, ir.IntType(1)(0)])
    pairs = e.call("llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), [w, x])
    quads = e.call("llvm.x86.avx2.pmadd.wd", vector(I32, 8), [pairs, e.fill(I16, 16, 1)])
    return e.b.add(acc, quads)


def lookup(e: Emit, table: Sequence[int], index: Value) -> Value:
    """vpshufb, on both halves."""
    if index.type.count != WIDTH:
        return portable.lookup(e, table, index)
    return e.call("llvm.x86.avx2.pshuf.b", index.type, [e.const(I8, list(table) * 2), index])


def from_f16(e: Emit, v: Value) -> Value:
    """vcvtph2ps."""
    return e.b.fpext(v, vector(F32, v.type.count))


def to_f16(e: Emit, v: Value) -> Value:
    """vcvtps2ph."""
    return e.b.fptrunc(v, vector(F16, v.type.count))


def pause(e: Emit) -> None:
    """Tell the core that it spins."""
    e.call("llvm.x86.sse2.pause", ir.VoidType(), [])
