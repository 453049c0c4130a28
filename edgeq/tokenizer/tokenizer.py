"""Text to ids and back, with special tokens; the library behind it is an Encoder."""

import operator
from collections.abc import Iterable
from typing import Protocol, cast

import numpy as np

from edgeq.errors import TokenizerError
from edgeq.tokenizer.loading import Vocab
from edgeq.tokenizer.stream import StreamDecoder
from edgeq.vocab import TokenType

__all__ = ["Encoder", "NoTokenizer", "Tokenizer"]


class Encoder(Protocol):
    """Encodes text that holds no special tokens."""

    def encode(self, text: str, *, first: bool) -> list[int]: ...
    def piece(self, token: int) -> bytes: ...


class Tokenizer:
    """Vocabulary of a model; made by `edgeq.tokenizer.load_tokenizer`.

    bos_id, eos_id: None when the vocabulary has none. eog_ids: any of them ends an answer.
    special_ids: control tokens; they come from text only where `special=True` says so, and are
    not shown. add_bos, add_eos: what the model was trained to see around a text.
    """

    def __init__(self, vocab: Vocab, encoder: Encoder) -> None:
        """Use `load_tokenizer`."""
        self.n_vocab = len(vocab.tokens)
        self.bos_id, self.eos_id, self.eog_ids = vocab.bos_id, vocab.eos_id, vocab.eog_ids
        self.add_bos, self.add_eos = vocab.add_bos, vocab.add_eos
        self.warnings = vocab.warnings
        control = vocab.ids_of(TokenType.CONTROL, TokenType.UNKNOWN)
        self.special_ids = frozenset(control)
        self._where = vocab.where
        self._encoder = encoder
        self._pieces: dict[int, bytes] = {}
        self._drop_space = vocab.add_space_prefix
        self._hidden = self.special_ids.union(vocab.ids_of(TokenType.UNUSED))
        self._always = _by_text(vocab, vocab.ids_of(TokenType.USER_DEFINED))
        self._special = _by_text(vocab, [*control, *vocab.ids_of(TokenType.USER_DEFINED)])
        self.special_texts = tuple(_by_text(vocab, control))

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Ids of a text.

        special: control tokens written in the text, such as <|im_end|>, become their ids; leave it
        off for text that a user wrote. bos: begin with BOS if the vocabulary asks for it.
        """
        return self.encode_parts(self.partition(text, special=special), bos=bos)

    def partition(self, text: str, *, special: bool = False) -> list[str | int]:
        """Special tokens of a text as ids, and the plain text between them.

        Longer tokens are looked for first, as llama.cpp does.
        """
        texts = self._special if special else self._always
        text = _valid(text)
        parts: list[str | int] = [text]
        for token in [token for token in texts if token in text]:
            parts = [
                item
                for part in parts
                for item in ([part] if isinstance(part, int) else _cut(part, token, texts[token]))
            ]
        return [part for part in parts if part != ""]

    def encode_parts(self, parts: Iterable[str | int], *, bos: bool = False) -> list[int]:
        """Ids of what `partition` returns, or of parts made in the same way."""
        ids = [self.bos_id] if bos and self.add_bos and self.bos_id is not None else []
        first = True  # the encoder may put a space before text that follows a special token
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += self._encoder.encode(_valid(part), first=first)
            first = isinstance(part, int)
        return ids

    def piece(self, token: int) -> bytes:
        """Bytes of one token, control tokens as their text. Raises TokenizerError for a bad id."""
        index = operator.index(token)
        if not 0 <= index < self.n_vocab:
            raise TokenizerError(
                f"{self._where}: token {index}: expected an id from 0 to {self.n_vocab - 1}"
            )
        if index not in self._pieces:
            self._pieces[index] = self._encoder.piece(index)
        return self._pieces[index]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ids, with U+FFFD for bytes that are not UTF-8; special: show control tokens.

        Raises TokenizerError for an id outside the vocabulary.
        """
        data = b"".join(map(self.piece if special else self._shown, ids))
        return data.removeprefix(b" " * self._drop_space).decode("utf-8", "replace")

    def decoder(self, *, special: bool = False, continues: bool = False) -> StreamDecoder:
        """Decoder for ids that come one by one.

        continues: the text goes on from an earlier one, so that a space it begins with counts.
        """
        shown = self.piece if special else self._shown
        return StreamDecoder(shown, drop_space=self._drop_space and not continues)

    def _shown(self, token: int) -> bytes:
        data = self.piece(token)
        return b"" if token in self._hidden else data


class NoTokenizer(Tokenizer):
    """Stands in where a file has no vocabulary: ids still run, text raises TokenizerError."""

    def __init__(self, where: str) -> None:
        """where: file name, for the error."""
        empty = np.zeros(0, np.float32)
        vocab = Vocab(where, [], empty.astype(np.int32), empty, {}, [], "")
        super().__init__(vocab, cast(Encoder, self))

    def partition(self, text: str, *, special: bool = False) -> list[str | int]:
        raise self._error()

    def piece(self, token: int) -> bytes:
        raise self._error()

    def _error(self) -> TokenizerError:
        return TokenizerError(f"{self._where}: it holds no tokenizer: give token ids, not text")


def _by_text(vocab: Vocab, ids: Iterable[int]) -> dict[str, int]:
    """Token texts with their ids, the longest first; of equal texts the lowest id."""
    texts: dict[str, int] = {}
    for i in sorted(ids, key=lambda i: (-len(vocab.tokens[i]), i)):
        if vocab.tokens[i]:
            texts.setdefault(vocab.tokens[i], i)
    return texts


def _cut(text: str, token: str, token_id: int) -> list[str | int]:
    """Text with every occurrence of a token replaced by its id."""
    parts: list[str | int] = []
    for piece in text.split(token):
        parts += [piece, token_id] if piece else [token_id]
    return parts[:-1]


def _valid(text: str) -> str:
    """Text without lone surrogates, which no UTF-8 can hold: U+FFFD instead."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
