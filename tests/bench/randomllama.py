"""GGUF files of the llama architecture with random weights, for speed and memory: these depend on
shapes and formats, not on what the weights say.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeq.blocks import BlockFormat, get, row_bytes
from edgeq.gguf import GgufWriter, TensorSpec
from edgeq.recipe import Model, Recipe, assign

__all__ = ["Llama", "random_tensor"]


@dataclass(frozen=True)
class Llama:
    """A model's shape. tied: the output is the embedding."""

    name: str
    layers: int
    width: int
    ff: int
    heads: int
    kv_heads: int
    vocab: int
    context: int = 2048
    tied: bool = False

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor."""
        width, ff, kv = self.width, self.ff, self.width // self.heads * self.kv_heads
        out: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (self.vocab, width))]
        out += [("output_norm.weight", (width,))]
        out += [] if self.tied else [("output.weight", (self.vocab, width))]
        for i in range(self.layers):
            at = f"blk.{i}."
            out += [(at + n, (width,)) for n in ("attn_norm.weight", "ffn_norm.weight")]
            out += [(at + n, (width, width)) for n in ("attn_q.weight", "attn_output.weight")]
            out += [(at + n, (kv, width)) for n in ("attn_k.weight", "attn_v.weight")]
            out += [(at + n, (ff, width)) for n in ("ffn_gate.weight", "ffn_up.weight")]
            out += [(at + "ffn_down.weight", (width, ff))]
        return out

    def matrices(self) -> list[tuple[str, tuple[int, ...]]]:
        """Those of `shapes` that a token is multiplied with."""
        unused = "" if self.tied else "token_embd.weight"
        return [(name, shape) for name, shape in self.shapes() if shape[1:] and name != unused]

    def formats(self, recipe: Recipe) -> dict[str, str]:
        """Of each tensor."""
        return assign(recipe, self.shapes(), Model(self.layers, self.heads, self.kv_heads))

    def metadata(self, file_type: int) -> dict[str, object]:
        """All but the vocabulary."""
        return {
            "general.architecture": "llama",
            "general.name": self.name,
            "general.file_type": file_type,
            "general.quantization_version": 2,
            "llama.context_length": self.context,
            "llama.embedding_length": self.width,
            "llama.block_count": self.layers,
            "llama.feed_forward_length": self.ff,
            "llama.attention.head_count": self.heads,
            "llama.attention.head_count_kv": self.kv_heads,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.dimension_count": self.width // self.heads,
            "llama.vocab_size": self.vocab,
        }

    def write(self, out: Path, recipe: str, vocabulary: dict[str, object]) -> None:
        """Write the file; vocabulary: its metadata."""
        rng, chosen, shapes = np.random.default_rng(0), Recipe.load(recipe), self.shapes()
        formats = self.formats(chosen)
        specs = [TensorSpec(name, shape, get(formats[name])) for name, shape in shapes]
        metadata = {**self.metadata(chosen.file_type), **vocabulary}
        with GgufWriter(out, metadata, specs, force=True) as writer:
            for spec in specs:
                writer.write(spec.name, random_tensor(rng, spec.format, spec.shape))


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
