"""Files of Hessians."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq import blocks, hessian
from edgeq.errors import FormatError, RequestError
from edgeq.gguf import GgufWriter, TensorSpec

Q, K, DOWN = "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_down.weight"


def test_weights_that_read_one_input_share_a_matrix(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    x, y = rng.standard_normal((9, 4), np.float32), rng.standard_normal((9, 6), np.float32)
    path = tmp_path / "h.gguf"
    hessian.write(path, {(Q, K): x.T @ x / 9, (DOWN,): y.T @ y / 9}, tokens=9)
    assert path.stat().st_size < 4 * (16 + 36) + 1000
    with hessian.read(path) as found:
        assert found.tokens == 9
        np.testing.assert_array_equal(found.get(K), x.T @ x / 9)
        np.testing.assert_array_equal(found.get(Q), found.get(K))
        np.testing.assert_array_equal(found.get(DOWN), y.T @ y / 9)
        assert found.get("output.weight") is None


def test_only_square_matrices_are_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"shape \(2, 3\)"):
        hessian.write(tmp_path / "h.gguf", {(Q,): np.ones((2, 3), np.float32)}, tokens=1)


KEYS: dict[str, Any] = {
    "general.type": "hessian",
    "hessian.weights": [Q],
    "hessian.stored": [Q],
    "hessian.tokens": 1,
}
GOOD = {f"{Q}.hessian": np.eye(2, dtype=np.float32)}


def write_raw(path: Path, keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    specs = [TensorSpec(name, a.shape, blocks.get("F32")) for name, a in tensors.items()]
    with GgufWriter(path, {**KEYS, **keys}, specs) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
    return path


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"general.type": "imatrix"}, GOOD, "general.type = imatrix: expected hessian"),
        ({"hessian.stored": [Q, K]}, GOOD, "1 names in hessian.weights, 2 in hessian.stored"),
        ({"hessian.tokens": "many"}, GOOD, "hessian.tokens = 'many'"),
        ({}, {"x": np.ones(2, np.float32)}, "expected a square F32 tensor"),
        ({}, {f"{Q}.hessian": np.ones((2, 3), np.float32)}, "expected a square F32 tensor"),
    ],
)
def test_other_files_are_refused(
    keys: dict[str, Any], tensors: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        hessian.read(write_raw(tmp_path / "h.gguf", keys, tensors))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_values_that_are_no_means_of_products(bad: float, tmp_path: Path) -> None:
    tensors = {f"{Q}.hessian": np.diag(np.array([1, bad], np.float32))}
    with (
        hessian.read(write_raw(tmp_path / "h.gguf", {}, tensors)) as found,
        pytest.raises(FormatError, match="expected finite means"),
    ):
        found.get(Q)
