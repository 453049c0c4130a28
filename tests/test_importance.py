"""Importance in conversions: mappings and files, and what does not fit the model."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_checkpoint import write_checkpoint

from edgeq import blocks, imatrix, quantize, stream
from edgeq.errors import FormatError, RequestError
from edgeq.gguf import GgufWriter, TensorSpec, open_gguf
from edgeq.pipeline import convert, run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny-model")


def values(path: Path) -> dict[str, NDArray[np.uint8]]:
    """Every tensor of a GGUF file, as stored."""
    with open_gguf(path) as file:
        return {name: file.tensor(name).copy() for name in file.tensors}


@pytest.mark.parametrize("bad", [np.ones(3), np.full(64, np.nan), np.full(64, -1.0)])
def test_importance_must_fit(checkpoint: Path, tmp_path: Path, bad: NDArray[np.float64]) -> None:
    with pytest.raises(RequestError, match=r"importance of blk\.0\.ffn_up\.weight"):
        convert(checkpoint, tmp_path / "o.gguf", "F16", importance={"blk.0.ffn_up.weight": bad})


def test_importance_of_unknown_tensors(checkpoint: Path, tmp_path: Path) -> None:
    given = {"blk.0.ffn_up.wieght": np.ones(64, np.float32), "x": np.ones(1, np.float32)}
    with pytest.raises(RequestError, match=r"has no tensor blk\.0\.ffn_up\.wieght, x: expected"):
        convert(checkpoint, tmp_path / "o.gguf", "F16", importance=given)
    assert list(tmp_path.glob("o.gguf*")) == []


def imatrix_file(path: Path, **sizes: int) -> Path:
    """An importance matrix in which the last column matters most."""
    sums = {f"blk.{name}.weight": np.arange(1, n + 1)[None] ** 2.0 for name, n in sizes.items()}
    counts = dict.fromkeys(sums, np.array([2], np.float32))
    found = {name: values.astype(np.float32) for name, values in sums.items()}
    imatrix.write(imatrix.Imatrix(found, counts, ("some.txt", "more.txt"), 7, 512), path)
    return path


ALL = {f"{i}.{part}": 64 for i in (0, 1) for part in ("attn_q", "attn_k", "attn_v", "attn_output")}
ALL |= {f"{i}.ffn_{part}": 64 for i in (0, 1) for part in ("gate", "up")}
ALL |= {f"{i}.ffn_down": 96 for i in (0, 1)}


def test_importance_of_a_file(checkpoint: Path, tmp_path: Path) -> None:
    """It is used, and noted in llama-quantize's words: base names only."""
    path = imatrix_file(tmp_path / "i.gguf", **ALL)
    report = run(checkpoint, tmp_path / "a.gguf", "Q4_0", importance=path)
    assert report.warnings == run(checkpoint, tmp_path / "b.gguf", "Q4_0").warnings
    by_hand = imatrix.read(path).importance()
    convert(checkpoint, tmp_path / "c.gguf", "Q4_0", importance=by_hand)
    a, b, c = (values(tmp_path / f"{name}.gguf") for name in "abc")
    name = "blk.0.ffn_up.weight"
    assert not np.array_equal(a[name], b[name])
    assert all(np.array_equal(a[name], c[name]) for name in a)
    with open_gguf(tmp_path / "a.gguf") as file:
        noted = {k: v for k, v in file.metadata.items() if k.startswith("quantize.")}
        assert {file.value_types[key] for key in noted} == {"string", "uint32"}
    assert noted == {
        "quantize.imatrix.file": "i.gguf",
        "quantize.imatrix.dataset": "some.txt",
        "quantize.imatrix.entries_count": 14,
        "quantize.imatrix.chunks_count": 7,
    }


def test_a_tensor_without_importance_is_named(checkpoint: Path, tmp_path: Path) -> None:
    del (sizes := dict(ALL))["1.ffn_up"]
    path = imatrix_file(tmp_path / "i.gguf", **sizes)
    report = run(checkpoint, tmp_path / "a.gguf", "Q4_0", importance=path)
    assert [w for w in report.warnings if "no entry for blk.1.ffn_up.weight: all" in w]


@pytest.mark.parametrize("sizes", [{"0.ffn_up": 32}, {"9.ffn_up": 64}])
def test_importance_of_another_model(
    checkpoint: Path, tmp_path: Path, sizes: dict[str, int]
) -> None:
    path = imatrix_file(tmp_path / "i.gguf", **sizes)
    with pytest.raises(FormatError, match=r"i\.gguf: importance.*blk\.[09]\.ffn_up"):
        convert(checkpoint, tmp_path / "a.gguf", "Q4_0", importance=str(path))
    assert list(tmp_path.glob("a.gguf*")) == []


@pytest.mark.parametrize("flat", [False, True])
def test_importance_of_experts(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, flat: bool
) -> None:
    """Each expert's rows get its own weights, wherever the steps of the work are cut."""
    w = rng.standard_normal((3, 5, 32)).astype(np.float32)
    keys = {"general.architecture": "any", "any.block_count": 1, "any.attention.head_count": 1}
    spec = TensorSpec("blk.0.ffn_up_exps.weight", w.shape, blocks.get("F32"))
    with GgufWriter(tmp_path / "f32.gguf", keys, [spec]) as writer:
        writer.write(spec.name, w)
    importance = rng.random((3, 32)).astype(np.float32)
    given = {spec.name: importance.reshape(-1) if flat else importance}
    monkeypatch.setattr(stream, "_CHUNK", 7 * 32)
    path = convert(tmp_path / "f32.gguf", tmp_path / "o.gguf", "Q4_0", importance=given)
    with open_gguf(path) as file:
        info = file.tensors[spec.name]
        found = file.tensor(spec.name)
    expected = [quantize(one, info.format, i) for one, i in zip(w, importance, strict=True)]
    np.testing.assert_array_equal(found, np.stack(expected))
