"""The GGUF writer: everything comes back, and what GGUF cannot hold is refused."""

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import RandomBlocks
from hypothesis import given, settings
from hypothesis import strategies as st
from rawgguf import check_equal

from edgeq import blocks
from edgeq.errors import FormatError, ResourceError
from edgeq.gguf import GgufWriter, TensorSpec, open_gguf, partfile

METADATA = {
    "general.architecture": "tiny",
    "a.int": 7,
    "a.negative": -7,
    "a.large": 1 << 40,
    "a.float": 0.25,
    "a.bool": False,
    "a.text": "ä\n\t\udcff",
    "a.strings": ["x", "", "\udc80"],
    "a.integers": [1, -2],
    "a.floats": [0.5, 2.0],
    "a.bools": [True, False],
    "a.u8": np.uint8(200),
    "a.i64": np.int64(-5),
    "a.f64": np.float64(0.1),
    "a.npbool": np.bool_(True),
    "a.array": np.array([1, -1], np.int16),
    "a.nothing": [],
    "a.nonumbers": np.array([], np.float32),
}
STORED = (
    "string uint32 int32 uint64 float32 bool string array[string] array[int32] array[float32] "
    "array[bool] uint8 int64 float64 bool array[int16] array[string] array[float32]"
)


def test_everything_comes_back(tmp_path: Path, random_blocks: RandomBlocks) -> None:
    path = tmp_path / "all.gguf"
    specs = [TensorSpec(f"t.{fmt.name}", (2, 3, 256), fmt) for fmt in blocks.formats().values()]
    specs.append(TensorSpec("last", (7,), blocks.get("F16")))
    data = {
        spec.name: random_blocks(spec.format, *spec.shape[:-1], spec.shape[-1] // spec.format.block)
        for spec in specs
    }
    with GgufWriter(path, METADATA, specs) as writer:
        for name in reversed(data):
            writer.write(name, data[name])
    assert path.stat().st_size == writer.nbytes
    with open_gguf(path) as file:
        assert " ".join(file.value_types.values()) == STORED
        for key, wanted in METADATA.items():
            assert np.array_equal(file.metadata[key], wanted), key
        for spec in specs:
            assert file.tensors[spec.name].shape == spec.shape
            assert np.array_equal(file.tensor(spec.name), data[spec.name])


def test_gguf_py_reads_what_we_write(tmp_path: Path, random_blocks: RandomBlocks) -> None:
    path = tmp_path / "ours.gguf"
    readable = {key: value for key, value in METADATA.items() if "\udc80" not in str(value)}
    readable |= {"a.text": "ä\n", "a.strings": ["x", ""]}
    for key in ("a.nothing", "a.nonumbers"):  # gguf-py cannot show empty arrays
        del readable[key]
    specs = [TensorSpec(f"t.{fmt.name}", (3, 256), fmt) for fmt in blocks.formats().values()]
    with GgufWriter(path, readable | {"general.alignment": 64}, specs) as writer:
        for spec in specs:
            writer.write(spec.name, random_blocks(spec.format, 3, 256 // spec.format.block))
    with open_gguf(path) as file:
        assert file.alignment == 64
        check_equal(file, gguf.GGUFReader(path))


def test_typed_metadata_keeps_types(tmp_path: Path) -> None:
    first, second = tmp_path / "1.gguf", tmp_path / "2.gguf"
    with GgufWriter(first, METADATA, []):
        pass
    with open_gguf(first) as file, GgufWriter(second, file.typed_metadata(), []):
        pass
    assert first.read_bytes() == second.read_bytes()


scalars = (
    st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(width=32, allow_nan=False)
    | st.booleans()
    | st.text()
)


@settings(max_examples=100, deadline=1000)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,9}\.[a-z_]{1,9}", fullmatch=True),
        scalars | st.lists(st.text()) | st.lists(st.integers(-(1 << 31), (1 << 31) - 1)),
        max_size=6,
    )
)
def test_any_metadata_comes_back(tmp_path_factory: pytest.TempPathFactory, metadata: Any) -> None:
    path = tmp_path_factory.mktemp("any") / "m.gguf"
    with GgufWriter(path, metadata, []):
        pass
    with open_gguf(path) as file:
        assert list(file.metadata) == list(metadata)
        for key, wanted in metadata.items():
            found = file.metadata[key]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == wanted


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    tokens = [f"token {i}" for i in range(262_144)]
    with GgufWriter(path, {"tokenizer.ggml.tokens": tokens}, []):
        pass
    start = time.process_time()
    with open_gguf(path) as file:
        elapsed = time.process_time() - start
        assert file.metadata["tokenizer.ggml.tokens"] == tokens
    assert elapsed < 1  # 0.1 s on a desktop; room for a small board


# ---- what is refused before anything is written

F32 = blocks.get("F32")
SPECS = [TensorSpec("a", (4, 32), F32), TensorSpec("b", (5,), F32)]
DATA = {"a": np.ones((4, 32), np.float32), "b": np.full(5, 2, np.float32)}


@pytest.mark.parametrize(
    ("metadata", "specs", "message"),
    [
        ({"": 1}, [], "metadata key 0 is ''"),
        ({"a": None}, [], "a: NoneType cannot be stored"),
        ({"a": [1, "x"]}, [], "a: list of int, str"),
        ({"a": [[1]]}, [], "a: list of list"),
        ({"a": 1 << 64}, [], f"a = {1 << 64}: expected an integer of 64 bits"),
        ({"a": [1 << 63]}, [], "expected an integer of 64 bits"),
        ({"a": 1e300}, [], "a = 1e+300: too large for float32"),
        ({"a": np.zeros((2, 2))}, [], "a: array of 2 dimensions"),
        ({"a": np.array([1j])}, [], "a: NumPy type complex128"),
        ({"general.alignment": 48}, [], "general.alignment = 48"),
        ({"general.alignment": "32"}, [], "general.alignment = '32'"),
        ({"general.architecture": "../x"}, [], "general.architecture = '../x'"),
        ({}, [TensorSpec("a" * 64, (1,), F32)], "expected at most 63"),
        ({}, [TensorSpec("a/b", (1,), F32)], "looks like a path"),
        ({}, [TensorSpec("a", (1,), F32)] * 2, "tensor a appears twice"),
        ({}, [TensorSpec("a", (), F32)], "shape ()"),
        ({}, [TensorSpec("a", (0,), F32)], "shape (0,)"),
        ({}, [TensorSpec("a", (1,) * 5, F32)], "5 dimensions"),
        ({}, [TensorSpec("a", (2, 33), blocks.get("Q4_0"))], "expected a multiple of 32"),
    ],
)
def test_writer_refuses(
    metadata: dict[str, Any], specs: list[TensorSpec], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError) as caught:
        GgufWriter(tmp_path / "x.gguf", metadata, specs)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c", b"", "tensor c was not declared"),
        ("a", b"123", "tensor a has 3 bytes: expected 512"),
        ("a", np.ones((4, 33), np.float32), "tensor a has 528 bytes: expected 512"),
        ("b", DATA["b"], "1 tensors not written: a"),
    ],
)
def test_wrong_data_leaves_nothing(name: str, data: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(FormatError, match=message), GgufWriter(path, {}, SPECS) as writer:
        writer.write(name, data)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FormatError, match="is late"):
        writer.write("b", DATA["b"])


def test_data_may_be_strided_or_bytes(tmp_path: Path) -> None:
    wide = np.arange(256, dtype=np.float32).reshape(4, 64)
    with GgufWriter(tmp_path / "x.gguf", {}, SPECS) as writer:
        writer.write("a", wide[:, ::2])
        writer.write("b", DATA["b"].tobytes())
    with open_gguf(tmp_path / "x.gguf") as file:
        assert file.tensor("a").tobytes() == wide[:, ::2].tobytes()


def test_parts_make_a_tensor(tmp_path: Path) -> None:
    raw = np.arange(512, dtype=np.uint16).astype(np.uint8)
    with GgufWriter(tmp_path / "x.gguf", {}, SPECS) as writer:
        writer.write_part("a", raw[:300])
        writer.write("b", DATA["b"])
        writer.write_part("a", raw[300:])
    with open_gguf(tmp_path / "x.gguf") as file:
        assert file.tensor("a").tobytes() == raw.tobytes()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([500], "1 tensors not written: a"),
        ([500, 13], "tensor a has 1 bytes more than the declared 512"),
        ([512, 8], "tensor a has 8 bytes more than the declared 512"),
    ],
)
def test_parts_that_make_no_tensor(sizes: list[int], message: str, tmp_path: Path) -> None:
    def write() -> None:
        with GgufWriter(tmp_path / "x.gguf", {}, SPECS) as writer:
            writer.write("b", DATA["b"])
            for size in sizes:
                writer.write_part("a", bytes(size))

    with pytest.raises(FormatError, match=message):
        write()
    assert list(tmp_path.iterdir()) == []


def test_no_error_of_a_background_flush_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads want a flush while one is under way; the second one fails."""
    calls, go = itertools.count(), threading.Event()

    def flush(fd: int) -> None:
        call = next(calls)
        if call == 0:
            go.wait(10)
        if call == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(partfile, "_SYNC_EVERY", 1)
    monkeypatch.setattr(os, "fdatasync", flush, raising=False)
    file = partfile.PartFile(tmp_path / "x", 64)
    failed: list[ResourceError] = []

    def attempt(work: Callable[[], None]) -> None:
        try:
            work()
        except ResourceError as error:
            failed.append(error)

    def write() -> None:
        file.pwrite(8, memoryview(bytes(8)))

    attempt(write)
    threads = [threading.Thread(target=attempt, args=[write]) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)  # both are waiting for the first flush
    go.set()
    for thread in threads:
        thread.join()
    attempt(file.sync)
    file.abort()
    assert [str(error).split(": ")[1] for error in failed] == ["cannot be written"]
