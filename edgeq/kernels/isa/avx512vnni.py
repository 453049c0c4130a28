"""x86-64 with AVX-512 F/BW/VL and VNNI (Ice Lake 2019, Zen 4 2022 and later)."""

from collections.abc import Sequence

from edgeq.kernels import isa as isas
from edgeq.kernels.isa import avx2, avxvnni
from edgeq.kernels.isa.avx2 import counted, flags, from_f16, pause, spread, stacked, starts, to_f16
from edgeq.kernels.llvm import I8, I32, Emit, Value, vector

__all__ = [
    "counted",
    "dot",
    "flags",
    "from_f16",
    "lookup",
    "pause",
    "shifted",
    "spread",
    "stacked",
    "starts",
    "to_f16",
]

NAME = "avx512vnni"
RANK = 40
NEEDS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "fma", "f16c"})
CPU = {"x86_64": "cascadelake"}
WIDTH = 64
TILE_COLS = 8
UNIT = 4
OFFSET = 128
ACROSS = False


def dot(e: Emit, acc: Value, w: Value, x: Value, signed: bool) -> Value:
    """vpdpbusd on 512 bits, or on 256 for a single group of 32."""
    if w.type.count != 64:
        return avxvnni.dot(e, acc, w, x, signed)
    words = [e.b.bitcast(v, vector(I32, 16)) for v in (w, x)]
    return e.call("llvm.x86.avx512.vpdpbusd.512", acc.type, [acc, *words])


def shifted(e: Emit, v: Value, shifts: Sequence[int], mask: int, low: int) -> Value:
    """One vgf2p8affineqb (Ice Lake, Zen 4) where neighbouring words are shifted alike: a bit matrix
    per eight bytes. Else vprorvd and vpandd.
    """
    n = len(shifts)
    if v.type.count == 64 and shifts[::2] == shifts[1::2] and "gfni" in isas.host_features():
        rows = range(low, low + mask.bit_length())
        places = [{7 - row: 1 << (row - low + s) for row in rows} for s in shifts[::2]]
        matrices = e.const(I8, [at.get(k, 0) for at in places for k in range(8)])
        return e.call("llvm.x86.vgf2p8affineqb.512", v.type, [v, matrices, I8(0)])
    words = e.b.bitcast(v, vector(I32, n))
    by = e.const(I32, [(shift - low) % 32 for shift in shifts])
    words = e.call(f"llvm.fshr.v{n}i32", words.type, [words, words, by])
    return e.b.and_(e.b.bitcast(words, v.type), e.fill(I8, v.type.count, mask << low))


def lookup(e: Emit, table: Sequence[int], index: Value) -> Value:
    """vpshufb on four quarters."""
    if index.type.count != 64:
        return avx2.lookup(e, table, index)
    return e.call("llvm.x86.avx512.pshuf.b.512", index.type, [e.const(I8, list(table) * 4), index])
