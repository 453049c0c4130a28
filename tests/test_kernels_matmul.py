"""Matrix products: the emitted panels and tiles of every format, and whole kernels."""

import emitcases
import gatedcases
import kernelcases as cases
import kernelkit as kit
import pytest

from edgeq import blocks
from edgeq.kernels import isa as isas

compiled = pytest.mark.parametrize(
    ("isa", "name"),
    [(isa, name) for isa in kit.ISAS for name in kit.formats_of(isa)],
)


def lengths(fmt: blocks.BlockFormat) -> list[int]:
    return {256: [256, 768], 32: [32, 96, 256, 288], 1: [1, 31, 100]}[fmt.block]


@pytest.mark.parametrize("name", kit.FORMATS)
@pytest.mark.parametrize("isa", kit.EMITTED)
def test_panel_times_tile(isa: str, name: str) -> None:
    lanes = isas.modules()[isa].WIDTH // 4
    for cols in lengths(blocks.get(name)):
        for rows in (1, lanes - 1, lanes):
            emitcases.panel(isa, name, rows=rows, cols=cols)


# -- whole kernels ---------------------------------------------------------------------------------
def widest(name: str) -> int:
    return {256: 512, 32: 288, 1: 100}[blocks.get(name).block]


@pytest.mark.parametrize("op", ["matvec", "matmul"])
@compiled
def test_product(op: str, isa: str, name: str) -> None:
    """1 to 17 tokens; rows and threads that do not divide anything; bias, and adding to out."""
    lanes = isas.modules()[isa].WIDTH // 4
    for tokens in range(1, 18):
        cases.product(
            op,
            isa,
            name,
            rows=(1, lanes - 1, lanes, lanes + 1, 5 * lanes + 3)[tokens % 5],
            cols=widest(name) if tokens % 4 else min(lengths(blocks.get(name))),
            tokens=tokens,
            threads=(1, 2, 3, 5)[tokens % 4],
            bias=tokens % 2 == 0,
            add=tokens % 3 == 0,
            panels=1 + tokens % 3,
            chunk=(1, 4, 17, 64)[tokens // 2 % 4],
        )


@pytest.mark.parametrize("isa", kit.ISAS)
def test_few_and_many_columns_agree(isa: str) -> None:
    """Both paths are within rounding of the same float64 product, with a thread per row or none."""
    for op in ("matvec", "matmul"):
        cases.product(op, isa, "Q4_K", rows=67, cols=256, tokens=8, threads=96, bias=True)


@pytest.mark.parametrize("formats", kit.GATED, ids=".".join)
@pytest.mark.parametrize("isa", kit.ISAS)
def test_gated(isa: str, formats: tuple[str, str]) -> None:
    """Chunks that end within a step of 256, more threads than chunks, a tail of smaller steps."""
    for tokens, rows, threads, chunk in (
        (1, 256, 1, 32),
        (1, 320, 2, 96),
        (3, 96, 5, 32),
        (4, 544, 3, 64),
        (7, 288, 2, 1024),
    ):
        shape = {"tokens": tokens, "rows": rows, "threads": threads, "chunk": chunk, "cols": 512}
        gatedcases.gated(isa, *formats, **shape)


@pytest.mark.parametrize("isa", kit.ISAS)
def test_gated_for_a_reader_of_floats(isa: str) -> None:
    """Rows need not be whole groups of 32."""
    for tokens, rows in ((1, 100), (2, 31), (5, 33)):
        shape = {"rows": rows, "cols": 100, "tokens": tokens, "threads": 2}
        gatedcases.gated(isa, "F16", "F16", **shape, quantized=False)
