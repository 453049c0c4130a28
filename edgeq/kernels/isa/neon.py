"""64-bit Arm without the dot-product extension (Cortex-A53, A72: Raspberry Pi 3, 4, Zero 2 W)."""

from collections.abc import Sequence
from functools import reduce

from llvmlite import ir

from edgeq.kernels.isa import portable
from edgeq.kernels.llvm import F16, F32, I8, I16, I32, Emit, Value, vector

NAME = "neon"
RANK = 10
NEEDS = frozenset({"neon"})
CPU = {"aarch64": "cortex-a72"}
WIDTH = 16
TILE_COLS = 8
UNIT = 32
OFFSET = 0
ACROSS = True

shifted = portable.shifted
starts, counted = portable.starts, portable.counted


def dot(e: Emit, acc: Value, w: Value, x: Value, signed: bool) -> Value:
    """smull, smull2, addp, sadalp. Two products fit 16 bits: |w| <= 128 and |x| <= 127."""
    if w.type.count != WIDTH:
        return portable.dot(e, acc, w, x, signed)
    halves = [_products(e, w, x, part) for part in (range(8), range(8, 16))]
    return e.b.add(acc, _wide_pairs(e, pairs(e, *halves)))


def sums(
    e: Emit, groups: Sequence[Sequence[tuple[Value, Value]]], peak: int, zeros: bool = False
) -> Value:
    """i32[groups]: sums over each group's w·x (i8[16] each), |w| <= peak and |x| <= 127.

    smull and smlal as long as products fit 16 bits, and so with addp between groups; then sadalp.
    """
    fits = 32767 // (127 * peak)  # products in a lane of 16 bits
    held = [_chained(e, group, fits // 2) for group in groups]
    count = 2 * len(groups[0])  # products in a lane, unless it is of 32 bits
    spread = held[0].type.count  # lanes of a group
    while spread > 1:
        if held[0].type.element == I16 and 2 * count > fits:
            held = [_wide_pairs(e, v) for v in held]
        else:
            held = [pairs(e, a, b) for a, b in zip(held[::2], held[1::2] or held, strict=True)]
        count, spread = 2 * count, spread // 2
    return e.pick(e.widen(e.join(held), I32, signed=True), range(len(groups)))


def _chained(e: Emit, group: Sequence[tuple[Value, Value]], most: int) -> Value:
    """i16[8] of a group if at most so many vectors make it up, else i32[4]."""
    chains = []
    for first in range(0, len(group), most):
        some = group[first : first + most]
        halves = [_products(e, *pair, part) for pair in some for part in (range(8), range(8, 16))]
        chains.append(reduce(e.b.add, halves))
    wide = chains if len(chains) == 1 else [_wide_pairs(e, chain) for chain in chains]
    return reduce(e.b.add, wide)


def _products(e: Emit, w: Value, x: Value, part: Sequence[int]) -> Value:
    """i16[8]: products of eight of the lanes."""
    args = [e.pick(w, part), e.pick(x, part)]
    return e.call("llvm.aarch64.neon.smull.v8i16", vector(I16, 8), args)


def pairs(e: Emit, a: Value, b: Value) -> Value:
    """Sums of two neighbours of a, then of b."""
    return e.call(f"llvm.aarch64.neon.addp.v{a.type.count}i{a.type.element.width}", a.type, [a, b])


def _wide_pairs(e: Emit, v: Value) -> Value:
    """i32[4]: sums of two neighbours of i16[8]."""
    return e.call("llvm.aarch64.neon.saddlp.v4i32.v8i16", vector(I32, 4), [v])


def neighbours(e: Emit, v: Value) -> Value:
    """i32[n/2]: sums of two neighbours of i16[n]."""
    parts = [e.pick(v, range(k, k + 8)) for k in range(0, v.type.count, 8)]
    return e.join([_wide_pairs(e, part) for part in parts])


def spread(e: Emit, kind: ir.Type, pointer: Value, count: int, lanes: int) -> list[Value]:
    """Lanes of a vector if one has them all; more would leave too few registers for products."""
    read = portable.spread if count > 4 else by_lane
    return read(e, kind, pointer, count, lanes)


def by_lane(e: Emit, kind: ir.Type, pointer: Value, count: int, lanes: int) -> list[Value]:
    """Lanes of whole vectors: fmul, fmla and sdot take one by its number."""
    n = min(count, 4)
    vectors = [e.load(vector(kind, n), pointer, 4 * k) for k in range(0, count, n)]
    return [e.pick(v, [k] * lanes) for v in vectors for k in range(n)]


def lookup(e: Emit, table: Sequence[int], index: Value) -> Value:
    """tbl."""
    if index.type.count != WIDTH:
        return portable.lookup(e, table, index)
    args = [e.const(I8, list(table)), index]
    return e.call("llvm.aarch64.neon.tbl1.v16i8", index.type, args)


def flags(e: Emit, word: Value) -> Value:
    """Each byte eight times, then a bit of each tested."""
    n = word.type.width
    spread = e.pick(e.b.bitcast(word, vector(I8, n // 8)), [k // 8 for k in range(n)])
    found = e.b.and_(spread, e.const(I8, [1 << k % 8 for k in range(n)]))
    zero = e.fill(I8, n, 0)
    return e.b.zext(e.b.icmp_unsigned("!=", found, zero), zero.type)


def missing(e: Emit, v: Value, shift: int) -> Value:
    """i8[16] of ones where a bit is not set. uabd, as LLVM moves any other inversion behind the
    test, of which there are more.
    """
    inverse = e.call("llvm.aarch64.neon.uabd.v16i8", v.type, [v, e.fill(I8, WIDTH, -1)])
    bit, zero = e.fill(I8, WIDTH, 1 << shift), e.fill(I8, WIDTH, 0)
    return e.b.sext(e.b.icmp_unsigned("!=", e.b.and_(inverse, bit), zero), v.type)


def signed(e: Emit, v: Value, shift: int, bits: int, above: Value) -> Value:
    """i8[16]: the lanes' `bits` from `shift` on, below `above`."""
    if shift + bits == 8:
        return e.call("llvm.aarch64.neon.vsri.v16i8", v.type, [above, v, I32(shift)])
    v = e.bits(v, shift, 0xFF)
    return e.call("llvm.aarch64.neon.vsli.v16i8", v.type, [v, above, I32(bits)])


def stacked(e: Emit, parts: Sequence[tuple[Value, int]], bits: Sequence[int]) -> Value:
    """sli, or sri where the first number is at the top of its byte; then what lies above both."""
    (low, start), (high, shift) = parts
    n = low.type.count
    if n not in (8, WIDTH):
        return portable.stacked(e, parts, bits)
    mask = e.fill(I8, n, (1 << sum(bits)) - 1)
    clean = sum(bits) == 8 or shift + bits[1] == 8
    if start and start + bits[0] == 8:
        by = bits[0] - shift
        high = e.b.shl(high, e.fill(I8, n, by)) if by > 0 else e.bits(high, -by, 0xFF)
        high = high if clean else e.b.and_(high, mask)
        return e.call(f"llvm.aarch64.neon.vsri.v{n}i8", high.type, [high, low, I32(start)])
    low, high = e.bits(low, start, 0xFF), e.bits(high, shift, 0xFF)
    v = e.call(f"llvm.aarch64.neon.vsli.v{n}i8", low.type, [low, high, I32(bits[0])])
    return v if clean else e.b.and_(v, mask)


def from_f16(e: Emit, v: Value) -> Value:
    """fcvtl: conversions need no half-precision arithmetic."""
    return e.b.fpext(v, vector(F32, v.type.count))


def to_f16(e: Emit, v: Value) -> Value:
    """fcvtn."""
    return e.b.fptrunc(v, vector(F16, v.type.count))


def pause(e: Emit) -> None:
    """yield is nothing on these cores; isb makes them wait a few cycles."""
    e.call("llvm.aarch64.isb", ir.VoidType(), [I32(15)])
