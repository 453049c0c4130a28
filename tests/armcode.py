"""What the kernels become on cores of Arm boards: assembly of the rows of decoding and of the tiles
of prefill, their innermost loops, and what llvm-mca says these cost.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import armkit
import kernelkit as kit

from edgeq import blocks
from edgeq.kernels import isa as isas
from edgeq.kernels.dot import Column, Reader, row_dots
from edgeq.kernels.llvm import Emit, Value
from edgeq.kernels.panel import quant_panel
from edgeq.kernels.tile import float_panel, float_tile, quant_tile

TOOLS = ("llvm-mca-22", "llvm-mca-21", "llvm-mca-20")
SCHEDULE = {
    "cortex-a53": ["-mcpu=cortex-a53"],
    "cortex-a72": ["-mcpu=cortex-a72"],  # LLVM's model of the Cortex-A57
    # LLVM schedules for the A76 as for the A57. The Neoverse N1 is an A76 with another cache; its
    # table says 3 micro-ops per cycle where Arm's guide says 4 instructions, 8 micro-ops.
    "cortex-a76": ["-mcpu=neoverse-n1", "-dispatch=4"],
}
ISA = {
    "cortex-a53": "neon",
    "cortex-a72": "neon",
    "cortex-a76": "dotprod",
    "apple-a15": "i8mm",
}
AHEAD = 4096
DOTS = {"dot": 16, "mmla": 32, "mull": 8, "mlal": 8}  # products of an instruction
PRODUCTS = re.compile(r"\t(?:s|u|us|su)(dot|mmla|mull|mlal)2?\tv\d+\.(?:4s, v\d+\.16b|8h)")
FLOATS = re.compile(r"\tfmla\tv\d+\.4s")
LABEL = re.compile(r"^(\.LBB\w+):", re.MULTILINE)
BACK = re.compile(r"^\t(?:b\.\w+|cbn?z|tbn?z|b)\t(?:.*, )?(\.LBB\w+)$", re.MULTILINE)


# -- compiling -------------------------------------------------------------------------------------
def assembly(emit: Callable[..., Any], arguments: str, cpu: str, *, result: bool = False) -> str:
    """Of an emitted function; letters as words.emitted."""
    module = kit.build(emit, arguments, isas.modules()[ISA[cpu]], result)
    module.triple = armkit.TRIPLE
    machine = armkit.machine(cpu)
    return str(machine.emit_assembly(kit.optimized(module, machine)))


@cache
def row_assembly(name: str, cpu: str) -> str:
    """Of a row times a column."""

    def emit(e: Emit, w: Value, cols: Value, *arrays: Value) -> Value:
        row = Reader(e.pointer(w), e.i64(AHEAD))
        return row_dots(e, blocks.get(name), row, [Column(*map(e.pointer, arrays))], cols)[0]

    return assembly(emit, "iiiii", cpu, result=True)


@cache
def tile_assembly(name: str, cpu: str) -> str:
    """Of a panel of rows times TILE_COLS columns."""
    fmt = blocks.get(name)

    def quantized(e: Emit, *args: Value) -> None:
        *given, cols, out = args
        quant_tile(e, fmt, *map(e.pointer, given), cols, e.pointer(out))

    def plain(e: Emit, panel: Value, x: Value, cols: Value, out: Value) -> None:
        float_tile(e, e.pointer(panel), e.pointer(x), 4096, cols, e.pointer(out))

    return assembly(plain, "iiii", cpu) if fmt.value == "x" else assembly(quantized, "i" * 8, cpu)


@cache
def panel_assembly(name: str, cpu: str) -> str:
    """Of unpacking a panel of rows."""
    fmt = blocks.get(name)

    def quantized(e: Emit, w: Value, stride: Value, rows: Value, cols: Value, *out: Value) -> None:
        quant_panel(e, fmt, e.pointer(w), stride, rows, cols, *map(e.pointer, out))

    def plain(e: Emit, w: Value, stride: Value, rows: Value, cols: Value, out: Value) -> None:
        float_panel(e, fmt, e.pointer(w), stride, rows, cols, e.pointer(out))

    return assembly(plain, "iiiii", cpu) if fmt.value == "x" else assembly(quantized, "i" * 8, cpu)


# -- reading ---------------------------------------------------------------------------------------
def mnemonics(text: str) -> set[str]:
    return set(re.findall(r"^\t([a-z][a-z0-9.]*)(?=\t|\n)", text, re.MULTILINE))


def instructions(text: str) -> int:
    return len(re.findall(r"^\t[a-z]", text, re.MULTILINE))


def products(text: str, *, floats: bool = False) -> int:
    """Weights times activations that instructions multiply."""
    if floats:
        return 4 * len(FLOATS.findall(text))
    return sum(DOTS[m[1]] for m in PRODUCTS.finditer(text))


def stack_accesses(text: str) -> int:
    """Loads and stores of the stack: in a loop, registers that were spilled."""
    return len(re.findall(r"^\t(?:ld|st)\w+\t.*\[sp\b", text, re.MULTILINE))


def loops(text: str) -> Iterator[str]:
    """Each loop, from its label to the branch back to it."""
    starts = {m[1]: m.start() for m in LABEL.finditer(text)}
    for m in BACK.finditer(text):
        start = starts.get(m[1], m.end())
        if start < m.start():
            yield text[start : m.end()]


@dataclass(frozen=True)
class Kernel:
    """The loop that does the work, and what stands around it in the next larger loop ("": none)."""

    inner: str
    outer: str
    floats: bool

    @property
    def products(self) -> int:
        return products(self.inner, floats=self.floats)


def kernel(text: str, *, floats: bool = False) -> Kernel:
    """The innermost loop with the most products, and its parent."""
    found = sorted(loops(text), key=len)
    inner = [a for a in found if not any(b in a for b in found if b != a)]
    best = max(inner, key=lambda loop: products(loop, floats=floats))
    parent = next((a for a in found if best in a and a != best), "")
    return Kernel(best, parent.replace(best, ""), floats)


# -- costs -----------------------------------------------------------------------------------------
@cache
def tool() -> str | None:
    """Path of llvm-mca (Debian: llvm-22), new enough to know these cores."""
    return next((found for found in map(shutil.which, TOOLS) if found), None)


def command(cpu: str, passes: int) -> list[str]:
    """llvm-mca for a core; code is read from its input."""
    features = "-mattr=+dotprod,+fullfp16" if ISA[cpu] != "neon" else "-mattr=+neon"
    return [str(tool()), "-mtriple=aarch64", *SCHEDULE[cpu], features, f"-iterations={passes}"]


def code_of(text: str) -> str:
    """Instructions alone."""
    return "\n".join(line for line in text.splitlines() if re.match(r"\t[a-z]", line))


@cache
def cycles(loop: str, cpu: str, passes: int = 200) -> float:
    """Cycles of a pass through a loop in the long run, by llvm-mca."""
    done = subprocess.run(
        command(cpu, passes), input=code_of(loop), capture_output=True, text=True, check=True
    )
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert total
    return int(total[1]) / passes


def cycles_of(found: Kernel, wanted: int, cpu: str) -> float:
    """Cycles of so many products, of which a pass of the outer loop does no more or fewer."""
    around = cycles(found.outer, cpu) if found.outer else 0.0
    return cycles(found.inner, cpu) * wanted / found.products + around


def counted(found: Kernel, wanted: int) -> float:
    """Instructions of so many products."""
    return instructions(found.inner) * wanted / found.products + instructions(found.outer)


def row_kernel(name: str, cpu: str) -> Kernel:
    """The loop of `row_assembly`; a pass has some times 256 weights."""
    return kernel(row_assembly(name, cpu), floats=blocks.get(name).value == "x")


def tile_kernel(name: str, cpu: str) -> Kernel:
    return kernel(tile_assembly(name, cpu), floats=blocks.get(name).value == "x")


def tile_products(cpu: str) -> int:
    """Of 256 columns of a tile."""
    isa = isas.modules()[ISA[cpu]]
    return 256 * int(isa.WIDTH) // 4 * int(isa.TILE_COLS)
