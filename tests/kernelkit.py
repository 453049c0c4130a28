"""What the tests of the kernels share: emitted code as Python functions, compiled kernels, packed
rows, activations, and memory that ends (or starts) at a forbidden page.
"""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import armkit
import llvmlite.binding as llvm
import numpy as np
from kvkit import PAIRS
from llvmlite import ir

from edgeq import blocks, kernels
from edgeq.kernels import cache as kernel_cache
from edgeq.kernels import isa as isas
from edgeq.kernels.llvm import F32, I64, Emit

ISAS = [isa.NAME for isa in isas.available()]
BEST = ISAS[0]
ARM = ["neon", "dotprod", "i8mm"] if armkit.HAVE_EMULATOR and isas.machine() == "x86_64" else []
EMITTED = ISAS + ARM  # those whose emitted code can be run, on the CPU or by an emulator
FORMATS = list(blocks.formats())
# One format per way that codes and scales are stored; other instruction sets than the best one run
# these as whole kernels, and all formats as emitted functions.
FAMILIES = ["F16", "Q4_0", "Q4_K", "Q6_K"]
QUERIES = (1, 2, 4, 8, 16)


def formats_of(isa: str) -> list[str]:
    """Formats of which an instruction set's whole kernels are tested."""
    return FORMATS if isa == BEST else FAMILIES


GATED = [("Q4_K", "Q4_K"), ("Q3_K", "Q6_K"), ("F16", "F16")]  # formats of the fused gate
Place = Callable[[np.ndarray], np.ndarray]  # copy of an array at a place of one's choice


# -- emitted code ----------------------------------------------------------------------------------
def build(emit: Callable[..., Any], arguments: str, isa: ModuleType, result: bool) -> ir.Module:
    """Module of one function `f` whose body is `emit(Emit, *values)`; letters as words.emitted."""
    module = ir.Module()
    kinds = [F32 if letter == "f" else I64 for letter in arguments]
    function = ir.Function(module, ir.FunctionType(F32 if result else ir.VoidType(), kinds), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    value = emit(Emit(builder, isa), *function.args)
    if result:
        builder.ret(value)
    else:
        builder.ret_void()
    return module


def optimized(module: ir.Module, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return parsed


def host_machine(isa: ModuleType, cpu: str | None = None) -> llvm.TargetMachine:
    """This CPU for the best instruction set; for others one that has no more than they need."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    features = ""
    if cpu is None and isa.NAME != BEST:
        cpu, features = isas.oldest(isa)
    elif cpu is None or cpu == "host":
        cpu, features = isas.target(isas.modules()[BEST])
    return target.create_target_machine(cpu=cpu, features=features, opt=3, jit=True)


def native(
    emit: Callable[..., Any],
    arguments: str,
    isa: str | ModuleType,
    *,
    result: bool = False,
    cpu: str | None = None,
) -> Callable[..., Any]:
    """Emitted code as a function of addresses, integers and floats; arrays stand for addresses."""
    isa = isas.modules()[isa] if isinstance(isa, str) else isa
    module = build(emit, arguments, isa, result)
    if isas.machine() not in isa.CPU:
        return foreign(module, arguments, isa, result)
    machine = host_machine(isa, cpu)
    engine = llvm.create_mcjit_compiler(optimized(module, machine), machine, use_lmm=True)
    engine.finalize_object()
    kinds = [ctypes.c_float if letter == "f" else ctypes.c_int64 for letter in arguments]
    address = engine.get_function_address("f")
    function = ctypes.CFUNCTYPE(ctypes.c_float if result else None, *kinds)(address)

    def call(*values: Any) -> Any:
        return function(*(v.ctypes.data if isinstance(v, np.ndarray) else v for v in values))

    call.engine, call.address = engine, address  # type: ignore[attr-defined]
    return call


def foreign(module: ir.Module, arguments: str, isa: ModuleType, result: bool) -> Any:
    """The same for an instruction set of Arm, by an emulator."""
    module.triple = armkit.TRIPLE
    machine = armkit.machine(*isas.oldest(isa))
    return armkit.emulated(machine.emit_object(optimized(module, machine)), arguments, result)


# -- compiled kernels ------------------------------------------------------------------------------
def kernel_names(isa: ModuleType) -> list[str]:
    """Kernels that tests of one instruction set run."""
    by_format = [
        f"{op}/{fmt}" for op in ("matvec", "matmul", "embed") for fmt in formats_of(isa.NAME)
    ]
    prepare = [f"prepare/{columns}" for columns in (1, isa.TILE_COLS)]
    gated = [f"gated/{'.'.join(pair)}" for pair in GATED]
    return [*by_format, *prepare, *gated, *attention_names(isa.NAME), "gather"]


def attention_names(isa: str) -> list[str]:
    """All widths with the usual types; of other types two widths where they would be used."""
    names = [f"attend/{n}.f16.f16" for n in QUERIES]
    names += [f"attend/{n}.{k}.{v}" for k, v in PAIRS[1:] for n in queries_of(isa, k)]
    return [*names, *(f"rope/{k}.{v}" for k, v in PAIRS)]


def queries_of(isa: str, kind: str) -> tuple[int, ...]:
    """Widths of the attention tile that are tested with a type of keys."""
    return QUERIES if kind == "f16" else (2, 8, 16) if isa == BEST else (4,)


@cache
def kernel(name: str, isa_name: str) -> Callable[..., None]:
    """kernel(args, thread, threads), compiled for its instruction set's own CPU."""
    isa = isas.modules()[isa_name]
    folder = kernel_cache.folder(isa)
    if kernel_cache.read(folder, name) is None:
        with _forced(isa), _alone(folder.parent):
            kernels.load({name: 0, **dict.fromkeys(kernel_names(isa))}, isa)
    entry = kernel_cache.read(folder, name)
    assert entry
    return kernel_cache.callable_at(_loader().add(*entry))


@cache
def _loader() -> kernel_cache.Loader:
    return kernel_cache.Loader()


@contextlib.contextmanager
def _forced(isa: ModuleType) -> Iterator[None]:
    """As a user forces an instruction set, except for the one that is chosen anyway."""
    before = os.environ.pop("EDGEQ_ISA", None)
    if isa.NAME != BEST:
        os.environ["EDGEQ_ISA"] = isa.NAME
    try:
        yield
    finally:
        os.environ.pop("EDGEQ_ISA", None)
        if before is not None:
            os.environ["EDGEQ_ISA"] = before


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One test process compiles, the others wait and find what it made."""
    try:
        import fcntl
    except ImportError:  # Windows: they compile the same twice
        yield
        return
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(name: str, isa: str, args: np.ndarray, threads: int) -> None:
    """Call a kernel as each of `threads` threads, the last one first."""
    for thread in reversed(range(threads)):
        kernel(name, isa)(args.ctypes.data, thread, threads)


# -- weights ---------------------------------------------------------------------------------------
def packed(fmt: blocks.BlockFormat, rows: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    """uint8[rows, row_bytes] with every code possible and scales of ordinary size."""
    lead = (rows, cols // fmt.block)
    fields = {}
    for name in fmt.fields:
        shape = (*lead, fmt.count(name)) if fmt.count(name) > 1 else lead
        if fmt.fields[name].type in ("f16", "bf16", "f32"):
            fields[name] = rng.normal(0, 0.02, shape).astype(np.float32)
        else:
            low, high = fmt.limits(name)
            fields[name] = rng.integers(low, high + 1, shape, dtype=np.int32)
    return blocks.pack(fields, fmt)


def filled(fmt: blocks.BlockFormat, cols: int, byte: int, scale: float) -> np.ndarray:
    """A row of equal bytes whose real numbers are all `scale`."""
    raw = np.full((1, blocks.row_bytes(fmt, cols)), byte, np.uint8)
    fields = blocks.unpack(raw, fmt)
    real = [name for name, field in fmt.fields.items() if field.type in ("f16", "bf16", "f32")]
    return blocks.pack({**fields, **{n: np.full_like(fields[n], scale) for n in real}}, fmt)


def reach(raw: np.ndarray, fmt: blocks.BlockFormat) -> np.ndarray:
    """float64 per weight: the largest magnitude it could have with any code. Rounding errors of
    sums go with it, because codes and minima are summed separately.
    """
    if fmt.value == "x":
        return np.abs(blocks.decode(raw, fmt)).astype(np.float64)
    fields = blocks.unpack(raw, fmt)
    low, high = fmt.limits("q")
    ends = (0, high) if fmt.table else (low, high)
    both = [
        blocks.decode(blocks.pack({**fields, "q": np.full_like(fields["q"], end)}, fmt), fmt)
        for end in ends
    ]
    return np.abs(np.array(both, np.float64)).sum(0)


# -- activations -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Codes:
    """Activations as kernels read them: int8 with a scale per 32."""

    q: np.ndarray  # int8 [tokens, cols]
    d: np.ndarray  # f32 [tokens, cols / 32]

    @property
    def values(self) -> np.ndarray:
        """float64 [tokens, cols]"""
        return self.q.astype(np.float64) * np.repeat(self.d.astype(np.float64), 32, axis=1)

    def named(self, sums: str) -> np.ndarray:
        """Sums by their name in layout.PREPARE."""
        kind, group = sums[:4], int(sums[4:])
        return self.sums(group) if kind == "sums" else self.negative(group)

    def sums(self, group: int) -> np.ndarray:
        """f32 [tokens, cols / group]: scale times the sum of a group's codes."""
        return -self.negative(group).astype(np.float32) * np.repeat(self.d, 32 // group, axis=1)

    def negative(self, group: int) -> np.ndarray:
        """i32 [tokens, cols / group]: minus the sum of a group's codes."""
        return -self.q.astype(np.int32).reshape(len(self.q), -1, group).sum(-1, dtype=np.int32)


def quantize(x: np.ndarray) -> Codes:
    """f32 [tokens, cols] by naive.quantize32's rule, all at once."""
    groups = x.reshape(len(x), -1, 32)
    peak = np.abs(groups).max(-1)
    inverse = np.where(peak > 1e-30, np.float32(127) / np.maximum(peak, np.float32(1e-30)), 0)
    q = np.rint(groups * inverse[..., None].astype(np.float32)).astype(np.int8)
    return Codes(q.reshape(x.shape), peak * np.float32(1 / 127))


def extreme(cols: int, sign: int = 0) -> Codes:
    """One row of the largest codes, all of a sign or with signs that give the largest sums of
    eight.
    """
    signs = np.full(cols, sign) if sign else np.where(np.arange(cols) // 8 % 3, 1, -1)
    return Codes((127 * signs).astype(np.int8)[None], np.full((1, cols // 32), 0.5, np.float32))


def in_order(q: np.ndarray, isa: str) -> np.ndarray:
    """Codes [tokens, cols] as row kernels read them. Where sums stay in their lanes, the words of
    four codes go in whole steps of 256 by (p0, i1, p1, half, i0, p2); p: part of 32, its bits from
    the low end; i: word of a half.
    """
    if isas.modules()[isa].ACROSS:
        return q
    tokens, cols = q.shape
    steps = cols // 256
    # Axes of a natural step: p2, p1, p0, half, i1, i0, byte.
    parts = q[:, : steps * 256].reshape(tokens, steps, 2, 2, 2, 2, 2, 2, 4)
    ordered = parts.transpose(0, 1, 4, 6, 3, 5, 7, 2, 8).reshape(tokens, -1)
    return np.concatenate([ordered, q[:, steps * 256 :]], axis=1)


def interleaved(a: np.ndarray, columns: int, unit: int = 1) -> np.ndarray:
    """[tokens, n] → [tiles][n / unit][columns][unit]; columns without a token are poison."""
    tokens, n = a.shape
    tiles = -(-tokens // columns)
    poison = np.nan if a.dtype == np.float32 else 0x55
    full = np.full((tiles * columns, n), poison, a.dtype)
    full[:tokens] = a
    return np.ascontiguousarray(full.reshape(tiles, columns, n // unit, unit).swapaxes(1, 2))


def separated(a: np.ndarray, columns: int, tokens: int, unit: int = 1) -> np.ndarray:
    """Inverse of `interleaved`, from flat memory."""
    tiles = -(-tokens // columns)
    n = a.size // (tiles * columns)
    rows = a.reshape(tiles, n // unit, columns, unit).swapaxes(1, 2).reshape(-1, n)
    return rows[:tokens]


# -- memory ----------------------------------------------------------------------------------------
def anywhere(a: np.ndarray) -> np.ndarray:
    """Copy with room on both sides, so that a wrong kernel does not take the test run with it."""
    margin = 1 << 16
    memory = np.zeros(a.nbytes + 2 * margin, np.uint8)
    copy = memory[margin : margin + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def fenced(a: np.ndarray, *, front: bool = False) -> np.ndarray:
    """Copy that ends where memory ends: the next byte (with `front`, the one before the first)
    is on a page that may not be touched. Linux and other POSIX systems.
    """
    page = mmap.PAGESIZE
    size = -(-max(a.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fence, offset = (start, page) if front else (start + size, size - a.nbytes)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(fence, page, 0) == 0
    copy = np.frombuffer(memory, np.uint8, a.nbytes, offset).view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy
