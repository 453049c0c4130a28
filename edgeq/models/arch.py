"""What the engine must know of a model: independent properties, never an architecture's name."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Arch", "Rope"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its context extensions."""

    dim: int  # leading dimensions of a head that are rotated; even
    base: float
    style: Literal["norm", "neox"]  # pairs (2i, 2i+1), or halves (i, i + dim/2)
    scaling: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0  # context extension; 1 = none
    original_context: int = 0  # yarn: context length before the extension
    attn_factor: float = 1.0  # multiplies cos and sin on top of yarn's own magnitude correction
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True)
class Arch:
    """Properties of a decoder-only transformer, validated, as read from GGUF metadata."""

    name: str  # general.architecture, for messages only
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    head_dim: int  # attention.key_length = attention.value_length
    vocab_size: int
    context_length: int  # positions seen in training; 0 < context_length
    rms_epsilon: float
    rope: Rope
    qk_norm: bool = (
        False  # RMS norm of each query and key head before rope (attn_q_norm, attn_k_norm)
    )
