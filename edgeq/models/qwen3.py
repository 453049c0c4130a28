"""Qwen3 (arXiv:2505.09388): as Qwen2 without biases, with an RMS norm on each Q and K head."""

from typing import TYPE_CHECKING, Any

from edgeq.models.arch import Arch
from edgeq.models.from_hf import decoder_metadata
from edgeq.models.hparams import decoder_arch
from edgeq.models.qwen2 import extra_tensors, transform

if TYPE_CHECKING:
    from edgeq.gguf import Gguf

__all__ = ["HF_ARCHITECTURES", "arch", "extra_tensors", "metadata", "transform"]

HF_ARCHITECTURES = ("Qwen3ForCausalLM",)


def arch(gguf: "Gguf") -> Arch:
    """Properties of a GGUF file's model. Raises FormatError, ModelError."""
    return decoder_arch(gguf, "neox", qk_norm=True)


def metadata(config: dict[str, Any]) -> dict[str, Any]:
    """GGUF keys for config.json. Raises ModelError."""
    # 128 is the class's own default: hidden_size / heads is smaller in most of these models.
    return decoder_metadata("qwen3", {"head_dim": 128, **config})
