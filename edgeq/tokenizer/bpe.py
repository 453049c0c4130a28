"""Byte-level BPE vocabularies, run by the tokenizers library."""

import unicodedata
from typing import Any

from edgeq.errors import TokenizerError
from edgeq.tokenizer.loading import Vocab
from edgeq.vocab import BYTE_TO_CHAR, PRETOKENIZERS, TokenType

__all__ = ["BpeEncoder"]

_CHAR_TO_BYTE = {char: bytes([byte]) for byte, char in enumerate(BYTE_TO_CHAR)}


class BpeEncoder:
    """Encodes text without special tokens; see Tokenizer for the whole."""

    def __init__(self, vocab: Vocab) -> None:
        """Raises TokenizerError when tokenizers refuses the vocabulary."""
        import tokenizers

        self._vocab = vocab
        self._rules = PRETOKENIZERS[vocab.pre]
        self._model = tokenizers.Tokenizer(_model(vocab, self._rules.whole_words))
        self._model.pre_tokenizer = _pretokenizer(self._rules.splits)

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Ids of plain text; `first` makes no difference here."""
        del first
        if self._rules.normal_form:
            text = unicodedata.normalize(self._rules.normal_form, text)  # type: ignore[arg-type]
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def piece(self, token: int) -> bytes:
        """Bytes of a token."""
        text = self._vocab.tokens[token]
        if self._vocab.types[token] in (TokenType.NORMAL, TokenType.UNDEFINED):
            return b"".join(
                _CHAR_TO_BYTE.get(c) or c.encode("utf-8", "surrogateescape") for c in text
            )
        return text.encode("utf-8", "surrogateescape")


def _pretokenizer(splits: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    cuts = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, to_bytes])


def _model(vocab: Vocab, whole_words: bool) -> Any:
    from tokenizers.models import BPE

    ids: dict[str, int] = {}
    matched = vocab.ids_of(TokenType.NORMAL, TokenType.UNDEFINED)
    for i in reversed(matched):  # of equal texts the lowest id stays
        ids[vocab.tokens[i]] = i
    if not _is_text("".join(ids)):  # tokens that are not UTF-8 cannot come from text
        ids = {text: i for text, i in ids.items() if _is_text(text)}
    try:
        return BPE(vocab=ids, merges=_sound_merges(vocab, ids), ignore_merges=whole_words)
    except Exception as error:
        raise TokenizerError(f"{vocab.where}: tokenizers refuses it: {error}") from error


def _is_text(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _sound_merges(vocab: Vocab, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Merges whose parts and result are tokens; the library would panic on others."""
    sound = [
        (left, right)
        for left, _, right in (merge.partition(" ") for merge in vocab.merges)
        if left in ids and right in ids and left + right in ids
    ]
    n = len(vocab.merges)
    if len(sound) < n:
        vocab.warnings.append(
            f"{vocab.where}: tokenizer.ggml.merges: {n - len(sound)} of {n} name texts that are "
            "not tokens: ignored"
        )
    return sound
