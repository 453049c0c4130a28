"""Ways to quantize a checkpoint, one file each; config.json's quantization_config names the way.

A scheme is a module of this package with `METHODS`, the values of `quant_method` that it reads, and
`find`, which gives a `Packed` for each weight that the checkpoint stores in its way.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint.parts import Parts
from edgeq.errors import ModelError
from edgeq.grid import Grid

__all__ = ["FLOAT8", "OWN_FILES", "Packed", "Scheme", "available", "find", "settings"]

# Older tools wrote no quantization_config, but such a file beside config.json.
OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
FLOAT8 = ("fp8", "fbgemm_fp8", "modelopt")  # read in checkpoint.float8: their types say it all


class Packed(Protocol):
    """One weight [rows, cols] that several stored tensors make up."""

    shape: tuple[int, int]
    parts: tuple[str, ...]  # names of the stored tensors, those that need not exist as well

    def check(self) -> None:
        """Look at what shapes do not tell. Raises ModelError."""

    def grid(self, start: int, stop: int) -> Grid | None:
        """Rows as integers; None where there are none. Raises ResourceError."""

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows as float32 [stop - start, cols]. Raises ResourceError."""


class Scheme(Protocol):
    """What a module of this package offers."""

    METHODS: tuple[str, ...]

    def find(self, parts: Parts, settings: Mapping[str, Any]) -> dict[str, Packed]:
        """Weights by name. Raises ModelError for shapes and settings that do not fit."""


@cache
def available() -> dict[str, Scheme]:
    """Schemes by `quant_method`.

    >>> sorted(available())
    ['awq', 'bitsandbytes', 'compressed-tensors', 'gptq']
    """
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [cast(Scheme, importlib.import_module(f"{__name__}.{name}")) for name in names]
    return {method: module for module in modules for method in module.METHODS}


def settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Table `quantization_config` of config.json, {} without one. Raises ModelError."""
    table = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(table, dict):
        raise ModelError(f"config.json: quantization_config = {table!r:.60}: expected a table")
    return table


def find(parts: Parts, config: Mapping[str, Any]) -> dict[str, Packed]:
    """Weights of a checkpoint that are quantized, by name; none for one of floats.

    Raises ModelError for a checkpoint quantized in a way that cannot be read.
    """
    table = settings(config)
    method = table.get("quant_method")
    if method is None or method in FLOAT8:
        return {}
    if not isinstance(method, str) or method not in available():
        known = ", ".join(sorted([*available(), *FLOAT8]))
        raise ModelError(
            f"config.json: quant_method = {method!r:.60}: expected one of {known}: convert the "
            "original checkpoint"
        )
    return available()[method].find(parts, table)
