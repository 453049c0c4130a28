"""Block formats: gguf-py's dequantizers are the oracle, bit for bit."""

from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import RandomBlocks
from numpy.typing import NDArray

from edgeq import blockformat, blocks
from edgeq.data import find
from edgeq.errors import FormatError
from edgeq.gguf import open_gguf

BY_ID = "F32 F16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS BF16"
every_format = pytest.mark.parametrize("fmt", blocks.formats().values(), ids=blocks.formats())


def reference(raw: NDArray[np.uint8], fmt: blocks.BlockFormat) -> NDArray[np.float32]:
    """What gguf-py decodes."""
    if fmt.name in ("F32", "F16"):  # gguf-py takes these as typed arrays
        return raw.view(np.float32 if fmt.name == "F32" else np.float16).astype(np.float32)
    kind = gguf.GGMLQuantizationType(fmt.ggml_type)
    values: NDArray[np.float32] = gguf.quants.dequantize(raw, kind)
    return values


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def test_formats_are_all_there() -> None:
    assert " ".join(blocks.formats()) == BY_ID


@every_format
def test_sizes_are_those_of_gguf(fmt: blocks.BlockFormat) -> None:
    kind = gguf.GGMLQuantizationType[fmt.name]
    assert fmt.ggml_type == kind
    assert (fmt.block, fmt.bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert blocks.by_type(fmt.ggml_type) is fmt is blocks.get(fmt.name.lower()) is blocks.get(fmt)


def bits_of(fmt: blocks.BlockFormat, name: str) -> list[int]:
    """Bits of a block that field `name` uses, by the formulas that the kernels use as well."""
    field, count = fmt.fields[name], fmt.count(name)
    if field.runs:
        places = [(run.byte(e), run.bit(e), run.bits) for run in field.runs for e in range(count)]
        return [8 * byte + bit + i for byte, bit, width in places for i in range(width)]
    if field.pack:  # both parts share 12 bytes; count them for the first
        return list(range(8 * field.at, 8 * (field.at + 12))) if field.part == 0 else []
    assert field.type
    size = count * blockformat.DTYPES[field.type].itemsize
    return list(range(8 * field.at, 8 * (field.at + size)))


@every_format
def test_every_bit_belongs_to_one_field(fmt: blocks.BlockFormat) -> None:
    used = Counter(bit for name in fmt.fields for bit in bits_of(fmt, name))
    assert used == Counter(range(8 * fmt.bytes))


@every_format
def test_runs_follow_the_formula(fmt: blocks.BlockFormat, random_blocks: RandomBlocks) -> None:
    raw = random_blocks(fmt, 1)
    for name, values in blocks.unpack(raw, fmt).items():
        field = fmt.fields[name]
        for e in range(fmt.count(name) if field.runs else 0):
            code = above = 0
            for run in field.runs:
                code += (int(raw[run.byte(e)]) >> run.bit(e)) % (1 << run.bits) << above
                above += run.bits
            assert values[0, e] == code + field.bias, (name, e)


@every_format
def test_decode_equals_gguf_on_random_blocks(
    fmt: blocks.BlockFormat, random_blocks: RandomBlocks
) -> None:
    raw = random_blocks(fmt, 3, 40)
    assert same_bits(blocks.decode(raw, fmt), reference(raw, fmt))


@every_format
@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_decode_of_extreme_codes_is_finite(fmt: blocks.BlockFormat, byte: int) -> None:
    raw = np.full(fmt.bytes, byte, np.uint8)
    for field in fmt.fields.values():
        if field.type == "f16":
            raw[field.at : field.at + 2] = np.array([0xFF, 0x7B], np.uint8)  # 65504
    if fmt.name in ("F32", "BF16"):
        raw[-2:] = 0x7F  # a large number instead of NaN
    values = blocks.decode(raw, fmt)
    assert np.isfinite(values).all()
    assert same_bits(values, reference(raw, fmt))


@every_format
def test_pack_inverts_unpack(fmt: blocks.BlockFormat, random_blocks: RandomBlocks) -> None:
    raw = random_blocks(fmt, 2, 3, 5)
    fields = blocks.unpack(raw, fmt)
    assert {name: array.shape[:3] for name, array in fields.items()} == dict.fromkeys(
        fmt.fields, (2, 3, 5)
    )
    assert np.array_equal(blocks.pack(fields, fmt), raw)


@every_format
def test_no_blocks_at_all(fmt: blocks.BlockFormat) -> None:
    raw = np.empty((0, 2 * fmt.bytes), np.uint8)
    assert blocks.decode(raw, fmt).shape == (0, 2 * fmt.block)
    assert blocks.pack(blocks.unpack(raw, fmt), fmt).shape == raw.shape


def test_decode_takes_a_view_that_is_not_contiguous(random_blocks: RandomBlocks) -> None:
    fmt = blocks.get("Q4_K")
    raw = random_blocks(fmt, 6, 2)
    assert same_bits(blocks.decode(raw[::2], fmt), blocks.decode(raw, fmt)[::2])


def test_decode_in_several_pieces(
    random_blocks: RandomBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = random_blocks(blocks.get("Q3_K"), 7, 3)
    whole = blocks.decode(raw, "Q3_K")
    monkeypatch.setattr(blocks, "_CHUNK", 4 * 256)
    assert same_bits(blocks.decode(raw, "Q3_K"), whole)


@pytest.mark.parametrize("recipe", ["Q2_K", "Q4_K_M", "Q5_K_M"])
def test_real_tensors(shared_data: Path, recipe: str) -> None:
    path = shared_data / "tiny-home" / "files_from_llama_cpp" / f"{recipe}.gguf"
    seen = set()
    with open_gguf(path) as file:
        for name, info in file.tensors.items():
            raw = file.tensor(name)
            assert same_bits(blocks.decode(raw, info.format), reference(raw, info.format)), name
            packed = blocks.pack(blocks.unpack(raw, info.format), info.format)
            assert np.array_equal(packed, raw), name
            seen.add(info.format.name)
    assert len(seen) >= 3


def test_pack_rounds_bf16_as_gguf_does(rng: np.random.Generator) -> None:
    bits = rng.integers(0, 1 << 32, 20_000, dtype=np.uint32)
    bits[:4] = [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x00000001]  # infinities, a NaN, a subnormal
    values = bits.view(np.float32)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16).reshape(-1)
    packed = blocks.pack({"x": values}, "BF16")
    nan = np.isnan(values)
    assert np.array_equal(packed.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(blocks.decode(packed, "BF16")[nan]).all()


def test_pack_rounds_f16_to_even() -> None:
    packed = blocks.pack({"x": np.array([2049.0, 2051.0, np.inf], np.float32)}, "F16")
    assert blocks.decode(packed, "F16").tolist() == [2048.0, 2052.0, np.inf]


def q4_0(d: object = 1.0, q: object = 0) -> dict[str, NDArray[np.generic]]:
    return {"d": np.full((2,), d), "q": np.full((2, 32), q)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (q4_0(q=8), "Q4_0: field q = 8..8: expected -8..7"),
        (q4_0(q=-9), "Q4_0: field q = -9..-9: expected -8..7"),
        (q4_0(q=0.0), "Q4_0: field q is float64: expected integers"),
        (q4_0(d=70000.0), "Q4_0: field d = 70000: too large for f16"),
        ({"d": np.ones(2)}, "Q4_0: fields d: expected d, q"),
        (q4_0() | {"m": np.ones(2)}, "Q4_0: fields d, q, m: expected d, q"),
        (q4_0() | {"d": np.ones(3)}, "Q4_0: field q has shape (2, 32): expected (3, 32)"),
        ({"d": np.float32(1), "q": np.zeros(32, int)}, "Q4_0: fields are single numbers"),
    ],
)
def test_pack_refuses(fields: dict[str, NDArray[np.generic]], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        blocks.pack(fields, "Q4_0")
    assert message in str(caught.value)


def test_limits_span_what_pack_takes() -> None:
    spans = {name: fmt.limits("q") for name, fmt in blocks.formats().items() if "q" in fmt.fields}
    assert spans["Q8_0"] == (-128, 127)
    assert spans["Q5_0"] == (-16, 15)
    assert spans["Q3_K"] == (-4, 3)
    assert spans["IQ4_XS"] == (0, 15)
    assert blocks.get("IQ4_XS").limits("sc") == blocks.get("Q3_K").limits("sc") == (-32, 31)
    assert blocks.get("Q2_K").limits("m") == (0, 15)
    with pytest.raises(FormatError, match="field d holds f16 numbers"):
        blocks.get("Q4_0").limits("d")


def test_wrong_input_is_refused() -> None:
    with pytest.raises(FormatError, match="format 'Q9_9' is unknown: expected one of F32, F16"):
        blocks.get("Q9_9")
    with pytest.raises(FormatError, match="row of 33 elements: expected a multiple of 32"):
        blocks.row_bytes("Q4_0", 33)
    with pytest.raises(FormatError, match=r"uint8 array of shape \(17,\)"):
        blocks.decode(np.zeros(17, np.uint8), "Q4_0")
    with pytest.raises(FormatError, match="int8 array"):
        blocks.unpack(np.zeros(18, np.int8), "Q4_0")  # type: ignore[arg-type]


@every_format
def test_find_nonfinite(fmt: blocks.BlockFormat, random_blocks: RandomBlocks) -> None:
    raw = random_blocks(fmt, 2, 3)
    numbers = [field for field in fmt.fields.values() if field.type in ("f16", "f32", "bf16")]
    assert blocks.find_nonfinite(raw, fmt) is None
    for field in numbers:
        size = blockformat.DTYPES[field.type].itemsize
        for bits, bad in ((0x7E, True), (0x7C, field.type == "f16"), (0x80, False), (0, False)):
            damaged = raw.reshape(6, fmt.bytes).copy()
            damaged[4, field.at : field.at + size] = 0
            damaged[4, field.at + size - 1] = bits  # f16: NaN, infinity, -0, 0
            if field.type != "f16" and bits == 0x7E:
                damaged[4, field.at + size - 2 : field.at + size] = [0x80, 0x7F]  # infinity
            found = blocks.find_nonfinite(damaged.reshape(raw.shape), fmt)
            assert found == (4 if bad else None), (field.name, bits)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("block = 256\n", "", "key block is missing"),
        ("group = 32", "group = 32\ngroups = 8", "unknown key groups"),
        ("group = 32", "group = 0", "group = 0"),
        ("group = 32", "group = 48", "group = 48"),
        ('name = "Q4_K"', 'name = "Q4_X"', "expected 'Q4_K'"),
        ("d * sc * q - dmin * m", "d * q ** 2", "value = 'd * q ** 2'"),
        ("d * sc * q - dmin * m", "d * sc * q", "[field]: expected d, sc, q"),
        ("[field]", "[fields]", "[field] is missing"),
        ('type = "f16"', 'type = "f17"', "'f17'"),
        ("at = 2, type", "at = 143, type", "field dmin"),
        ("at = 2, type", "at = -1, type", "field dmin"),
        ("lanes = 32", "lanes = 24", "field q"),
        ("bits = 4", "bits = 3", "field q"),
        ("at = 16, bits", "at = 17, bits", "field q"),
        ("part = 1", "part = 2", "field m"),
        ("runs = [", "bias = 1.5, runs = [", "bias = 1.5"),
        ('value = "', 'table = [1, 2]\nvalue = "', "table: expected 16 values"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (find("formats") / "q4_k.toml").read_text()
    assert old in text
    path = tmp_path / "q4_k.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(FormatError) as caught:
        blockformat._read(path)
    assert message in str(caught.value)
    assert "q4_k.toml" in str(caught.value)
