"""64-bit Arm with the dot-product extension (Cortex-A76: Raspberry Pi 5; Apple M1 and later)."""

from collections.abc import Sequence

from edgeq.kernels.isa import neon
from edgeq.kernels.isa.neon import (
    flags,
    from_f16,
    lookup,
    missing,
    neighbours,
    pause,
    shifted,
    signed,
    stacked,
    to_f16,
)
from edgeq.kernels.llvm import F32, I16, I32, Emit, Value, vector

__all__ = [
    "counted",
    "dot",
    "flags",
    "from_f16",
    "lookup",
    "missing",
    "neighbours",
    "pause",
    "shifted",
    "signed",
    "spread",
    "stacked",
    "starts",
    "sums",
    "to_f16",
]

NAME = "dotprod"
RANK = 20
NEEDS = frozenset({"neon", "dotprod"})
CPU = {"aarch64": "cortex-a76"}
WIDTH = 16
TILE_COLS = 8
UNIT = 4
OFFSET = 0
ACROSS = True
MAGIC = 0x4B400000  # bits of 1.5 * 2^23: beside it an f32 holds integers as they are

spread = neon.by_lane


def dot(e: Emit, acc: Value, w: Value, x: Value, signed: bool) -> Value:
    """sdot."""
    if w.type.count != WIDTH:
        return neon.dot(e, acc, w, x, signed)
    return e.call("llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, [acc, w, x])


def sums(
    e: Emit, groups: Sequence[Sequence[tuple[Value, Value]]], peak: int, zeros: bool = False
) -> Value:
    """sdot, then addp between groups. With `zeros`, sums start with zeros from memory: a constant
    is copied by the pipes that multiply. For kernels that have loads to spare.
    """
    held = [e.fill(I32, 4, 0)] * len(groups)
    if zeros:
        held = _loaded(e, 0, len(groups), 4)
    for k, group in enumerate(groups):
        for w, x in group:
            held[k] = dot(e, held[k], w, x, signed=True)
    if 127 * 16 * len(groups[0]) * peak < 1 << 15 and len(held) > 1:
        held = [_halved(e, a, b) for a, b in zip(held[::2], held[1::2], strict=True)]
    for _ in range(2):
        held = [neon.pairs(e, a, b) for a, b in zip(held[::2], held[1::2] or held, strict=True)]
    return e.pick(e.widen(e.join(held), I32, signed=True), range(len(groups)))


def _loaded(e: Emit, value: int, count: int, lanes: int) -> list[Value]:
    """i32[lanes] of `value`, so many times, each loaded."""
    place = e.unknown(I32, count * lanes, value)
    return [e.load(vector(I32, lanes), place, 4 * lanes * k) for k in range(count)]


def _halved(e: Emit, a: Value, b: Value) -> Value:
    """uzp1: i16[8] of the sums in a, then of those in b."""
    halves = [e.b.bitcast(v, vector(I16, 8)) for v in (a, b)]
    return e.pick(halves[0], range(0, 16, 2), halves[1])


def starts(e: Emit, count: int, lanes: int) -> list[Value]:
    """MAGIC, from memory: see `sums`."""
    return _loaded(e, MAGIC, count, lanes)


def counted(e: Emit, total: Value) -> Value:
    """fsub, where scvtf would take one pipe for two cycles."""
    lanes = total.type.count
    base = e.b.bitcast(e.fill(I32, lanes, MAGIC), vector(F32, lanes))
    return e.b.fsub(e.b.bitcast(total, base.type), base)
