"""edgeq: quantize Hugging Face checkpoints to GGUF and run them on a CPU.

>>> import numpy as np
>>> from edgeq import dequantize, quantize
>>> weights = np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 256)
>>> raw = quantize(weights, "Q8_0")
>>> raw.shape, bool(np.abs(dequantize(raw, "Q8_0") - weights).max() < 0.005)
((1, 272), True)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgeq import errors
from edgeq.version import VERSION

if TYPE_CHECKING:
    from edgeq.blocks import decode as dequantize
    from edgeq.engine import Model, load
    from edgeq.evaluate import perplexity
    from edgeq.gguf import open_gguf
    from edgeq.pipeline import convert
    from edgeq.quantizers import quantize

__all__ = [
    "Model",
    "convert",
    "dequantize",
    "errors",
    "load",
    "open_gguf",
    "perplexity",
    "quantize",
]
__version__ = VERSION

# What is imported on first use, so that `import edgeq` costs nothing.
_HOMES = {
    "Model": "edgeq.engine",
    "convert": "edgeq.pipeline",
    "dequantize": "edgeq.blocks:decode",
    "load": "edgeq.engine",
    "open_gguf": "edgeq.gguf",
    "perplexity": "edgeq.evaluate",
    "quantize": "edgeq.quantizers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeq' has no attribute {name!r}")
    module, _, original = _HOMES[name].partition(":")
    return getattr(import_module(module), original or name)
