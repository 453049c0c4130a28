"""Write a GGUF of TinyLlama-1.1B's shape with random weights, in any recipe: `python
tests/bench/tinyllama.py OUT [RECIPE]`.

Speed depends on shapes and formats, not on what the weights say: blocks are random bytes with sane
scales.
"""

import sys
from pathlib import Path

import numpy as np
from randomllama import Llama

MODEL = Llama("random TinyLlama-1.1B", 22, 2048, 5632, 32, 4, 32000, context=2048 + 1024)


def vocabulary() -> dict[str, object]:
    """Made-up words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    kinds = [2, 3, 3, *[6] * 256]
    words = [f"▁w{i}" for i in range(MODEL.vocab - len(tokens))]
    scores = [0.0] * len(tokens) + [-float(i) for i in range(len(words))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + words,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds + [1] * len(words), np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


if __name__ == "__main__":
    recipe = sys.argv[2] if len(sys.argv) > 2 else "Q4_K_M"
    MODEL.write(Path(sys.argv[1]), recipe, vocabulary())
