"""What LLVM calls this CPU and its features. It is asked once per machine: its library takes 40 MB
of memory, and from a memory card seconds, which a start that compiles nothing can do without.
"""

import ctypes
import hashlib
import platform
import re
import sys
from functools import cache as once
from importlib.util import find_spec
from pathlib import Path

from edgeq import sysfs
from edgeq.errors import KernelError
from edgeq.kernels import store

__all__ = ["features", "name", "version"]

# Lines of /proc/cpuinfo that tell one CPU from another, on x86 and Arm.
_IDENTITY = re.compile(
    r"^(?:vendor_id|cpu family|model|model name|stepping|flags|Features|CPU \w+)\s*:.*",
    re.MULTILINE,
)
_FEATURES = re.compile(r"(?:[+-][\w.-]+(?:,[+-][\w.-]+)*)?")
_HWCAPS = 16, 26  # of getauxval(3)


def name() -> str:
    """Such as znver4, cortex-a76, generic."""
    return _facts()["cpu"]


def features() -> str:
    """Such as +avx,-sha: what it has and what it lacks."""
    return _facts()["features"]


def version(package: str) -> str:
    """Of an installed package, as its folder of metadata is named; importlib.metadata would take
    longer than the rest of a start.
    """
    spec = find_spec(package)
    places = [] if spec is None or not spec.origin else [Path(spec.origin).parents[1]]
    found = (path.name for place in places for path in place.glob(f"{package}-*-info"))
    return " ".join(sorted(found)) or "none"


@once
def _facts() -> dict[str, str]:
    kept_as = _identity()
    kept = store.kept(kept_as) if kept_as else None
    if kept is not None and _sane(kept):
        return kept
    import llvmlite.binding as llvm

    found = {"cpu": llvm.get_host_cpu_name(), "features": llvm.get_host_cpu_features().flatten()}
    if kept_as:
        store.keep(kept_as, found)
    return found


def _sane(kept: dict[str, object]) -> bool:
    texts = [value for value in map(kept.get, ("cpu", "features")) if isinstance(value, str)]
    return len(kept) == len(texts) == 2 and bool(_FEATURES.fullmatch(texts[1]))


def _identity() -> Path | None:
    """File for the facts about this CPU; None where it cannot be told from another."""
    lines = sorted(set(_IDENTITY.findall(sysfs.text(Path("/proc/cpuinfo")))))
    if not lines or sys.platform != "linux":
        return None
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype = ctypes.c_ulong
    lines += [platform.machine(), version("llvmlite"), *(str(getauxval(i)) for i in _HWCAPS)]
    key = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:20]
    try:
        return store.root() / f"cpu-{key}.json"
    except KernelError:
        return None
