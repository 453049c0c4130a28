"""64-bit Arm with 8-bit matrix products (Cortex-X2, A710, Neoverse V1; Apple M2 and later).

Rows are those of dot products, of which memory allows no more; tiles multiply two rows with two
columns at once.
"""

from edgeq.kernels.isa.dotprod import (
    counted,
    dot,
    flags,
    from_f16,
    lookup,
    missing,
    neighbours,
    pause,
    shifted,
    signed,
    spread,
    stacked,
    starts,
    sums,
    to_f16,
)
from edgeq.kernels.llvm import Emit, Value

__all__ = [
    "counted",
    "dot",
    "flags",
    "from_f16",
    "lookup",
    "missing",
    "neighbours",
    "pause",
    "quads",
    "shifted",
    "signed",
    "spread",
    "stacked",
    "starts",
    "sums",
    "to_f16",
]

NAME = "i8mm"
RANK = 30
NEEDS = frozenset({"neon", "dotprod", "i8mm"})
CPU = {"aarch64": "cortex-a78"}  # the M2 has no SVE, others no SHA3
WIDTH = 16
TILE_COLS = 8
UNIT = 8
OFFSET = 0
ACROSS = True


def quads(e: Emit, acc: Value, w: Value, x: Value) -> Value:
    """smmla: acc i32[2][2] + sums over eight of two rows w times two columns x (i8[2][8])."""
    return e.call("llvm.aarch64.neon.smmla.v4i32.v16i8", acc.type, [acc, w, x])
