"""Error feedback: hand-worked and slow twins, correlated inputs, and a real model's."""

from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_checkpoint import CONFIG, write_checkpoint

from edgeq import blocks, calibration, encoding, hessian, quantizers, stream
from edgeq.errors import RequestError
from edgeq.pipeline import run
from edgeq.quantizers import Hessian, find, gptq, quantize
from edgeq.quantizers._blas import _controller
from edgeq.quantizers._hessian import _invert_lower
from edgeq.quantizers.gptq.grid import Grid
from edgeq.quantizers.gptq.kernels import feed_back
from edgeq.sources import open_source

Array = NDArray[np.float32]

WIDE = {**CONFIG, "hidden_size": 256, "intermediate_size": 512}
FORMATS = [name for name, fmt in blocks.formats().items() if fmt.value != "x"]
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-home"


def inputs(rng: np.random.Generator, cols: int) -> Array:
    """Mean of x x^T where neighbours are alike, and channels differ in size."""
    x = rng.standard_normal((4 * cols, cols + 8))
    x = sum(x[:, i : i + cols] for i in range(8)) * np.exp(rng.standard_normal(cols) / 2)
    moments: Array = (x.T @ x / len(x)).astype(np.float32)
    return moments


def output_error(w: Array, raw: NDArray[np.uint8], fmt: str, moments: Array) -> float:
    miss = blocks.decode(raw, fmt).astype(np.float64) - w
    return float(((miss @ moments) * miss).sum())


@pytest.mark.parametrize("fmt", FORMATS)
def test_output_error_is_far_below_searchs(fmt: str, rng: np.random.Generator) -> None:
    w, moments = rng.standard_normal((24, 512)).astype(np.float32), inputs(rng, 512)
    found = quantize(w, fmt, method="gptq", hessian=moments)
    searched = quantize(w, fmt, np.diagonal(moments))
    assert output_error(w, found, fmt, moments) < 0.5 * output_error(w, searched, fmt, moments)


def test_two_weights_by_hand() -> None:
    """H^-1 = [[5, -2], [-2, 4]] / 16, so U = [[√5/4, -1/(2√5)], [0, 1/√5]].

    0.4 is rounded to 0; its error, times 2/5, is added to 1.4, which becomes 1.56 and then 2. The
    output error is 1.48; without feedback 1.4 would be rounded to 1, and it would be 2.08.
    """
    h = np.array([[4, 2], [2, 5]])
    factor = np.array([[5**0.5 / 4, -1 / (2 * 5**0.5)], [0, 1 / 5**0.5]], np.float32)
    np.testing.assert_allclose(factor.T @ factor, np.linalg.inv(h), atol=1e-7)
    w = np.array([[0.4, 1.4]], np.float32)
    codes, miss = np.zeros((1, 2), np.int32), np.zeros((1, 2), np.float32)
    step, base, table = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32), np.arange(4)
    feed_back(w.copy(), step, base, table.astype(np.float32), True, factor, codes, miss)
    assert codes.tolist() == [[0, 2]]
    errors = [e @ h @ e for e in (w[0] - codes[0], w[0] - [0, 1])]
    assert errors == pytest.approx([1.48, 2.08])
    assert float((miss**2).sum()) == pytest.approx(1.48)  # each miss, in units of U's diagonal


def test_the_factor_is_that_of_the_damped_inverse(rng: np.random.Generator) -> None:
    known = Hessian(inputs(rng, 40))
    damped = known.matrix + 0.01 * np.eye(40)
    assert np.diagonal(known.matrix).mean() == pytest.approx(1)
    np.testing.assert_allclose(known.feedback.T @ known.feedback @ damped, np.eye(40), atol=1e-3)
    assert (np.tril(known.feedback, -1) == 0).all()


@pytest.mark.parametrize("fmt", ["Q4_0", "Q3_K", "Q6_K"])
def test_codes_are_those_of_the_definition(
    fmt: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all blocks: an index that is off by one group, or a block, would show at once."""
    monkeypatch.setattr(gptq, "SWEEPS", 0)
    w, moments = rng.standard_normal((4, 512)).astype(np.float32), inputs(rng, 512)
    known, form = Hessian(moments), blocks.get(fmt)
    fields = gptq.quantize(w, form, None, known)
    steps = np.repeat(Grid(fields, form).steps()[0], form.group, axis=1)
    damped = known.matrix.astype(np.float64) + 0.01 * np.eye(512)
    same = [
        np.mean(naive.feed_back(row, damped, step, form.limits("q")) == codes.reshape(-1))
        for row, step, codes in zip(w, steps, fields["q"], strict=True)
    ]
    assert np.mean(same) > 0.99  # one rounding that differs in float32 changes what follows it
    assert max(same) == 1


@pytest.mark.parametrize(("fmt", "distance"), [("Q4_0", 32), ("Q3_K", 16), ("Q4_K", 32)])
def test_errors_end_in_the_columns_that_can_undo_them(
    fmt: str, distance: int, rng: np.random.Generator
) -> None:
    """Columns j and j + one group see the same input: only the sum of their errors counts."""
    moments = np.eye(256, dtype=np.float32)
    first = np.flatnonzero(np.arange(256) // distance % 2 == 0)
    moments[first, first + distance] = moments[first + distance, first] = 0.999
    w = rng.standard_normal((32, 256)).astype(np.float32)
    miss = blocks.decode(quantize(w, fmt, method="gptq", hessian=moments), fmt) - w
    together, apart = miss[:, first] + miss[:, first + distance], miss[:, first]
    assert np.square(together).mean() < 0.6 * np.square(apart).mean()  # 2 where unrelated
    others = miss[:, first] + np.roll(miss[:, first + distance], 1, axis=1)
    assert np.square(others).mean() > 1.5 * np.square(apart).mean()


@pytest.mark.parametrize("fmt", ["Q4_0", "Q4_1", "Q3_K", "Q4_K", "IQ4_XS"])
def test_sweeps_only_lower_the_error(
    fmt: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, moments = rng.standard_normal((16, 256)).astype(np.float32), inputs(rng, 256)
    errors = []
    for sweeps in range(4):
        monkeypatch.setattr(gptq, "SWEEPS", sweeps)
        raw = quantize(w, fmt, method="gptq", hessian=moments)
        errors.append(output_error(w, raw, fmt, Hessian(moments).matrix))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.98 * errors[0]


@pytest.mark.parametrize("fmt", ["Q4_0", "Q4_1", "Q3_K", "Q4_K", "IQ4_NL"])
def test_independent_inputs_lose_little(fmt: str, rng: np.random.Generator) -> None:
    w = rng.standard_normal((8, 256)).astype(np.float32)
    moments = np.eye(256, dtype=np.float32)
    errors = [
        output_error(w, quantize(w, fmt, np.ones(256), method, 1, moments), fmt, moments)
        for method in ("gptq", "search")
    ]
    assert errors[0] <= 1.02 * errors[1]


def test_channels_that_were_never_active_keep_their_weights(rng: np.random.Generator) -> None:
    w, moments = rng.standard_normal((8, 256)).astype(np.float32), inputs(rng, 256)
    dead = np.arange(0, 256, 7)
    moments[dead] = 0
    moments[:, dead] = 0
    decoded = blocks.decode(quantize(w, "Q4_K", method="gptq", hessian=moments), "Q4_K")
    assert np.abs(decoded - w)[:, dead].max() < 0.5


def test_inputs_that_span_few_directions(rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 256))
    w, moments = rng.standard_normal((8, 256)).astype(np.float32), (x.T @ x).astype(np.float32)
    raw = quantize(w, "Q4_K", method="gptq", hessian=moments)
    assert output_error(w, raw, "Q4_K", moments) < 0.1 * output_error(
        w, quantize(w, "Q4_K"), "Q4_K", moments
    )


def test_threads_and_chunks_change_nothing(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, moments = rng.standard_normal((600, 256)).astype(np.float32), inputs(rng, 256)
    expected = quantize(w, "Q4_K", None, "gptq", 1, moments)
    monkeypatch.setattr(quantizers, "CHUNK", 7 * 256)  # 86 parts
    assert np.array_equal(quantize(w, "Q4_K", None, "gptq", 3, moments), expected)


@pytest.mark.parametrize("method", ["gptq", "search"])
def test_each_hessian_is_read_and_factored_once(
    method: str, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts, threads and matrices there are; meanwhile BLAS has one thread."""
    monkeypatch.setattr(stream, "_CHUNK", 32 * 256)
    source, path = write_checkpoint(tmp_path / "model", WIDE), tmp_path / "h.gguf"
    moments = inputs(rng, 256)
    qkv = [tuple(f"blk.{i}.attn_{kind}.weight" for kind in "kqv") for i in range(2)]
    hessian.write(path, {names: moments * (i + 1) for i, names in enumerate(qkv)}, tokens=1)
    read, factored, threads = list[str](), list[int](), set[int]()
    get, cholesky, quantized = hessian.Hessians.get, np.linalg.cholesky, encoding.quantize

    def counted_get(self: hessian.Hessians, name: str) -> Any:
        read.append(name)
        return get(self, name)

    def counted_cholesky(matrix: Any) -> Any:
        factored.append(len(matrix))
        return cholesky(matrix)

    def watched(*args: Any) -> Any:
        threads.update(pool["num_threads"] for pool in _controller().info())
        return quantized(*args)

    monkeypatch.setattr(hessian.Hessians, "get", counted_get)
    monkeypatch.setattr(np.linalg, "cholesky", counted_cholesky)
    monkeypatch.setattr(encoding, "quantize", watched)
    before = _controller().info()
    run(source, tmp_path / "o.gguf", "Q4_K_S", method=method, hessians=path, threads=2)
    assert len(read) == 2
    assert factored == ([256, 256] if method == "gptq" else [])
    assert threads == {1}
    assert _controller().info() == before


@pytest.mark.parametrize("n", [1, 2, 63, 65, 200])
def test_triangles_are_inverted_in_place(n: int, rng: np.random.Generator) -> None:
    lower = np.tril(rng.standard_normal((n, n))) + 2 * np.sqrt(n) * np.eye(n)
    found = lower.copy()
    _invert_lower(found)
    np.testing.assert_allclose(found @ lower, np.eye(n), atol=1e-12)
    assert (np.triu(found, 1) == 0).all()


def test_without_a_hessian_it_is_search(rng: np.random.Generator) -> None:
    w, importance = rng.standard_normal((4, 256)).astype(np.float32), rng.random(256)
    expected = quantize(w, "Q3_K", importance)
    assert np.array_equal(quantize(w, "Q3_K", importance, "gptq"), expected)


@pytest.mark.parametrize(
    ("moments", "said"),
    [
        (np.ones((256, 3)), r"shape \(256, 3\): expected \[n, n\]"),
        (np.eye(32), r"shape \(32, 32\): expected \[256, 256\]"),
        (np.diag([np.nan] * 256), "expected finite numbers"),
        (-np.eye(256), "none below 0 on the diagonal"),
        (np.eye(256) - 1e9 * (1 - np.eye(256)), "not positive semidefinite"),
    ],
)
def test_wrong_hessians_are_refused(moments: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        quantize(np.ones((2, 256), np.float32), "Q4_K", method="gptq", hessian=moments)


def test_every_matrix_of_a_model_gets_better(shared_data: Path, tmp_path: Path) -> None:
    """With a little of the calibration text; some rows of each matrix are enough."""
    text, path = tmp_path / "text.txt", tmp_path / "hessian.gguf"
    text.write_text((shared_data / "tiny-home" / "calibration.txt").read_text()[:40_000])
    calibration.run(EXAMPLE, text, tmp_path / "imatrix.gguf", hessian_out=path)
    source = open_source(EXAMPLE)
    worse = []
    with hessian.read(path) as hessians:
        for name in hessians.weights:
            moments = hessians.get(name)
            assert moments is not None
            w = source.read(name, 0, 32)
            found, searched = (
                quantize(w, "Q3_K", np.diagonal(moments), method, 1, moments)
                for method in ("gptq", "search")
            )
            ratio = output_error(w, found, "Q3_K", moments) / output_error(
                w, searched, "Q3_K", moments
            )
            worse += [(name, ratio)] * (ratio > 0.9)
        assert len(hessians.weights) == 56
    source.close()
    assert worse == []


def test_method_says_what_it_needs() -> None:
    assert getattr(find("gptq"), "NEEDS", "") == "hessian"
