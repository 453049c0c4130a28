"""Numba's side of a kernel: machine words, atomics, and emitted code as functions that a kernel
body can call.

A kernel is `kernel(args, thread, threads)`: args is the address of its argument block (int64
words), and the body is plain loops over addresses. Nothing here allocates, raises or touches a
Python object.
"""

import inspect
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeq.kernels.llvm import F32, I64, PTR, Emit

__all__ = [
    "SIGNATURE",
    "add_at",
    "call0",
    "call3",
    "emitted",
    "f32_at",
    "f32_set",
    "i32_at",
    "load",
    "pause",
    "peek",
    "poke",
    "smaller",
    "store",
]

SIGNATURE = types.void(types.intp, types.intp, types.intp)
ORDER = "seq_cst"
_serial = itertools.count()  # two emitted functions may have the same Python name


def emitted(
    isa: ModuleType, emit: Callable[..., Any], arguments: str, *, result: bool = False
) -> Any:
    """Numba function whose body is `emit(Emit, *values)`; one letter per argument: i integer or
    address, f f32.

    With `result`, it returns the f32 that emit returns. It becomes an LLVM function of its own,
    inlined where LLVM sees fit.
    """
    kinds = [types.float32 if letter == "f" else types.intp for letter in arguments]
    returns = types.float32 if result else types.void
    name = f"edgeq.{emit.__qualname__}.{next(_serial)}"

    def define(typing_context, *args):
        def generate(context, builder, signature, values):
            module = builder.module
            function = module.globals.get(name) or _function(
                module, name, isa, emit, arguments, result
            )
            out = builder.call(function, values)
            return out if result else context.get_dummy_value()

        return returns(*kinds), generate

    # Numba folds arguments by signature and knows no *args here: give it names.
    names = ["typing_context", *(f"a{i}" for i in range(len(arguments)))]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    define.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
    return intrinsic(define)


def _function(
    module: ir.Module,
    name: str,
    isa: ModuleType,
    emit: Callable[..., Any],
    arguments: str,
    result: bool,
) -> ir.Function:
    kinds = [F32 if letter == "f" else I64 for letter in arguments]
    function = ir.Function(module, ir.FunctionType(F32 if result else ir.VoidType(), kinds), name)
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    value = emit(Emit(builder, isa), *function.args)
    if result:
        builder.ret(value)
    else:
        builder.ret_void()
    return function


def _slot(b: ir.IRBuilder, address: Any, index: Any, element: ir.Type) -> Any:
    return b.gep(b.inttoptr(address, PTR), [index], source_etype=element)


@intrinsic
def load(typing_context, address, index):
    """int64 word `index` of a block."""

    def generate(context, b, signature, args):
        return b.load(_slot(b, args[0], args[1], I64), align=8, typ=I64)

    return types.intp(types.intp, types.intp), generate


@intrinsic
def store(typing_context, address, index, value):
    """Set int64 word `index` of a block."""

    def generate(context, b, signature, args):
        b.store(args[2], _slot(b, args[0], args[1], I64), align=8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def smaller(typing_context, a, b):
    """Minimum of two words. (Numba's `min` is a call that may raise, and a kernel must not.)"""

    def generate(context, builder, signature, args):
        return builder.select(builder.icmp_signed("<", args[0], args[1]), args[0], args[1])

    return types.intp(types.intp, types.intp), generate


@intrinsic
def i32_at(typing_context, address, index):
    """Element of an int32 array."""

    def generate(context, b, signature, args):
        value = b.load(_slot(b, args[0], args[1], ir.IntType(32)), align=4, typ=ir.IntType(32))
        return b.sext(value, I64)

    return types.intp(types.intp, types.intp), generate


@intrinsic
def f32_at(typing_context, address, index):
    """Element of an f32 array."""

    def generate(context, b, signature, args):
        return b.load(_slot(b, args[0], args[1], F32), align=4, typ=F32)

    return types.float32(types.intp, types.intp), generate


@intrinsic
def f32_set(typing_context, address, index, value):
    """Set an element of an f32 array."""

    def generate(context, b, signature, args):
        b.store(args[2], _slot(b, args[0], args[1], F32), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), generate


@intrinsic
def add_at(typing_context, address, index, value):
    """Atomic fetch-and-add on an int64 word; returns the value before."""

    def generate(context, b, signature, args):
        return b.atomic_rmw("add", _slot(b, args[0], args[1], I64), args[2], ORDER)

    return types.intp(types.intp, types.intp, types.intp), generate


@intrinsic
def peek(typing_context, address, index):
    """Atomic load of an int64 word."""

    def generate(context, b, signature, args):
        return b.load_atomic(_slot(b, args[0], args[1], I64), ORDER, 8, typ=I64)

    return types.intp(types.intp, types.intp), generate


@intrinsic
def poke(typing_context, address, index, value):
    """Atomic store of an int64 word."""

    def generate(context, b, signature, args):
        # llvmlite's store_atomic does not take opaque pointers; an exchange does the same.
        b.atomic_rmw("xchg", _slot(b, args[0], args[1], I64), args[2], ORDER)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def call3(typing_context, function, args, thread, threads):
    """Call the kernel at an address."""

    def generate(context, b, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [I64] * 3)
        b.call(b.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), generate


@intrinsic
def call0(typing_context, function):
    """Call a C function without arguments at an address (sched_yield); its int result."""

    def generate(context, b, signature, values):
        kind = ir.FunctionType(ir.IntType(32), [])
        return b.sext(b.call(b.inttoptr(values[0], kind.as_pointer()), []), I64)

    return types.intp(types.intp), generate


def pause(isa: ModuleType) -> Any:
    """The instruction set's hint for spin loops."""

    @intrinsic
    def hint(typing_context):
        def generate(context, b, signature, values):
            isa.pause(Emit(b, isa))
            return context.get_dummy_value()

        return types.void(), generate

    return hint
