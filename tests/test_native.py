"""Models whose weights are integers already: trained for a grid (QAT), or quantized to GGUF."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_checkpoint import CONFIG, bf16, f32, random_weights, write_checkpoint, write_safetensors

from edgeq import blocks, quantize
from edgeq.errors import ModelError
from edgeq.gguf import GgufWriter, TensorSpec, open_gguf
from edgeq.models import llama
from edgeq.native import native_recipe
from edgeq.pipeline import convert, run
from edgeq.quantizers.search.lattice import find_grid
from edgeq.sources import open_source

WIDE = {**CONFIG, "hidden_size": 256, "intermediate_size": 512}


def rounded(w: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Nearest bfloat16: 8 bits, ties to even."""
    fraction, exponent = np.frexp(w.astype(np.float64))
    return np.ldexp(np.rint(fraction * 256) / 256, exponent).astype(np.float32)


def grid(
    rng: np.random.Generator, rows: int, cols: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Weights d * k with an f16 d for each 32, k, and d."""
    k = rng.integers(-8, 8, (rows, cols))
    d = (rng.standard_normal((rows, cols // 32)) * 0.02).astype(np.float16).astype(np.float32)
    return d.repeat(32, axis=1) * k.astype(np.float32), k, d


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_grid_is_found_in_floats(rng: np.random.Generator, name: str) -> None:
    w, k, d = grid(rng, 40, 128)
    ready = find_grid(w, blocks.get(name))
    assert ready is not None
    assert ready.exact.all()
    np.testing.assert_array_equal(blocks.decode(blocks.pack(ready.fields, name), name), w)
    if name == "Q4_0":
        with_8 = (k.reshape(40, -1, 32) == -8).any(axis=2)  # else there is more than one way
        np.testing.assert_array_equal(ready.fields["q"][with_8], k.reshape(40, -1, 32)[with_8])
        np.testing.assert_array_equal(ready.fields["d"][with_8], d[with_8])


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_grid_is_found_in_rounded_floats(rng: np.random.Generator, name: str) -> None:
    """Of the scales near the true one, one is taken that gives every weight when rounded again."""
    w, _, _ = grid(rng, 60, 128)
    w = rounded(w)
    ready = find_grid(w, blocks.get(name))
    assert ready is not None
    assert ready.exact.all()
    again = blocks.decode(blocks.pack(ready.fields, name), name)
    np.testing.assert_array_equal(rounded(again), w)


def test_scale_of_more_bits_than_a_block_holds(rng: np.random.Generator) -> None:
    k = rng.integers(-8, 8, (8, 64))
    k[:, ::32] = -8
    d = rng.random((8, 2)).astype(np.float32) + 1
    ready = find_grid(d.repeat(32, axis=1) * k.astype(np.float32), blocks.get("Q4_0"))
    assert ready is not None
    np.testing.assert_array_equal(ready.fields["q"].reshape(8, 64), k)
    np.testing.assert_allclose(ready.fields["d"], d, rtol=2**-11)


def test_floats_are_on_no_grid(rng: np.random.Generator) -> None:
    for w in (rng.standard_normal((64, 256)), np.zeros((4, 64)), rng.random((8, 64)) * 1e-30):
        assert find_grid(w.astype(np.float32), blocks.get("Q4_0")) is None
    assert find_grid(rounded(rng.standard_normal((64, 64))), blocks.get("Q4_0")) is None
    on_grid = grid(rng, 4, 256)[0]
    for name in ("Q4_K", "IQ4_NL", "Q6_K"):
        assert find_grid(on_grid, blocks.get(name)) is None


def test_blocks_beside_the_grid_are_left(rng: np.random.Generator) -> None:
    w, _, _ = grid(rng, 16, 128)
    w[3, 64:96] = rng.standard_normal(32)
    w[5, 7] *= np.float32(1.03)
    w[6, :32] = 0
    w[7, 32] = np.inf
    ready = find_grid(w, blocks.get("Q4_0"))
    assert ready is not None
    assert np.argwhere(~ready.exact).tolist() == [[3, 2], [5, 0], [6, 0], [7, 1]]
    assert not ready.fields["d"][~ready.exact].any()


def qat(folder: Path, rng: np.random.Generator, write: Any) -> dict[str, NDArray[np.float32]]:
    """A checkpoint whose matrices lie on a grid, rounded when it stores bfloat16."""
    weights = random_weights(WIDE)
    for name, w in weights.items():
        if w.ndim == 2:
            w = grid(rng, *w.shape)[0]
            weights[name] = rounded(w) if write is bf16 else w
    write_checkpoint(folder, WIDE)
    tensors = {name: write(w) for name, w in weights.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    return weights


@pytest.mark.parametrize("write", [bf16, f32])
def test_trained_grids_reach_the_file(tmp_path: Path, rng: np.random.Generator, write: Any) -> None:
    weights = qat(tmp_path / "model", rng, write)
    report = run(tmp_path / "model", tmp_path / "o.gguf")
    assert report.recipe == "Q4_0"  # chosen because of the grid
    name = "blk.1.attn_q.weight"
    with open_gguf(report.path) as file:
        found = blocks.decode(file.tensor(name), "Q4_0")
    w = llama.transform(name, weights["model.layers.1.self_attn.q_proj.weight"], WIDE)
    np.testing.assert_array_equal(rounded(found) if write is bf16 else found, w)
    assert {t.format for t in report.tensors if t.kept} == {"Q4_0"}


def test_importance_does_not_move_a_grid(tmp_path: Path, rng: np.random.Generator) -> None:
    qat(tmp_path / "model", rng, f32)
    importance = {"blk.0.ffn_up.weight": rng.random(256).astype(np.float32)}
    plain = convert(tmp_path / "model", tmp_path / "a.gguf", "Q4_0")
    weighted = convert(tmp_path / "model", tmp_path / "b.gguf", "Q4_0", importance=importance)
    with open_gguf(plain) as one, open_gguf(weighted) as two:
        name = "blk.0.ffn_up.weight"
        np.testing.assert_array_equal(one.tensor(name), two.tensor(name))


# --- GGUF to GGUF


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "wide", WIDE)
    return convert(folder, tmp_path / "once.gguf", "Q4_K_M")


def test_equal_formats_are_copied_byte_for_byte(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "again.gguf", "Q4_K_M", allow_requantize=True)
    with open_gguf(source) as one, open_gguf(report.path) as two:
        assert list(one.tensors) == list(two.tensors)
        for name in one.tensors:
            np.testing.assert_array_equal(one.tensor(name), two.tensor(name))
    assert report.relative_rmse == 0
    assert not any("second time" in warning for warning in report.warnings)


def test_other_formats_are_quantized_again_with_a_warning(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "small.gguf", "Q2_K", allow_requantize=True)
    again = [warning for warning in report.warnings if "second time" in warning]
    assert len(again) == 1
    assert "start from the original" in again[0]
    with open_gguf(source) as one, open_gguf(report.path) as two:
        for tensor in report.tensors:
            same = one.tensors[tensor.name].format == two.tensors[tensor.name].format
            assert tensor.kept == (same and "norm" not in tensor.name)
        w = blocks.decode(one.tensor("blk.0.ffn_up.weight"), "Q4_K")
        found = blocks.decode(two.tensor("blk.0.ffn_up.weight"), "Q2_K")
    error = np.sqrt(np.mean((found - w) ** 2) / np.mean(w**2))
    assert 0.05 < error < 0.4


def rewritten(path: Path, source: Path, formats: dict[str, str], rng: np.random.Generator) -> Path:
    """The same model with random weights, by endings of names in other formats than F32."""
    with open_gguf(source) as file:
        metadata = file.typed_metadata()
        shapes = {name: info.shape for name, info in file.tensors.items()}
    found = {
        name: next((fmt for end, fmt in formats.items() if name.endswith(end)), "F32")
        for name in shapes
    }
    specs = [TensorSpec(name, shapes[name], blocks.get(found[name])) for name in shapes]
    with GgufWriter(path, metadata, specs) as writer:
        for spec in specs:
            w = rng.standard_normal(spec.shape).astype(np.float32)
            packed = quantize(np.atleast_2d(w), found[spec.name], method="rtn")
            writer.write(spec.name, w if found[spec.name] == "F32" else packed)
    return path


def test_the_layers_decide_which_recipe_keeps_a_file(
    source: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """As files made elsewhere: the table comes first and is the only tensor in Q6_K."""
    matrices = dict.fromkeys(("attn_q.weight", "attn_output.weight", "ffn_up.weight"), "Q4_0")
    others = {"attn_v.weight": "Q8_0", "token_embd.weight": "Q6_K"}
    path = rewritten(tmp_path / "mixed.gguf", source, {**others, **matrices}, rng)
    report = run(path, tmp_path / "again.gguf", allow_requantize=True)
    assert report.recipe == "Q4_0"
    assert report.why.startswith("Q4_0: ")
    assert {"blk.0.attn_q.weight", "blk.1.ffn_up.weight"} <= {
        tensor.name for tensor in report.tensors if tensor.kept
    }


def test_a_quantized_vector_says_nothing(
    source: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = rewritten(tmp_path / "vector.gguf", source, {"norm.weight": "Q8_0"}, rng)
    opened = open_source(path, allow_requantize=True)
    assert len(opened.quantized) > 1
    assert native_recipe(opened) is None
    opened.close()


def test_damaged_block_is_not_copied(source: Path, tmp_path: Path) -> None:
    with open_gguf(source) as file:
        info = file.tensors["blk.1.ffn_up.weight"]
    with source.open("r+b") as raw:
        raw.seek(info.offset + 144 + 1)  # d of the second block becomes NaN
        raw.write(b"\x7e")
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight: row 1, block 0: expected"):
        run(source, tmp_path / "again.gguf", "Q4_K_M", allow_requantize=True)
    assert not list(tmp_path.glob("again*"))
