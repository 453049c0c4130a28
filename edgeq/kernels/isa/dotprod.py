"""64-bit Arm with the dot-product extension (Cortex-A76: Raspberry Pi 5; Apple M1 and later)."""

from edgeq.kernels.isa import neon
from edgeq.kernels.isa.neon import from_f16, lookup, pause, shifted, to_f16
from edgeq.kernels.llvm import Emit, Value

__all__ = ["dot", "from_f16", "lookup", "pause", "shifted", "to_f16"]

NAME = "dotprod"
RANK = 20
NEEDS = frozenset({"neon", "dotprod"})
CPU = {"aarch64": "cortex-a76"}
WIDTH = 16
TILE_COLS = 8
OFFSET = 0


def dot(e: Emit, acc: Value, w: Value, x: Value, signed: bool) -> Value:
    """sdot."""
    if w.type.count != WIDTH:
        return neon.dot(e, acc, w, x, signed)
    return e.call("llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, [acc, w, x])
