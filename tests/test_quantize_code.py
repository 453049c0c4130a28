"""Quantizers: the bytes they write, and the compiled code of the search."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import RandomBlocks
from numpy.typing import NDArray

from edgeq import blocks
from edgeq.quantizers import Hessian, available, find, needs, quantize
from edgeq.quantizers.search.packing import pack

FORMATS = [name for name, fmt in blocks.formats().items() if fmt.value != "x"]


# --- bytes ---


@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16"])
def test_floats_are_rounded_to_nearest_even(fmt: str, rng: np.random.Generator) -> None:
    w = rng.standard_normal((5, 64)).astype(np.float32)
    w[0, :4] = 1 + np.array([1, 3, 5, 7]) * np.float32(2**-11)  # halfway between f16 values
    w[1, :4] = 1 + np.array([1, 3, 5, 7]) * np.float32(2**-8)  # halfway between bf16 values
    kind = gguf.GGMLQuantizationType[fmt]
    expected = gguf.quants.quantize(w, kind).view(np.uint8).reshape(5, -1)
    assert np.array_equal(quantize(w, fmt), expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_compiled_pack_writes_the_same_bytes(fmt: str, random_blocks: RandomBlocks) -> None:
    raw = random_blocks(blocks.get(fmt), 5, 3)
    fields = {
        name: values if values.dtype == np.float32 else values.astype(np.int8)
        for name, values in blocks.unpack(raw, fmt).items()
    }
    assert np.array_equal(pack(fields, blocks.get(fmt)), raw)


@pytest.mark.parametrize("method", available())
@pytest.mark.parametrize("fmt", FORMATS)
def test_fields_are_shaped_as_unpack_gives_them(
    fmt: str, method: str, rng: np.random.Generator
) -> None:
    w, known = rng.standard_normal((3, 512)).astype(np.float32), Hessian(np.eye(512))
    given = {"hessian": known} if needs(method) == "hessian" else {}
    fields = find(method).quantize(w, blocks.get(fmt), **given)
    unpacked = blocks.unpack(quantize(w, fmt, method=method, **given), fmt)
    assert set(fields) == set(unpacked)
    for name, values in unpacked.items():
        assert np.array_equal(fields[name].astype(values.dtype), values)


# --- steps of the search ---


def tile(rng: np.random.Generator, rows: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Elements and weights of 16 groups, one per column [rows, 16]; the last three are odd ones."""
    x = rng.standard_t(3, (rows, 16)).astype(np.float32)
    x[:, 13], x[:, 14], x[1:, 15] = 0, 0.25, 0
    return x, rng.uniform(0.1, 3, (rows, 16)).astype(np.float32)


def test_climbing_never_loses_what_the_best_scale_had(rng: np.random.Generator) -> None:
    from edgeq.quantizers.search import scan
    from edgeq.quantizers.search.jit import kernel
    from edgeq.quantizers.search.lanes import load, store

    @kernel
    def sums(rows, levels, scales, out):  # type: ignore[no-untyped-def]
        scale = load(scales, 0)
        for i, (xl, ll) in enumerate(
            (
                scan.fit(rows, 0, scan.inverse(scale), levels),
                scan.climb(rows, 0, scale, levels),
            )
        ):
            store(out, 2 * i, xl)
            store(out, 2 * i + 1, ll)

    x, w = tile(rng, 32)
    out = np.empty(64, np.float32)
    scales = (np.abs(x).max(axis=0) / 8).astype(np.float32)
    rows = scan.Rows(x.reshape(-1), w.reshape(-1), 32)
    sums(rows, scan.Levels(-8.0, 7.0, None), scales, out)
    xl, ll, better_xl, better_ll = out.reshape(4, 16).astype(np.float64)
    before = np.divide(xl**2, ll, out=np.zeros(16), where=ll > 0)
    after = np.divide(better_xl**2, better_ll, out=np.zeros(16), where=better_ll > 0)
    assert (after >= before * (1 - 1e-6)).all()
    assert (after > before * (1 + 1e-5)).sum() > 4


def test_climbing_with_an_offset_never_loses(rng: np.random.Generator) -> None:
    from edgeq.quantizers.search import affine, scan
    from edgeq.quantizers.search.jit import kernel
    from edgeq.quantizers.search.lanes import load, splat, store

    @kernel
    def sums(rows, scales, lows, top, out):  # type: ignore[no-untyped-def]
        scale, base, zero = load(scales, 0), load(lows, 0), splat(0.0)
        one, sx = affine.totals(rows, 0, base)
        for i, (sl, ll, xl) in enumerate(
            (
                affine.moments(rows, 0, base, scan.inverse(scale), zero, top),
                affine.climb(rows, 0, base, scale, zero, top, one, sx),
            )
        ):
            store(out, i, affine.solve(one, sx, sl, ll, xl, splat(scan.UNBOUNDED))[2])

    x, w = tile(rng, 32)
    out = np.empty(32, np.float32)
    scales = (np.ptp(x, axis=0) / 15).astype(np.float32)
    rows = scan.Rows(x.reshape(-1), w.reshape(-1), 32)
    sums(rows, scales, x.min(axis=0), 15.0, out)
    before, after = out.reshape(2, 16)[:, :13].astype(np.float64)
    assert (after >= before * (1 - 1e-6)).all()
    assert (after > before * (1 + 1e-5)).sum() > 4


# --- compiled code ---


def test_lanes_round_to_half_precision() -> None:
    from edgeq.quantizers.search.jit import kernel
    from edgeq.quantizers.search.lanes import half, load, store

    @kernel
    def round_all(x, out):  # type: ignore[no-untyped-def]
        for row in range(x.size // 16):
            store(out, row, half(load(x, row)))

    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2
    x = np.concatenate(
        [
            halves,
            between,
            np.nextafter(between, np.float32(0)),
            np.nextafter(between, np.float32(9e9)),
        ]
    )
    x = np.concatenate([x, -x, np.zeros(-2 * len(x) % 16, np.float32)])
    out = np.empty_like(x)
    round_all(x, out)
    assert np.array_equal(out, x.astype(np.float16).astype(np.float32))
    round_all(np.full(16, 1e6, np.float32), out)
    assert (out[:16] == 65504).all()


def test_lane_words_take_flat_arrays_only() -> None:
    from numba.core.errors import TypingError

    from edgeq.quantizers.search.jit import kernel
    from edgeq.quantizers.search.lanes import load, store

    @kernel
    def copy(x, out):  # type: ignore[no-untyped-def]
        store(out, 0, load(x, 0))

    with pytest.raises(TypingError):
        copy(np.zeros(64, np.float32)[::2], np.zeros(16, np.float32))
    with pytest.raises(TypingError):
        copy(np.zeros(64), np.zeros(16, np.float32))


def test_compiled_code_is_kept_and_survives_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeq.quantizers.search import jit

    def double(x):  # type: ignore[no-untyped-def]
        return x * 2

    monkeypatch.setattr(jit, "_folder", lambda: str(tmp_path))
    assert jit.kernel(double)(4) == 8
    again: Any = jit.kernel(double)
    assert again(4) == 8
    assert sum(again.stats.cache_hits.values()) == 1
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        path.write_bytes(path.read_bytes()[:7])
    damaged: Any = jit.kernel(double)
    assert damaged(4) == 8
    assert not damaged.stats.cache_hits


def test_plain_rounding_needs_no_compiler() -> None:
    code = (
        "import sys, numpy as np; from edgeq.quantizers import quantize;"
        "quantize(np.ones((1, 256), np.float32), 'Q4_K', method='rtn');"
        "print('numba' in sys.modules, 'llvmlite' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[1]
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert shown.stdout == "False False\n", shown.stderr
