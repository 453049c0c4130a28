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
from tinyllama import random_tensor

from edgeq.blocks import get
from edgeq.gguf import GgufWriter, TensorSpec
from edgeq.recipe import Model, Recipe, assign
from edgeq.vocab import BYTE_TO_CHAR

LAYERS, WIDTH, FF, HEADS, KV_HEADS, VOCAB = 30, 576, 1536, 9, 3, 49152
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def shapes() -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor; the output is the embedding."""
    kv = WIDTH // HEADS * KV_HEADS
    out: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (VOCAB, WIDTH))]
    out += [("output_norm.weight", (WIDTH,))]
    for i in range(LAYERS):
        at = f"blk.{i}."
        out += [(at + n, (WIDTH,)) for n in ("attn_norm.weight", "ffn_norm.weight")]
        out += [(at + n, (WIDTH, WIDTH)) for n in ("attn_q.weight", "attn_output.weight")]
        out += [(at + n, (kv, WIDTH)) for n in ("attn_k.weight", "attn_v.weight")]
        out += [(at + n, (FF, WIDTH)) for n in ("ffn_gate.weight", "ffn_up.weight")]
        out += [(at + "ffn_down.weight", (WIDTH, FF))]
    return out


def words() -> Iterator[tuple[str, str]]:
    """The two parts of each word, shorter words first."""
    letters = string.ascii_lowercase
    pairs = list(product(letters, letters))
    yield from pairs
    yield from (("Ġ", a) for a in letters)
    yield from (("Ġ" + a, b) for a, b in pairs)
    yield from ((a + b, c) for a, b in pairs for c in letters)
    yield from ((a + b, c + d) for a, b in pairs for c, d in pairs)


def metadata(file_type: int) -> dict[str, object]:
    """Hyper-parameters and vocabulary."""
    merges = list(islice(words(), VOCAB - len(SPECIAL) - len(BYTE_TO_CHAR)))
    tokens = [*SPECIAL, *BYTE_TO_CHAR, *(a + b for a, b in merges)]
    kinds = [3] * len(SPECIAL) + [1] * (VOCAB - len(SPECIAL))
    return {
        "general.architecture": "llama",
        "general.name": "random SmolLM-135M",
        "general.file_type": file_type,
        "general.quantization_version": 2,
        "llama.context_length": 2048,
        "llama.embedding_length": WIDTH,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": FF,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "llama.vocab_size": VOCAB,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def main(out: Path, name: str) -> None:
    """Write the file."""
    rng, chosen = np.random.default_rng(0), Recipe.load(name)
    formats = assign(chosen, shapes(), Model(LAYERS, HEADS, KV_HEADS))
    specs = [TensorSpec(n, shape, get(formats[n])) for n, shape in shapes()]
    with GgufWriter(out, metadata(chosen.file_type), specs, force=True) as writer:
        for spec in specs:
            writer.write(spec.name, random_tensor(rng, spec.format, spec.shape))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "Q4_K_M")
