"""Kernels compiled here for Arm boards: they compile, use the instructions that the board has, and
call nothing. Whether they compute the right thing is seen in test_kernels_words, _dot, _rows and
_matmul, where the emulator is installed.
"""

import kernelkit as kit
import pytest
from armcode import ISA as CPUS
from armcode import (
    assembly,
    counted,
    cycles_of,
    mnemonics,
    panel_assembly,
    row_assembly,
    row_kernel,
    stack_accesses,
    tile_assembly,
    tile_kernel,
    tile_products,
    tool,
)

from edgeq import blocks
from edgeq.kernels import rows
from edgeq.kernels.llvm import F32, Emit, Value, vector

QUANTIZED = [name for name in kit.FORMATS if blocks.get(name).value != "x"]
PLAIN = [name for name in kit.FORMATS if blocks.get(name).value == "x"]

DOTS_CPUS = [cpu for cpu in CPUS if CPUS[cpu] != "neon"]
# Instructions per 256 weights of a row: a few more than there are, to notice if they become many.
INSTRUCTIONS = {
    "Q4_0": 110, "Q4_1": 130, "Q5_0": 185, "Q5_1": 210, "Q8_0": 96, "Q2_K": 130, "Q3_K": 145,
    "Q4_K": 112, "Q5_K": 135, "Q6_K": 145, "IQ4_NL": 120, "IQ4_XS": 117,
}  # fmt: skip
SHARES = {
    "Q8_0": (0.75, 0.65), "Q4_0": (0.75, 0.65), "Q4_K": (0.75, 0.65), "Q5_K": (0.75, 0.65),
    "Q6_K": (0.75, 0.57), "Q3_K": (1.35, 0.65), "Q2_K": (1.56, 0.65),
}  # fmt: skip

each_cpu = pytest.mark.parametrize("cpu", CPUS)


DOTS = {"dotprod": "sdot", "i8mm": "sdot"}  # what instruction sets multiply rows with
TILES = {"dotprod": "sdot", "i8mm": "smmla"}


def check_integer(found: set[str], wanted: str | None) -> None:
    """What does products of bytes where there is such; elsewhere widening multiplies and sums."""
    assert not found & {"bl", "blr"}
    if wanted:
        assert wanted in found
    else:
        assert not found & {"sdot", "udot", "usdot", "smmla"}
        assert found & {"smull", "smlal"}
        assert found & {"sadalp", "saddlp", "addp"}


@pytest.mark.parametrize("name", QUANTIZED)
@each_cpu
def test_row_dot(cpu: str, name: str) -> None:
    found = mnemonics(row_assembly(name, cpu))
    check_integer(found, DOTS.get(CPUS[cpu]))
    assert CPUS[cpu] in DOTS or found & {"smull2", "smlal2"}
    assert "prfm" in found
    if blocks.get(name).table:
        assert found & {"tbl", "tbl.16b"}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("cpu", DOTS_CPUS)
def test_inner_loops(cpu: str, name: str) -> None:
    """All products are in one loop, which keeps everything in registers."""
    for found in (row_kernel(name, cpu), tile_kernel(name, cpu)):
        assert found.products % 256 == 0
        assert stack_accesses(found.inner) == 0
    assert counted(row_kernel(name, cpu), 256) <= INSTRUCTIONS[name]


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.skipif(tool() is None, reason="needs llvm-mca of LLVM 20 or newer")
def test_cycles(name: str) -> None:
    """Rows on a Cortex-A76 take this share of the cycles in which a Raspberry Pi 5 delivers them to
    each of two threads (2.75 bytes per cycle); tiles reach this share of 32 products per cycle.
    """
    cpu, fmt, wanted = "cortex-a76", blocks.get(name), tile_products("cortex-a76")
    memory = 256 / fmt.block * fmt.bytes / 2.75
    row = cycles_of(row_kernel(name, cpu), 256, cpu) / memory
    tile = wanted / cycles_of(tile_kernel(name, cpu), wanted, cpu) / 32
    assert row <= SHARES[name][0]
    assert tile >= SHARES[name][1]


@pytest.mark.skipif(tool() is None, reason="needs llvm-mca of LLVM 20 or newer")
def test_cycles_of_floats() -> None:
    """Tiles reach 95 % of two fmla of four per cycle."""
    cpu, wanted = "cortex-a76", tile_products("cortex-a76")
    assert wanted / cycles_of(tile_kernel("F16", cpu), wanted, cpu) >= 0.95 * 8


@pytest.mark.parametrize("name", PLAIN)
@each_cpu
def test_float_row_dot(cpu: str, name: str) -> None:
    found = mnemonics(row_assembly(name, cpu))
    assert not found & {"bl", "blr"}
    assert any(word.startswith("fmla") for word in found)
    if name == "F16":
        assert found & {"fcvtl", "fcvtl2"}


@pytest.mark.parametrize("name", QUANTIZED)
@each_cpu
def test_panel_and_tile(cpu: str, name: str) -> None:
    unpacking = mnemonics(panel_assembly(name, cpu))
    assert not unpacking & {"bl", "blr"}
    assert any(word.startswith(("zip", "trn", "uzp")) for word in unpacking)
    check_integer(mnemonics(tile_assembly(name, cpu)), TILES.get(CPUS[cpu]))


@pytest.mark.parametrize("name", PLAIN)
@each_cpu
def test_float_panel_and_tile(cpu: str, name: str) -> None:
    assert not mnemonics(panel_assembly(name, cpu)) & {"bl", "blr"}
    found = mnemonics(tile_assembly(name, cpu))
    assert not found & {"bl", "blr"}
    assert any(word.startswith("fmla") for word in found)


@each_cpu
def test_row_functions(cpu: str) -> None:
    """Softmax, gate, norm and quantization become straight code, without a math library."""

    def softmax(e: Emit, s: Value, valid: Value, stats: Value) -> None:
        rows.softmax_row(e, e.pointer(s), valid, e.pointer(stats))

    def gate(e: Emit, g: Value, up: Value, out: Value, n: Value) -> None:
        rows.silu_gate(e, e.pointer(g), e.pointer(up), e.pointer(out), n)

    def quantize(e: Emit, x: Value, *v: Value) -> None:
        rows.quantize_row(e, e.pointer(x), v[:3], [*map(e.pointer, v[3:])], columns=8)

    for emit, arguments in ((softmax, "iii"), (gate, "iiii"), (quantize, "i" * 10)):
        assert not mnemonics(assembly(emit, arguments, cpu)) & {"bl", "blr"}


@each_cpu
def test_halves_convert_in_hardware(cpu: str) -> None:
    def emit(e: Emit, x: Value, out: Value) -> None:
        v = e.isa.to_f16(e, e.load(vector(F32, 4), e.pointer(x)))
        e.store(v, e.pointer(out))
        e.store(e.isa.from_f16(e, v), e.pointer(out), 8)

    found = mnemonics(assembly(emit, "ii", cpu))
    assert {"fcvtn", "fcvtl"} <= found
    assert not found & {"bl", "blr"}


@each_cpu
def test_spin_hint(cpu: str) -> None:
    assert "isb" in mnemonics(assembly(lambda e: e.isa.pause(e), "", cpu))
