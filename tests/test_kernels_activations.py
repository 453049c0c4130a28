"""Kernels over activations: embedding, gathering, norm, gate, quantization."""

import kernelcases as cases
import kernelkit as kit
import pytest

from edgeq import blocks
from edgeq.kernels import isa as isas

each_isa = pytest.mark.parametrize("isa", kit.ISAS)


@each_isa
def test_embed(isa: str) -> None:
    for name in kit.formats_of(isa):
        for cols in {256: (256, 768), 32: (32, 288), 1: (1, 31, 100)}[blocks.get(name).block]:
            for tokens, threads in ((1, 1), (1, 3), (5, 2)):
                cases.embed(isa, name, tokens=tokens, cols=cols, threads=threads)


@each_isa
def test_gather(isa: str) -> None:
    for tokens, wanted, threads in ((1, 1, 1), (9, 1, 2), (9, 4, 3), (9, 9, 5)):
        cases.gather(isa, tokens=tokens, wanted=wanted, cols=37, threads=threads)


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("tiled", [False, True])
@each_isa
def test_prepare(isa: str, tiled: bool, mode: int) -> None:
    """Few tokens are split by position, many by token; more threads than groups of 32, too."""
    columns = isas.modules()[isa].TILE_COLS if tiled else 1
    for tokens, threads in ((1, 1), (1, 2), (2, 3), (3, 5), (5, 5), (7, 2), (17, 3)):
        for cols in (32, 96, 288):
            cases.prepare(isa, columns, mode=mode, tokens=tokens, cols=cols, threads=threads)


@pytest.mark.parametrize("mode", [0, 1])
@each_isa
def test_prepare_a_copy_for_each_thread(isa: str, mode: int) -> None:
    for tokens, threads, cols in ((1, 1, 32), (1, 3, 96), (3, 2, 288), (7, 4, 64)):
        options = {"tokens": tokens, "threads": threads, "cols": cols}
        cases.prepare(isa, 1, mode=mode, private=True, **options)


@pytest.mark.parametrize("mode", [1, 2])
@each_isa
def test_prepare_for_float_formats(isa: str, mode: int) -> None:
    """Without codes, rows need not be whole groups of 32."""
    for tokens, threads, cols in ((1, 3, 100), (2, 1, 31), (6, 4, 70), (1, 2, 1)):
        options = {"tokens": tokens, "threads": threads, "cols": cols}
        cases.prepare(isa, 1, mode=mode, quantized=False, **options)
