"""GGUF files: a strict memory-mapped reader for files nobody vouches for, and a crash-safe writer.

Versions 2 and 3, little-endian, are read; version 3 is written. The format is described at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from edgeq.gguf.layout import TensorInfo, TensorSpec
from edgeq.gguf.reader import REQUIRED, Gguf, open_gguf
from edgeq.gguf.writer import GgufWriter, outline

__all__ = ["REQUIRED", "Gguf", "GgufWriter", "TensorInfo", "TensorSpec", "open_gguf", "outline"]
