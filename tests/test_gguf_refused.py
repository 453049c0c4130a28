"""Malformed GGUF files: each is refused by a FormatError of one line, at once, without allocation.

The numbers are kept from the list of malformed inputs that this reader was written against.
"""

import struct
from dataclasses import replace

import pytest
from conftest import OpenBytes
from hypothesis import given, settings
from hypothesis import strategies as st
from rawgguf import (
    ARRAY,
    BARE,
    BOOL,
    I32,
    MAX,
    NONE,
    ONE,
    STRING,
    T_F32,
    T_IQ2_XXS,
    T_Q4_0,
    T_Q4_K,
    TINY,
    U8,
    U32,
    U64,
    Raw,
    array,
    info,
    kv,
    one,
    text,
)

from edgeq.errors import FormatError
from edgeq.gguf import cursor
from edgeq.gguf.header import Header, read_header
from edgeq.gguf.layout import MAX_ARRAY_LENGTH, MAX_KEYS


def alignment(code: int, payload: bytes) -> bytes:
    return ONE.key(kv(b"general.alignment", code, payload)).build()


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def split(count: int, number: int) -> bytes:
    pair = kv(b"split.count", U32, u32(count)), kv(b"split.no", U32, u32(number))
    return TINY.key(*pair).build()


def first_key(key: bytes) -> bytes:
    return replace(TINY, keys=(kv(key, U32, u32(1)), *TINY.keys[1:])).build()


def key_length(length: int) -> bytes:
    return replace(BARE, n_keys=1).build() + struct.pack("<Q", length) + bytes(1000)


def name_length(length: int) -> bytes:
    return replace(BARE, n_tensors=1).build() + struct.pack("<Q", length) + bytes(1000)


def value(code: int, payload: bytes) -> bytes:
    return BARE.key(kv(b"k", code, payload)).build()


def architecture(code: int, payload: bytes) -> bytes:
    return replace(TINY, keys=(kv(b"general.architecture", code, payload),)).build()


def offsets(*values: int) -> bytes:
    infos = [info(b"abc"[i : i + 1], [32], T_F32, at) for i, at in enumerate(values)]
    return Raw(tensors=tuple(infos), data=bytes(128 * len(values))).build()


REFUSED: dict[str, tuple[bytes, str]] = {
    "01 empty": (b"", "empty file"),
    "02 only the magic": (b"GGUF", "truncated"),
    "03 GGML": (b"GGML" + bytes(60), "before GGUF"),
    "03 ggjt": (b"ggjt" + bytes(60), "before GGUF"),
    "03 ggjt as it is stored": (b"tjgg" + bytes(60), "before GGUF"),
    "03 zip": (b"PK\x03\x04" + bytes(60), "PyTorch"),
    "03 web page": (b"<!DOCTYPE html>", "web page"),
    "03 LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "03 safetensors": (struct.pack("<Q", 99) + b'{"a":', "safetensors"),
    "03 other": (b"\x1b[2J" + bytes(60), "not a GGUF file"),
    "03 short": (b"GG", "truncated"),
    "03 shorter and wrong": (b"X", "not a GGUF file"),
    **{
        f"04 version {number}": (
            replace(TINY, version=struct.pack("<I", number)).build(),
            f"version {number} is not supported",
        )
        for number in (0, 1, 4, 0xFFFFFFFF)
    },
    "05 big-endian": (replace(TINY, version=b"\x00\x00\x00\x03").build(), "big-endian"),
    **{
        f"07 tensor count {count}": (
            replace(TINY, n_tensors=count).build(),
            f"tensor count {count}",
        )
        for count in (1 << 63, MAX, 10**9, 60_000)
    },
    **{
        f"08 metadata count {count}": (
            replace(TINY, n_keys=count).build(),
            f"metadata count {count}",
        )
        for count in ((1 << 61) + 1, MAX, MAX_KEYS + 1, 60_000)
    },
    "09 one key fewer": (replace(TINY, n_keys=6).build(), ""),
    "09 one key more": (replace(TINY, n_keys=8).build(), ""),
    "09 one key fewer, no tensors": (replace(TINY, n_keys=6, tensors=(), data=b"").build(), ""),
    "09 one key more, no tensors": (replace(TINY, n_keys=8, tensors=(), data=b"").build(), ""),
    "09 one tensor fewer": (replace(TINY, n_tensors=2).build(), "a count is too small"),
    "09 one tensor more": (replace(TINY, n_tensors=4).build(), ""),
    "10 data without tensors": (replace(NONE, data=bytes(64)).build(), "no tensors"),
    "11 key of 2**64 - 1": (key_length(MAX), f"{MAX} bytes"),
    "11 key of 2**31": (key_length(1 << 31), "bytes"),
    "11 key beyond the end": (key_length(1001), "truncated"),
    "12 empty key": (first_key(b""), "metadata key 0 is ''"),
    "13 key with NUL": (first_key(b"a\x00"), r"'a\x00'"),
    "13 key with escape codes": (first_key(b"\x1b[2J"), r"'\x1b[2J'"),
    "13 key not UTF-8": (first_key(b"\xff"), r"'\udcff'"),
    "14 key twice": (TINY.key(TINY.keys[1]).build(), "general.name appears twice"),
    **{
        f"15 value type {code}": (value(code, bytes(8)), f"value type {code}")
        for code in (13, 255, 0xFFFFFFFF)
    },
    "16 array of arrays": (value(ARRAY, array(ARRAY, 1, array(U8, 1, b"a"))), "array of arrays"),
    "16 arrays 10,000 deep": (value(ARRAY, array(ARRAY, 1) * 10_000), "array of arrays"),
    "17 array of 2**61": (value(ARRAY, array(U64, 1 << 61, bytes(8))), "elements"),
    "18 array of 10**9 strings": (value(ARRAY, array(STRING, 10**9)), "elements"),
    "18 array longer than the file": (value(ARRAY, array(STRING, 10**6)), "truncated"),
    "18 largest array in a small file": (
        value(ARRAY, array(U64, MAX_ARRAY_LENGTH, bytes(1000))),
        "truncated",
    ),
    "18 last string is cut": (
        value(ARRAY, array(STRING, 2, text(b"a") + struct.pack("<Q", 9))),
        "k[1] of 2",
    ),
    "18 string of 2**64 - 1 in an array": (
        value(ARRAY, array(STRING, 2, struct.pack("<Q", MAX) + bytes(99))),
        "k[0] of 2",
    ),
    "21 string of 17 MiB": (value(STRING, struct.pack("<Q", 17 << 20)), "17825792 bytes"),
    "21 template of 2 MiB": (
        NONE.key(kv(b"tokenizer.chat_template", STRING, text(b"a" * (2 << 20)))).build(),
        "expected at most 1048576",
    ),
    **{
        f"25 alignment {size}": (alignment(U32, u32(size)), f"general.alignment = {size}")
        for size in (0, 3, 7, 4, 48, 1 << 21, 1 << 31)
    },
    "27 alignment int32": (alignment(I32, u32(32)), "32 (int32)"),
    "27 alignment string": (alignment(STRING, text(b"32")), "'32' (string)"),
    "27 alignment array": (alignment(ARRAY, array(U32, 1, u32(32))), "1 values (array[uint32])"),
    "29 architecture integer": (architecture(U32, u32(1)), "1 (uint32)"),
    "29 architecture with NUL": (architecture(STRING, text(b"tiny\x00")), r"'tiny\x00'"),
    "29 architecture as a path": (architecture(STRING, text(b"../x")), "'../x'"),
    "29 architecture empty": (architecture(STRING, text(b"")), "''"),
    "29 architecture of 10 MB": (architecture(STRING, text(b"a" * 10_000_000)), "aaa..."),
    "30 part 3 of 2": (split(2, 2), "split.no = 2, split.count = 2"),
    "30 part name": (split(2, 0), "expected a name ending in -00001-of-00002.gguf"),
    "30 split count is text": (
        TINY.key(kv(b"split.count", STRING, text(b"../x"))).build(),
        "split.count = '../x'",
    ),
    "31 name of 64": (ONE.tensor(0, info(b"a" * 64, [32], T_F32, 0)).build(), "at most 63"),
    "31 name of 2**64 - 1": (name_length(MAX), "at most 63"),
    "32 tensor twice": (
        replace(ONE, tensors=(*ONE.tensors, info(b"a", [32], T_F32, 128)), data=bytes(256)).build(),
        "tensor a appears twice",
    ),
    **{
        f"33 name {name!r}": (ONE.tensor(0, info(name, [32], T_F32, 0)).build(), "tensor name")
        for name in (b"../x", b"a\x00b", b"", b"a/b", b"..\\x", b"\xff")
    },
    **{
        f"34 {count} dimensions": (one([32], n_dims=count).build(), f"{count} dimensions")
        for count in (0, 5, 0xFFFFFFFF)
    },
    "35 size 0": (one([0]).build(), "shape [0]"),
    "35 size 0, second": (one([32, 0]).build(), "shape [32, 0]"),
    "36 size 2**64 - 1": (one([MAX]).build(), "shape"),
    "36 size 2**63": (one([1 << 63]).build(), "shape"),
    "37 product is 2**64": (one([1 << 32, 1 << 32]).build(), "the file has"),
    "37 product is 2**64 and a bit": (one([1 << 32, (1 << 32) + 1]).build(), "the file has"),
    "38 bytes are 2**62": (one([1 << 60]).build(), "the file has"),
    "38 bytes are 2**64 + 128": (one([(1 << 62) + 32]).build(), "the file has"),
    "39 padding passes 2**64": (one([(1 << 62) - 2]).build(), "the file has"),
    "40 sum passes 2**64": (
        Raw(
            tensors=(
                info(b"a", [1 << 61], T_F32, 0),
                info(b"b", [1 << 61], T_F32, 1 << 63),
                info(b"c", [32], T_F32, 0),
            )
        ).build(),
        "the file has",
    ),
    "41 row of 33 in Q4_0": (one([33], T_Q4_0).build(), "multiple of 32"),
    "41 row of 255 in Q4_K": (one([255], T_Q4_K).build(), "multiple of 256"),
    **{
        f"42 type {kind}": (one([32], kind).build(), f"type {kind} (unknown")
        for kind in (4, 5, 31, 33, 200, 0xFFFFFFFF)
    },
    "43 type without decoder": (one([256], T_IQ2_XXS).build(), "type 16 (IQ2_XXS)"),
    "44 offset not aligned": (offsets(1), "offset 1: expected 0"),
    "44 offset not aligned, second": (offsets(0, 130), "offset 130: expected 128"),
    "45 offset beyond the end": (offsets(1 << 30), "offset"),
    "45 offset 2**64 - 32": (offsets(MAX - 31), "offset"),
    "46 overlap": (offsets(0, 0), "offset 0: expected 128"),
    "46 half overlap": (offsets(0, 64), "offset 64: expected 128"),
    "46 out of order": (offsets(128, 0), "offset 128: expected 0"),
    "46 gap": (offsets(0, 160), "offset 160: expected 128"),
    "47 alignment moves the data": (
        ONE.key(kv(b"general.alignment", U32, u32(4096))).build(),
        "the file has",
    ),
    "48 one byte short": (replace(ONE, data=bytes(127)).build(), "incomplete?"),
    "48 half": (replace(TINY, data=TINY.data[:300]).build(), "incomplete?"),
    "48 no data": (replace(TINY, data=b"").build(), "incomplete?"),
    "padding not zero": (replace(ONE, padding=b"\x01").build(), "other than zero"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(content: bytes, message: str, open_bytes: OpenBytes) -> None:
    with pytest.raises(FormatError) as caught:
        open_bytes(content)
    error = str(caught.value)
    assert message in error
    assert "bad.gguf: " in error
    assert error.isprintable()
    assert len(error) < 600


def test_the_bases_of_the_refused_files_are_fine(open_bytes: OpenBytes) -> None:
    """Otherwise every file above could be refused for the same, unrelated reason."""
    for content in (TINY, ONE, NONE):
        assert open_bytes(content.build()).warnings == []
    assert open_bytes(offsets(0, 128)).warnings == []
    assert open_bytes(value(U32, u32(7))).metadata["k"] == 7


def test_06_truncated_at_every_byte() -> None:
    whole = TINY.build()
    needed = len(whole) - 28  # the final padding may be missing
    for size in range(needed):
        with pytest.raises(FormatError):
            read_header(whole[:size], size, "cut.gguf")
    assert len(read_header(whole[:needed], needed, "cut.gguf").tensors) == 3


def test_metadata_as_a_whole_is_limited(
    open_bytes: OpenBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursor, "MAX_METADATA_BYTES", 200)
    with pytest.raises(FormatError, match="metadata is larger than"):
        open_bytes(TINY.build())


@settings(max_examples=300, deadline=1000)
@given(st.lists(st.tuples(st.integers(0, 4096), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_give_a_file_or_a_format_error(flips: list[tuple[int, int]]) -> None:
    content = bytearray(TINY.build())
    for position, bits in flips:
        content[position % len(content)] ^= bits
    check_any_bytes(bytes(content))


@settings(max_examples=200, deadline=1000)
@given(st.data())
def test_spliced_bytes_give_a_file_or_a_format_error(data: st.DataObject) -> None:
    """Numbers that matter (0, 2**63, ...) put over any 8 bytes reach deeper than single flips."""
    content = bytearray(TINY.build())
    position = data.draw(st.integers(0, len(content) - 8))
    number = data.draw(st.sampled_from([0, 1, 255, 1 << 31, 1 << 32, 1 << 61, 1 << 63, MAX]))
    content[position : position + 8] = struct.pack("<Q", number)
    check_any_bytes(bytes(content))


def check_any_bytes(content: bytes) -> None:
    outcome = header_or_error(content)
    if isinstance(outcome, FormatError):
        assert str(outcome).isprintable()
        return
    for tensor in outcome.tensors.values():
        assert outcome.data_start <= tensor.offset
        assert tensor.offset + tensor.nbytes <= len(content)


def header_or_error(content: bytes) -> Header | FormatError:
    try:
        return read_header(content, len(content), "fuzz.gguf")
    except FormatError as error:
        return error


ACCEPTED: dict[str, tuple[Raw, str]] = {  # bytes, and the warning if there is one
    "04 version 2": (replace(TINY, version=struct.pack("<I", 2)), ""),
    "10 nothing at all": (NONE, ""),
    "19 empty array": (TINY.key(kv(b"k", ARRAY, array(STRING, 0))), ""),
    "20 truth value 2": (TINY.key(kv(b"k", BOOL, b"\x02")), "k has the byte 2"),
    "20 truth value 255 in an array": (
        TINY.key(kv(b"k", ARRAY, array(BOOL, 2, b"\x00\xff"))),
        "k has the byte 255",
    ),
    "22 name not UTF-8": (
        TINY.key(kv(b"k", STRING, text(b"\xff\x1b[2J"))),
        r"k = '\udcff\x1b[2J' is not valid UTF-8",
    ),
    "23 name with escape codes": (TINY.key(kv(b"k", STRING, text(b"\x1b[2J\r\n"))), ""),
    "30 one part of one": (TINY.key(kv(b"split.count", 2, b"\x01\x00")), ""),
    "49 final padding missing": (replace(TINY, data=TINY.data[:-28]), ""),
    "50 bytes after the data": (
        replace(TINY, data=TINY.data + bytes(1 << 20)),
        "1048576 bytes after the last tensor",
    ),
    **{
        f"28 alignment {size}": (
            replace(
                ONE.key(kv(b"general.alignment", U32, struct.pack("<I", size))), alignment=size
            ),
            "",
        )
        for size in (8, 16, 64, 4096, 1 << 20)
    },
}


@pytest.mark.parametrize(("raw", "warning"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(raw: Raw, warning: str, open_bytes: OpenBytes) -> None:
    file = open_bytes(raw.build())
    assert len(file.warnings) == bool(warning)
    assert warning in "".join(file.warnings)
    assert "".join(file.warnings).isprintable()
    for name in file.tensors:
        file.tensor(name)
