"""What the bytes of a conversion depend on: only the same work may go on where it was stopped."""

import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.data import find
from edgeq.errors import ResourceError
from edgeq.hessian import Hessians
from edgeq.sources import Source

__all__ = ["identity", "program", "stamp"]

_COMPILERS = ("numpy", "numba", "llvmlite")


def identity(
    source: Source,
    recipe: str,
    method: str,
    importance: Mapping[str, NDArray[np.float32]],
    hessians: Hessians | None = None,
) -> dict[str, str]:
    """Facts by name; the formats of the tensors and all metadata are for the writer to add.

    Files count as unchanged when name, size and time of the last change are. Raises ResourceError
    when one has gone.
    """
    return {
        "recipe": recipe,
        "method": method,
        "source": str(source.path.resolve()),
        "files": _digest(stamp(path).encode() for path in source.files),
        "importance": _digest(_array(name, w) for name, w in sorted(importance.items())),
        "hessians": _digest([] if hessians is None else [stamp(hessians.path).encode()]),
        "program": program(),
    }


def stamp(path: Path) -> str:
    """Name, size and time of the last change of a file. Raises ResourceError."""
    try:
        status = path.stat()
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}") from error
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def _array(name: str, w: NDArray[np.float32]) -> bytes:
    return name.encode() + np.ascontiguousarray(w).tobytes()


@cache
def program() -> str:
    """Text of this package and of its formats and recipes, and the versions of what compiles it:
    other code, other bytes.
    """
    home = Path(__file__).parent
    versions = [f"{name} {importlib.metadata.version(name)}".encode() for name in _COMPILERS]
    files = [*sorted(home.rglob("*.py")), *sorted(find("formats").rglob("*.toml"))]
    return _digest([*versions, *(path.read_bytes() for path in files)])


def _digest(items: Iterable[bytes]) -> str:
    """Sixteen characters that stand for these items, in this order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(len(item).to_bytes(8, "little") + item)
    return digest.hexdigest()[:16]
