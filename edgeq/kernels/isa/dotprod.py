"""64-bit Arm with the dot-product extension (Cortex-A76: Raspberry Pi 5; Apple M1 and later)."""

from collections.abc import Sequence

from edgeq.kernels.isa import neon
from edgeq.kernels.isa.neon import flags, from_f16, lookup, pause, shifted, to_f16
from edgeq.kernels.llvm import I32, Emit, Value

__all__ = ["dot", "flags", "from_f16", "lookup", "pause", "shifted", "to_f16"]

NAME = "dotprod"
RANK = 20
NEEDS = frozenset({"neon", "dotprod"})
CPU = {"aarch64": "cortex-a76"}
WIDTH = 16
TILE_COLS = 8
UNIT = 4
OFFSET = 0
ACROSS = True


def dot(e: Emit, acc: Value, w: Value, x: Value, signed: bool) -> Value:
    """sdot."""
    if w.type.count != WIDTH:
        return neon.dot(e, acc, w, x, signed)
    return e.call("llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, [acc, w, x])


def sums(e: Emit, groups: Sequence[Sequence[tuple[Value, Value]]], peak: int) -> Value:
    """sdot, then addp between groups."""
    held = []
    for group in groups:
        acc = e.fill(I32, 4, 0)
        for w, x in group:
            acc = dot(e, acc, w, x, signed=True)
        held.append(acc)
    for _ in range(2):
        held = [neon.pairs(e, a, b) for a, b in zip(held[::2], held[1::2] or held, strict=True)]
    return e.pick(e.join(held), range(len(groups)))
