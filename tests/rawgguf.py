"""GGUF by other means: files made byte by byte, any of which can be wrong, and gguf-py."""

import itertools
import struct
from dataclasses import dataclass, field, replace

import gguf
import numpy as np

from edgeq.gguf import Gguf

U8, I32, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 5, 4, 6, 7, 8, 9, 10  # value types
T_F32, T_Q4_0, T_Q4_K, T_IQ2_XXS = 0, 2, 12, 16  # tensor types


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def kv(key: bytes, code: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", code) + payload


def array(code: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", code, count) + payload


def info(name: bytes, dims: list[int], kind: int, offset: int, n_dims: int | None = None) -> bytes:
    sizes = b"".join(struct.pack("<Q", dim) for dim in dims)
    count = struct.pack("<I", len(dims) if n_dims is None else n_dims)
    return text(name) + count + sizes + struct.pack("<IQ", kind, offset)


@dataclass(frozen=True)
class Raw:
    """A GGUF file in pieces, so that one of them can be replaced; made without the writer."""

    keys: tuple[bytes, ...] = (
        kv(b"general.architecture", STRING, text(b"tiny")),
        kv(b"general.name", STRING, text("Größe 1".encode())),
        kv(b"tiny.block_count", U32, struct.pack("<I", 1)),
        kv(b"tiny.epsilon", F32, struct.pack("<f", 0.5)),
        kv(b"tokenizer.add_bos", BOOL, b"\x01"),
        kv(b"tokenizer.tokens", ARRAY, array(STRING, 3, text(b"a") + text(b"") + text(b"\xff"))),
        kv(b"tokenizer.scores", ARRAY, array(F32, 2, struct.pack("<2f", 1.5, -2))),
    )
    tensors: tuple[bytes, ...] = (
        info(b"token_embd.weight", [32, 4], T_F32, 0),
        info(b"blk.0.attn_q.weight", [64, 3], T_Q4_0, 512),
        info(b"output_norm.weight", [33], T_F32, 640),
    )
    data: bytes = field(default=bytes(range(256)) * 2 + bytes(108 + 20) + bytes(132 + 28))
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    n_tensors: int | None = None
    n_keys: int | None = None
    alignment: int = 32
    padding: bytes = b"\x00"  # before the tensor data

    def build(self) -> bytes:
        counts = (
            len(self.tensors) if self.n_tensors is None else self.n_tensors,
            len(self.keys) if self.n_keys is None else self.n_keys,
        )
        head = self.magic + self.version + struct.pack("<QQ", *counts)
        head += b"".join(self.keys) + b"".join(self.tensors)
        return head + self.padding * (-len(head) % self.alignment) + self.data

    def key(self, *extra: bytes) -> "Raw":
        return replace(self, keys=self.keys + extra)

    def tensor(self, index: int, new: bytes) -> "Raw":
        parts = (*self.tensors[:index], new, *self.tensors[index + 1 :])
        return replace(self, tensors=parts)


TINY = Raw()
ONE = Raw(tensors=(info(b"a", [32], T_F32, 0),), data=bytes(128))  # one tensor, easy to replace
NONE = Raw(keys=(), tensors=(), data=b"")


def one(dims: list[int], kind: int = T_F32, offset: int = 0, n_dims: int | None = None) -> Raw:
    return ONE.tensor(0, info(b"a", dims, kind, offset, n_dims))


BARE = replace(NONE, padding=b"")  # ends with its last entry
MAX = (1 << 64) - 1


def check_equal(file: Gguf, reader: gguf.GGUFReader) -> None:
    """Same metadata and tensors as gguf-py sees."""
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF."):
            found = file.metadata[key]
            plain = found.tolist() if isinstance(found, np.ndarray) else found
            assert plain == entry.contents(), key
    assert len(file.tensors) == len(reader.tensors)
    for ours, theirs in itertools.zip_longest(file.tensors.values(), reader.tensors):
        assert (ours.name, ours.ggml_type) == (theirs.name, theirs.tensor_type)
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
        seen = np.ascontiguousarray(theirs.data).view(np.uint8).reshape(-1)
        assert np.array_equal(file.tensor(ours.name).reshape(-1), seen)
