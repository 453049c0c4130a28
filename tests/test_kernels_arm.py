"""Kernels compiled here for Arm boards: they compile, use the instructions that the board has, and
call nothing. Whether they compute the right thing is seen in test_kernels_words, _dot, _rows and
_matmul, where the emulator is installed.
"""

import kernelkit as kit
import pytest
from armcode import ISA as CPUS
from armcode import assembly, mnemonics, panel_assembly, row_assembly, tile_assembly

from edgeq import blocks
from edgeq.kernels import rows
from edgeq.kernels.llvm import F32, Emit, Value, vector

QUANTIZED = [name for name in kit.FORMATS if blocks.get(name).value != "x"]
PLAIN = [name for name in kit.FORMATS if blocks.get(name).value == "x"]

each_cpu = pytest.mark.parametrize("cpu", CPUS)


def check_integer(found: set[str], cpu: str) -> None:
    """sdot where there is one; elsewhere widening multiplies and pairwise sums."""
    assert not found & {"bl", "blr"}
    if CPUS[cpu] == "dotprod":
        assert "sdot" in found
        assert not found & {"smull", "smull2"}
    else:
        assert not found & {"sdot", "udot", "usdot", "smmla"}
        assert found & {"smull", "smlal"}
        assert found & {"sadalp", "saddlp", "addp"}


@pytest.mark.parametrize("name", QUANTIZED)
@each_cpu
def test_row_dot(cpu: str, name: str) -> None:
    found = mnemonics(row_assembly(name, cpu))
    check_integer(found, cpu)
    assert CPUS[cpu] == "dotprod" or found & {"smull2", "smlal2"}
    assert "prfm" in found
    if blocks.get(name).table:
        assert found & {"tbl", "tbl.16b"}


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
    check_integer(mnemonics(tile_assembly(name, cpu)), cpu)


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
