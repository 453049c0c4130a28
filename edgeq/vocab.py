"""What the numbers and names of a vocabulary mean: token types, byte alphabet, pre-tokenizers.

Shared by the converter, which writes them, and the tokenizer, which reads them. To add a
pre-tokenizer, add an entry to PRETOKENIZERS (and to ALIASES for each other name of it).
"""

from dataclasses import dataclass
from enum import IntEnum

__all__ = [
    "ALIASES",
    "BYTE_TO_CHAR",
    "END_TEXTS",
    "MAX_TOKENS",
    "PRETOKENIZERS",
    "PreTokenizer",
    "TokenType",
]

MAX_TOKENS = 1 << 22  # no vocabulary is larger; a file that says so is damaged or hostile

# Texts that end an answer in known models, whatever the file declares as its end-of-text token.
END_TEXTS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>"),
        *("<|flush|>", "<|calls|>", "<end_of_turn>", "<end_of_utterance>", "<|endoftext|>"),
        *("<|end_of_text|>", "</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
        "<｜end▁of▁sentence｜>",
    }
)


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`, the same as in SentencePiece's protocol buffer.

    >>> TokenType(3).name
    'CONTROL'
    """

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # never made from plain text, never shown
    USER_DEFINED = 4  # matched in the text before anything else
    UNUSED = 5
    BYTE = 6


def _byte_to_char() -> tuple[str, ...]:
    """Printable stand-in of each byte in byte-level vocabularies (GPT-2, encoder.py)."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return tuple(chr(b) if b in visible else chr(256 + hidden.index(b)) for b in range(256))


BYTE_TO_CHAR = _byte_to_char()


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into words before byte-pair encoding.

    splits: regular expressions (Oniguruma), applied one after the other; each match and each
        stretch between matches is a word.
    whole_words: a word that is itself a token is taken without looking at the merges.
    add_bos: BOS goes first when the file does not say.
    normal_form: Unicode normal form of the text, or "" to leave it as it is.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    normal_form: str = ""


# Sources: GPT-2 encoder.py; tokenizer.json of Llama 3, Qwen2 and SmolLM.
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_SPACES = r"\s+(?!\S)|\s+"  # the last space of a run belongs to the word after it


def _classic() -> str:
    """Split of GPT-2: a word takes one space before it."""
    return rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"


def _modern(digits: str) -> str:
    """Split of Llama 3 and its relatives, which differ in how many digits make a word."""
    letters = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    marks = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return rf"(?i:{_CONTRACTIONS})|{letters}|{digits}|{marks}|\s*[\r\n]+|{_SPACES}"


# Values of `tokenizer.ggml.pre` for byte-level vocabularies.
PRETOKENIZERS = {
    "gpt-2": PreTokenizer((_classic(),)),
    "llama-bpe": PreTokenizer((_modern(r"\p{N}{1,3}"),), whole_words=True, add_bos=True),
    "qwen2": PreTokenizer((_modern(r"\p{N}"),), normal_form="NFC"),
    "smollm": PreTokenizer((r"\p{N}", _classic())),
}
ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "pixtral": "llama-bpe",
    "lfm2": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "phi-2": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
}
