"""Tokenizers rebuilt from the vocabulary in a GGUF file."""

from edgeq.errors import TokenizerError
from edgeq.tokenizer.loading import Metadata, read_vocab
from edgeq.tokenizer.stream import StreamDecoder
from edgeq.tokenizer.tokenizer import NoTokenizer, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]


def load_tokenizer(gguf: Metadata) -> Tokenizer:
    """Tokenizer of an open GGUF file.

    A file without a vocabulary gets one that raises when text is used. What is odd but usable is
    told in `.warnings`. Raises FormatError, TokenizerError.

    >>> from edgeq.gguf import open_gguf  # doctest: +SKIP
    >>> tokenizer = load_tokenizer(open_gguf("tiny-home-Q4_K_M.gguf"))  # doctest: +SKIP
    >>> tokenizer.encode("Hello world")  # doctest: +SKIP
    [4075, 434, 328, 491, 1002]
    """
    model = gguf.metadata.get("tokenizer.ggml.model")
    if model in ("none", "no_vocab") or (
        model is None and "tokenizer.ggml.tokens" not in gguf.metadata
    ):
        return NoTokenizer(str(gguf.path))
    if model == "llama":
        from edgeq.tokenizer.spm import SpmEncoder

        vocab = read_vocab(gguf)
        return Tokenizer(vocab, SpmEncoder(vocab))
    if model == "gpt2":
        from edgeq.tokenizer.bpe import BpeEncoder

        vocab = read_vocab(gguf)
        return Tokenizer(vocab, BpeEncoder(vocab))
    raise TokenizerError(
        f"{gguf.path}: tokenizer.ggml.model: {model!r:.40}: expected one of gpt2, llama, none"
    )
