"""The dot product of a row of weights with a column of activations, for every format."""

import emitcases
import kernelkit as kit
import numpy as np
import pytest

from edgeq import blocks
from edgeq.kernels import isa as isas
from edgeq.kernels import layout
from edgeq.kernels.dot import sums_of


def row_lengths(fmt: blocks.BlockFormat) -> list[int]:
    return {256: [256, 512, 768], 32: [32, 64, 96, 256, 288, 544], 1: [1, 31, 100, 256]}[fmt.block]


def product(isa: str, fmt: blocks.BlockFormat, row: np.ndarray, x: kit.Codes) -> float:
    sums = x.named(sums_of(fmt, isas.modules()[isa]))
    column = [kit.in_order(x.q, isa), x.d, sums]
    return float(emitcases.products(isa, fmt.name, row, [column])[0])


def check(isa: str, fmt: blocks.BlockFormat, row: np.ndarray, x: kit.Codes) -> None:
    expected = float(blocks.decode(row[0], fmt).astype(np.float64) @ x.values[0])
    limit = 5e-7 * float(kit.reach(row, fmt)[0] @ np.abs(x.values[0]))
    assert product(isa, fmt, row, x) == pytest.approx(expected, abs=limit, rel=0)


@pytest.mark.parametrize("name", kit.FORMATS)
@pytest.mark.parametrize("isa", kit.EMITTED)
def test_row_dot(isa: str, name: str) -> None:
    for cols in row_lengths(blocks.get(name)):
        emitcases.dot(isa, name, cols=cols)


@pytest.mark.parametrize("name", kit.FAMILIES)
@pytest.mark.parametrize("isa", kit.EMITTED)
def test_several_columns_at_once(isa: str, name: str) -> None:
    cols = row_lengths(blocks.get(name))[-1]
    for columns in (2, layout.COLUMNS):
        emitcases.dots(isa, name, cols=cols, columns=columns)


QUANTIZED = [name for name in kit.FORMATS if blocks.get(name).block > 1]


@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x80, 0x7F])
@pytest.mark.parametrize("isa", kit.EMITTED)
def test_extreme_codes(isa: str, byte: int) -> None:
    """Nothing saturates or overflows with equal bytes, the largest scales and activations."""
    for name in QUANTIZED:
        fmt = blocks.get(name)
        cols = fmt.block * 3
        for scale, sign in ((0.0, 0), (65504.0, 0), (-65504.0, 1), (2.0**-24, -1)):
            check(isa, fmt, kit.filled(fmt, cols, byte, scale), kit.extreme(cols, sign))


@pytest.mark.parametrize("isa", kit.EMITTED)
def test_single_weights_find_their_activation(isa: str, rng: np.random.Generator) -> None:
    """One activation at a time is not zero: each weight is multiplied with its own."""
    for name in QUANTIZED:
        fmt = blocks.get(name)
        cols = 288 if fmt.block == 32 else 256
        row = kit.packed(fmt, 1, cols, rng)
        w = blocks.decode(row[0], fmt)
        limit = 127 * 5e-7 * kit.reach(row, fmt)[0].max()
        for k in range(0, cols, 1 if isa in kit.ISAS else 5):  # an emulator takes its time
            q = np.zeros((1, cols), np.int8)
            q[0, k] = 127
            got = product(isa, fmt, row, kit.Codes(q, np.ones((1, cols // 32), np.float32)))
            assert got == pytest.approx(127 * float(w[k]), abs=limit), (name, k)


@pytest.mark.parametrize("isa", kit.EMITTED)
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
def test_a_damaged_scale_shows(isa: str, value: float, rng: np.random.Generator) -> None:
    """NaN and infinity in a file reach the result: they do not turn into plausible numbers."""
    for name in QUANTIZED:
        fmt = blocks.get(name)
        x = kit.quantize(rng.standard_normal((1, 3 * fmt.block)).astype(np.float32))
        for scale in {"d", "dmin"} & fmt.fields.keys():
            fields = blocks.unpack(kit.packed(fmt, 1, 3 * fmt.block, rng), fmt)
            fields[scale][0, 1] = value
            found = product(isa, fmt, blocks.pack(fields, fmt), x)
            assert not np.isfinite(found), (name, scale)
