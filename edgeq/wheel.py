"""edgeq itself as a wheel, made from the files that run: installed or checked out, without pip.

Format: packaging.python.org/specifications/binary-distribution-format
"""

import base64
import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeq.data import find, load_toml
from edgeq.errors import ResourceError
from edgeq.version import VERSION

__all__ = ["build"]

PACKAGE = Path(__file__).resolve().parent
_WHEEL = "Wheel-Version: 1.0\nGenerator: edgeq\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_TIME = (1980, 1, 1, 0, 0, 0)  # the same files make the same wheel


def build(folder: Path) -> Path:
    """Write edgeq-VERSION-py3-none-any.whl to a folder; returns its path.

    Raises ResourceError when nothing says what edgeq needs.
    """
    described = _metadata()
    version = next(x[9:] for x in described.splitlines() if x.startswith("Version: "))
    path, about = folder / f"edgeq-{version}-py3-none-any.whl", f"edgeq-{version}.dist-info"
    entries = dict(_files())
    entries[f"{about}/METADATA"] = described.encode()
    entries[f"{about}/WHEEL"] = _WHEEL.encode()
    entries[f"{about}/entry_points.txt"] = b"[console_scripts]\nedgeq = edgeq.__main__:main\n"
    record = "".join(f"{name},{_digest(data)},{len(data)}\n" for name, data in entries.items())
    entries[f"{about}/RECORD"] = f"{record}{about}/RECORD,,\n".encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            info = zipfile.ZipInfo(name, _TIME)
            info.external_attr = 0o644 << 16
            file.writestr(info, data, zipfile.ZIP_DEFLATED)
    return path


def _files() -> Iterator[tuple[str, bytes]]:
    """(name in the wheel, content) of the package and of its data folders."""
    places = {PACKAGE: "edgeq", find("formats"): "edgeq/formats", find("devices"): "edgeq/devices"}
    for folder, name in places.items():
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes()


def _digest(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return f"sha256={digest.decode().rstrip('=')}"


def _metadata() -> str:
    """Name, version and dependencies: of the checkout, else of the installation."""
    with suppress(ResourceError):  # no such file
        project = load_toml(PACKAGE.parent / "pyproject.toml").get("project", {})
        if project.get("name") == "edgeq":  # else somebody else's project holds this package
            return _of_project(project)
    with suppress(metadata.PackageNotFoundError):
        if described := metadata.distribution("edgeq").read_text("METADATA"):
            return described
    raise ResourceError(
        f"{PACKAGE.parent}: neither a checkout nor an installation of edgeq: install it again"
    )


def _of_project(project: dict[str, Any]) -> str:
    lines = ["Metadata-Version: 2.1", "Name: edgeq", f"Version: {VERSION}"]
    lines += [f"Requires-Python: {project['requires-python']}"]
    lines += [f"Requires-Dist: {need}" for need in project["dependencies"]]
    return "\n".join(lines) + "\n"
