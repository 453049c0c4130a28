"""Importance matrices: files of other tools and our own, merging, statistics."""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq import blocks, imatrix
from edgeq.errors import EdgeqError, FormatError, RequestError
from edgeq.gguf import GgufWriter, TensorSpec, open_gguf
from edgeq.imatrix import Imatrix, dat, statistics


@pytest.fixture(scope="module")
def theirs(shared_data: Path) -> Path:
    """A file of llama-imatrix."""
    return shared_data / "tiny-home" / "imatrix.gguf"


@pytest.fixture
def experts(rng: np.random.Generator) -> Imatrix:
    """A dense weight, and one of three experts of which the second saw nothing."""
    sums = {
        "blk.0.ffn_up.weight": rng.random((1, 8)),
        "blk.0.ffn_up_exps.weight": rng.random((3, 8)),
    }
    sums["blk.0.ffn_up_exps.weight"][1] = 0
    counts = {"blk.0.ffn_up.weight": [512], "blk.0.ffn_up_exps.weight": [300, 0, 212]}
    return Imatrix(
        {name: values.astype(np.float32) for name, values in sums.items()},
        {name: np.array(values, np.float32) for name, values in counts.items()},
        ("a.txt", "b.txt"),
        2,
        256,
    )


def assert_same(a: Imatrix, b: Imatrix) -> None:
    assert (a.datasets, a.chunk_count, a.chunk_size) == (b.datasets, b.chunk_count, b.chunk_size)
    assert a.sums.keys() == b.sums.keys() == a.counts.keys()
    for name in a.sums:
        np.testing.assert_array_equal(a.sums[name], b.sums[name])
        np.testing.assert_array_equal(a.counts[name], b.counts[name])


def test_a_file_of_llama_imatrix_is_written_back_byte_by_byte(theirs: Path, tmp_path: Path) -> None:
    found = imatrix.read(theirs)
    assert len(found.sums) == 56
    assert found.datasets == ("calibration.txt",)
    assert (found.chunk_count, found.chunk_size) == (493, 256)
    imatrix.write(found, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == theirs.read_bytes()


def test_importance_is_the_mean(theirs: Path) -> None:
    name = "blk.3.ffn_down.weight"
    with open_gguf(theirs) as file:
        sums = file.tensor(f"{name}.in_sum2").view("<f4")
        count = file.tensor(f"{name}.counts").view("<f4")[0]
    np.testing.assert_array_equal(imatrix.read(theirs).importance()[name], sums / count)


def test_experts_survive_a_round_trip(experts: Imatrix, tmp_path: Path) -> None:
    imatrix.write(experts, tmp_path / "a.gguf")
    found = imatrix.read(tmp_path / "a.gguf")
    assert_same(found, experts)
    means = found.importance()["blk.0.ffn_up_exps.weight"]
    assert means.shape == (3, 8)
    assert (means[1] == 1).all()
    with open_gguf(tmp_path / "a.gguf") as file:  # as llama-imatrix: ne = [1, n_mat]
        assert file.tensors["blk.0.ffn_up_exps.weight.counts"].shape == (3, 1)


def test_dat_keeps_the_means(experts: Imatrix, tmp_path: Path) -> None:
    path = tmp_path / "named.imatrix"
    dat.write(experts, path)
    found = imatrix.read(path)
    assert found.datasets == ("b.txt",)
    assert found.chunk_count == 2
    for name, means in experts.importance().items():
        np.testing.assert_allclose(found.importance()[name], means.reshape(-1), rtol=1e-6)


def entry(name: bytes, calls: int, values: list[float], size: int | None = None) -> bytes:
    count = len(values) if size is None else size
    head = struct.pack("<i", len(name)) + name + struct.pack("<2i", calls, count)
    return head + struct.pack(f"<{len(values)}f", *values)


def test_dat_by_hand(tmp_path: Path) -> None:
    """Values are mean times calls; the first versions of the tool wrote no text's name."""
    path = tmp_path / "imatrix.dat"
    path.write_bytes(struct.pack("<i", 1) + entry(b"blk.0.attn_q.weight", 4, [8, 2]))
    assert imatrix.read(path).importance()["blk.0.attn_q.weight"].tolist() == [2, 0.5]


NAME = b"blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<i", 2) + entry(NAME, 1, [1]), "length of name of entry 1 needs 4 bytes"),
        (struct.pack("<i", 2) + 2 * entry(NAME, 1, [1]), "expected a new plain name"),
        (struct.pack("<i", 1) + entry(NAME, 0, [1]), "calls of .* is 0"),
        (struct.pack("<i", 1) + entry(NAME, 1, [1], 1 << 20), "needs 4194304 bytes, 4 are left"),
        (struct.pack("<i", 1) + entry(NAME, 1, [1], -1), "is -1: expected 1"),
        (struct.pack("<i", 1) + entry(NAME, 1, [math.nan]), "value 0 is nan"),
        (struct.pack("<i", 1) + entry(b"\x1b[2J", 1, [1]), r"named '\\x1b"),
        (b"hello, world", "not a GGUF file"),
    ],
)
def test_damaged_dat(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        imatrix.read(path)
    assert len(str(caught.value).splitlines()) == 1


KEYS: dict[str, Any] = {
    "general.type": "imatrix",
    "imatrix.datasets": ["a.txt"],
    "imatrix.chunk_count": 1,
    "imatrix.chunk_size": 512,
}
SUMS, COUNTS = "blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"
ONE, TWO = np.ones(1, np.float32), np.ones(2, np.float32)


def write_raw(path: Path, keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    kinds = {"float32": "F32", "float16": "F16"}
    specs = [TensorSpec(n, a.shape, blocks.get(kinds[a.dtype.name])) for n, a in tensors.items()]
    with GgufWriter(path, keys, specs) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
    return path


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        (
            {"general.type": "model"},
            {SUMS: TWO, COUNTS: ONE},
            "general.type = model: expected imat",
        ),
        ({"imatrix.datasets": 7}, {SUMS: TWO, COUNTS: ONE}, "imatrix.datasets = 7"),
        ({"imatrix.chunk_size": 0}, {SUMS: TWO, COUNTS: ONE}, "imatrix.chunk_size = 0"),
        ({"imatrix.chunk_count": -1}, {SUMS: TWO, COUNTS: ONE}, "imatrix.chunk_count = -1"),
        ({}, {SUMS: TWO}, "expected both .in_sum2 and .counts"),
        ({}, {COUNTS: TWO}, "expected both .in_sum2 and .counts"),
        ({}, {"x": TWO}, "no entries"),
        ({}, {SUMS: TWO, COUNTS: TWO}, "2 counts for 1 matrices"),
        ({}, {SUMS: TWO.astype(np.float16), COUNTS: ONE}, "F16 of shape .2.: expected F32"),
        ({}, {SUMS: np.ones((2, 2, 2), np.float32), COUNTS: ONE}, "one or two axes"),
        ({}, {SUMS: np.array([1, -1], np.float32), COUNTS: ONE}, "value 1 is -1"),
        ({}, {SUMS: np.array([1, np.inf], np.float32), COUNTS: ONE}, "value 1 is inf"),
        ({}, {SUMS: TWO, COUNTS: -ONE}, "counts: value 0 is -1"),
    ],
)
def test_files_that_are_no_importance_matrix(
    keys: dict[str, Any], tensors: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    path = write_raw(tmp_path / "bad.gguf", {**KEYS, **keys}, tensors)
    with pytest.raises(FormatError, match=message) as caught:
        imatrix.read(path)
    assert str(caught.value).startswith(str(path))


def test_a_count_of_zero_says_nothing(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.gguf", KEYS, {SUMS: 3 * TWO, COUNTS: 0 * ONE})
    assert imatrix.read(path).importance()["blk.0.attn_q.weight"].tolist() == [1, 1]


def test_merging_adds(experts: Imatrix) -> None:
    more = Imatrix(
        {**experts.sums, "new": np.ones((1, 2), np.float32)}, {**experts.counts, "new": ONE}
    )
    found = imatrix.merge([experts, more])
    for name in experts.sums:
        np.testing.assert_allclose(found.sums[name], 2 * experts.sums[name])
        np.testing.assert_array_equal(found.counts[name], 2 * experts.counts[name])
    assert found.counts["new"] == 1
    assert (found.datasets, found.chunk_count) == (("a.txt", "b.txt"), 2)


def test_merging_with_a_dat_file_of_experts(experts: Imatrix, tmp_path: Path) -> None:
    dat.write(experts, tmp_path / "a.dat")
    name = "blk.0.ffn_up_exps.weight"
    for parts in (
        [experts, imatrix.read(tmp_path / "a.dat")],
        [imatrix.read(tmp_path / "a.dat")] * 2,
    ):
        found = imatrix.merge(parts)
        assert found.sums[name].size == 24
    both = imatrix.merge([imatrix.read(tmp_path / "a.dat"), experts])
    assert both.counts[name].tolist() == [1024 + 300, 1024, 1024 + 212]


@pytest.mark.parametrize("parts", [[], [{"a": (1, 2)}, {"a": (1, 3)}]])
def test_what_cannot_be_merged(parts: list[dict[str, tuple[int, int]]]) -> None:
    made = [
        Imatrix(
            {name: np.ones(shape, np.float32) for name, shape in part.items()},
            {name: np.ones(shape[0], np.float32) for name, shape in part.items()},
        )
        for part in parts
    ]
    with pytest.raises(RequestError, match="merge"):
        imatrix.merge(made)


def test_nothing_is_overwritten(experts: Imatrix, tmp_path: Path) -> None:
    for write in (imatrix.write, dat.write):
        write: Callable[..., None]
        path = tmp_path / write.__module__
        write(experts, path)
        before = path.read_bytes()
        with pytest.raises(EdgeqError, match="exists"):
            write(experts, path)
        write(experts, path, force=True)
        assert path.read_bytes() == before
    assert list(tmp_path.glob("*.part")) == []


def naive_statistics(values: list[float]) -> dict[str, float]:
    """llama-imatrix's loops over the means of one tensor."""
    n, total = len(values), sum(values)
    mean = total / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    entropy = -sum(v / total * math.log2(v / total) for v in values if v > 0)
    zd = sum(abs(v - mean) / deviation > 1 for v in values) / n
    return {"sum": total, "mean": mean, "deviation": deviation, "entropy": entropy, "zd": zd}


def test_statistics_of_a_tensor(theirs: Path) -> None:
    found = imatrix.read(theirs)
    for tensor in statistics.tensors(found):
        expected = naive_statistics(found.importance()[tensor.name].astype(float).tolist())
        for key, value in expected.items():
            assert getattr(tensor, key) == pytest.approx(value, rel=1e-5), (tensor.name, key)
        assert tensor.evenness == pytest.approx(tensor.entropy / math.log2(tensor.channels))


def test_cosines_compare_with_the_layer_before() -> None:
    rows = {0: [1, 0], 1: [1, 1], 3: [1, 1]}
    sums = {f"blk.{i}.ffn_up.weight": np.array([row], np.float32) for i, row in rows.items()}
    found = Imatrix(sums, dict.fromkeys(sums, ONE))
    cosines = [tensor.cosine for tensor in statistics.tensors(found)]
    assert cosines == [None, pytest.approx(math.sqrt(0.5)), None]
    assert [layer.cosine for layer in statistics.layers(found)] == cosines


def test_statistics_leave_out_experts_without_tokens(experts: Imatrix) -> None:
    exps = next(t for t in statistics.tensors(experts) if "exps" in t.name)
    assert exps.channels == 16
    assert exps.min > 0
