"""SentencePiece vocabularies, run by the sentencepiece library.

The library wants its own model file, a protocol buffer (sentencepiece_model.proto). It is rebuilt
here from the vocabulary, byte by byte: that takes a few lines and spares the protobuf package.
"""

import struct
from collections.abc import Iterator

from edgeq.errors import TokenizerError
from edgeq.tokenizer.loading import Vocab
from edgeq.vocab import TokenType

__all__ = ["SpmEncoder"]

_SPACE = "▁"  # stands for a space in tokens
_MAX_PIECE = 512  # bytes; the library refuses much longer ones, which no text needs
_HELPER = b"\x01"  # begins the names of pieces that are not in the vocabulary


class SpmEncoder:
    """Encodes text without special tokens; see Tokenizer for the whole."""

    def __init__(self, vocab: Vocab) -> None:
        """Raises TokenizerError when sentencepiece refuses the vocabulary."""
        from sentencepiece import SentencePieceProcessor

        self._vocab = vocab
        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(_model_proto(vocab))
        except RuntimeError as error:
            raise TokenizerError(f"{vocab.where}: sentencepiece refuses it: {error}") from error

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Ids of plain text; `first`: it opens the prompt or follows a special token."""
        if first and self._vocab.add_space_prefix:
            text = " " + text
        n = len(self._vocab.tokens)
        ids: list[int] = self._model.EncodeAsIds(text)
        return ids if max(ids, default=0) < n else self._without_helpers(ids, n)

    def piece(self, token: int) -> bytes:
        """Bytes of a token."""
        if token in self._vocab.byte_of:
            return bytes([self._vocab.byte_of[token]])
        text = self._vocab.tokens[token]
        if self._vocab.types[token] in (TokenType.NORMAL, TokenType.UNDEFINED):
            text = text.replace(_SPACE, " ")
        return text.encode("utf-8", "surrogateescape")

    def _without_helpers(self, ids: list[int], n: int) -> list[int]:
        """Pieces that only the model proto has mean: not in the vocabulary."""
        unknown = self._vocab.unknown_id
        return [i if i < n else unknown for i in ids if i < n or unknown is not None]  # type: ignore[misc]


def _model_proto(vocab: Vocab) -> bytes:
    """ModelProto with the vocabulary's pieces, and helper pieces with ids above it.

    Helpers: the unknown piece, of which the library wants exactly one, and byte pieces that the
    vocabulary lacks, of which it wants all.
    """
    pieces = b"".join(_message(1, piece) for piece in _pieces(vocab))
    # ModelType BPE; byte_fallback; a sentence of 1 GB is still one sentence.
    trainer = _varint_field(3, 2) + _varint_field(35, 1)
    # No dummy prefix, no whitespace removed, spaces become ▁: llama.cpp's own normalization.
    normal = (
        _message(1, b"identity") + _varint_field(3, 0) + _varint_field(4, 0) + _varint_field(5, 1)
    )
    return pieces + _message(2, trainer) + _message(3, normal)


def _pieces(vocab: Vocab) -> Iterator[bytes]:
    seen: set[bytes] = set()
    plain = set(vocab.ids_of(TokenType.NORMAL, TokenType.UNDEFINED))
    normal, byte, control = map(int, (TokenType.NORMAL, TokenType.BYTE, TokenType.CONTROL))
    for i, (text, score) in enumerate(zip(vocab.tokens, vocab.scores.tolist(), strict=True)):
        name, kind = b"", normal  # special tokens are cut out of the text before
        if i in plain:
            name = text.encode("utf-8", "surrogateescape")
        elif i in vocab.byte_of:
            name, kind = _byte_name(vocab.byte_of[i]), byte
        if name in seen or not _is_usable(name):
            name, kind = _HELPER + b"%d" % i, control  # keeps the id, matches no text
        seen.add(name)
        yield _piece(name, score, kind)
    yield _piece(_HELPER + b"unknown", 0.0, TokenType.UNKNOWN)
    for name in sorted({_byte_name(value) for value in range(256)} - seen):
        yield _piece(name, 0.0, TokenType.BYTE)


def _is_usable(name: bytes) -> bool:
    """Whether the library takes it and text can hold it."""
    if not 0 < len(name) <= _MAX_PIECE or b"\0" in name or name[:1] == _HELPER != name:
        return False
    try:
        return bool(name.decode())
    except UnicodeDecodeError:
        return False


def _byte_name(value: int) -> bytes:
    return b"<0x%02X>" % value


def _piece(name: bytes, score: float, kind: int) -> bytes:
    return _message(1, name) + b"\x15" + struct.pack("<f", score) + _varint_field(3, kind)


def _message(number: int, payload: bytes) -> bytes:
    """Field of wire type 2: key, length, bytes."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint_field(number: int, value: int) -> bytes:
    """Field of wire type 0."""
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits at a time, low ones first; the top bit says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
