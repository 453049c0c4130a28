"""Kernels compiled here for Arm boards: they compile, use the instructions that the board has, and
call nothing. Whether they compute the right thing is seen in test_kernels_words, _dot, _rows and
_matmul, where the emulator is installed.
"""

import tomllib
from pathlib import Path

import kernelkit as kit
import pytest
from armboards import BOARDS
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

CORES = Path(__file__).resolve().parents[1] / "devices" / "cores"
QUANTIZED = [name for name in kit.FORMATS if blocks.get(name).value != "x"]
PLAIN = [name for name in kit.FORMATS if blocks.get(name).value == "x"]

DOTS_CPUS = [cpu for cpu in CPUS if CPUS[cpu] != "neon"]
# Instructions per 256 weights of a row: a few more than there are, to notice if they become many.
INSTRUCTIONS = {
    "Q4_0": 110, "Q4_1": 130, "Q5_0": 185, "Q5_1": 210, "Q8_0": 96, "Q2_K": 130, "Q3_K": 145,
    "Q4_K": 112, "Q5_K": 135, "Q6_K": 145, "IQ4_NL": 120, "IQ4_XS": 117,
}  # fmt: skip
# Of the cycles in which a board's memory delivers them: what rows take at most.
SHARES = {
    "cortex-a76": {
        "Q8_0": 0.75, "Q4_0": 0.75, "Q4_K": 0.75, "Q5_K": 0.75, "Q6_K": 0.75, "Q3_K": 1.35,
        "Q2_K": 1.49,
    },
    "cortex-a72": {"Q8_0": 1.0, "Q4_0": 1.0, "Q4_K": 1.0, "Q6_K": 1.0, "Q3_K": 1.0, "Q2_K": 1.0},
    "cortex-a53": {"Q8_0": 1.0, "Q4_0": 1.0, "Q4_K": 1.0, "Q6_K": 1.0, "Q3_K": 1.3, "Q2_K": 1.3},
}  # fmt: skip
# Of the peak of 32 products per cycle (of bytes), or of 8, which tiles reach.
TILES_REACH = {
    "cortex-a76": (32, {"Q8_0": 0.65, "Q4_0": 0.65, "Q4_K": 0.65, "Q5_K": 0.65, "Q6_K": 0.57,
                        "Q3_K": 0.65, "Q2_K": 0.65}),
    "cortex-a72": (8, {"Q8_0": 0.9, "Q4_0": 0.9, "Q4_K": 0.9, "Q6_K": 0.75, "Q3_K": 0.85,
                       "Q2_K": 0.8}),
    "cortex-a53": (8, {"Q8_0": 0.32, "Q4_0": 0.4, "Q4_K": 0.36, "Q6_K": 0.27, "Q3_K": 0.3,
                       "Q2_K": 0.3}),
}  # fmt: skip
SPILLED = {("cortex-a76", "Q3_K"): 1}
# Loads and stores of the stack on cores without sdot: rows, tiles.
STACK = {"cortex-a72": (1, 40), "cortex-a53": (5, 62)}

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
        assert stack_accesses(found.inner) <= SPILLED.get((cpu, name), 0)
    assert counted(row_kernel(name, cpu), 256) <= INSTRUCTIONS[name]


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("cpu", STACK)
def test_inner_loops_without_dot_products(cpu: str, name: str) -> None:
    """Sums are wider than codes there: some do not stay in registers."""
    row, tile = row_kernel(name, cpu), tile_kernel(name, cpu)
    assert row.products % 256 == 0
    assert stack_accesses(row.inner) <= STACK[cpu][0]
    assert stack_accesses(tile.inner) <= STACK[cpu][1]


@pytest.mark.parametrize(("cpu", "name"), [(cpu, name) for cpu in SHARES for name in SHARES[cpu]])
@pytest.mark.skipif(tool() is None, reason="needs llvm-mca of LLVM 20 or newer")
def test_cycles(cpu: str, name: str) -> None:
    """Rows take this share of the cycles in which a board's memory delivers them; tiles reach this
    share of what the core can multiply.
    """
    fmt, wanted, (peak, reached) = blocks.get(name), tile_products(cpu), TILES_REACH[cpu]
    [board] = [board for board in BOARDS if board.core == cpu]
    memory = 256 / fmt.block * fmt.bytes / board.bytes_per_cycle
    row = cycles_of(row_kernel(name, cpu), 256, cpu) / memory
    tile = wanted / cycles_of(tile_kernel(name, cpu), wanted, cpu) / peak
    assert row <= SHARES[cpu][name]
    assert tile >= reached[name]


@pytest.mark.parametrize(("cpu", "name"), [("cortex-a76", "Q4_K"), ("cortex-a53", "F16")])
@pytest.mark.skipif(tool() is None, reason="needs llvm-mca of LLVM 20 or newer")
def test_what_plans_use_is_what_kernels_cost(cpu: str, name: str) -> None:
    """devices/cores/ is written by tests/bench/arm.py --write."""
    kept = tomllib.loads((CORES / f"{cpu}.toml").read_text())
    wanted = tile_products(cpu)
    assert kept["row"][name] == pytest.approx(cycles_of(row_kernel(name, cpu), 256, cpu), abs=0.1)
    tile = wanted / cycles_of(tile_kernel(name, cpu), wanted, cpu)
    assert kept["tile"][name] == pytest.approx(tile, rel=0.01)


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
