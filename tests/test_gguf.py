"""The GGUF reader: what it gives, and that gguf-py sees the same."""

import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import OpenBytes
from rawgguf import ARRAY, BOOL, NONE, ONE, TINY, U32, array, check_equal, kv

from edgeq import blocks
from edgeq.errors import FormatError, ResourceError
from edgeq.gguf import GgufWriter, TensorSpec, open_gguf


def test_tiny_file(open_bytes: OpenBytes) -> None:
    file = open_bytes(TINY.build())
    assert (file.version, file.alignment, file.warnings) == (3, 32, [])
    assert file.metadata["general.name"] == "Größe 1"
    assert file.metadata["tokenizer.tokens"] == ["a", "", "\udcff"]
    assert file.metadata["tokenizer.scores"].tolist() == [1.5, -2]
    assert file.metadata["tokenizer.add_bos"] is True
    assert file.value_types["tokenizer.tokens"] == "array[string]"
    assert file.value_types["tiny.block_count"] == "uint32"
    assert [tensor.shape for tensor in file.tensors.values()] == [(4, 32), (3, 64), (33,)]
    assert file.tensors["blk.0.attn_q.weight"].format is blocks.get("Q4_0")
    assert file.tensor("token_embd.weight").reshape(-1).tolist() == list(range(256)) * 2
    assert file.tensor("blk.0.attn_q.weight").shape == (3, 36)
    assert file.tensor("output_norm.weight").shape == (132,)
    assert not file.tensor("output_norm.weight").flags.writeable
    assert file.size == len(TINY.build())


def test_20_truth_values_become_bool(open_bytes: OpenBytes) -> None:
    file = open_bytes(TINY.key(kv(b"k", ARRAY, array(BOOL, 2, b"\x00\xff"))).build())
    assert file.metadata["k"].tolist() == [False, True]


def split_part(number: int) -> bytes:
    pair = (
        kv(b"split.count", U32, struct.pack("<I", 2)),
        kv(b"split.no", U32, struct.pack("<I", number)),
    )
    return TINY.key(*pair).build()


def test_29_architecture_missing(open_bytes: OpenBytes) -> None:
    file = open_bytes(NONE.build())
    with pytest.raises(FormatError, match=r"general\.architecture is missing"):
        file.get("general.architecture", str)


def test_30_missing_part_is_named(tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    first.write_bytes(split_part(0))
    with pytest.raises(FormatError, match=r"m-00002-of-00002\.gguf is missing"):
        open_gguf(first)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(split_part(1))
    with pytest.raises(FormatError, match="llama-gguf-split --merge"):
        open_gguf(first)


def test_51_53_problems_are_found(open_bytes: OpenBytes) -> None:
    data = bytearray(len(TINY.data))
    data[512 + 18 * 3 + 1] = 0x7E  # scale of the second block of row 1: NaN
    data[640 + 4 * 32 : 640 + 4 * 33] = struct.pack("<f", float("inf"))
    problems = list(open_bytes(replace(TINY, data=bytes(data)).build()).problems())
    assert [line.split(": ", 1)[1] for line in problems] == [
        "tensor blk.0.attn_q.weight, row 1, block 1: not a finite number",
        "tensor output_norm.weight, row 0, block 32: not a finite number",
    ]
    assert list(open_bytes(ONE.build()).problems()) == []


def test_60_only_regular_files(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FormatError, match="is a folder"):
        open_gguf(tmp_path)
    for special in (tmp_path / "fifo", Path("/dev/zero"), Path("/dev/random")):
        with pytest.raises(FormatError, match="not a regular file"):
            open_gguf(special)
    for bad in (tmp_path / "loop", tmp_path / "none", tmp_path / "a\x00b"):
        with pytest.raises(ResourceError, match="cannot be opened"):
            open_gguf(bad)


def test_61_replaced_while_open(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(TINY.build())
    with open_gguf(path) as file:
        (tmp_path / "b.gguf").write_bytes(b"other")
        os.replace(tmp_path / "b.gguf", path)
        file.check_unchanged()
        assert file.tensor("token_embd.weight")[0, 1] == 1


def test_61_truncated_while_open(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(TINY.build())
    with open_gguf(path) as file:
        os.truncate(path, 100)
        with pytest.raises(ResourceError, match="has 100 bytes"):
            file.check_unchanged()


# ---- typed access


def test_forgotten_rows_can_be_read_again(tmp_path: Path) -> None:
    raw = np.arange(64 * 1024, dtype=np.float32).reshape(64, 1024)
    with GgufWriter(
        tmp_path / "x.gguf", {}, [TensorSpec("a", raw.shape, blocks.get("F32"))]
    ) as writer:
        writer.write("a", raw)
    with open_gguf(tmp_path / "x.gguf") as file:
        rows = file.tensor("a")[5:60]
        for part in (rows, rows[:1], rows[-1:], file.tensor("a")):
            file.forget(part)
            assert file.tensor("a").tobytes() == raw.tobytes()
    file.forget(rows)  # after `close`: nothing to do


def test_get_checks_the_type(open_bytes: OpenBytes) -> None:
    file = open_bytes(TINY.build())
    assert file.get("tiny.block_count", int) == 1
    assert file.get("tiny.epsilon", float) == 0.5
    assert file.get("tokenizer.add_bos", bool) is True
    assert file.get("general.name", str) == "Größe 1"
    assert file.get("tokenizer.tokens", "strs") == ["a", "", "\udcff"]
    assert file.get("tokenizer.scores", "floats").tolist() == [1.5, -2]
    assert file.get("none", int, 5) == 5
    assert file.get("none", "ints", None) is None


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("none", int, "none is missing: expected an integer"),
        ("tiny.epsilon", int, "tiny.epsilon = 0.5 (float32): expected an integer"),
        ("tiny.block_count", float, "tiny.block_count = 1 (uint32): expected a float"),
        ("tiny.block_count", bool, "expected a truth value"),
        ("tokenizer.add_bos", int, "tokenizer.add_bos = True (bool): expected an integer"),
        ("general.name", int, "general.name = 'Größe 1' (string): expected an integer"),
        ("tokenizer.tokens", str, "tokenizer.tokens = 3 values (array[string])"),
        ("tokenizer.scores", "ints", "expected an array of integers"),
        ("tokenizer.scores", "strs", "expected an array of strings"),
        ("tokenizer.tokens", "floats", "expected an array of floats"),
    ],
)
def test_get_refuses(key: str, kind: Any, message: str, open_bytes: OpenBytes) -> None:
    with pytest.raises(FormatError) as caught:
        open_bytes(TINY.build()).get(key, kind)
    assert message in str(caught.value)


def test_tensor_after_close_and_unknown_tensor(open_bytes: OpenBytes) -> None:
    file = open_bytes(TINY.build())
    with pytest.raises(FormatError, match="tensor none is missing"):
        file.tensor("none")
    view = file.tensor("token_embd.weight")
    file.close()
    assert view[0, 1] == 1
    with pytest.raises(ResourceError, match="file is closed"):
        file.tensor("token_embd.weight")
    file.close()


# ---- real files and gguf-py


def test_files_of_llama_cpp(shared_data: Path) -> None:
    for path in (shared_data / "tiny-home").rglob("*.gguf"):
        reader = gguf.GGUFReader(path)
        with open_gguf(path) as file:
            assert file.warnings == []
            assert list(file.problems()) == []
            check_equal(file, reader)


def test_vocabularies(shared_data: Path) -> None:
    paths = sorted((shared_data / "vocab").glob("*.gguf"))
    assert paths
    for path in paths:
        with open_gguf(path) as file:
            assert (file.tensors, file.warnings) == ({}, [])
            assert len(file.get("tokenizer.ggml.tokens", "strs")) > 30_000
