"""Checkpoints quantized by others: every weight as its format defines it, integers kept."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from numpy.typing import NDArray
from tiny_checkpoint import CONFIG, Raw, bf16, f32, write_safetensors

from edgeq import blocks
from edgeq.checkpoint import open_checkpoint
from edgeq.checkpoint.names import gguf_names
from edgeq.checkpoint.parts import Parts
from edgeq.checkpoint.safetensors import HfTensor
from edgeq.errors import EdgeqError, ModelError
from edgeq.gguf import open_gguf
from edgeq.models import llama
from edgeq.pipeline import convert, run

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes"}
PACK = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
INT = {"quant_method": "compressed-tensors", "format": "int-quantized"}

SCHEMES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "gptq 4 bits": (GPTQ, packers.gptq, {}),
    "gptq 2 bits": ({**GPTQ, "bits": 2}, packers.gptq, {"bits": 2, "symmetric": False}),
    "gptq 3 bits": ({**GPTQ, "bits": 3}, packers.gptq, {"bits": 3, "symmetric": False}),
    "gptq 8 bits": ({**GPTQ, "bits": 8}, packers.gptq, {"bits": 8, "symmetric": False}),
    "gptq desc_act": (GPTQ, packers.gptq, {"order": True, "symmetric": False}),
    "gptq per row": ({**GPTQ, "group_size": -1}, packers.gptq, {"size": 96}),
    "gptq v2": (
        {**GPTQ, "checkpoint_format": "gptq_v2"},
        packers.gptq,
        {"version": 2, "symmetric": False},
    ),
    "gptq without g_idx": (GPTQ, packers.gptq, {"index": False, "symmetric": False}),
    "gptq other bits here": (GPTQ, packers.gptq, {"bits": 8}),  # GPTQModel's `dynamic`
    "awq": (AWQ, packers.awq, {}),
    "bnb nf4": (BNB, packers.four_bits, {}),
    "bnb fp4": (BNB, packers.four_bits, {"kind": "fp4"}),
    "bnb double": (BNB, packers.four_bits, {"double": True}),
    "bnb int8": (BNB, packers.int8, {}),
    "compressed 4 bits": (PACK, packers.compressed, {}),
    "compressed 8 bits": (PACK, packers.compressed, {"bits": 8, "symmetric": False}),
    "compressed asymmetric": (PACK, packers.compressed, {"symmetric": False}),
    "compressed order": (PACK, packers.compressed, {"symmetric": False, "order": True}),
    "compressed per row": (PACK, packers.compressed, {"size": 96}),
    "int-quantized": (INT, packers.int_quantized, {}),
    "int-quantized, one scale": (INT, packers.int_quantized, {"single": True}),
}


def folder_of(
    tmp_path: Path, name: str, rng: np.random.Generator
) -> tuple[Path, dict[str, NDArray[np.float64]]]:
    settings, pack, options = SCHEMES[name]
    folder = tmp_path / "model"
    return folder, packers.write_quantized(folder, CONFIG, settings, partial(pack, rng, **options))


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_what_the_format_says(
    tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    folder, weights = folder_of(tmp_path, name, rng)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors.keys() == weights.keys()
        for tensor, w in weights.items():
            np.testing.assert_allclose(checkpoint.read(tensor), w, rtol=2e-6, atol=1e-7)
            if w.ndim == 2:
                part = checkpoint.read_rows(tensor, 3, 21)
                np.testing.assert_array_equal(part, checkpoint.read(tensor)[3:21])


def stored(path: Path) -> dict[str, NDArray[np.float32]]:
    with open_gguf(path) as file:
        return {
            name: blocks.decode(file.tensor(name), info.format).reshape(info.shape)
            for name, info in file.tensors.items()
            if "blk" in name and len(info.shape) == 2
        }


# Scheme, and which type holds its integers. The error is that of 16-bit scales.
KEPT = {
    "gptq 4 bits": ("Q4_0", 0.0),
    "gptq per row": ("Q4_0", 0.0),
    "gptq v2": ("Q4_1", 1e-3),
    "gptq other bits here": ("Q8_0", 0.0),
    "awq": ("Q4_1", 1e-3),
    "bnb int8": ("Q8_0", 1e-3),
    "compressed 4 bits": ("Q4_0", 0.0),
    "compressed asymmetric": ("Q4_1", 1e-3),
    "int-quantized": ("Q8_0", 1e-3),
    "int-quantized, one scale": ("Q8_0", 1e-3),
}


@pytest.mark.parametrize("method", ["rtn", "search"])
@pytest.mark.parametrize("name", KEPT)
def test_integers_are_kept(
    tmp_path: Path, rng: np.random.Generator, name: str, method: str
) -> None:
    """By a type that has room for them, chosen when none is named; rows of Q and K are moved."""
    folder, weights = folder_of(tmp_path, name, rng)
    recipe, error = KEPT[name]
    report = run(folder, tmp_path / "o.gguf", method=method)
    assert report.recipe == recipe
    assert not any("second time" in warning for warning in report.warnings)
    names = {old: new for old, new in gguf_names("llama", 2, weights).items() if "blk" in new}
    found = stored(report.path)
    for old, new in names.items():
        if weights[old].ndim == 2:
            expected = llama.transform(new, weights[old].astype(np.float32), CONFIG)
            step = np.abs(expected).max()
            np.testing.assert_allclose(found[new], expected, rtol=1e-6, atol=error * step)
    kept = {tensor.name for tensor in report.tensors if tensor.kept}
    assert kept == found.keys()


def test_symmetric_integers_are_the_same_in_every_type_that_has_them(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    folder, _ = folder_of(tmp_path, "gptq 4 bits", rng)
    expected = stored(convert(folder, tmp_path / "f32.gguf", "F32"))
    for recipe in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        found = stored(convert(folder, tmp_path / f"{recipe}.gguf", recipe))
        for name, w in expected.items():
            np.testing.assert_array_equal(found[name], w)


def test_blocks_that_fit_are_kept_beside_others(tmp_path: Path, rng: np.random.Generator) -> None:
    """Zero points of an asymmetric matrix: only those of 8 suit Q4_0."""
    folder, _ = folder_of(tmp_path, "gptq v2", rng)
    with open_checkpoint(folder) as checkpoint:
        grid = checkpoint.grid("model.layers.0.mlp.up_proj.weight", 0, 96)
    assert grid is not None
    ready = grid.fields(blocks.get("Q4_0"))
    assert ready is not None
    assert 0 < ready.exact.mean() < 0.5
    report = run(folder, tmp_path / "o.gguf", "Q4_0")
    assert any("Q4_1 keeps them" in warning for warning in report.warnings)
    w, found = grid.values(), stored(report.path)["blk.0.ffn_up.weight"]
    same = (found == w).reshape(96, -1, 32).all(axis=2)
    assert same[ready.exact].all()
    np.testing.assert_allclose(found, w, atol=2 * np.abs(w).max() / 15)


def test_act_order_is_dequantized(tmp_path: Path, rng: np.random.Generator) -> None:
    folder, _ = folder_of(tmp_path, "gptq desc_act", rng)
    report = run(folder, tmp_path / "o.gguf")
    assert report.recipe == "IQ4_NL"  # rows of 64: what models of floats get, too
    assert any("start from the original" in warning for warning in report.warnings)


def test_bias_of_zeros_is_left_out(tmp_path: Path, rng: np.random.Generator) -> None:
    """AutoGPTQ gives every matrix a bias; one that is not 0 belongs to the model."""

    def pack(shape: tuple[int, int]) -> packers.Packed:
        tensors, w = packers.gptq(rng, shape)
        return {**tensors, "bias": packers.f16(np.full(shape[0], shape == (32, 64)))}, w

    packers.write_quantized(tmp_path, CONFIG, GPTQ, pack)
    with open_checkpoint(tmp_path) as checkpoint:
        found = {name.split(".")[-2] for name in checkpoint.tensors if name.endswith(".bias")}
    assert found == {"k_proj", "v_proj"}


def test_float8_is_a_float(tmp_path: Path, rng: np.random.Generator) -> None:
    def pack(shape: tuple[int, int]) -> packers.Packed:
        codes = rng.integers(0, 0x60, shape)
        tensors = {
            "weight": ("F8_E4M3", shape, codes.astype(np.uint8).tobytes()),
            "weight_scale": bf16(np.full((shape[0], 1), 0.5)),
        }
        exponent, fraction = codes >> 3, codes & 7
        normal = (1 + fraction / 8) * 2.0 ** (exponent - 7.0)
        return tensors, np.where(exponent, normal, fraction / 8 * 2.0**-6) * 0.5

    settings = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    weights = packers.write_quantized(tmp_path / "m", CONFIG, settings, pack)
    report = run(tmp_path / "m", tmp_path / "o.gguf", "F16")
    assert not any("second time" in warning for warning in report.warnings)
    found = stored(report.path)["blk.1.ffn_up.weight"]
    np.testing.assert_array_equal(found, weights["model.layers.1.mlp.up_proj.weight"])


# --- what cannot be read


METHODS = {
    "unknown": ({"quant_method": "aqlm"}, "quant_method = 'aqlm': expected one of awq"),
    "no text": ({"quant_method": ["gptq"]}, "quant_method"),
    "marlin": ({**GPTQ, "is_marlin_format": True}, "checkpoint_format = 'marlin'"),
    "bits": ({**GPTQ, "bits": 5}, "bits = 5"),
    "bits of text": ({**GPTQ, "bits": "4"}, "bits = '4'"),
    "bits of a float": ({**GPTQ, "bits": 4.0}, "bits = 4.0"),
    "format of a list": ({**GPTQ, "checkpoint_format": []}, r"checkpoint_format = \[\]"),
    "gemv": ({**AWQ, "version": "gemv"}, "version = 'gemv'"),
    "awq 3 bits": ({**AWQ, "bits": 3}, "bits = 3"),
    "nvfp4": ({**PACK, "format": "nvfp4-pack-quantized"}, "format = 'nvfp4"),
    "sparse": ({**PACK, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity"),
    "rotated": ({**PACK, "transform_config": {"config_groups": {}}}, "rotations"),
    "a list": ([1], "expected a table"),
}


@pytest.mark.parametrize(("settings", "message"), METHODS.values(), ids=METHODS)
def test_ways_that_are_not_read(tmp_path: Path, settings: Any, message: str) -> None:
    packers.write_quantized(tmp_path, CONFIG, settings, lambda shape: ({}, np.zeros(shape)))
    with pytest.raises(ModelError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def put(name: str, raw: Raw) -> Any:
    return lambda tensors: tensors.update({name: raw})


def state(**values: Any) -> Any:
    """The quant_state of bitsandbytes with other values."""
    import json

    good = {"blocksize": 64, "shape": [32, 64], "nested_blocksize": 4, "nested_offset": 0.25}
    text = json.dumps(good | values).encode()
    return put("weight.quant_state.bitsandbytes__nf4", packers.integers("U8", list(text)))


WRONG: dict[str, tuple[str, Any, str]] = {
    "no scales": ("gptq 4 bits", drop("scales"), "scales: is missing"),
    "no zeros": ("gptq 4 bits", drop("qzeros"), "qzeros: is missing"),
    "zero groups": ("gptq 4 bits", put("scales", packers.f16(np.zeros((0, 32)))), "scales: shape"),
    "scales of other rows": (
        "gptq 4 bits",
        put("scales", packers.f16(np.ones((2, 31)))),
        "expected any x 32",
    ),
    "group too high": (
        "gptq 4 bits",
        put("g_idx", packers.integers("I32", np.full(64, 2))),
        "group 2: expected 0 to 1",
    ),
    "group below zero": (
        "gptq 4 bits",
        put("g_idx", packers.integers("I32", np.full(64, -1))),
        "group -1",
    ),
    "columns do not fit": (
        "gptq 4 bits",
        put("g_idx", packers.integers("I32", np.zeros(65))),
        "words for 65 columns",
    ),
    "one column": (
        "gptq 4 bits",
        put("g_idx", packers.integers("I32", [0])),
        "8 words for 1 columns",
    ),
    "uneven groups": (
        "gptq without g_idx",
        lambda t: t.update(
            scales=packers.f16(np.ones((50, 32))),
            qzeros=packers.integers("I32", np.zeros((50, 4))),
        ),
        "50 groups for 64 columns",
    ),
    "words of 64 bits": (
        "gptq 4 bits",
        put("qweight", packers.integers("I64", np.zeros((8, 32)))),
        "type I64: expected I32",
    ),
    "awq zeros": (
        "awq",
        put("qzeros", packers.integers("I32", np.zeros((2, 3)))),
        "expected 2 x 4",
    ),
    "awq zero groups": ("awq", put("scales", packers.f16(np.zeros((0, 32)))), "scales: shape"),
    "infinite scale": (
        "awq",
        put("scales", packers.f16(np.full((2, 32), np.inf))),
        "is not finite|finite number",
    ),
    "bnb shape": ("bnb double", state(shape=[1 << 40, 1 << 40]), "bytes: expected"),
    "bnb shape of text": ("bnb double", state(shape="x"), "shape = 'x'"),
    "bnb block": ("bnb double", state(blocksize=0), "blocksize = 0"),
    "bnb huge block": ("bnb nf4", state(blocksize=1 << 34), "expected 1 to 2048, the number"),
    "bnb endless block": ("bnb double", state(blocksize=10**30), "expected 1 to 2048"),
    "bnb nested huge": ("bnb double", state(nested_blocksize=10**30), "expected 1 to 2048"),
    "bnb huge offset": ("bnb double", state(nested_offset=10**400), "nested_offset = 1000"),
    "bnb nested block": ("bnb double", state(nested_blocksize=None), "nested_blocksize = None"),
    "bnb offset": ("bnb double", state(nested_offset="1"), "nested_offset = '1'"),
    "bnb no JSON": (
        "bnb nf4",
        put("weight.quant_state.bitsandbytes__nf4", packers.integers("U8", [1, 2])),
        "not valid JSON",
    ),
    "bnb map": ("bnb nf4", put("weight.quant_map", f32(np.ones(15))), "quant_map: shape"),
    "bnb absmax": ("bnb nf4", put("weight.absmax", f32(np.ones(31))), "absmax: shape"),
    "bnb weight": ("bnb nf4", drop("weight"), "None bytes"),
    "int8 scale": ("bnb int8", put("SCB", f32(np.ones(31))), "SCB: shape"),
    "int8 layout": ("bnb int8", put("weight_format", packers.integers("U8", 2)), "weight_format"),
    "packed shape": (
        "compressed 4 bits",
        put("weight_shape", packers.integers("I64", [32, 1 << 40])),
        "weight_shape",
    ),
    "packed rows": (
        "compressed 4 bits",
        put("weight_shape", packers.integers("I64", [31, 64])),
        "expected 32 rows",
    ),
    "packed scale": (
        "compressed 4 bits",
        put("weight_scale", packers.f16(np.ones((31, 2)))),
        "weight_scale: shape",
    ),
    "packed group": (
        "compressed order",
        put("weight_g_idx", packers.integers("I32", np.full(64, 9))),
        "group 9",
    ),
    "packed zeros": (
        "compressed asymmetric",
        put("weight_zero_point", packers.integers("I32", np.zeros((1, 2)))),
        "expected 4 x 2",
    ),
    "bytes without a scale": ("int-quantized", drop("weight_scale"), "weight_scale: is missing"),
}


@pytest.mark.parametrize(("name", "change", "message"), WRONG.values(), ids=WRONG)
def test_damaged_tensors_are_named(
    tmp_path: Path, rng: np.random.Generator, name: str, change: Any, message: str
) -> None:
    """Before any work, on one line, and with nothing left behind."""
    settings, pack, options = SCHEMES[name]

    def damaged(shape: tuple[int, int]) -> packers.Packed:
        tensors, w = pack(rng, shape, **options)
        if shape == (32, 64):
            change(tensors)
        return tensors, w

    packers.write_quantized(tmp_path / "m", CONFIG, settings, damaged)
    with pytest.raises(EdgeqError, match=message) as caught:
        convert(tmp_path / "m", tmp_path / "o.gguf", "F16")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("o.gguf*"))


def test_scheme_of_a_plain_checkpoint_changes_nothing(tmp_path: Path) -> None:
    """A GPTQ checkpoint in which nothing is packed."""
    packers.write_quantized(
        tmp_path, CONFIG, GPTQ, lambda shape: ({"weight": bf16(np.ones(shape))}, np.ones(shape))
    )
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("model.layers.0.mlp.up_proj.weight").min() == 1


def test_extra_parts_are_no_tensors(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors, w = packers.compressed(rng, (32, 64))
    named = {f"model.layers.0.self_attn.q_proj.{end}": raw for end, raw in tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", named)
    (tmp_path / "config.json").write_text(
        '{"quantization_config": {"quant_method": "compressed-tensors"}}'
    )
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["model.layers.0.self_attn.q_proj.weight"]
        entry = checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"]
        assert (entry.shape, entry.nbytes) == (
            w.shape,
            sum(len(raw[2]) for raw in tensors.values()),
        )


def test_threads_share_what_is_kept(rng: np.random.Generator) -> None:
    w = rng.standard_normal((2, 8), np.float32)
    reads: list[HfTensor] = []

    def slow(tensor: HfTensor, start: int, stop: int) -> NDArray[np.uint8]:
        reads.append(tensor)
        time.sleep(0.01)  # others ask for the same meanwhile
        return w.reshape(-1).view(np.uint8)

    parts = Parts(Path(), {"a": HfTensor(w.shape, "F32", Path(), 0, w.nbytes)}, slow)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(parts.array, ["a"] * 8):
            np.testing.assert_array_equal(found, w)
    assert len(reads) == 1
