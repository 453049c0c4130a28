"""Qwen2 and Qwen2.5 (arXiv:2407.10671): as Llama, with Q, K and V biases, and halves rotated."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.models.arch import Arch
from edgeq.models.from_hf import decoder_metadata
from edgeq.models.hparams import decoder_arch

if TYPE_CHECKING:
    from edgeq.gguf import Gguf

__all__ = ["HF_ARCHITECTURES", "arch", "extra_tensors", "metadata", "transform"]

HF_ARCHITECTURES = ("Qwen2ForCausalLM",)


def arch(gguf: "Gguf") -> Arch:
    """Properties of a GGUF file's model. Raises FormatError, ModelError."""
    return decoder_arch(gguf, "neox")


def metadata(config: dict[str, Any]) -> dict[str, Any]:
    """GGUF keys for config.json. Raises ModelError."""
    return decoder_metadata("qwen2", config)


def transform(name: str, w: NDArray[np.float32], config: dict[str, Any]) -> NDArray[np.float32]:
    """Nothing changes: GGUF stores these rows in HF's order."""
    return w


def extra_tensors(config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """None."""
    return {}
