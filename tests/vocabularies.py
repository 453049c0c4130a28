"""Small vocabularies for tests, without a file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from edgeq.tokenizer import Tokenizer, load_tokenizer
from edgeq.vocab import BYTE_TO_CHAR


def spm_metadata(**changes: Any) -> dict[str, Any]:
    """A small SentencePiece vocabulary with all bytes; keys without their prefix."""
    words = ["▁", "a", "b", "ab", "▁a", "▁ab", "é", "<|", "|>"]
    specials = {"<unk>": 2, "<s>": 3, "</s>": 3, "<|end|>": 3, "<think>": 4, "[PAD5]": 5}
    tokens = [*specials, *(f"<0x{i:02X}>" for i in range(256)), *words]
    types = [*specials.values(), *[6] * 256, *[1] * len(words)]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": np.arange(len(tokens), dtype=np.float32),
        "token_type": np.array(types, np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def bpe_metadata(**changes: Any) -> dict[str, Any]:
    """A small byte-level vocabulary; keys without their prefix."""
    tokens = [*BYTE_TO_CHAR, "ab", "Ġab", "Ġa", "<|im_end|>", "<|fun|>"]
    return {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": np.array([*[1] * (len(tokens) - 2), 3, 4], np.int32),
        "merges": ["a b", "Ġ ab", "Ġ a"],
        "eos_token_id": len(tokens) - 2,
        **changes,
    }


def load(metadata: dict[str, Any]) -> Tokenizer:
    table = {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}
    return load_tokenizer(SimpleNamespace(path=Path("x.gguf"), metadata=table))


def token(metadata: dict[str, Any], text: str) -> int:
    return int(metadata["tokens"].index(text))
