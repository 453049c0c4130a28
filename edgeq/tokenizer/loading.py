"""Vocabulary of a GGUF file, checked: whatever the file says, later code gets sound tables."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import FormatError, TokenizerError
from edgeq.vocab import ALIASES, END_TEXTS, MAX_TOKENS, PRETOKENIZERS, TokenType

__all__ = ["Metadata", "Vocab", "read_vocab"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Metadata(Protocol):
    """What a vocabulary is read from: an open GGUF file."""

    @property
    def path(self) -> Path: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


@dataclass
class Vocab:
    """Checked tables of a vocabulary; an index into them is a token id.

    tokens: text as stored (bytes that are not UTF-8 as surrogate escapes). types: TokenType [n].
    scores: float32 [n] of SentencePiece vocabularies. byte_of: id -> value, for byte tokens.
    pre: name of the pre-tokenizer in PRETOKENIZERS; merges: "left right", best first.
    """

    where: str
    tokens: list[str]
    types: NDArray[np.int32]
    scores: NDArray[np.float32]
    byte_of: dict[int, int]
    merges: list[str]
    pre: str
    bos_id: int | None = None
    eos_id: int | None = None
    unknown_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    eog_ids: frozenset[int] = frozenset()
    warnings: list[str] = field(default_factory=list)

    def ids_of(self, *types: TokenType) -> list[int]:
        """Ids of the tokens of the given types, ascending."""
        return [int(i) for i in np.flatnonzero(np.isin(self.types, types))]


def read_vocab(gguf: Metadata) -> Vocab:
    """Vocabulary of an open GGUF file (tokenizer.ggml.model "llama" or "gpt2").

    Raises FormatError for values of a wrong type or length, TokenizerError for what they mean.
    """
    reader = _Reader(gguf)
    spm = gguf.metadata["tokenizer.ggml.model"] == "llama"
    tokens = reader.tokens()
    types = reader.types(len(tokens))
    vocab = Vocab(
        where=reader.where,
        tokens=tokens,
        types=types,
        scores=reader.scores(len(tokens)) if spm else np.zeros(0, np.float32),
        byte_of=_byte_tokens(reader.where, tokens, types) if spm else {},
        merges=[] if spm else reader.merges(),
        pre="" if spm else _pretokenizer(reader),
        warnings=reader.warnings,
    )
    _read_special(reader, vocab, spm)
    return vocab


class _Reader:
    """Typed access to the keys below `tokenizer.ggml.`."""

    def __init__(self, gguf: Metadata) -> None:
        self.where = str(gguf.path)
        self.metadata = gguf.metadata
        self.warnings: list[str] = []

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Scalar value; an integer is never taken for a boolean, nor the other way round."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise FormatError(
                f"{self.where}: tokenizer.ggml.{key}: {value!r:.40}: expected {kind.__name__}"
            )
        return value

    def tokens(self) -> list[str]:
        tokens = self._strings("tokens")
        if not 0 < len(tokens) <= MAX_TOKENS:
            raise TokenizerError(
                f"{self.where}: tokenizer.ggml.tokens: {len(tokens)} entries: "
                f"expected 1 to {MAX_TOKENS}"
            )
        copies = len(tokens) - len(set(tokens))
        if copies:
            self._warn("tokens", f"{copies} texts occur twice: the lowest id is used")
        return tokens

    def types(self, n: int) -> NDArray[np.int32]:
        values = self._numbers("token_type", n, "iu")
        if values is None:
            return np.full(n, TokenType.NORMAL, np.int32)
        odd = (values < 0) | (values > max(TokenType))
        if odd.any():
            self._warn("token_type", f"{int(odd.sum())} unknown types: taken as undefined")
        return np.where(odd, TokenType.UNDEFINED, values).astype(np.int32)

    def scores(self, n: int) -> NDArray[np.float32]:
        values = self._numbers("scores", n, "f")
        if values is None:
            raise TokenizerError(
                f"{self.where}: tokenizer.ggml.scores: missing: expected {n} floats"
            )
        if not np.isfinite(values).all():
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            raise TokenizerError(
                f"{self.where}: tokenizer.ggml.scores[{at}]: {values[at]}: expected a finite number"
            )
        return values.astype(np.float32)

    def merges(self) -> list[str]:
        merges = self._strings("merges")
        bad = next((m for m in merges if " " not in m[1:-1]), None)
        if bad is not None:
            raise TokenizerError(
                f"{self.where}: tokenizer.ggml.merges: {bad!r:.40}: expected two parts"
            )
        return merges

    def special(self, name: str, n: int, default: int | None = None) -> int | None:
        """Id of a special token; one that is not in the vocabulary counts as absent."""
        key = f"{name}_token_id"
        value = self.get(key, int, default)
        if value is None or 0 <= value < n:
            return value if value is None else int(value)
        if value != 0xFFFFFFFF:  # the usual way to write "none"
            self._warn(key, f"{value}: outside the vocabulary of {n}: ignored")
        return None

    def _strings(self, key: str) -> list[str]:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            raise TokenizerError(f"{self.where}: tokenizer.ggml.{key}: missing: expected strings")
        if not isinstance(value, list) or not set(map(type, value)) <= {str}:
            raise FormatError(f"{self.where}: tokenizer.ggml.{key}: expected an array of strings")
        return value

    def _numbers(self, key: str, n: int, kinds: str) -> NDArray[Any] | None:
        """Array of at least 32-bit numbers, one for each token; None when absent."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        array = np.asarray(value)
        if array.ndim != 1 or array.dtype.kind not in kinds or array.itemsize < 4:
            raise FormatError(
                f"{self.where}: tokenizer.ggml.{key}: type {array.dtype}: expected "
                f"{'float32' if 'f' in kinds else 'int32'} [{n}]"
            )
        if len(array) < n:
            raise FormatError(
                f"{self.where}: tokenizer.ggml.{key}: {len(array)} entries: expected {n}"
            )
        if len(array) > n:
            self._warn(key, f"{len(array)} entries for {n} tokens: the rest is ignored")
        return array[:n]

    def _warn(self, key: str, fact: str) -> None:
        self.warnings.append(f"{self.where}: tokenizer.ggml.{key}: {fact}")


def _byte_tokens(where: str, tokens: Sequence[str], types: NDArray[np.int32]) -> dict[int, int]:
    """Byte value by id. A token that looks exactly like one is one, whatever its type says."""
    byte_of = {}
    for i in [i for i, text in enumerate(tokens) if text.startswith("<0x")]:
        if match := _BYTE.fullmatch(tokens[i]):
            byte_of[i], types[i] = int(match[1], 16), TokenType.BYTE
    bad = [int(i) for i in np.flatnonzero(types == TokenType.BYTE) if int(i) not in byte_of]
    if bad:
        raise TokenizerError(
            f"{where}: tokenizer.ggml.tokens[{bad[0]}]: {tokens[bad[0]]!r:.40}: "
            "expected <0x00> to <0xFF>"
        )
    return byte_of


def _pretokenizer(reader: _Reader) -> str:
    name = reader.get("pre", str, "")
    name = ALIASES.get(name, name)
    if name not in PRETOKENIZERS:
        known = ", ".join(sorted([*PRETOKENIZERS, *ALIASES]))
        raise TokenizerError(
            f"{reader.where}: tokenizer.ggml.pre: {name!r:.40}: expected one of {known}"
        )
    return str(name)


def _read_special(reader: _Reader, vocab: Vocab, spm: bool) -> None:
    """Special ids and flags, with llama.cpp's defaults for what the file leaves out."""
    n = len(vocab.tokens)
    # 1, 2 and 0 are the ids of SentencePiece's own defaults.
    vocab.bos_id = reader.special("bos", n, 1 if spm else None)
    vocab.eos_id = reader.special("eos", n, 2 if spm else None)
    vocab.unknown_id = reader.special("unknown", n, 0 if spm else None)
    default = spm or PRETOKENIZERS[vocab.pre].add_bos
    vocab.add_bos = reader.get("add_bos_token", bool, default and vocab.bos_id is not None)
    vocab.add_eos = reader.get("add_eos_token", bool, False)
    vocab.add_space_prefix = reader.get("add_space_prefix", bool, True) and spm
    if vocab.add_bos and vocab.bos_id is None:
        raise TokenizerError(
            f"{vocab.where}: tokenizer.ggml.add_bos_token is true, but there is no bos_token_id"
        )
    _mark_control(vocab)
    ends = {vocab.eos_id, reader.special("eot", n), reader.special("eom", n)} - {None}
    known = (i for i in vocab.ids_of(TokenType.CONTROL) if vocab.tokens[i] in END_TEXTS)
    vocab.eog_ids = frozenset(i for i in (*ends, *known) if i is not None)
    if not vocab.eog_ids:
        vocab.warnings.append(f"{vocab.where}: no end-of-text token: answers end at the limit")


def _mark_control(vocab: Vocab) -> None:
    """Control tokens that a careless converter declared as text must not come from user text."""
    careless = (TokenType.USER_DEFINED, TokenType.UNUSED)
    for i, text in enumerate(vocab.tokens):
        if text in END_TEXTS and (vocab.types[i] in careless or text.startswith("<|")):
            vocab.types[i] = TokenType.CONTROL
    for special in (vocab.bos_id, vocab.eos_id):
        if special is not None and vocab.types[special] in careless:
            vocab.types[special] = TokenType.CONTROL
