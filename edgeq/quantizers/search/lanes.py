"""Vectors of 16 floats as values inside Numba functions: the words the searches are written in.

A search handles 16 blocks at once, one per lane, so no step needs a sum across a vector and every
branch is a `select`. The words emit plain LLVM vector operations, so a machine with narrower
registers runs two or four instructions for each. Importing this imports Numba.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
HALF_MAX = 65504.0

_F32 = ir.FloatType()
_FLOATS = ir.VectorType(_F32, LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_BITS = ir.VectorType(ir.IntType(1), LANES)


class LaneType(types.Type):  # type: ignore[misc]
    """A Numba type whose values are LLVM vectors; they live in registers only."""

    def __init__(self, name: str, vector: ir.VectorType):
        self.vector = vector
        super().__init__(name=name)


@register_model(LaneType)
class _LaneModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, lane_type: LaneType):
        super().__init__(manager, lane_type, lane_type.vector)


floats = LaneType("floats16", _FLOATS)
mask = LaneType("mask16", _BITS)

Emit = Callable[..., ir.Value]


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    start = ir.Constant(_FLOATS, ir.Undefined)
    one = builder.insert_element(start, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, start, ir.Constant(_INTS, [0] * LANES))


def _ints(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def _lanes(context: Any, builder: ir.IRBuilder, kind: types.Type, value: ir.Value) -> ir.Value:
    """A scalar argument becomes 16 equal lanes."""
    if isinstance(kind, LaneType):
        return value
    return _splat(builder, context.cast(builder, value, kind, types.float32))


def _codegen(emit: Emit) -> Callable[..., ir.Value]:
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return emit(builder, *(_lanes(context, builder, *pair) for pair in zip(sig.args, args)))

    return codegen


def _unary(emit: Emit, result: LaneType = floats) -> Any:
    return intrinsic(lambda typing, a: (result(a), _codegen(emit)))


def _binary(emit: Emit, result: LaneType = floats) -> Any:
    return intrinsic(lambda typing, a, b: (result(a, b), _codegen(emit)))


def _ternary(emit: Emit, result: LaneType = floats) -> Any:
    return intrinsic(lambda typing, a, b, c: (result(a, b, c), _codegen(emit)))


def _llvm(name: str) -> Emit:
    """The LLVM intrinsic of this name on 16 floats."""

    def emit(builder: ir.IRBuilder, *args: ir.Value) -> ir.Value:
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(args))
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v16f32")
        return builder.call(function, args)

    return emit


def _compare(sign: str) -> Emit:
    return lambda builder, a, b: builder.fcmp_ordered(sign, a, b)


def _smaller(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _clip(builder: ir.IRBuilder, a: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    return _smaller(builder, _larger(builder, a, low), high)


def _half(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """Nearest f16 value, ties to even, kept as f32; large values saturate.

    In integer arithmetic, because a conversion instruction is not there on every machine.
    """
    a = _clip(builder, a, _constant(-HALF_MAX), _constant(HALF_MAX))
    bits = builder.bitcast(a, _INTS)
    odd = builder.and_(builder.lshr(bits, _ints(13)), _ints(1))
    rounded = builder.add(builder.add(bits, odd), _ints(0xFFF))
    normal = builder.bitcast(builder.and_(rounded, _ints(~0x1FFF)), _FLOATS)
    # Below 2^-14 the step is 2^-24, which is one unit in the last place of 0.75.
    shift = _constant(0.75)
    tiny = builder.fsub(builder.fadd(a, shift), shift)
    is_tiny = builder.fcmp_ordered("<", _llvm("fabs")(builder, a), _constant(2.0**-14))
    return builder.select(is_tiny, tiny, normal)


splat = _unary(lambda builder, a: a)
rint = _unary(_llvm("rint"))
sqrt = _unary(_llvm("sqrt"))
absolute = _unary(_llvm("fabs"))
half = _unary(_half)
smaller = _binary(_smaller)
larger = _binary(_larger)
clip = _ternary(_clip)
fma = _ternary(_llvm("fmuladd"))


@intrinsic
def select(typing, where, a, b):
    """Lanes of `a` where the mask holds, else of `b`."""

    def codegen(context, builder, sig, args):
        a, b = (_lanes(context, builder, sig.args[i], args[i]) for i in (1, 2))
        return builder.select(args[0], a, b)

    return floats(where, a, b), codegen


def is_flat(array: types.Type, dtype: types.Type) -> bool:
    """Whether an argument is a contiguous array of one dimension: all that the words may touch."""
    known = isinstance(array, types.Array) and array.dtype == dtype
    return known and array.ndim == 1 and array.layout == "C"


def address(
    context: Any, builder: ir.IRBuilder, array: types.Type, value: ir.Value, at: ir.Value
) -> ir.Value:
    """Of 16 items of a contiguous array, from item `at` on."""
    data = context.make_array(array)(context, builder, value).data
    vector = _FLOATS if array.dtype == types.float32 else _BYTES
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def row_address(
    context: Any, builder: ir.IRBuilder, array: types.Type, value: ir.Value, row: ir.Value
) -> ir.Value:
    """Of lane row `row` of a contiguous array."""
    at = builder.mul(row, ir.Constant(row.type, LANES))
    return address(context, builder, array, value, at)


@intrinsic
def load(typing, array, row):
    """Lane row `row` of a contiguous float32 array: elements 16 row .. 16 row + 15."""

    def codegen(context, builder, sig, args):
        return builder.load(row_address(context, builder, sig.args[0], *args), align=4)

    return (floats(array, types.intp), codegen) if is_flat(array, types.float32) else None


@intrinsic
def store(typing, array, row, value):
    """Writes `value` to lane row `row` of a contiguous float32 array."""

    def codegen(context, builder, sig, args):
        value = _lanes(context, builder, sig.args[2], args[2])
        builder.store(value, row_address(context, builder, sig.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    if not is_flat(array, types.float32):
        return None
    return types.void(array, types.intp, value), codegen


@intrinsic
def store_int8(typing, array, row, value):
    """Writes `value`, whole numbers in -128..127, to lane row `row` of a contiguous int8 array."""

    def codegen(context, builder, sig, args):
        value = builder.trunc(builder.fptosi(args[2], _INTS), _BYTES)
        builder.store(value, row_address(context, builder, sig.args[0], *args[:2]), align=1)
        return context.get_dummy_value()

    if not is_flat(array, types.int8) or value != floats:
        return None
    return types.void(array, types.intp, value), codegen


def _operator(symbol: Callable[..., Any], word: Any) -> None:
    @overload(symbol)
    def implement(a, b):
        if floats in (a, b):
            return lambda a, b: word(a, b)
        return None


for _symbol, _emit, _result in (
    (operator.add, lambda builder, a, b: builder.fadd(a, b), floats),
    (operator.sub, lambda builder, a, b: builder.fsub(a, b), floats),
    (operator.mul, lambda builder, a, b: builder.fmul(a, b), floats),
    (operator.truediv, lambda builder, a, b: builder.fdiv(a, b), floats),
    (operator.gt, _compare(">"), mask),
    (operator.lt, _compare("<"), mask),
):
    _operator(_symbol, _binary(_emit, _result))
