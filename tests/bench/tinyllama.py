"""Write a GGUF of TinyLlama-1.1B's shape with random weights, in any recipe: `python
tests/bench/tinyllama.py OUT [RECIPE]`.

Speed depends on shapes and formats, not on what the weights say: blocks are random bytes with sane
scales.
"""

import sys
from pathlib import Path

import numpy as np

from edgeq.blocks import BlockFormat, get, row_bytes
from edgeq.gguf import GgufWriter, TensorSpec
from edgeq.recipe import Model, Recipe, assign

LAYERS, WIDTH, FF, HEADS, KV_HEADS, VOCAB = 22, 2048, 5632, 32, 4, 32000


def shapes() -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor."""
    kv = WIDTH // HEADS * KV_HEADS
    out: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd.weight", (VOCAB, WIDTH)),
        ("output_norm.weight", (WIDTH,)),
        ("output.weight", (VOCAB, WIDTH)),
    ]
    for i in range(LAYERS):
        at = f"blk.{i}."
        out += [(at + n, (WIDTH,)) for n in ("attn_norm.weight", "ffn_norm.weight")]
        out += [(at + n, (WIDTH, WIDTH)) for n in ("attn_q.weight", "attn_output.weight")]
        out += [(at + n, (kv, WIDTH)) for n in ("attn_k.weight", "attn_v.weight")]
        out += [(at + n, (FF, WIDTH)) for n in ("ffn_gate.weight", "ffn_up.weight")]
        out += [(at + "ffn_down.weight", (WIDTH, FF))]
    return out


def metadata(file_type: int) -> dict[str, object]:
    """Hyper-parameters, and a vocabulary of made-up words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    kinds = [2, 3, 3, *[6] * 256]
    words = [f"▁w{i}" for i in range(VOCAB - len(tokens))]
    scores = [0.0] * len(tokens) + [-float(i) for i in range(len(words))]
    return {
        "general.architecture": "llama",
        "general.name": "random TinyLlama-1.1B",
        "general.file_type": file_type,
        "general.quantization_version": 2,
        "llama.context_length": 2048 + 1024,
        "llama.embedding_length": WIDTH,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": FF,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "llama.vocab_size": VOCAB,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + words,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds + [1] * len(words), np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def random_tensor(rng: np.random.Generator, fmt: BlockFormat, shape: tuple[int, ...]) -> np.ndarray:
    """Random blocks whose values are of the size of a trained model's weights."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    rows, cols = shape
    blocks = rows * cols // fmt.block
    if fmt.value == "x":
        w = rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(0.02)
        return w.astype(np.float16) if fmt.name == "F16" else w
    raw = rng.integers(0, 256, (blocks, fmt.bytes), dtype=np.uint8)
    span = max(map(abs, fmt.limits("q"))) if fmt.table is None else 127
    for name in ("d", "dmin", "m"):
        field = fmt.fields.get(name)
        if field is not None and field.type == "f16":
            size = 0.04 / span / (32 if "sc" in fmt.fields else 1)
            scale = rng.uniform(0.5 * size, size, blocks).astype(np.float16)
            raw[:, field.at : field.at + 2] = scale.view(np.uint8).reshape(blocks, 2)
    return raw.reshape(rows, row_bytes(fmt, cols))


def main(out: Path, name: str) -> None:
    """Write the file."""
    rng, chosen = np.random.default_rng(0), Recipe.load(name)
    model = Model(LAYERS, HEADS, KV_HEADS)
    formats = assign(chosen, shapes(), model)
    specs = [TensorSpec(n, shape, get(formats[n])) for n, shape in shapes()]
    with GgufWriter(out, metadata(chosen.file_type), specs, force=True) as writer:
        for spec in specs:
            writer.write(spec.name, random_tensor(rng, spec.format, spec.shape))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "Q4_K_M")
