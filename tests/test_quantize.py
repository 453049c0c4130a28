"""Quantizers: error against the reference and plain rounding, edge cases, bytes, caching."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import edgeq
from edgeq import blocks
from edgeq.errors import FormatError, RequestError
from edgeq.quantizers import available, find, quantize, search

Array = NDArray[np.float32]

FORMATS = [name for name, fmt in blocks.formats().items() if fmt.value != "x"]
LEGACY = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
REFERENCE = {  # the arrays that quantize_reference.json describes
    "normal": lambda: (
        np.random.default_rng(0).standard_normal((1024, 1024), np.float32) * np.float32(0.02)
    ),
    "student_t4": lambda: (np.random.default_rng(1).standard_t(4, (1024, 1024)) * 0.02).astype(
        np.float32
    ),
    "channel_scaled": lambda: (
        np.random.default_rng(2).standard_normal((1024, 1024))
        * 0.02
        * np.exp(np.random.default_rng(3).standard_normal(1024) * 0.5)[None, :]
    ).astype(np.float32),
}

# Our error / the reference's, at most: what was reached, so that no step of a search is lost again.
RATIOS = {
    "Q8_0": 0.9135,
    "Q6_K": 0.9435,
    "Q5_K": 0.9615,
    "Q5_1": 0.895,
    "Q5_0": 0.9685,
    "Q4_K": 0.9795,
    "Q4_1": 0.8955,
    "Q4_0": 0.97,
    "IQ4_NL": 0.972,
    "IQ4_XS": 0.9675,
    "Q3_K": 0.962,
    "Q2_K": 0.8795,
}


def relative_rmse(w: Array, raw: NDArray[np.uint8], fmt: str) -> float:
    miss = blocks.decode(raw, fmt).astype(np.float64) - w
    return float(np.sqrt((miss**2).mean() / (w.astype(np.float64) ** 2).mean()))


def cost(w: Array, importance: Array | None, fmt: blocks.BlockFormat) -> NDArray[np.float64]:
    """What an error in each weight costs: importance * sqrt(1 + x x / power), in float64."""
    x = w.astype(np.float64)
    nested = fmt.group < fmt.block
    parts = x.reshape(-1, fmt.block) if nested else x
    power = (parts**2).mean(axis=1, keepdims=True) * (2 if nested else 1)
    power *= 1 if nested and importance is not None else 3
    power[power <= 1e-30] = np.inf
    weights = np.sqrt(1 + parts**2 / power).reshape(x.shape)
    return weights if importance is None else weights * importance


def weighted_errors(
    w: Array, raw: NDArray[np.uint8], fmt: str, importance: Array | None = None
) -> NDArray[np.float64]:
    """Weighted squared error of each block."""
    miss = blocks.decode(raw, fmt).astype(np.float64) - w
    each = miss**2 * cost(w, importance, blocks.get(fmt))
    result: NDArray[np.float64] = each.reshape(-1, blocks.get(fmt).block).sum(axis=1)
    return result


# --- error ---


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("fmt", FORMATS)
def test_error_is_below_the_reference(fmt: str, name: str, shared_data: Path) -> None:
    table = json.loads((shared_data / "quantize_reference.json").read_text())["relative_rmse"]
    w = REFERENCE[name]()
    assert relative_rmse(w, quantize(w, fmt), fmt) <= RATIOS[fmt] * table[fmt][name]


@pytest.mark.parametrize("fmt", LEGACY)
def test_rtn_writes_what_the_reference_implementation_writes(
    fmt: str, rng: np.random.Generator
) -> None:
    w = rng.standard_normal((16, 256), np.float32)
    w[1] = 0
    w[2, ::3] = -4
    w.view(np.uint32)[8:] &= 0xFFFF0000  # bf16 values: exact halves between two codes are common
    expected = gguf.quants.quantize(w, gguf.GGMLQuantizationType[fmt])
    assert np.array_equal(quantize(w, fmt, method="rtn"), expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_rtn_error_is_about_one_step(fmt: str, rng: np.random.Generator) -> None:
    w = rng.uniform(-1, 1, (8, 512)).astype(np.float32)
    levels = len(blocks.get(fmt).table or ()) or np.diff(blocks.get(fmt).limits("q"))[0] + 1
    miss = np.abs(blocks.decode(quantize(w, fmt, method="rtn"), fmt) - w)
    assert miss.max() < 2.6 / levels


def test_scale_search_finds_nearly_the_best_scale(rng: np.random.Generator) -> None:
    w = rng.standard_t(4, (64, 32)).astype(np.float32)
    best = np.full(len(w), np.inf)
    for step in np.linspace(-12, 12, 2000):
        d = np.abs(w).max(axis=1, keepdims=True) / step
        miss = w - d * np.clip(np.rint(w / d), -8, 7)
        best = np.minimum(best, (miss**2 * cost(w, None, blocks.get("Q4_0"))).sum(axis=1))
    assert weighted_errors(w, quantize(w, "Q4_0"), "Q4_0").sum() < 1.002 * best.sum()


def test_pair_search_finds_nearly_the_best_pair(rng: np.random.Generator) -> None:
    w = rng.standard_normal((16, 32)).astype(np.float32)
    low, span = w.min(axis=1, keepdims=True), np.ptp(w, axis=1, keepdims=True)
    best = np.full(len(w), np.inf)
    for start in np.linspace(-0.05, 0.15, 60):
        for part in np.linspace(0.75, 1.1, 120):
            d, m = span * part / 15, low + start * span
            miss = w - m - d * np.clip(np.rint((w - m) / d), 0, 15)
            best = np.minimum(best, (miss**2 * cost(w, None, blocks.get("Q4_1"))).sum(axis=1))
    assert weighted_errors(w, quantize(w, "Q4_1"), "Q4_1").sum() < 1.01 * best.sum()


@pytest.mark.parametrize("fmt", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_moving_integer_scales_lessens_the_error(
    fmt: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = rng.standard_t(4, (64, 512)).astype(np.float32)
    moved = weighted_errors(w, quantize(w, fmt, threads=1), fmt)
    monkeypatch.setattr(search, "REACH", 0)
    rounded = weighted_errors(w, quantize(w, fmt, threads=1), fmt)
    assert moved.sum() < rounded.sum()
    assert (moved < rounded).sum() > (moved > rounded).sum()


# --- edge cases ---


def edge_cases() -> Array:
    """Rows of 512, each hard in its own way."""
    rng = np.random.default_rng(5)
    normal = rng.standard_normal((17, 512)).astype(np.float32)
    normal[1] = 0
    normal[2] = 0.37  # constant
    normal[3] = -0.37
    normal[4] *= 1e-40  # denormal in float32
    normal[5] *= 1e-7  # scales denormal in f16
    normal[6] *= 2e-6
    normal[7] *= 1.5e4 / np.abs(normal[7]).max()
    normal[8] = np.where(rng.random(512) < 0.5, 6e4, -6e4)
    normal[9] = -np.abs(normal[9])
    normal[10, 100] = 1e3  # one outlier
    normal[11] = np.abs(normal[11]) + 1000  # a large common offset
    normal[12, 1:] = 0
    normal[13] = -1000 - 1e-3 * np.abs(normal[13])
    normal[14] *= 1e-3
    normal[14, ::32] = np.where(rng.random(16) < 0.5, 100, -100)  # an outlier in each block
    normal[15] = np.repeat(np.exp2(np.arange(-16, 16)), 16)  # groups constant, far apart
    normal[16, ::2] *= 1e-6  # huge and small by turns
    return normal


@pytest.mark.parametrize("method", available())
@pytest.mark.parametrize("fmt", FORMATS)
def test_edge_cases_stay_finite_and_near(fmt: str, method: str) -> None:
    w, alone = edge_cases(), np.eye(512, dtype=np.float32)
    decoded = blocks.decode(quantize(w, fmt, method=method, hessian=alone), fmt)
    assert np.isfinite(decoded).all()
    assert (decoded[1] == 0).all()
    slack = 2.0 if method == "rtn" else 1.0  # minima that f16 loses move what lies above them
    assert (np.abs(decoded - w).max(axis=1) <= slack * np.abs(w).max(axis=1) + 2.0**-20).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_scales_too_small_for_f16_lose_little(fmt: str, rng: np.random.Generator) -> None:
    w = (rng.standard_normal((4, 512)) * 2e-6).astype(np.float32)
    assert relative_rmse(w, quantize(w, fmt), fmt) < 0.4


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_search_is_never_worse_than_rtn(fmt: str, weighted: bool, rng: np.random.Generator) -> None:
    w = np.concatenate([edge_cases(), rng.standard_t(3, (50, 512)).astype(np.float32)])
    importance = np.exp(rng.standard_normal(512)).astype(np.float32) if weighted else None
    search = weighted_errors(w, quantize(w, fmt, importance), fmt, importance)
    plain = weighted_errors(w, quantize(w, fmt, method="rtn"), fmt, importance)
    assert (search <= plain * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_row_does_not_depend_on_the_others(fmt: str, rows: int, rng: np.random.Generator) -> None:
    w = rng.standard_normal((rows, 256)).astype(np.float32)
    alone = np.concatenate([quantize(row[None], fmt) for row in w])
    assert np.array_equal(quantize(w, fmt), alone)


def test_result_does_not_depend_on_threads_or_chunks(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = rng.standard_normal((50, 512)).astype(np.float32)
    expected = quantize(w, "Q4_K", threads=1)
    monkeypatch.setattr(sys.modules["edgeq.quantizers"], "CHUNK", 1500)
    assert np.array_equal(quantize(w, "Q4_K", threads=1), expected)
    assert np.array_equal(quantize(w, "Q4_K", threads=3), expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_is_the_same_on_any_number_of_threads(
    fmt: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = rng.standard_normal((37, 256)).astype(np.float32)
    importance = rng.random(256).astype(np.float32)
    monkeypatch.setattr(sys.modules["edgeq.quantizers"], "CHUNK", 700)
    one, two, five = (quantize(w, fmt, importance, threads=n) for n in (1, 2, 5))
    assert np.array_equal(one, two)
    assert np.array_equal(one, five)


def test_other_layouts_of_the_same_numbers(rng: np.random.Generator) -> None:
    w = rng.standard_normal((6, 256)).astype(np.float16)
    expected = quantize(w.astype(np.float32), "Q4_K")
    assert np.array_equal(quantize(w, "Q4_K"), expected)
    assert np.array_equal(quantize(np.asfortranarray(w), "Q4_K"), expected)
    assert quantize(w[:0], "Q4_K").shape == (0, 144)


# --- importance ---


@pytest.mark.parametrize("fmt", FORMATS)
def test_importance_moves_error_away_from_what_matters(fmt: str, rng: np.random.Generator) -> None:
    w = rng.standard_normal((16, 512)).astype(np.float32)
    importance = np.where(np.arange(512) % 4 == 0, 20, 0.1).astype(np.float32)
    plain, weighted = (
        np.square(blocks.decode(quantize(w, fmt, a), fmt) - w)[:, ::4].mean()
        for a in (None, importance)
    )
    assert weighted < 0.98 * plain


def test_importance_matters_by_proportion_only(rng: np.random.Generator) -> None:
    w = rng.standard_normal((4, 512)).astype(np.float32)
    importance = rng.random(512).astype(np.float32)
    for a, b in (
        (importance, importance * np.float32(2.0**-66)),
        (np.full(512, 7.0), None),
        (np.zeros(512), None),
    ):
        assert np.array_equal(quantize(w, "Q4_K", a), quantize(w, "Q4_K", b))


def test_columns_of_no_importance_are_still_stored(rng: np.random.Generator) -> None:
    w = rng.standard_normal((4, 512)).astype(np.float32)
    importance = (np.arange(512) < 300).astype(np.float32)
    assert relative_rmse(w, quantize(w, "Q4_K", importance), "Q4_K") < 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a[:-1], r"shape \(255,\): expected \[256\]"),
        (lambda a: np.where(np.arange(256) == 9, np.nan, a), "column 9 is nan"),
        (lambda a: np.where(np.arange(256) == 3, -1, a), "column 3 is -1"),
        (lambda a: np.where(np.arange(256) == 3, np.inf, a), "column 3 is inf"),
    ],
)
def test_wrong_importance_is_refused(change: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        quantize(np.ones((2, 256), np.float32), "Q4_K", change(np.ones(256)))


# --- requests ---


def test_public_name_is_callable_whatever_was_imported(rng: np.random.Generator) -> None:
    w = rng.standard_normal((2, 64)).astype(np.float32)
    for _ in range(2):
        raw = edgeq.quantize(w, "Q4_0", method="rtn")
        assert np.array_equal(raw, quantize(w, "Q4_0", method="rtn"))


def test_methods_are_found_by_file_name() -> None:
    assert available() == ["awq", "gptq", "rtn", "search", "smoothquant"]
    with pytest.raises(RequestError, match="'magic' is unknown: expected one of awq, gptq, rtn, s"):
        find("magic")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fmt", ["Q4_K", "Q8_0", "F16", "F32"])
def test_values_that_are_not_finite_are_refused(fmt: str, value: float) -> None:
    w = np.ones((600, 256), np.float32)
    w[513, 7] = value
    with pytest.raises(RequestError, match=f"row 513, column 7 is {value}"):
        quantize(w, fmt)


def said(value: float, fmt: str) -> str:
    return re.escape(f"row 2, column 5 is {value:g}: too large for {fmt}")


@pytest.mark.parametrize("method", ["rtn", "search", "gptq"])
@pytest.mark.parametrize("fmt", [*FORMATS, "F16", "BF16"])
def test_values_too_large_are_refused(fmt: str, method: str) -> None:
    w = np.ones((3, 256), np.float32)
    for value in (3.4e38, -3.4e38) if fmt == "BF16" else (1e9, -1e9, 1e20, 3.4e38):
        w[2, 5] = value
        with pytest.raises(RequestError, match=said(value, fmt)):
            quantize(w, fmt, method=method, hessian=np.eye(256, dtype=np.float32))


def test_other_wrong_requests() -> None:
    w = np.ones((2, 256), np.float32)
    with pytest.raises(RequestError, match=r"shape \(256,\): expected \[rows, cols\]"):
        quantize(w[0], "Q4_0")
    with pytest.raises(RequestError, match="threads = 0"):
        quantize(w, "Q4_0", threads=0)
    with pytest.raises(FormatError, match="row of 100 elements"):
        quantize(w[:, :100], "Q4_0")
    with pytest.raises(FormatError, match="unknown"):
        quantize(w, "Q9_9")
