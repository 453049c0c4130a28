"""Checkpoint folders: what is read, and what is refused with a message."""

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_checkpoint import (
    CONFIG,
    Raw,
    bf16,
    f32,
    header_bytes,
    random_weights,
    write_checkpoint,
    write_safetensors,
)

from edgeq.checkpoint import open_checkpoint
from edgeq.checkpoint.card import card_metadata, sampling_metadata
from edgeq.checkpoint.names import gguf_names
from edgeq.checkpoint.safetensors import SafetensorsFile, float8_e4m3, to_float32
from edgeq.errors import EdgeqError, FormatError, ModelError, ResourceError


def folder_with(path: Path, tensors: dict[str, Raw], config: dict[str, Any] | None = None) -> Path:
    (path / "config.json").write_text(json.dumps(config or CONFIG))
    write_safetensors(path / "model.safetensors", tensors)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    shape, offsets = (list(x) if isinstance(x, tuple) else x for x in (shape, offsets))
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = {"a": entry()}
MALFORMED = {
    "empty file": b"",
    "seven bytes": b"\x02" + bytes(6),
    "only a length": (2).to_bytes(8, "little"),
    "length 0": bytes(8) + b"{}",
    "length 1": (1).to_bytes(8, "little") + b"{}",
    "length of the whole file": (18).to_bytes(8, "little") + b"{" + b" " * 8 + b"}",
    "length 2**64 - 1": b"\xff" * 8 + b"{}",
    "length beyond the limit": (100_000_001).to_bytes(8, "little") + b"{}" * 9,
    "not UTF-8": header_bytes(b'{"\xff": 1}'),
    "byte order mark": header_bytes(b"\xef\xbb\xbf{}"),
    "a list": header_bytes(b"[1, 2]"),
    "cut short": header_bytes(b'{"a": '),
    "text after the object": header_bytes(b"{}GGUF"),
    "newline after the object": header_bytes(b"{}\n"),
    "nested too deeply": header_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "number of 5000 digits": header_bytes(b'{"a": ' + b"9" * 5000 + b"}"),
    "duplicate tensor": header_bytes(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "duplicate metadata": header_bytes(b'{"__metadata__":{},"__metadata__":{}}'),
    "metadata of numbers": header_bytes({"__metadata__": {"a": 1}}),
    "metadata is a list": header_bytes({"__metadata__": []}),
    "entry is a number": header_bytes({"a": 1}),
    "field missing": header_bytes({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "extra field": header_bytes({"a": {**entry(), "x": 1}}, bytes(4)),
    "begin after end": header_bytes({"a": entry(offsets=(4, 0))}, bytes(4)),
    "negative offset": header_bytes({"a": entry(offsets=(-4, 0))}, bytes(4)),
    "float offset": header_bytes({"a": entry(offsets=(0, 4.0))}, bytes(4)),
    "true as offset": header_bytes({"a": entry("U8", (1,), (False, True))}, bytes(1)),
    "three offsets": header_bytes({"a": entry(offsets=(0, 2, 4))}, bytes(4)),
    "end after the file": header_bytes({"a": entry(shape=(2,), offsets=(0, 8))}, bytes(4)),
    "offset 2**63": header_bytes({"a": entry(offsets=(2**63, 2**63 + 4))}, bytes(4)),
    "overlap": header_bytes({**GOOD, "b": entry(offsets=(0, 4))}, bytes(4)),
    "half overlap": header_bytes({**GOOD, "b": entry(offsets=(2, 6))}, bytes(6)),
    "gap": header_bytes({**GOOD, "b": entry(offsets=(8, 12))}, bytes(12)),
    "bytes left over": header_bytes(GOOD, bytes(5)),
    "shape is a number": header_bytes({"a": entry(shape=1)}, bytes(4)),
    "negative size": header_bytes({"a": entry(shape=(-1,))}, bytes(4)),
    "sizes whose product wraps": header_bytes({"a": entry(shape=(2**40, 2**40))}, bytes(4)),
    "200 dimensions": header_bytes({"a": entry(shape=(1,) * 200)}, bytes(4)),
    "shape needs more": header_bytes({"a": entry(shape=(2,))}, bytes(4)),
    "unknown type": header_bytes({"a": entry("F4")}, bytes(4)),
    "type is a number": header_bytes({"a": entry(4)}, bytes(4)),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_file_is_a_format_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"model\.safetensors: ") as caught:
        SafetensorsFile(path)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": f32([1.0, 2.0]), "b": bf16([[3.0]])})
    whole = path.read_bytes()
    SafetensorsFile(path).close()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            SafetensorsFile(path)


def test_zero_size_and_rank_zero_tensors_are_legal(tmp_path: Path) -> None:
    tensors = {"empty": f32(np.zeros((0, 3))), "scalar": f32(2.5)}
    with open_checkpoint(folder_with(tmp_path, tensors)) as checkpoint:
        assert checkpoint.read("scalar").shape == ()
        assert checkpoint.read("scalar") == 2.5
        with pytest.raises(ModelError, match="without elements"):
            checkpoint.read("empty")


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_special_files_are_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    with pytest.raises(FormatError, match="not a regular file"):
        SafetensorsFile(path)


def test_file_cut_while_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    with open_checkpoint(folder_with(tmp_path, {"a": f32(np.ones(64))})) as checkpoint:
        os.truncate(tmp_path / "model.safetensors", 200)
        with pytest.raises(ResourceError, match="changed while open"):
            checkpoint.read("a")


def test_bf16_and_f16_equal_gguf_py(rng: np.random.Generator) -> None:
    raw = rng.integers(0, 256, 4096, dtype=np.uint8)
    for name in ("F16", "BF16"):
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(to_float32(raw, name), expected)


def test_every_float16_value() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = every[np.isfinite(every.view(np.float16))]  # others take a way of their own
    for bits in (finite, every):
        expected = bits.view(np.float16).astype(np.float32)
        found = to_float32(bits.view(np.uint8), "F16")
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_float8_equals_its_definition() -> None:
    def slow(code: int) -> float:
        sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
        if (exponent, fraction) == (15, 7):
            return float("nan")
        scale = 2.0 ** (max(exponent, 1) - 7)
        return (-1) ** sign * scale * ((exponent > 0) + fraction / 8)

    expected = np.array([slow(code) for code in range(256)], np.float32)
    np.testing.assert_array_equal(float8_e4m3(), expected)


SCALES = {
    "number": ("weight_scale", np.array(2.0), lambda i, j: 2.0),
    "one element": ("weight_scale_inv", np.array([3.0]), lambda i, j: 3.0),
    "vector of rows": ("weight_scale", np.arange(1.0, 6.0), lambda i, j: 1.0 + i),
    "column of rows": ("weight_scale", np.arange(1.0, 6.0)[:, None], lambda i, j: 1.0 + i),
    "blocks": (
        "weight_scale_inv",
        np.arange(1.0, 7.0).reshape(3, 2),
        lambda i, j: 1.0 + 2 * (i // 2) + j // 4,
    ),
}


@pytest.mark.parametrize(("suffix", "scale", "factor"), SCALES.values(), ids=SCALES.keys())
def test_float8_weights_are_scaled(tmp_path: Path, suffix: str, scale: Any, factor: Any) -> None:
    """5 rows of 7: neither is a multiple of the blocks of 2 x 4."""
    codes = np.arange(35, dtype=np.uint8).reshape(5, 7)
    tensors = {"q.weight": ("F8_E4M3", (5, 7), codes.tobytes()), f"q.{suffix}": f32(scale)}
    config = {**CONFIG, "quantization_config": {"weight_block_size": [2, 4]}}
    expected = [[float8_e4m3()[7 * i + j] * factor(i, j) for j in range(7)] for i in range(5)]
    with open_checkpoint(folder_with(tmp_path, tensors, config)) as checkpoint:
        assert list(checkpoint.tensors) == ["q.weight"]
        np.testing.assert_allclose(checkpoint.read("q.weight"), expected, rtol=1e-6)
        np.testing.assert_allclose(checkpoint.read_rows("q.weight", 1, 4), expected[1:4], rtol=1e-6)


def test_scale_of_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    tensors = {"q.weight": ("F8_E4M3", (4, 4), bytes(16)), "q.weight_scale": f32(np.ones(3))}
    with (
        open_checkpoint(folder_with(tmp_path, tensors)) as checkpoint,
        pytest.raises(ModelError, match=r"q\.weight_scale: shape \(3,\) does not fit"),
    ):
        checkpoint.check("q.weight")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_weight_is_named(tmp_path: Path, bad: float) -> None:
    w = np.ones((6, 5), np.float32)
    w[4, 2] = bad
    with open_checkpoint(folder_with(tmp_path, {"q": bf16(w)})) as checkpoint:
        for read in (lambda: checkpoint.read("q"), lambda: checkpoint.read_rows("q", 3, 6)):
            with pytest.raises(ModelError, match=r"q\[4, 2\] = (nan|inf|-inf)"):
                read()
        assert checkpoint.read_rows("q", 0, 4).sum() == 20


def test_large_finite_weights_pass(tmp_path: Path) -> None:
    w = np.full((4, 4), 3e38, np.float32)  # their sum is infinite
    with open_checkpoint(folder_with(tmp_path, {"q": f32(w)})) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("q"), w)


def test_unsupported_type_is_named(tmp_path: Path) -> None:
    tensors = {"q": ("I8", (2, 2), bytes(4))}
    with (
        open_checkpoint(folder_with(tmp_path, tensors)) as checkpoint,
        pytest.raises(ModelError, match="q: type I8: expected one of F32, F16, BF16, F8_E4M3"),
    ):
        checkpoint.check("q")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_refused_unopened(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / name)  # opening it would block
    with pytest.raises(ModelError, match=r"pickle files .* can run code and are never opened"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="never opened"):
        open_checkpoint(tmp_path / name)


CONFIGS = {
    "a list": b"[]",
    "not JSON": b"{'a': 1}",
    "not UTF-8": b'{"a": "\xff"}',
    "duplicate key": b'{"a": 1, "a": 1}',
    "nested too deeply": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("data", CONFIGS.values(), ids=CONFIGS.keys())
def test_malformed_config_is_a_format_error(tmp_path: Path, data: bytes) -> None:
    folder_with(tmp_path, {"a": f32([1.0])})
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(FormatError, match=r"config\.json: "):
        open_checkpoint(tmp_path)


def sharded(folder: Path, weight_map: dict[str, str], shards: dict[str, dict[str, Raw]]) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, tensors in shards.items():
        write_safetensors(folder / name, tensors)
    return folder


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    shards = {ONE: {"a": f32([1.0])}, TWO: {"b": f32([2.0]), "c": bf16([4.0])}}
    with open_checkpoint(sharded(tmp_path, {"a": ONE, "b": TWO, "c": TWO}, shards)) as checkpoint:
        assert [float(checkpoint.read(name)[0]) for name in "abc"] == [1.0, 2.0, 4.0]


A, B = {"a": f32([1.0])}, {"b": f32([2.0])}
WRONG_SHARDS = {
    "one missing": ({"a": ONE, "b": TWO}, {ONE: A}, r"1 of 2 shards missing, first .*00002"),
    "tensor elsewhere": ({"a": ONE, "b": ONE}, {ONE: A, TWO: B}, "'b' is missing"),
    "tensor in two": ({"a": ONE, "b": TWO}, {ONE: A, TWO: {**B, **A}}, "'a' is here, but"),
    "tensor not in index": ({"a": ONE}, {ONE: {**A, **B}}, "'b' is here, but"),
    "path upwards": ({"a": "../x.safetensors"}, {}, "expected a plain file name"),
    "absolute path": ({"a": "/etc/passwd"}, {}, "expected a plain file name"),
    "NUL": ({"a": "a\0b"}, {}, "expected a plain file name"),
    "dots": ({"a": ".."}, {}, "expected a plain file name"),
    "empty map": ({}, {}, "weight_map: expected a table"),
    "number": ({"a": 1}, {}, "weight_map: expected file names"),
}


@pytest.mark.parametrize(("index", "shards", "message"), WRONG_SHARDS.values(), ids=WRONG_SHARDS)
def test_index_and_shards_must_agree(tmp_path: Path, index: Any, shards: Any, message: str) -> None:
    with pytest.raises(EdgeqError, match=message):
        open_checkpoint(sharded(tmp_path, index, shards))


def test_symbolic_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    write_safetensors(outside, {"a": f32([1.0])})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(FormatError, match="symbolic link leaves the folder"):
        open_checkpoint(folder)


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--tiny" / "blobs"
    folder = tmp_path / "models--org--tiny" / "snapshots" / "0123abc"
    for path in (blobs, folder):
        path.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_safetensors(blobs / "5d41402a", {"a": f32([1.0])})
    (folder / "model.safetensors").symlink_to("../../blobs/5d41402a")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.read("a") == 1.0


def test_weights_come_back_exactly(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    with open_checkpoint(write_checkpoint(tmp_path, CONFIG, weights)) as checkpoint:
        assert checkpoint.config == CONFIG
        assert checkpoint.generation_config == {}
        for name, w in weights.items():
            np.testing.assert_array_equal(checkpoint.read(name), w)


def test_reference_checkpoints_open(shared_data: Path) -> None:
    for folder in (*sorted((shared_data / "arch").iterdir()), shared_data / "tiny-home/checkpoint"):
        with open_checkpoint(folder) as checkpoint:
            embedding = checkpoint.tensors["model.embed_tokens.weight"]
            assert embedding.shape[0] == checkpoint.config["vocab_size"]


def test_names_without_a_place_are_refused() -> None:
    good = "model.layers.1.mlp.up_proj.weight"
    assert gguf_names("llama", 2, [good]) == {good: "blk.1.ffn_up.weight"}
    with pytest.raises(ModelError, match=r"1 tensors have no place .*qweight"):
        gguf_names("llama", 2, [good, "model.layers.1.mlp.up_proj.qweight"])
    with pytest.raises(ModelError, match="with 1 layers"):
        gguf_names("llama", 1, [good])


def test_useless_tensors_are_skipped() -> None:
    attention = "model.layers.0.self_attn."
    names = [attention + tail for tail in ("rotary_emb.inv_freq", "k_proj.input_scale", "k_scale")]
    assert gguf_names("llama", 1, names) == {}


def test_two_tensors_for_one_place_are_refused() -> None:
    with pytest.raises(ModelError, match=r"are both token_embd\.weight"):
        gguf_names("llama", 1, ["model.embed_tokens.weight", "transformer.wte.weight"])


def test_model_card_and_folder_name(tmp_path: Path) -> None:
    folder = tmp_path / "Tiny-Home-7M-Instruct"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a, 7]\nversion: 1.5\n---\n# Hi\n")
    assert card_metadata(folder, {}, 7_000_000) == {
        "general.name": "Tiny Home 7M Instruct",
        "general.version": "1.5",
        "general.finetune": "Instruct",
        "general.basename": "Tiny-Home",
        "general.size_label": "7M",
        "general.license": "mit",
        "general.tags": ["a", "7"],
    }


@pytest.mark.parametrize(
    "card",
    [
        "---\na: [\n---\n",
        "---\n1: 2\n---\n",
        "---\nlicense: [1, 2]\n---\n",
        "---\n- a\n---\n",
        "\xff",
    ],
)
def test_broken_model_card_is_ignored(tmp_path: Path, card: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "README.md").write_bytes(card.encode("latin-1"))
    found = card_metadata(folder, {}, 7_340_000)
    assert found.pop("general.name").lower() == "checkpoint"
    assert found == {"general.size_label": "7.3M"}


def test_values_of_any_type_become_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nname: 7\nversion: 2024-01-01\nlicense: no\n---\n")
    found = card_metadata(tmp_path, {"_name_or_path": 5}, 1000)
    assert found["general.size_label"] == "1.0K"
    found = card_metadata(tmp_path, {}, 1000)
    assert (found["general.name"], found["general.version"]) == ("7", "2024-01-01")
    assert all(isinstance(value, str) for value in found.values())


def test_sampling_values_that_are_no_numbers_are_left_out() -> None:
    config = {"temperature": True, "top_p": float("nan"), "top_k": 2**40, "min_p": 0, "x": 1}
    assert sampling_metadata(config) == {"general.sampling.min_p": 0.0}
