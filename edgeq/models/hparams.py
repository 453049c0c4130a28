"""Reading hyper-parameters from GGUF metadata: every value checked once, here, against a range.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Kernels and loops see only what
passed.
"""

from typing import TYPE_CHECKING, Literal

from edgeq.errors import ModelError
from edgeq.models.arch import Arch, Rope

if TYPE_CHECKING:
    from edgeq.gguf import Gguf

__all__ = ["Hparams", "decoder_arch"]

_MAX_WIDTH = 1 << 20  # of embeddings and feed-forward layers
_MAX_CONTEXT = 1 << 28


class Hparams:
    """Typed, range-checked access to `<architecture>.*` keys of a file."""

    def __init__(self, gguf: "Gguf") -> None:
        """gguf: an open file. Raises FormatError when it names no architecture."""
        self.gguf = gguf
        self.architecture: str = gguf.get("general.architecture", str)

    def has(self, key: str) -> bool:
        """Whether the file states `key`."""
        return f"{self.architecture}.{key}" in self.gguf.metadata

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """Whole number in low..high. Without a default the key is required.

        Raises FormatError when it is missing or of another type, ModelError out of range.
        """
        full = f"{self.architecture}.{key}"
        value: int = self.gguf.get(full, int) if default is None or self.has(key) else default
        if not low <= value <= high:
            raise self.error(key, value, f"expected {low} to {high}")
        return value

    def real(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """Number with low < value <= high; NaN is in no range. As `integer` otherwise."""
        full = f"{self.architecture}.{key}"
        value: float = self.gguf.get(full, float) if default is None or self.has(key) else default
        if not low < value <= high:
            raise self.error(key, value, f"expected more than {low:g}, at most {high:g}")
        return value

    def text(self, key: str, default: str) -> str:
        """Text of an optional key. Raises FormatError when it is of another type."""
        full = f"{self.architecture}.{key}"
        return str(self.gguf.get(full, str)) if self.has(key) else default

    def error(self, key: str, value: object, expected: str) -> ModelError:
        """The error to raise for a value that does not fit."""
        return ModelError(f"{self.gguf.path}: {self.architecture}.{key} = {value!r}: {expected}")


def decoder_arch(
    gguf: "Gguf", rope_style: Literal["norm", "neox"], *, qk_norm: bool = False
) -> Arch:
    """Properties of a decoder-only transformer: RMS norms, gated feed-forward, rotary positions.

    Raises FormatError for missing or mistyped keys, ModelError for values out of range, unsupported
    features, and an embedding table that does not fit.
    """
    keys = Hparams(gguf)
    width = keys.integer("embedding_length", 1, _MAX_WIDTH)
    heads, kv_heads, head_dim = _heads(keys, width)
    if keys.integer("expert_count", 0, 1 << 16, default=0):
        raise keys.error("expert_count", "> 0", "mixture-of-experts models are not supported")
    return Arch(
        name=keys.architecture,
        block_count=keys.integer("block_count", 1, 1024),
        embedding_length=width,
        feed_forward_length=keys.integer("feed_forward_length", 1, _MAX_WIDTH),
        head_count=heads,
        head_count_kv=kv_heads,
        head_dim=head_dim,
        vocab_size=_vocab_size(keys, width),
        context_length=keys.integer("context_length", 1, _MAX_CONTEXT),
        rms_epsilon=keys.real("attention.layer_norm_rms_epsilon", 0.0, 0.1),
        rope=_rope(keys, head_dim, rope_style),
        qk_norm=qk_norm,
    )


def _heads(keys: Hparams, width: int) -> tuple[int, int, int]:
    """Query heads, key/value heads, and the length of each."""
    heads = keys.integer("attention.head_count", 1, width)
    kv_heads = keys.integer("attention.head_count_kv", 1, heads, default=heads)
    if heads % kv_heads:
        raise keys.error("attention.head_count_kv", kv_heads, f"expected a divisor of {heads}")
    explicit = keys.has("attention.key_length")
    if not explicit and width % heads:
        raise keys.error("attention.head_count", heads, f"expected a divisor of {width}")
    head_dim = keys.integer("attention.key_length", 2, 1024, default=width // heads)
    if head_dim % 2:
        raise keys.error("attention.key_length", head_dim, "expected an even number")
    value_dim = keys.integer("attention.value_length", 2, 1024, default=head_dim)
    if value_dim != head_dim:
        raise keys.error("attention.value_length", value_dim, f"expected key_length, {head_dim}")
    return heads, kv_heads, head_dim


def _rope(keys: Hparams, head_dim: int, style: Literal["norm", "neox"]) -> Rope:
    dim = keys.integer("rope.dimension_count", 2, head_dim, default=head_dim)
    if dim % 2:
        raise keys.error("rope.dimension_count", dim, "expected an even number")
    # 10,000 is the default of the RoPE paper; old files rely on it.
    base = keys.real("rope.freq_base", 1.0, 1e12, default=10000.0)
    # A factor without a type means linear, as in llama.cpp.
    kind = keys.text("rope.scaling.type", "linear" if keys.has("rope.scaling.factor") else "none")
    if kind == "none":
        return Rope(dim, base, style)
    factor = keys.real("rope.scaling.factor", 0.0, 1e4)
    if kind == "linear":
        return Rope(dim, base, style, "linear", factor)
    if kind == "yarn":
        return _yarn(keys, dim, base, style, factor)
    raise keys.error("rope.scaling.type", kind, "expected none, linear or yarn")


def _yarn(
    keys: Hparams, dim: int, base: float, style: Literal["norm", "neox"], factor: float
) -> Rope:
    """YaRN (Peng et al. 2023, arXiv:2309.00071)."""
    if keys.real("rope.scaling.yarn_ext_factor", -2.0, 1e4, default=1.0) not in (1.0, -1.0):
        raise keys.error("rope.scaling.yarn_ext_factor", "not 1", "only full YaRN is supported")
    # rope.scaling.yarn_attn_factor is not read: llama.cpp computes it from the factor.
    return Rope(
        dim,
        base,
        style,
        "yarn",
        factor,
        original_context=keys.integer("rope.scaling.original_context_length", 1, _MAX_CONTEXT),
        attn_factor=keys.real("rope.scaling.attn_factor", 0.0, 100.0, default=1.0),
        beta_fast=keys.real("rope.scaling.yarn_beta_fast", 0.0, 1e4, default=32.0),
        beta_slow=keys.real("rope.scaling.yarn_beta_slow", 0.0, 1e4, default=1.0),
    )


def _vocab_size(keys: Hparams, width: int) -> int:
    """Rows of the embedding table: at least one per token, more when it is padded."""
    table = keys.gguf.tensors.get("token_embd.weight")
    if table is None:
        raise ModelError(f"{keys.gguf.path}: tensor token_embd.weight is missing")
    if len(table.shape) != 2 or table.shape[1] != width:
        raise ModelError(
            f"{keys.gguf.path}: token_embd.weight has shape {table.shape}: expected "
            f"(vocabulary, {width}), as embedding_length says"
        )
    tokens = len(keys.gguf.metadata.get("tokenizer.ggml.tokens", ()))
    if tokens > table.shape[0]:
        raise ModelError(
            f"{keys.gguf.path}: token_embd.weight has {table.shape[0]} rows: expected one for each "
            f"of {tokens} tokens"
        )
    return int(table.shape[0])
