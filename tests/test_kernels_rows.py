"""Emitted functions over one row of f32: exp, softmax, gate, norm, quantization, decoding."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import kernelkit as kit
import naive
import numpy as np
import pytest

from edgeq import blocks
from edgeq.kernels import isa as isas
from edgeq.kernels import rows
from edgeq.kernels.llvm import F32, Emit, Value, vector

each_isa = pytest.mark.parametrize("isa", kit.EMITTED)


@cache
def function(
    isa: str, name: str, arguments: str, result: bool = False, *, columns: int = 1
) -> Callable[..., Any]:
    """rows.<name> with its addresses as pointers; what counts is the last but for softmax, and the
    second to fourth of quantize_row.
    """
    counts = {"softmax_row": [1], "quantize_row": [1, 2, 3]}.get(name, [len(arguments) - 1])

    def emit(e: Emit, *values: Value) -> Value:
        pointers = [
            v if k in counts or v.type == F32 else e.pointer(v) for k, v in enumerate(values)
        ]
        if name == "quantize_row":
            return rows.quantize_row(e, pointers[0], pointers[1:4], pointers[4:], columns=columns)
        return getattr(rows, name)(e, *pointers)

    return kit.native(emit, arguments, isa, result=result)


# -- exp -------------------------------------------------------------------------------------------
def exp(isa: str, x: np.ndarray) -> np.ndarray:
    out = np.zeros_like(x)

    def emit(e: Emit, x: Value, out: Value, count: Value) -> None:
        def body(offset: Value, lanes: int) -> None:
            v = e.load(vector(F32, lanes), e.pointer(x), offset)
            e.store(rows.exp(e, v), e.pointer(out), offset)

        rows.each(e, count, body)

    kit.native(emit, "iii", isa)(x, out, len(x))
    return out


@each_isa
def test_exp_is_accurate(isa: str, rng: np.random.Generator) -> None:
    grid = np.linspace(-87, 88, 200_003)
    near = [np.linspace(-1e-3, 1e-3, 20_001), 0.5 * math.log(2) * np.arange(-250, 251)]
    x = np.concatenate([grid, *near, rng.uniform(-20, 0, 100_000)]).clip(-87, 88)
    x = x.astype(np.float32)
    true = np.exp(x.astype(np.float64))
    assert np.abs(exp(isa, x) / true - 1).max() < 3e-7
    assert exp(isa, np.zeros(1, np.float32))[0] == 1


@each_isa
def test_exp_at_the_ends(isa: str) -> None:
    """Far below it is next to nothing but never negative, far above large but finite."""
    low = exp(isa, np.array([-87.1, -104, -1e4, -3e38, -np.inf], np.float32))
    assert ((low >= 0) & (low < 1.7e-38)).all()
    high = exp(isa, np.array([88.1, 1e4, 3e38, np.inf], np.float32))
    assert ((high > 1e38) & np.isfinite(high)).all()


@each_isa
def test_exp_of_nan_is_nan(isa: str) -> None:
    bits = [0x7FC00000, 0xFFC00000, 0x7FC00001, 0xFFFFFFFF, 0x7F800001, 0x7FC001FE] * 7
    assert np.isnan(exp(isa, np.array(bits, np.uint32).view(np.float32))).all()


# -- softmax ---------------------------------------------------------------------------------------
def online(isa: str, steps: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """(unnormalized weights of all steps at the last maximum, their sum)."""
    stats, done = np.array([-3e38, 0, 0, 0], np.float32), np.zeros(0)
    for step in steps:
        padded = np.concatenate([step, np.full(3, 55, np.float32)])
        function(isa, "softmax_row", "iii")(padded, len(step), stats)
        assert (padded[len(step) :] == 55).all()
        done = np.concatenate([done * stats[2], padded[: len(step)].astype(np.float64)])
    return done, float(stats[1])


@pytest.mark.parametrize("spread", [0.1, 3.0, 50.0])
@each_isa
def test_softmax_in_steps(isa: str, spread: float, rng: np.random.Generator) -> None:
    for counts in ([1], [7], [16], [128, 1], [33, 0, 128, 5], [2, 3, 4, 15, 17]):
        steps = [rng.normal(0, spread, n).astype(np.float32) for n in counts]
        expected = naive.softmax(np.concatenate(steps).astype(np.float64))
        weights, total = online(isa, steps)
        np.testing.assert_allclose(weights / total, expected, rtol=2e-5, atol=1e-30)
        assert total == pytest.approx(weights.sum(), rel=1e-5)


@each_isa
def test_softmax_with_masked_scores(isa: str) -> None:
    """-inf counts for nothing, wherever it stands, and a later maximum displaces the earlier."""
    for length in (1, 5, 16, 21):
        for place in {0, length // 2, length - 1}:
            row = np.full(length, -np.inf, np.float32)
            row[place] = -4
            weights, total = online(isa, [row])
            assert weights[place] / total == pytest.approx(1, abs=1e-30)
            assert np.delete(weights, place).max(initial=0) < 1e-37
    weights, total = online(isa, [np.full(20, -900, np.float32), np.full(4, 900, np.float32)])
    np.testing.assert_allclose(weights[20:] / total, 0.25, rtol=1e-6)


@each_isa
def test_a_nan_score_shows(isa: str) -> None:
    for length in (1, 16, 40):
        for place in range(length):
            row = np.linspace(-1, 1, length).astype(np.float32)
            row[place] = np.nan
            total = online(isa, [np.ones(3, np.float32), row, np.ones(2, np.float32)])[1]
            assert np.isnan(total)  # by which all values are divided in the end


# -- norm and gate ---------------------------------------------------------------------------------
@each_isa
def test_sum_of_squares(isa: str, rng: np.random.Generator) -> None:
    squares = function(isa, "sum_squares", "ii", True)
    for n in (0, 1, 3, 16, 31, 64, 1001):
        x = rng.standard_normal(n + 1).astype(np.float32)
        expected = float(np.square(x[:n], dtype=np.float64).sum())
        assert squares(x, n) == pytest.approx(expected, rel=1e-6)


@each_isa
def test_normalize(isa: str, rng: np.random.Generator) -> None:
    normalize = function(isa, "normalize", "iifii")
    for n in (1, 5, 16, 100):
        x, weight, out = (rng.standard_normal(n + 1).astype(np.float32) for _ in range(3))
        after = out[n]
        normalize(x, weight, 0.25, out, n)
        np.testing.assert_allclose(out[:n], (x * weight)[:n] * 0.25, rtol=3e-7)
        assert out[n] == after


@each_isa
def test_silu_gate(isa: str, rng: np.random.Generator) -> None:
    gate = np.concatenate([np.linspace(-30, 30, 301), [-100, -1000, 100, 0, -0.0, 1e30]])
    gate = gate.astype(np.float32)
    up, out = rng.standard_normal(len(gate)).astype(np.float32), np.zeros_like(gate)
    function(isa, "silu_gate", "iiii")(gate, up, out, len(gate))
    expected = naive.silu_gate(gate.clip(-700), up)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-34)
    bad = np.array([np.nan], np.float32)
    function(isa, "silu_gate", "iiii")(bad, up, out, 1)
    assert np.isnan(out[0])


# -- quantization ----------------------------------------------------------------------------------
def quantize(isa: str, x: np.ndarray) -> tuple[np.ndarray, ...]:
    n = len(x)
    out = np.zeros(n, np.int8), *(np.zeros(n // k, np.float32) for k in (32, 16, 32))
    ints = [np.zeros(n // k, np.int32) for k in (16, 32)]
    for low in range(0, n // 32, 3):  # in pieces that start anywhere within a step of 256
        high, whole = min(low + 3, n // 32), n // 256 * 8
        span = low, max(low, min(whole, high)), high
        function(isa, "quantize_row", "i" * 10)(x, *span, *out, *ints)
    out[0][kit.in_order(np.arange(n)[None], isa)[0]] = out[0].copy()
    if np.isfinite(x).all():
        for counts, group in zip(ints, (16, 32), strict=True):
            np.testing.assert_array_equal(counts, -out[0].reshape(-1, group).sum(1, dtype=np.int32))
    return out


def special_groups() -> dict[str, np.ndarray]:
    ramp = np.linspace(-1, 1, 32)
    ties = np.concatenate([np.arange(-15.5, 15.5), [127.0]])  # scale 1: halves go to even
    groups = {
        "zeros": np.zeros(32),
        "negative zeros": np.full(32, -0.0),
        "ramp": ramp,
        "ties": ties,
        "one": np.eye(32)[17] * -3.0,
        "denormal": ramp * 1e-40,
        "just too small": ramp * np.float64(np.float32(1e-30)),
        "just large enough": ramp * 1.0000002e-30,
        "smallest": np.full(32, 1e-45),
        "large": ramp * 1e34,
        "equal": np.full(32, -0.1),
    }
    return {name: values.astype(np.float32) for name, values in groups.items()}


@each_isa
def test_quantize_special_rows(isa: str) -> None:
    groups = special_groups()
    q, d, sums16, sums32 = quantize(isa, np.concatenate(list(groups.values())))
    for i, (name, values) in enumerate(groups.items()):
        codes, scale = naive.quantize32(values)
        np.testing.assert_array_equal(q[32 * i : 32 * i + 32], codes, err_msg=name)
        assert d[i] == scale, name
        counts = codes.astype(np.float64).reshape(2, 16).sum(1)
        got = sums16[2 * i : 2 * i + 2], sums32[i]
        np.testing.assert_allclose(got[0], counts * scale, rtol=2e-7, atol=1e-45, err_msg=name)
        np.testing.assert_allclose(
            got[1], counts.sum() * scale, rtol=2e-7, atol=4e-7 * 127 * 32 * scale, err_msg=name
        )


@each_isa
def test_quantize_random_rows(isa: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal(32 * 500) * np.repeat(10.0 ** rng.uniform(-25, 25, 500), 32)
    x = x.astype(np.float32)
    expected = [naive.quantize32(group) for group in x.reshape(-1, 32)]
    q, d, _, _ = quantize(isa, x)
    np.testing.assert_array_equal(q, np.concatenate([codes for codes, _ in expected]))
    np.testing.assert_array_equal(d, [scale for _, scale in expected])


@each_isa
def test_quantize_into_a_tile(isa: str, rng: np.random.Generator) -> None:
    """Codes lie as panels have theirs, scales and sums beside those of the other columns."""
    columns, unit = isas.modules()[isa].TILE_COLS, isas.modules()[isa].UNIT
    x = rng.standard_normal((columns, 96)).astype(np.float32)
    q, d = np.zeros(columns * 96, np.int8), np.zeros(columns * 3, np.float32)
    sums = [np.zeros(columns * 96 // n, np.float32) for n in (16, 32)]
    ints = [np.zeros(columns * 96 // n, np.int32) for n in (16, 32)]
    for t, row in enumerate(x):
        places = [q[t * unit :], *(part[t:] for part in (d, *sums, *ints))]
        function(isa, "quantize_row", "i" * 10, columns=columns)(row, 0, 0, 3, *places)
    expected = kit.quantize(x)
    np.testing.assert_array_equal(kit.separated(q, columns, columns, unit), expected.q)
    np.testing.assert_array_equal(kit.separated(d, columns, columns), expected.d)
    for group, got in zip((16, 32), ints, strict=True):
        got = kit.separated(got, columns, columns)
        np.testing.assert_array_equal(got, expected.negative(group))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@each_isa
def test_a_bad_activation_shows_in_its_scale(isa: str, value: float) -> None:
    """Whatever the codes become, scale times code is not an ordinary number any more."""
    for place in range(32):
        x = np.linspace(-1, 1, 64).astype(np.float32)
        x[place] = value
        q, d, _, _ = quantize(isa, x)
        assert not np.isfinite(d[0])
        np.testing.assert_array_equal(q[32:], naive.quantize32(x[32:])[0])


# -- decoding --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", kit.FORMATS)
@each_isa
def test_decode_row(isa: str, name: str, rng: np.random.Generator) -> None:
    fmt = blocks.get(name)

    def emit(e: Emit, w: Value, out: Value, cols: Value) -> None:
        rows.decode_row(e, fmt, e.pointer(w), e.pointer(out), cols)

    decode = kit.native(emit, "iii", isa)
    for cols in {256: (256, 768), 32: (32, 96, 256, 352), 1: (1, 15, 33, 256)}[fmt.block]:
        raw = kit.packed(fmt, 1, cols, rng)
        out = np.full(cols + 1, 55, np.float32)
        decode(raw, out, cols)
        expected, limit = blocks.decode(raw, fmt)[0], 2e-7 * kit.reach(raw, fmt)[0]
        assert (np.abs(out[:cols].astype(np.float64) - expected) <= limit).all()
        assert out[cols] == 55
