"""Kernels compiled here for Arm boards: they compile, use the instructions that the board has, and
call nothing. Whether they compute the right thing is seen in test_kernels_words, _dot, _rows and
_matmul, where the emulator is installed.
"""

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import armkit
import kernelkit as kit
import pytest

from edgeq import blocks
from edgeq.kernels import isa as isas
from edgeq.kernels import rows
from edgeq.kernels.dot import Column, Reader, row_dots
from edgeq.kernels.llvm import F32, Emit, Value, vector
from edgeq.kernels.panel import quant_panel
from edgeq.kernels.tile import float_panel, float_tile, quant_tile

CPUS = {"cortex-a53": "neon", "cortex-a72": "neon", "cortex-a76": "dotprod"}
QUANTIZED = [name for name in kit.FORMATS if blocks.get(name).value != "x"]
PLAIN = [name for name in kit.FORMATS if blocks.get(name).value == "x"]

each_cpu = pytest.mark.parametrize("cpu", CPUS)


def assembly(emit: Callable[..., Any], arguments: str, cpu: str, *, result: bool = False) -> str:
    isa: ModuleType = isas.modules()[CPUS[cpu]]
    module = kit.build(emit, arguments, isa, result)
    module.triple = armkit.TRIPLE
    machine = armkit.machine(cpu)
    return str(machine.emit_assembly(kit.optimized(module, machine)))


def mnemonics(text: str) -> set[str]:
    return set(re.findall(r"^\t([a-z][a-z0-9.]*)(?=\t|\n)", text, re.MULTILINE))


def check_integer(found: set[str], cpu: str) -> None:
    """sdot where there is one; elsewhere widening multiplies and pairwise sums."""
    assert not found & {"bl", "blr"}
    if CPUS[cpu] == "dotprod":
        assert "sdot" in found
        assert not found & {"smull", "smull2"}
    else:
        assert not found & {"sdot", "udot", "usdot", "smmla"}
        assert found & {"smull", "smlal"}
        assert found & {"sadalp", "saddlp"}


def row_assembly(name: str, cpu: str) -> str:
    """Of a row times a column."""

    def emit(e: Emit, w: Value, cols: Value, *arrays: Value) -> Value:
        row = Reader(e.pointer(w), e.i64(4096))
        return row_dots(e, blocks.get(name), row, [Column(*map(e.pointer, arrays))], cols)[0]

    return assembly(emit, "iiiii", cpu, result=True)


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
    fmt = blocks.get(name)

    def panel(e: Emit, w: Value, stride: Value, rows: Value, cols: Value, *out: Value) -> None:
        quant_panel(e, fmt, e.pointer(w), stride, rows, cols, *map(e.pointer, out))

    def tile(e: Emit, *args: Value) -> None:
        *given, cols, out = args
        quant_tile(e, fmt, *map(e.pointer, given), cols, e.pointer(out))

    unpacking = mnemonics(assembly(panel, "i" * 8, cpu))
    assert not unpacking & {"bl", "blr"}
    assert any(word.startswith(("zip", "trn", "uzp")) for word in unpacking)
    check_integer(mnemonics(assembly(tile, "i" * 8, cpu)), cpu)


@pytest.mark.parametrize("name", PLAIN)
@each_cpu
def test_float_panel_and_tile(cpu: str, name: str) -> None:
    def panel(e: Emit, w: Value, stride: Value, rows: Value, cols: Value, out: Value) -> None:
        float_panel(e, blocks.get(name), e.pointer(w), stride, rows, cols, e.pointer(out))

    def tile(e: Emit, panel: Value, x: Value, cols: Value, out: Value) -> None:
        def read(p: Value, n: int) -> Value:
            return e.load(vector(F32, n), p)

        width, columns = e.isa.WIDTH, e.isa.TILE_COLS
        places = e.pointer(panel), width, e.pointer(x), 4, 4096, cols, e.pointer(out), width
        float_tile(e, read, *places, columns=columns)

    assert not mnemonics(assembly(panel, "iiiii", cpu)) & {"bl", "blr"}
    found = mnemonics(assembly(tile, "iiii", cpu))
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
