"""Reader of tokenizer.model, SentencePiece's protocol buffer (sentencepiece_model.proto).

Only what a GGUF file needs is kept, and every length is checked against what is left of the file.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeq.checkpoint.files import read_small
from edgeq.errors import FormatError, TokenizerError
from edgeq.vocab import MAX_TOKENS, TokenType

__all__ = ["Piece", "SpmModel", "read_spm_model"]

_MAX_FILE = 64 << 20
_BPE = 2  # TrainerSpec.ModelType
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


@dataclass(frozen=True)
class Piece:
    """One piece; its index in the model is its id."""

    text: str
    score: float
    kind: TokenType


@dataclass(frozen=True)
class SpmModel:
    """pieces; add_space_prefix: text is encoded with a space before it."""

    pieces: tuple[Piece, ...]
    add_space_prefix: bool


def read_spm_model(path: Path) -> SpmModel:
    """Content of a tokenizer.model file.

    Raises FormatError when it is malformed, TokenizerError when it is not a BPE model.
    """
    pieces: list[Piece] = []
    where, kind, prefix = str(path), 1, True
    for number, value in _fields(read_small(path, _MAX_FILE), where):
        if number == 1:
            pieces.append(_piece(_bytes(value, where), f"{where}: piece {len(pieces)}"))
        elif number == 2:
            kind = _last(value, 3, kind, where)
        elif number == 3:
            prefix = bool(_last(value, 3, prefix, where))
    if not 0 < len(pieces) <= MAX_TOKENS:
        raise FormatError(f"{where}: {len(pieces)} pieces: expected 1 to {MAX_TOKENS}")
    if kind != _BPE:
        raise TokenizerError(
            f"{where}: model type {kind}: expected BPE ({_BPE}); others do not run"
        )
    return SpmModel(tuple(pieces), prefix)


def _piece(data: bytes, where: str) -> Piece:
    text, score, kind = b"", 0.0, int(TokenType.NORMAL)
    for number, value in _fields(data, where):
        if number == 1:
            text = _bytes(value, where)
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    if not 1 <= kind <= max(TokenType) or not math.isfinite(score):
        raise FormatError(
            f"{where}: type {kind}, score {score}: expected a known type and a number"
        )
    try:
        return Piece(text.decode(), score, TokenType(kind))
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: text {text[:40]!r} is not UTF-8") from error


def _last(message: bytes | int | float, field: int, default: int, where: str) -> int:
    """Value of an integer field in a message; as the format demands, the last one counts."""
    for number, value in _fields(_bytes(message, where), where):
        if number == field and isinstance(value, int):
            default = value
    return default


def _bytes(value: bytes | int | float, where: str) -> bytes:
    if not isinstance(value, bytes):
        raise FormatError(f"{where}: {value!r}: expected a message")
    return value


def _fields(data: bytes, where: str) -> Iterator[tuple[int, bytes | int | float]]:
    """Field numbers and values of one message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at, where)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at, where)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at, where)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise FormatError(f"{where}: wire type {wire}: not a SentencePiece model")
        if size > len(data) - at:
            raise FormatError(f"{where}: a field of {size} bytes, but {len(data) - at} are left")
        raw, at = data[at : at + size], at + size
        yield key >> 3, struct.unpack("<f", raw)[0] if wire == _FIXED32 else raw


def _varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    """Integer of 7-bit groups, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at == len(data):
            raise FormatError(f"{where}: ends inside a number: download it again")
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise FormatError(f"{where}: a number of more than 70 bits: not a SentencePiece model")
