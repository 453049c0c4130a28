"""Model architectures, one file each, found by the file's name.

A module states only how its architecture differs: its HF class names, and four functions (see
`Architecture`).
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import ModelError
from edgeq.models.arch import Arch

if TYPE_CHECKING:
    from edgeq.gguf import Gguf

__all__ = ["Architecture", "arch_of", "available", "by_hf", "find"]


class Architecture(Protocol):
    """What a module of this package offers."""

    HF_ARCHITECTURES: tuple[str, ...]  # class names in config.json's `architectures`

    def arch(self, gguf: "Gguf") -> Arch:
        """Validated properties of a GGUF file's model. Raises FormatError, ModelError."""

    def metadata(self, config: dict[str, Any]) -> dict[str, Any]:
        """general.architecture and hyper-parameter keys for config.json. Raises ModelError."""

    def transform(
        self, name: str, w: NDArray[np.float32], config: dict[str, Any]
    ) -> NDArray[np.float32]:
        """Rows of the HF weight as GGUF stores them; name: GGUF tensor name.

        w: [n, cols] or [n], whole heads of it at least where heads matter.
        """

    def extra_tensors(self, config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
        """Tensors that the GGUF file has and the checkpoint has not, by GGUF name."""


def available() -> list[str]:
    """Names of the architectures, as in general.architecture.

    >>> "llama" in available()
    True
    """
    files = Path(__file__).parent.glob("*.py")
    # Reading text is cheaper than importing: files shared by architectures import kernels.
    return sorted(file.stem for file in files if "\nHF_ARCHITECTURES" in file.read_text("utf-8"))


def find(name: str) -> Architecture:
    """Module of the architecture called `name` in general.architecture.

    Raises ModelError, with the list of those available.

    >>> find("clip")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    edgeq.errors.ModelError: architecture 'clip' is not supported: expected one of llama, ...
    """
    names = available()
    stem = name.replace("-", "_")
    if stem not in names:
        raise ModelError(
            f"architecture {name[:64]!r} is not supported: expected one of {', '.join(names)}"
        )
    return cast(Architecture, importlib.import_module(f"edgeq.models.{stem}"))


def arch_of(gguf: "Gguf") -> Arch:
    """Properties of the model in a GGUF file. Raises FormatError, ModelError."""
    return find(gguf.get("general.architecture", str)).arch(gguf)


def by_hf(architectures: Sequence[str]) -> Architecture:
    """Module for config.json's `architectures`.

    Raises ModelError, with the list of class names that are known.

    >>> by_hf(["Qwen2ForCausalLM"]).HF_ARCHITECTURES
    ('Qwen2ForCausalLM',)
    """
    modules = [find(name) for name in available()]
    for module in modules:
        if any(name in module.HF_ARCHITECTURES for name in architectures):
            return module
    known = ", ".join(name for module in modules for name in module.HF_ARCHITECTURES)
    raise ModelError(f"config.json: architectures = {list(architectures)}: expected one of {known}")
