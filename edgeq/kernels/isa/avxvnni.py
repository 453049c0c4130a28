"""x86-64 with AVX-VNNI: 256-bit byte dot products (Alder Lake, Gracemont, Zen 5 and later)."""

from edgeq.kernels.isa import portable
from edgeq.kernels.isa.avx2 import (
    counted,
    flags,
    from_f16,
    lookup,
    pause,
    shifted,
    spread,
    stacked,
    starts,
    to_f16,
)
from edgeq.kernels.llvm import I32, Emit, Value, vector

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

NAME = "avxvnni"
RANK = 30
NEEDS = frozenset({"avx2", "fma", "f16c", "avxvnni"})
CPU = {"x86_64": "haswell"}
WIDTH = 32
TILE_COLS = 4
UNIT = 4
OFFSET = 128  # vpdpbusd multiplies unsigned by signed bytes: signed codes are shifted up
ACROSS = False


def dot(e: Emit, acc: Value, w: Value, x: Value, signed: bool) -> Value:
    """vpdpbusd. The i32-vector signature of older LLVM is accepted by newer ones too."""
    if w.type.count != 32:
        return portable.dot(e, acc, w, x, False)
    words = [e.b.bitcast(v, vector(I32, 8)) for v in (w, x)]
    return e.call("llvm.x86.avx512.vpdpbusd.256", acc.type, [acc, *words])
