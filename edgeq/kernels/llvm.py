"""The vocabulary that kernels are emitted in: LLVM IR over vectors of any width.

An `Emit` wraps one IRBuilder and one instruction set (a module of `edgeq.kernels.isa`). Everything
here is generic IR that LLVM lowers well on every target; what a target has special instructions for
is a word of the instruction set. Addresses are pointers plus byte offsets; offsets may be Python
integers or i64 values.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from llvmlite import ir

__all__ = ["F16", "F32", "I1", "I8", "I16", "I32", "I64", "PTR", "Emit", "vector"]

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
PTR = ir.PointerType()

# Multiplies may be contracted; NaN and infinity keep their meaning. Nothing is reordered: a column
# must give the same bits alone and among others.
FAST = ("contract", "nsz", "arcp")
Value = Any  # llvmlite values have no useful static type


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    """Vector type of `lanes` elements."""
    return ir.VectorType(element, lanes)


class Emit:
    """Emits vector IR through `b` for the instruction set `isa`."""

    def __init__(self, b: ir.IRBuilder, isa: ModuleType) -> None:
        self.b, self.isa = b, isa

    # -- constants ---------------------------------------------------------------------------------
    def i64(self, value: int | Value) -> Value:
        return I64(value) if isinstance(value, int) else value

    def const(self, element: ir.Type, values: Sequence[int | float]) -> Value:
        return ir.Constant(vector(element, len(values)), list(values))

    def fill(self, element: ir.Type, lanes: int, value: int | float) -> Value:
        return self.const(element, [value] * lanes)

    # -- memory ------------------------------------------------------------------------------------
    def pointer(self, address: Value) -> Value:
        """i64 address → pointer."""
        return self.b.inttoptr(address, PTR)

    def at(self, pointer: Value, offset: int | Value) -> Value:
        """Pointer `offset` bytes further."""
        return self.b.gep(pointer, [self.i64(offset)], source_etype=I8)

    def load(self, type_: ir.Type, pointer: Value, offset: int | Value = 0) -> Value:
        """Unaligned load."""
        return self.b.load(self.at(pointer, offset), align=1, typ=type_)

    def store(self, value: Value, pointer: Value, offset: int | Value = 0) -> None:
        """Unaligned store."""
        self.b.store(value, self.at(pointer, offset), align=1)

    def prefetch(self, pointer: Value, offset: int | Value, nbytes: int) -> None:
        """Ask for the cache lines of `nbytes` bytes, read once (low temporal locality)."""
        for line in range(0, nbytes, 64):
            where = self.at(self.at(pointer, offset), line)
            self.call("llvm.prefetch.p0", ir.VoidType(), [where, I32(0), I32(2), I32(1)])

    def unknown(self, element: ir.Type, lanes: int, value: int) -> Value:
        """Pointer to a constant in memory, which the optimizer does not see through. It takes this
        for something that may write to memory, so what is loaded from there stays behind it.
        """
        constant, module = self.fill(element, lanes, value), self.b.module
        name = f"edgeq.constant.{element}.{lanes}.{value}"
        place = module.globals.get(name)
        if place is None:
            place = ir.GlobalVariable(module, constant.type, name)
            place.linkage, place.global_constant, place.initializer = "private", True, constant
        return self.b.asm(ir.FunctionType(PTR, [PTR]), "", "=r,0", [place], False)

    def forget_memory(self) -> None:
        """Make the optimizer load again what it has loaded before; no instruction."""
        self.b.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)

    # -- vectors -----------------------------------------------------------------------------------
    def splat(self, scalar: Value, lanes: int) -> Value:
        undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
        first = self.b.insert_element(undefined, scalar, I32(0))
        return self.b.shuffle_vector(first, undefined, self.fill(I32, lanes, 0))

    def gather(self, scalars: Sequence[Value]) -> Value:
        """Scalars → vector."""
        out = ir.Constant(vector(scalars[0].type, len(scalars)), ir.Undefined)
        for lane, scalar in enumerate(scalars):
            out = self.b.insert_element(out, scalar, I32(lane))
        return out

    def pick(self, v: Value, lanes: Sequence[int], other: Value | None = None) -> Value:
        """Lanes of `v` (and, counted on, of `other`) in the given order."""
        if other is None and list(lanes) == list(range(v.type.count)):
            return v
        second = ir.Constant(v.type, ir.Undefined) if other is None else other
        return self.b.shuffle_vector(v, second, self.const(I32, list(lanes)))

    def join(self, parts: Sequence[Value]) -> Value:
        """Concatenation; the number of equal parts is a power of two."""
        while len(parts) > 1:
            n = parts[0].type.count
            parts = [self.pick(a, range(2 * n), b) for a, b in zip(parts[::2], parts[1::2])]
        return parts[0]

    def lane(self, v: Value, index: int) -> Value:
        return self.b.extract_element(v, I32(index))

    def halve_sum(self, v: Value) -> Value:
        """f32 vector → scalar sum."""
        n = v.type.count
        while n > 1:
            n //= 2
            low, high = self.pick(v, range(n)), self.pick(v, range(n, 2 * n))
            v = self.b.fadd(low, high, flags=FAST)
        return self.lane(v, 0)

    def transpose(self, rows: Sequence[Value]) -> list[Value]:
        """n vectors of n lanes → their transpose, by log2(n) rounds of interleaving."""
        n, vs = len(rows), list(rows)
        half = n // 2
        low = [x for i in range(half) for x in (i, n + i)]
        high = [x for i in range(half, n) for x in (i, n + i)]
        for _ in range(n.bit_length() - 1):
            pairs = [(vs[i], vs[i + half]) for i in range(half)]
            vs = [self.pick(a, order, b) for a, b in pairs for order in (low, high)]
        return vs

    # -- arithmetic --------------------------------------------------------------------------------
    def call(self, name: str, result: ir.Type, args: Sequence[Value]) -> Value:
        """Call an LLVM intrinsic (or external function) by its full name."""
        module = self.b.module
        fn = module.globals.get(name)
        if fn is None:
            fn = ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.b.call(fn, list(args))

    def unary(self, name: str, v: Value) -> Value:
        """`llvm.<name>` on a float scalar or vector."""
        return self.call(f"llvm.{name}.{_suffix(v.type)}", v.type, [v])

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self.call(f"llvm.fma.{_suffix(a.type)}", a.type, [a, b, c])

    def mul(self, a: Value, b: Value) -> Value:
        return self.b.fmul(a, b, flags=FAST)

    def add(self, a: Value, b: Value) -> Value:
        return self.b.fadd(a, b, flags=FAST)

    def sub(self, a: Value, b: Value) -> Value:
        return self.b.fsub(a, b, flags=FAST)

    def floats(self, v: Value) -> Value:
        """Signed integer lanes → f32 lanes."""
        return self.b.sitofp(v, vector(F32, v.type.count))

    def widen(self, v: Value, element: ir.Type, signed: bool) -> Value:
        to = vector(element, v.type.count)
        return self.b.sext(v, to) if signed else self.b.zext(v, to)

    def bits(self, v: Value, shift: int, mask: int) -> Value:
        """(v >> shift) & mask on unsigned integer lanes."""
        n, element = v.type.count, v.type.element
        if shift:
            v = self.b.lshr(v, self.fill(element, n, shift))
        full = (1 << element.width) - 1
        return v if mask >= full >> shift else self.b.and_(v, self.fill(element, n, mask))

    def bits_of_words(self, v: Value, shifts: Sequence[int], mask: int, low: int) -> Value:
        """((v >> shift) & mask) << low of i8 lanes; a shift per four of them."""
        if len(set(shifts)) == 1:
            v = self.bits(v, shifts[0], mask)
            return self.b.shl(v, self.fill(I8, v.type.count, low)) if low else v
        return self.isa.shifted(self, v, shifts, mask, low)

    # -- control -----------------------------------------------------------------------------------
    def loop(
        self,
        count: int | Value,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """`for i in range(count): carried = body(i, carried)`; values stay in registers. count may
        be 0.
        """
        b, start = self.b, self.b.block
        head, inner, done = (b.append_basic_block(part) for part in ("head", "inner", "done"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(I64(0), start)
        phis = [b.phi(v.type) for v in carried]
        for phi, v in zip(phis, carried):
            phi.add_incoming(v, start)
        b.cbranch(b.icmp_unsigned("<", index, self.i64(count)), inner, done)
        b.position_at_end(inner)
        results = body(index, list(phis))
        end = b.block
        index.add_incoming(b.add(index, I64(1)), end)
        for phi, v in zip(phis, results):
            phi.add_incoming(v, end)
        b.branch(head)
        b.position_at_end(done)
        return list(phis)

    def steps(
        self,
        count: Value,
        n: int,
        carried: Sequence[Value],
        body: Callable[[Value, int, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """carried = body(index of the first, how many, carried): `n` at a time, the rest one by
        one.
        """
        whole = self.b.sub(count, self.b.urem(count, self.i64(n)))

        def several(i: Value, values: list[Value]) -> Sequence[Value]:
            return body(self.b.mul(i, self.i64(n)), n, values)

        def single(i: Value, values: list[Value]) -> Sequence[Value]:
            return body(self.b.add(whole, i), 1, values)

        values = self.loop(self.b.udiv(count, self.i64(n)), carried, several)
        return self.loop(self.b.urem(count, self.i64(n)), values, single)


def _suffix(type_: ir.Type) -> str:
    if isinstance(type_, ir.VectorType):
        return f"v{type_.count}{_suffix(type_.element)}"
    names: dict[ir.Type, str] = {F16: "f16", F32: "f32", I8: "i8", I32: "i32"}
    return names[type_]
