"""Write a GGUF of SmolLM-135M's shape with random weights, in any recipe: `python
tests/bench/smollm.py OUT [RECIPE]`.

A model for a board with 512 MB: 100 MiB as Q4_K_M. Its vocabulary is byte-level BPE of the real
one's size, with made-up words, since a vocabulary takes memory too.
"""

import string
import sys
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path

import numpy as np
from randomllama import Llama

from edgeq.vocab import BYTE_TO_CHAR

MODEL = Llama("random SmolLM-135M", 30, 576, 1536, 9, 3, 49152, context=2048, tied=True)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def words() -> Iterator[tuple[str, str]]:
    """The two parts of each word, shorter words first."""
    letters = string.ascii_lowercase
    pairs = list(product(letters, letters))
    yield from pairs
    yield from (("Ġ", a) for a in letters)
    yield from (("Ġ" + a, b) for a, b in pairs)
    yield from ((a + b, c) for a, b in pairs for c in letters)
    yield from ((a + b, c + d) for a, b in pairs for c, d in pairs)


def vocabulary() -> dict[str, object]:
    """Of pairs of letters, merged."""
    merges = list(islice(words(), MODEL.vocab - len(SPECIAL) - len(BYTE_TO_CHAR)))
    tokens = [*SPECIAL, *BYTE_TO_CHAR, *(a + b for a, b in merges)]
    kinds = [3] * len(SPECIAL) + [1] * (MODEL.vocab - len(SPECIAL))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


if __name__ == "__main__":
    recipe = sys.argv[2] if len(sys.argv) > 2 else "Q4_K_M"
    MODEL.write(Path(sys.argv[1]), recipe, vocabulary())
